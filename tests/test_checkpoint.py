"""Checkpoints: exact, onto another layout, and refused when they hold something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from laser_jax.checkpoint import CheckpointError, Checkpoints
from laser_jax.config import MeshConfig, OptimizerConfig
from laser_jax.sharding import make_mesh
from laser_jax.step import TrainState, make_optimizer

DATA = {"next_index": 17, "epochs": [1, 2]}


def state(
    seed: int, *, rank: int | None = 2, step: int = 0, mesh: MeshConfig | None = None
) -> TrainState:
    """Random everywhere, the optimizer's moments included; `rank` None is full fine-tuning."""
    rng = np.random.default_rng(seed)
    layout = NamedSharding(make_mesh(mesh or MeshConfig()), PartitionSpec(None, "fsdp"))

    def tensor(*shape: int) -> jax.Array:
        return jax.device_put(rng.normal(size=shape).astype(np.float32), layout)

    frozen = None if rank is None else {"kernel": tensor(64, 64)}
    trained = {"kernel": tensor(64, 64)}
    if rank is not None:
        trained = {"lora_a": tensor(64, rank), "lora_b": tensor(rank, 64)}
    opt_state = jax.tree.map(
        lambda a: tensor(*a.shape) if a.ndim else a,
        make_optimizer(OptimizerConfig(), 10).init(trained),
    )
    return TrainState(jax.device_put(np.int32(step)), trained, frozen, opt_state)


def save(directory: Path, *states: TrainState, keep: int = 2) -> None:
    checkpoints = Checkpoints(directory, keep)
    for each in states:
        checkpoints.save(each, DATA)
    checkpoints.close()


def restore(directory: Path, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    checkpoints = Checkpoints(directory, 2)
    latest = checkpoints.latest()
    assert latest is not None
    try:
        return checkpoints.restore(latest, like)
    finally:
        checkpoints.close()


def assert_equal(left: Any, right: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("rank", [2, None])
def test_what_was_saved_comes_back_exactly(tmp_path: Path, rank) -> None:
    saved = state(1, rank=rank, step=5)
    save(tmp_path, saved)
    found, data = restore(tmp_path, like := state(2, rank=rank))
    assert data == DATA
    assert int(found.step) == 5
    assert_equal((found.trained, found.opt_state), (saved.trained, saved.opt_state))
    assert_equal(found.frozen, like.frozen)
    assert jax.tree.structure(found) == jax.tree.structure(like)


def test_another_layout_gets_the_same_values(tmp_path: Path) -> None:
    saved = state(1, step=5)
    save(tmp_path, saved)
    like = state(2, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    found, _ = restore(tmp_path, like)
    assert_equal((found.trained, found.opt_state), (saved.trained, saved.opt_state))
    layouts = [
        jax.tree.map(lambda a: a.sharding, (s.step, s.trained, s.opt_state)) for s in (found, like)
    ]
    assert layouts[0] == layouts[1]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, *(state(step, step=step) for step in (1, 2, 3)), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["2", "3"]
    assert_equal(restore(tmp_path, state(9))[0].trained, state(3).trained)


def test_a_new_directory_has_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "new", 2)
    assert checkpoints.latest() is None
    checkpoints.close()


@pytest.mark.parametrize(
    ("saved", "wanted", "messages"),
    [
        (2, 4, ["trained.lora_a is (64, 2), not (64, 4)", "... and 1 more"]),
        (None, 2, ["trained.kernel is (64, 64), not wanted", "trained.lora_a is absent"]),
        # the frozen base is not in the checkpoint
        (2, None, ["trained.lora_a is (64, 2), not wanted", "trained.kernel is absent"]),
    ],
)
def test_other_tensors_are_refused_by_name(tmp_path: Path, saved, wanted, messages) -> None:
    save(tmp_path, state(1, rank=saved, step=7))
    with pytest.raises(CheckpointError, match=r"/7 was saved by a run with other") as caught:
        restore(tmp_path, state(2, rank=wanted))
    for message in messages:
        assert message in str(caught.value)
    assert "frozen" not in str(caught.value)
