"""Checkpoints: exact, on every layout, and neither damage nor another run goes unnoticed."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from laser_jax.config import MeshConfig, OptimizerConfig
from laser_jax.sharding import make_mesh
from laser_jax.step import TrainState
from laser_jax.train.checkpoint import (
    CheckpointError,
    Checkpoints,
    DamagedCheckpointError,
    fingerprint,
)
from laser_jax.train.state import make_optimizer

META = {"samples": 17, "config": {"output": "run", "lora": None}, "version": "0.1.0", "seed": 0}
BASE = "0123"
MESHES = (MeshConfig(8, 1, 1), MeshConfig(2, 2, 2))


def drops_reads(test: Any) -> Any:
    """When one read or write fails, orbax drops the others half-way, which python reports once they
    are collected: then, and not during some later test."""
    unraisable = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    return unraisable(pytest.mark.usefixtures("collected")(test))


def state(
    seed: int, *, rank: int | None = 2, step: int = 0, mesh: MeshConfig = MESHES[1], size: int = 64
) -> TrainState:
    """Random everywhere, the optimizer's moments included; `rank` None is full fine-tuning."""
    rng = np.random.default_rng(seed)
    grid = make_mesh(mesh)
    layout = NamedSharding(grid, PartitionSpec("fsdp", "tensor"))
    replicated = NamedSharding(grid, PartitionSpec())

    def tensor(*shape: int) -> jax.Array:
        return jax.device_put(rng.normal(size=shape).astype(np.float32), layout)

    frozen = None if rank is None else {"kernel": tensor(size, size)}
    trained = {"kernel": tensor(size, size)}
    if rank is not None:
        trained = {"lora_a": tensor(size, rank), "lora_b": tensor(rank, size)}
    opt_state = jax.tree.map(
        lambda a: tensor(*a.shape) if a.ndim else jax.device_put(a, replicated),
        make_optimizer(OptimizerConfig(), 10).init(trained),
    )
    return TrainState(
        step=jax.device_put(np.int32(step), replicated),
        skipped=jax.device_put(np.int32(seed), replicated),
        trained=trained,
        frozen=frozen,
        opt_state=opt_state,
    )


def open_checkpoints(directory: Path, *, keep: int = 2, **more: Any) -> Checkpoints:
    return Checkpoints(directory, keep=keep, **({"base": BASE} | more))


def save(directory: Path, *states: TrainState, **more: Any) -> None:
    checkpoints = open_checkpoints(directory, **more)
    for each in states:
        checkpoints.save(each, META | {"samples": int(each.step) * 10})
    checkpoints.close()


def restore(directory: Path, like: TrainState, **more: Any) -> tuple[TrainState, dict[str, Any]]:
    checkpoints = open_checkpoints(directory, **more)
    try:
        restored = checkpoints.restore(like)
    finally:
        checkpoints.close()
    assert restored is not None
    return restored


def steps_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def saved_part(state: TrainState) -> Any:
    return state.step, state.skipped, state.trained, state.opt_state


def assert_equal(left: Any, right: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


# --- what is saved comes back ------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, None])
def test_what_was_saved_comes_back_exactly(tmp_path: Path, rank) -> None:
    saved = state(1, rank=rank, step=5)
    save(tmp_path, saved)
    found, meta = restore(tmp_path, like := state(2, rank=rank))
    assert meta == META | {"samples": 50}
    assert_equal(saved_part(found), saved_part(saved))
    assert_equal(found.frozen, like.frozen)
    assert jax.tree.structure(found) == jax.tree.structure(like)


@pytest.mark.parametrize("mesh", MESHES)
def test_another_mesh_gets_the_same_values_in_its_own_layout(tmp_path: Path, mesh) -> None:
    saved = state(1, step=5, mesh=MESHES[0])
    save(tmp_path, saved)
    found, _ = restore(tmp_path, like := state(2, mesh=mesh))
    assert_equal(saved_part(found), saved_part(saved))
    layouts = [jax.tree.map(lambda a: a.sharding, saved_part(s)) for s in (found, like)]
    assert layouts[0] == layouts[1]


def test_a_single_device_restores_from_abstract_values(tmp_path: Path) -> None:
    saved = state(1, step=5)
    save(tmp_path, saved)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), saved)
    found, _ = restore(tmp_path, like)
    assert_equal(saved_part(found), saved_part(saved))
    assert all(leaf.sharding == device for leaf in jax.tree.leaves(saved_part(found)))


