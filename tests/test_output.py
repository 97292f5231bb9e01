"""A run's directory: whose it is, which settings a resumed run may change, and the logs in it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from tensorboardX.proto.event_pb2 import Event

import laser_jax.train.output as module
from laser_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    MixtureSource,
    ModelConfig,
    ScratchConfig,
    TrainConfig,
    as_dict,
)
from laser_jax.files.claim import OutputError
from laser_jax.train.output import (
    StepLog,
    claimed,
    code_version,
    logged_lines,
    open_boards,
    require_boards,
    tensorboard,
    wandb_run,
)


def config(output: Path | str, **train: Any) -> Config:
    return Config(
        model=ModelConfig(scratch=ScratchConfig()),
        data=DataConfig(train="rows.jsonl"),
        output=str(output),
        train=TrainConfig(**train),
    )


def claim(config: Config) -> None:
    with claimed(config) as held:
        held.record(json.dumps(as_dict(config)))


# --- the processes of a run ----------------------------------------------------------------------


def test_the_first_process_claims_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    granted: list[bool] = []

    def sent(value: np.ndarray) -> np.ndarray:
        """What the first process sends, which comes first."""
        granted.append(bool(value))
        return np.asarray(granted[0])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", sent)

    def by(process: int, seed: int) -> list[str]:
        """What lies in the directory while a process holds it."""
        monkeypatch.setattr(jax, "process_index", lambda: process)
        with claimed(config(tmp_path / "run", seed=seed)) as held:
            if process == 0:
                held.record(json.dumps(as_dict(config(tmp_path / "run", seed=seed))))
            return sorted(path.name for path in tmp_path.rglob("*"))

    assert by(0, seed=1) == [".lock", "config.json", "run"]
    assert by(1, seed=1) == ["config.json", "run"]
    granted.clear()
    with pytest.raises(OutputError, match=r"another config:\n  train\.seed was 1, is 2"):
        by(0, seed=2)
    with pytest.raises(OutputError, match=r"run: refused to process 0, which says why"):
        by(1, seed=2)


# --- one config --------------------------------------------------------------------------------


def test_another_config_is_refused_with_keys_and_values(tmp_path: Path) -> None:
    claim(config(tmp_path, seed=1, steps=10))
    with pytest.raises(OutputError) as caught:
        claim(config(tmp_path, seed=2, steps=10, epochs=3.0, log_every=3))
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path} holds a run with another config:"
    assert [line.strip() for line in lines[1:-1]] == [
        "train.epochs was 1.0, is 3.0",
        "train.seed was 1, is 2",
    ]
    assert "choose another --output" in lines[-1].lower()


def test_a_resumed_run_may_change_what_is_not_trained(tmp_path: Path) -> None:
    first = config(tmp_path, seed=1)
    claim(first)
    changed = replace(
        config(f"{tmp_path}/.", seed=1, log_every=3, keep_checkpoints=7),
        mesh=MeshConfig(1, 2, 4),
        data=replace(first.data, threads=9),
        model=replace(first.model, attention="xla"),
    )
    claim(changed)
    assert json.loads((tmp_path / "config.json").read_text())["mesh"]["tensor"] == 4


def test_the_same_rows_may_lie_elsewhere(tmp_path: Path) -> None:
    first = config(tmp_path)
    claim(first)
    claim(replace(first, data=DataConfig(train="moved", split="train")))
    mixture = (MixtureSource("a"), MixtureSource("b", 2.0))
    mixed = replace(config(tmp_path / "mixed"), data=DataConfig(mixture=mixture))
    claim(mixed)
    claim(replace(mixed, data=DataConfig(mixture=(MixtureSource("/x/a"), mixture[1]))))
    for other, change in (
        ((mixture[0], MixtureSource("b", 3.0)), r"data\.mixture\.1\.weight was 2.0, is 3.0"),
        (mixture[:1], r"data\.mixture was "),
    ):
        with pytest.raises(OutputError, match=change):
            claim(replace(mixed, data=DataConfig(mixture=other)))


def test_a_setting_that_an_older_release_did_not_have_counts_as_its_default(tmp_path: Path) -> None:
    claim(config(tmp_path))
    file = tmp_path / "config.json"
    older = json.loads(file.read_text())
    del older["objective"]["distillation_warmup_steps"]
    file.write_text(json.dumps(older))
    claim(config(tmp_path))
    file.write_text(json.dumps(older | {"colour": "red"}))
    with pytest.raises(OutputError, match=r"config.json is no run's config: .*colour"):
        claim(config(tmp_path))


@pytest.mark.parametrize(("accumulation", "allowed"), [("gradcache", True), ("plain", False)])
def test_micro_batches_may_change_where_they_are_no_other_loss(
    tmp_path: Path, accumulation, allowed: bool
) -> None:
    claim(config(tmp_path, accumulation=accumulation, micro_batch_size=8))
    smaller = config(tmp_path, accumulation=accumulation, micro_batch_size=4)
    if allowed:
        claim(smaller)
    else:
        with pytest.raises(OutputError, match="micro_batch_size was 8, is 4"):
            claim(smaller)


@pytest.mark.parametrize("content", [b'{"model": ', bytes(100), b"\xff", b"[" * 5000, b"3"])
def test_a_damaged_config_counts_as_absent_and_is_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    claim(config(tmp_path, seed=3))
    assert "config.json is damaged and counts as absent" in caplog.text
    assert json.loads((tmp_path / "config.json").read_text())["train"]["seed"] == 3


def test_a_file_of_another_program_is_no_damaged_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(OutputError, match=r"config\.json is no run's config: .*another --output"):
        claim(config(tmp_path))


def test_a_checkpoints_config_is_compared_as_that_of_the_file(tmp_path: Path) -> None:
    with claimed(config(tmp_path, seed=1)) as held:
        held.require_same(as_dict(config(tmp_path, seed=1, log_every=3)), tmp_path / "4")
        with pytest.raises(OutputError, match=r"train\.seed was 2, is 1"):
            held.require_same(as_dict(config(tmp_path, seed=2)), tmp_path / "4")


# --- the version of the code -------------------------------------------------------------------


def git(directory: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    command = ["git", "-C", str(directory), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_is_named_where_the_package_is_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "laser_jax" / "training" / "output.py"
    own.parent.mkdir(parents=True)
    own.write_text("first")
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    page.write_text("first")
    monkeypatch.setattr(module, "__file__", str(own))
    package = {"version": version("laser-jax")}
    assert code_version() == package  # no checkout
    git(tmp_path, "init")
    assert code_version() == package  # a checkout of something else, as around site-packages
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert code_version() == package | {"commit": commit}
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "log").write_text("what git does not follow changes no code")
    page.write_text("second")  # nor do documents, which a benchmark's report rewrites
    assert code_version() == package | {"commit": commit}
    own.write_text("second")
    assert code_version() == package | {"commit": f"{commit}+changes"}


def test_without_git_the_version_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert code_version() == {"version": version("laser-jax")}


# --- the log -----------------------------------------------------------------------------------


def written(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resumed_log_drops_what_comes_after_its_start_and_what_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = StepLog(path, [])
    assert log.last == {}
    for step in (1, 2, 3, 4):
        log.write({"step": step, "loss": 1.5 / step})
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    resumed = StepLog(path, logged_lines(path, 2))
    assert resumed.last == {"step": 2, "loss": 0.75}
    assert resumed.lines == [{"step": 1, "loss": 1.5}, {"step": 2, "loss": 0.75}]
    resumed.write({"step": 3, "loss": 0.5})
    assert written(path) == [1, 2, 3]


@pytest.mark.parametrize("damaged", [bytes(30), b'{"step": 3, "lo', b'{"loss": 1}', b"\xff", b"3"])
def test_damaged_lines_of_a_log_are_named_and_kept_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    before = b'{"step": 1}\n' + damaged + b'\n{"step": 4}\n' + damaged
    path.write_bytes(before)
    log = StepLog(path, logged_lines(path, 4))
    assert log.lines == [{"step": 1}, {"step": 4}]
    assert f"{path}:2 is damaged and left out" in caplog.text
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before
    assert written(path) == [1, 4]


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
    with tensorboard(tmp_path, 0) as draw:
        draw("train", {"step": 1, "loss": 0.5, "latent": 2.0})
        draw("dev", {"step": 2, "nDCG@10": 0.25})
    assert scalars(tmp_path) == {
        ("train/loss", 1): 0.5,
        ("train/latent", 1): 2.0,
        ("dev/nDCG_10", 2): 0.25,
    }


def test_a_resumed_run_replaces_what_comes_after_its_start(tmp_path: Path) -> None:
    for start, steps, value in ((0, (1, 2, 3), 1.0), (1, (2,), 5.0)):
        with tensorboard(tmp_path, start) as draw:
            for step in steps:
                draw("train", {"step": step, "loss": value})
    assert scalars(tmp_path) == {("train/loss", 1): 1.0, ("train/loss", 2): 5.0}


def test_a_full_disk_ends_the_training_instead_of_a_thread_that_it_would_wait_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def drawn() -> None:
        with tensorboard(tmp_path, 0) as draw:
            monkeypatch.setattr("tensorboardX.event_file_writer.EventsWriter.write_event", full)
            for step in range(1, 100):
                draw("train", {"step": step, "loss": 0.5})

    ended: list[BaseException | None] = []
    thread = threading.Thread(target=lambda: ended.append(raised(drawn)), daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert [str(error) for error in ended] == ["[Errno 28] No space left on device"]


def raised(run: Callable[[], object]) -> BaseException | None:
    try:
        run()
    except OSError as error:
        return error
    return None


def test_the_other_processes_write_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    both = config(tmp_path / "board", tensorboard=True, wandb="mine")
    with ExitStack() as stack:
        assert open_boards(both, 0, stack) == []
    assert not (tmp_path / "board").exists()


class Recorder:
    """A stand-in for wandb, which would want a server: what it is told, by the id of a run."""

    def __init__(self) -> None:
        self.runs: dict[str, list[Any]] = {}
        self.asked: list[dict[str, Any]] = []

    def init(self, **asked: Any) -> Any:
        self.asked.append(asked)
        lines = self.runs.setdefault(asked["id"], [])
        return SimpleNamespace(
            log=lambda values, step: lines.append((step, values)),
            finish=lambda: lines.append("finished"),
        )


def test_a_resumed_training_goes_on_with_its_run_of_wandb(tmp_path: Path, monkeypatch) -> None:
    wandb = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for step in (1, 2):
        with wandb_run("mine", tmp_path, {"seed": 3}) as draw:
            draw("train", {"step": step, "loss": 0.5})
    lines = [(1, {"train/loss": 0.5}), "finished", (2, {"train/loss": 0.5}), "finished"]
    [(id_, found)] = wandb.runs.items()
    assert found == lines
    told = {"project": "mine", "dir": str(tmp_path), "id": id_, "resume": "allow"}
    assert wandb.asked == [told | {"config": {"seed": 3}}] * 2


@pytest.mark.parametrize(
    ("config", "package", "name"),
    [
        (TrainConfig(tensorboard=True), "tensorboardX", "tensorboard"),
        (TrainConfig(wandb="mine"), "wandb", "wandb"),
    ],
)
def test_an_absent_package_is_named_with_its_extra(
    monkeypatch, config: TrainConfig, package: str, name: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    require_boards(TrainConfig())
    wanted = rf"train\.{name} needs {package}: pip install 'laser-jax\[{name}\]'"
    with pytest.raises(ImportError, match=wanted):
        require_boards(config)
