"""The trace of some steps, which a run leaves for XProf."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from laser_jax.train.loop import Trace


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