def test_a_saved_state_may_be_donated_at_once(tmp_path: Path) -> None:
    saved = state(1, step=5, size=512)
    expected = jax.device_get(saved_part(saved))
    overwrite = jax.jit(lambda s: jax.tree.map(lambda a: a * 0, s), donate_argnums=0)
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(saved, META)
    jax.block_until_ready(overwrite(saved))
    checkpoints.close()
    assert_equal(saved_part(restore(tmp_path, state(2, size=512))[0]), expected)


def test_what_is_ranked_while_a_save_is_under_way_is_no_part_of_it(tmp_path, monkeypatch) -> None:
    ranked, write = threading.Event(), ocp.JsonCheckpointHandler._save_fn

    async def slow(*arguments: Any) -> None:
        assert ranked.wait(60)
        await write(*arguments)

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", slow)
    scores = [{"step": 2, "nDCG@10": 0.5}]
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(state(1, step=5), META | {"evaluations": scores})
    scores.append({"step": 5, "nDCG@10": 0.6})
    ranked.set()
    checkpoints.close()
    assert restore(tmp_path, state(2))[1]["evaluations"] == scores[:1]


def test_a_new_directory_has_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = open_checkpoints(tmp_path / "new")
    assert checkpoints.restore(state(1)) is None
    checkpoints.close()


# --- which are kept ----------------------------------------------------------------------------


def test_the_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, *(state(step, step=step) for step in (1, 2, 3)), keep=2)
    assert steps_in(tmp_path) == ["2", "3"]
    assert_equal(restore(tmp_path, state(9))[0].trained, state(3).trained)


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    ranked: list[int] = []
    for steps in ((1, 2, 3), (4, 5, 6)):  # over two runs
        checkpoints = open_checkpoints(tmp_path, keep=1)
        for step in steps:
            checkpoints.save(state(step, step=step), META, ranked)
            if step in (1, 2, 4, 5):  # after the save
                ranked = [s for s in (2, 4, 1, 5) if s in (*ranked, step)]
        checkpoints.close()
    assert steps_in(tmp_path) == ["2", "6"]
    checkpoints = open_checkpoints(tmp_path, keep=1)
    assert_equal(checkpoints.restore_step(2, state(9))[0].trained, state(2).trained)
    checkpoints.close()


def test_a_step_that_is_saved_already_is_left_alone(tmp_path: Path) -> None:
    save(tmp_path, state(1, step=5), state(2, step=5))
    save(tmp_path, state(3, step=5))
    assert_equal(restore(tmp_path, state(9))[0].trained, state(1).trained)


def test_leftovers_of_a_killed_save_are_removed_and_never_restored(tmp_path: Path) -> None:
    save(tmp_path, state(1, step=1), state(2, step=2))
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    for step in range(3, 100):
        (tmp_path / f"{step}.orbax-checkpoint-tmp").mkdir()
    checkpoints = open_checkpoints(tmp_path)
    assert steps_in(tmp_path) == ["1"]  # at once: a run may be stopped before it saves anything
    checkpoints.close()
    assert int(restore(tmp_path, state(9))[0].step) == 1
    save(tmp_path, state(2, step=2))
    assert steps_in(tmp_path) == ["1", "2"]


# --- another run -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved", "wanted", "messages"),
    [
        (2, 4, ["trained.lora_a is float32[64, 2], not float32[64, 4]", "... and 1 more"]),
        (None, 2, ["trained.kernel is float32[64, 64], not wanted", "trained.lora_a is absent"]),
        # the frozen base is not in the checkpoint
        (2, None, ["trained.lora_a is float32[64, 2], not wanted", "trained.kernel is absent"]),
    ],
)
def test_other_tensors_are_refused_by_name(tmp_path: Path, saved, wanted, messages) -> None:
    save(tmp_path, state(1, rank=saved, step=7))
    with pytest.raises(CheckpointError, match=r"/7 was saved by a run with other") as caught:
        restore(tmp_path, state(2, rank=wanted))
    for message in messages:
        assert message in str(caught.value)
    assert "frozen" not in str(caught.value)
    assert steps_in(tmp_path) == ["7"]


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    save(tmp_path, state(1, step=7))
    like = state(2)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), like.trained)
    with pytest.raises(CheckpointError, match=r"lora_a is float32\[64, 2\], not bfloat16"):
        restore(tmp_path, like.replace(trained=half))


