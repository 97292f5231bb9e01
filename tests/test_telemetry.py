"""What a run shows beside its log: TensorBoard scalars and an XProf trace."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from laser_jax.config import ConfigError
from laser_jax.train.loop import Trace
from laser_jax.train.output import TensorBoard, require_tensorboard

# --- TensorBoard -------------------------------------------------------------------------------


def records(file: Path) -> Iterator[Event]:
    """The events of a file: length, its checksum, the event, its checksum."""
    content = file.read_bytes()
    while content:
        length = int.from_bytes(content[:8], "little")
        data, content = content[12 : 12 + length], content[16 + length :]
        yield Event.FromString(data)


def scalars(directory: Path) -> dict[tuple[str, int], float]:
    """What TensorBoard shows: of a later file, the events from its start on replace the former."""
    shown: dict[tuple[str, int], float] = {}
    for file in sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        for event in records(file):
            if event.session_log.status == event.session_log.START:
                shown = {key: value for key, value in shown.items() if key[1] < event.step}
            for value in event.summary.value:
                shown[value.tag, event.step] = value.simple_value
    return shown


def test_scalars_are_written_by_group_and_step(tmp_path: Path) -> None:
    with closing(TensorBoard(tmp_path, 0)) as board:
        board.write("train", {"step": 1, "loss": 0.5, "latent": 2.0})
        board.write("dev", {"step": 2, "nDCG@10": 0.25})
    assert scalars(tmp_path) == {
        ("train/loss", 1): 0.5,
        ("train/latent", 1): 2.0,
        ("dev/nDCG_10", 2): 0.25,
    }


def test_a_resumed_run_replaces_what_comes_after_its_start(tmp_path: Path) -> None:
    for start, steps, value in ((0, (1, 2, 3), 1.0), (1, (2,), 5.0)):
        with closing(TensorBoard(tmp_path, start)) as board:
            for step in steps:
                board.write("train", {"step": step, "loss": value})
    assert scalars(tmp_path) == {("train/loss", 1): 1.0, ("train/loss", 2): 5.0}


def test_the_other_processes_write_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with closing(TensorBoard(tmp_path / "board", 0)) as board:
        board.write("train", {"step": 1, "loss": 0.5})
    assert not (tmp_path / "board").exists()


def test_an_absent_package_is_named_with_its_extra(monkeypatch) -> None:
    require_tensorboard()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tensorboardX: pip install laser-jax\[tensorboard\]"):
        require_tensorboard()


# --- the trace ---------------------------------------------------------------------------------


def take_steps(directory: Path, steps: tuple[int, int] | None, last: int) -> list[int]:
    """Which steps run while a trace is recorded."""
    recorded, double = [], jax.jit(lambda x: 2 * x)
    with closing(Trace(directory, steps)) as trace:
        for step in range(1, last + 1):
            trace.before(step)
            arrays = double(jnp.ones(3))
            recorded += [step] if trace.recording else []
            trace.after(step, arrays)
    return recorded


@pytest.mark.parametrize(
    ("steps", "last", "recorded"),
    [((2, 3), 4, [2, 3]), ((2, 2), 4, [2]), ((3, 9), 4, [3, 4])],
    ids=["inside", "one_step", "beyond_the_end"],
)
def test_a_trace_holds_the_steps_asked_for(tmp_path: Path, steps, last, recorded) -> None:
    assert take_steps(tmp_path / "profile", steps, last) == recorded
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0


@pytest.mark.parametrize("steps", [None, (8, 9)])
def test_nothing_is_recorded_where_no_step_is_asked_for(tmp_path: Path, steps) -> None:
    assert take_steps(tmp_path / "profile", steps, 4) == []
    assert not (tmp_path / "profile").exists()