def test_another_base_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    save(tmp_path, state(1, step=7), base="0123")
    with pytest.raises(CheckpointError, match=r"base 0123, .* now is 4567\. Set model\.path"):
        restore(tmp_path, state(2), base="4567")
    assert steps_in(tmp_path) == ["7"]


# --- damage ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("two")
    save(directory, large(1), large(2))
    return directory


def large(step: int) -> TrainState:
    """Arrays that fill files of their own; orbax writes small ones among its metadata."""
    return state(step, rank=None, step=step, size=128)


def files_of(step: Path) -> list[Path]:
    return sorted(path.relative_to(step) for path in step.rglob("*") if path.is_file())


def missing(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(bytes(content))


@drops_reads
@pytest.mark.parametrize("damage", [missing, empty, truncated, changed])
def test_no_damage_to_any_file_goes_unnoticed(two_steps: Path, tmp_path: Path, damage) -> None:
    """Either the values are right all the same or the checkpoint before is taken."""
    like, fell_back = large(9), []
    for i, file in enumerate(files_of(two_steps / "2")):
        copy = tmp_path / str(i)
        shutil.copytree(two_steps, copy)
        damage(copy / "2" / file)
        found, meta = restore(copy, like)
        step = int(found.step)
        assert_equal(saved_part(found), saved_part(large(step)))
        assert meta["samples"] == step * 10
        fell_back += [file.parts[0]] if step == 1 else []
    assert {"meta", "state"} <= set(fell_back)


def array_file(step: Path) -> Path:
    return max((step / "state" / "ocdbt.process_0" / "d").iterdir(), key=file_size)


def file_size(path: Path) -> int:
    return path.stat().st_size


@drops_reads
def test_the_fall_back_is_said_and_its_step_can_be_saved_again(
    two_steps: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = shutil.copytree(two_steps, tmp_path / "copy")
    truncated(array_file(directory / "2"))
    checkpoints = open_checkpoints(directory)
    found, _ = checkpoints.restore(large(9)) or pytest.fail("nothing was restored")
    assert int(found.step) == 1
    said = caplog.text
    assert f"{directory / '2'} is damaged: " in said
    assert "2.damaged" in said
    checkpoints.save(large(3).replace(step=large(2).step), META)
    checkpoints.close()
    assert steps_in(directory) == ["1", "2", "2.damaged"]
    assert_equal(restore(directory, large(9))[0].trained, large(3).trained)


@drops_reads
def test_when_all_are_damaged_the_run_does_not_start_afresh(
    two_steps: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(two_steps, tmp_path / "copy")
    truncated(array_file(directory / "1"))
    missing(directory / "2" / "meta" / "metadata")
    with pytest.raises(CheckpointError, match="no other checkpoint") as caught:
        restore(directory, large(9))
    assert f"{directory / '1'} is damaged: " in str(caught.value)
    assert f"{directory / '2'} is damaged: FileNotFoundError" in str(caught.value)
    assert steps_in(directory) == ["1", "2"]


@drops_reads
def test_a_step_asked_for_by_number_must_be_whole(two_steps: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(two_steps, tmp_path / "copy")
    changed(array_file(directory / "1"))
    checkpoints = open_checkpoints(directory)
    with pytest.raises(DamagedCheckpointError, match="arrays read are not those"):
        checkpoints.restore_step(1, large(9))
    checkpoints.close()


WORKER = """
import sys, jax, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jax.sharding import NamedSharding, PartitionSpec
from laser_jax.train.checkpoint import Checkpoints, fingerprint
from laser_jax.config import MeshConfig
from laser_jax.sharding import make_mesh
from laser_jax.step import TrainState
mesh = make_mesh(MeshConfig(1, 2, 1))
def put(array, *axes):
    layout = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.make_array_from_callback(array.shape, layout, lambda index: array[index])
def state(step):
    kernel = put(np.random.default_rng(step).normal(size=(256, 256)).astype(np.float32), "fsdp")
    count = put(np.int32(step))
    return TrainState(count, count, {"kernel": kernel}, None, {"mu": kernel})
checkpoints = Checkpoints(sys.argv[3], keep=2, base=None)
restored = checkpoints.restore(state(9))
if restored is None:
    checkpoints.save(state(1), {"samples": 1})
    checkpoints.save(state(2), {"samples": 2})
else:
    print(int(restored[0].step), restored[1]["samples"], fingerprint(restored[0].trained))
checkpoints.close()
"""


def run_two(directory: Path, environment: dict[str, str]) -> list[tuple[str, str]]:
    """What each of two processes says on stdout and stderr."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(i), str(directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for i in range(2)
    ]
    said = [worker.communicate() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    return said


def test_processes_fall_back_together_when_one_cannot_read_its_part(
    tmp_path: Path, one_device
) -> None:
    run_two(tmp_path, one_device)
    truncated(max((tmp_path / "2" / "state" / "ocdbt.process_1" / "d").iterdir(), key=file_size))
    said = run_two(tmp_path, one_device)
    kernel = np.random.default_rng(1).normal(size=(256, 256)).astype(np.float32)
    expected = f"1 1 {fingerprint({'kernel': kernel})}"
    assert [stdout.splitlines()[-1] for stdout, _ in said] == [expected, expected]
    assert ["is damaged" in stderr for _, stderr in said] == [True, False]


# --- a full disk -------------------------------------------------------------------------------


@pytest.fixture
def small_files() -> Iterator[None]:
    """Writing beyond 256 KiB of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 * 1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@drops_reads
@pytest.mark.parametrize("surfaces_in", ["save", "close"])
def test_a_write_error_surfaces_and_leaves_the_older_whole(
    tmp_path: Path, small_files, surfaces_in: str
) -> None:
    checkpoints = open_checkpoints(tmp_path, keep=1)
    checkpoints.save(state(1, step=1), META)
    checkpoints.save(state(2, step=2, size=512, rank=None), META)
    notice = {"save": lambda: checkpoints.save(state(3, step=3), META), "close": checkpoints.close}
    with pytest.raises(CheckpointError, match=rf"{tmp_path} could not be written.*(27|too large)"):
        notice[surfaces_in]()
    checkpoints.close()  # says it once
    assert int(restore(tmp_path, state(9))[0].step) == 1
    save(tmp_path, state(2, step=2), keep=1)
    assert steps_in(tmp_path) == ["2"]


# --- fingerprints ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_fingerprint_is_the_same_on_every_mesh(dtype) -> None:
    array = np.random.default_rng(0).normal(size=(16, 32, 8)).astype(dtype)
    on_mesh = [
        fingerprint(
            {"w": jax.device_put(array, NamedSharding(make_mesh(mesh), PartitionSpec(*axes)))}
        )
        for mesh, axes in ((MESHES[0], ("data",)), (MESHES[1], ("tensor", ("data", "fsdp"))))
    ]
    assert {fingerprint({"w": jnp.asarray(array)})} == set(on_mesh)


def test_fingerprint_sees_every_small_change() -> None:
    array = np.arange(1, 25, dtype=np.float32).reshape(4, 6)
    signs, swapped, nudged = array.copy(), array.copy(), array.copy()
    signs[0, :2] *= -1
    swapped[1, [2, 3]] = swapped[1, [3, 2]]
    nudged[3, 5] = np.nextafter(nudged[3, 5], 0)
    trees = [
        {"w": array},
        {"v": array},
        {"w": array.reshape(6, 4)},
        {"w": array.T.copy()},
        {"w": array.view(np.int32)},
        {"w": signs},
        {"w": swapped},
        {"w": nudged},
        {"w": array, "b": np.zeros(3, np.float32)},
        {"w": array, "b": -np.zeros(3, np.float32)},
        {"w": array, "b": np.zeros(3, bool)},
    ]
    assert len({fingerprint(tree) for tree in trees}) == len(trees)
    assert fingerprint({"w": array.copy()}) == fingerprint({"w": array})


def test_what_is_recorded_is_plain_json(tmp_path: Path) -> None:
    save(tmp_path, state(1, step=3))
    record = json.loads((tmp_path / "3" / "meta" / "metadata").read_text())
    assert record["meta"] == META | {"samples": 30}
    assert record["base"] == BASE
