"""Orbax checkpoints: everything of a run but its frozen base.

The base under adapters is rebuilt from where it came from; its fingerprint is saved, and another
base is refused. The arrays' own fingerprint is saved too: neither orbax nor the file system says
so when a file's bytes have changed, so what is restored is compared with what was saved.
"""

import copy
import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from laser_jax.files.durable import digest_of
from laser_jax.settings import listed
from laser_jax.step import TrainState

_log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or used. Names its directory and what is wrong."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are missing, cut short or changed."""


def fingerprint(tree: Any) -> str:
    """An exact hash of every leaf's name, shape, dtype and bits, the same on every mesh.

    The leaves are summed up where they lie, as integers, so that no order of addition shows; only
    two numbers a leaf reach the host. All processes must call it.
    """
    leaves = [  # one leaf at a time, as the CPU holds a copy of each that is under way
        [_name(path), _describe(leaf), *map(int, jax.device_get(_checksums(leaf)))]
        for path, leaf in jax.tree.leaves_with_path(tree)
    ]
    return digest_of(leaves)[:32]


@jax.jit
def _checksums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _checksum(x, 0x9E3779B1), _checksum(x, 0x85EBCA77)


def _checksum(x: jax.Array, multiplier: int) -> jax.Array:
    """The sum modulo 2^32 over a mix of each element's bits with its position."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    mixed = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    stride = multiplier
    for axis in reversed(range(x.ndim)):
        # broadcast in the sum's own loop: no array of positions is ever stored
        position = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        mixed += position * np.uint32(stride % 2**32)
        stride *= x.shape[axis]
    # not linear: a sum of bits times weights would miss two flipped signs
    mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x21F0AAAD)
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x735A2D97)
    return jnp.sum(mixed ^ (mixed >> np.uint32(15)), dtype=jnp.uint32)


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: `train.stop` asks jax, whose protocol counts one caller's calls."""
        return False


class Checkpoints:
    """Numbered checkpoints in one directory, written in the background, of which the newest `keep`
    are kept. `base` is the fingerprint of the frozen base, None without one. The directory is
    created; leftovers of saves that were cut off are removed."""

    def __init__(self, directory: str | Path, *, keep: int, base: str | None):
        self._directory = Path(directory).absolute()
        self._keep, self._base = keep, base
        self._ranked: Sequence[int] = ()
        self._handler = ocp.StandardCheckpointHandler()
        if jax.process_index() == 0:  # orbax does it in a thread, which a stop would cut short
            for leftover in ocp.utils.tmp_checkpoints(self._directory):
                shutil.rmtree(leftover.get())
        self._manager = _Manager(
            self._directory,
            item_handlers={"state": self._handler, "meta": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self, lightweight_initialize=True
            ),
        )

    def save(self, state: TrainState, meta: dict[str, Any], ranked: Sequence[int] = ()) -> None:
        """Starts saving a step that is not saved yet. The state is copied off the device first, so
        that the next step may donate it, and so is `meta`, of plain JSON types, which `restore`
        gives back. Of the steps `ranked`, best first, the best that is there is kept beside the
        newest. Raises a CheckpointError when this or the last save cannot be written."""
        step, saved = int(state.step), _saved(state)
        if step in self._manager.all_steps():
            return
        record = {"meta": copy.deepcopy(meta), "base": self._base, "arrays": fingerprint(saved)}
        self._ranked = ranked
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(saved),
            meta=ocp.args.JsonSave(record | {"seal": digest_of(record)[:32]}),
        )
        with self._write_errors_explained():
            # without force, orbax leaves out a step below the newest in silence
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Waits for the save under way; a CheckpointError says that it cannot be written."""
        with self._write_errors_explained():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """As `wait`, and ends the threads."""
        with self._write_errors_explained():
            self._manager.close()

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that is whole, and its meta; None where none was ever saved.

        `like` gives shapes, dtypes and layouts, as arrays or `jax.ShapeDtypeStruct`s, and the
        frozen base. A damaged checkpoint is named in a warning, and renamed to `<step>.damaged`
        once an older one is restored, so that the run can save that step again. Raises a
        CheckpointError where one belongs to another base or holds other tensors than `like`
        (another adapter rank, another optimizer), or all are damaged.
        """
        damaged: dict[int, DamagedCheckpointError] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self.restore_step(step, like)
            except DamagedCheckpointError as error:
                damaged[step] = error
            else:
                self._set_aside(damaged)
                return restored
        if damaged:
            named = "\n".join(map(str, damaged.values()))
            raise CheckpointError(
                f"{named}\nThere is no other checkpoint. Bring one back from a copy, or delete "
                f"{self._directory} to start from the beginning"
            )
        return None

    def restore_step(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The checkpoint of `step`, as `restore`; or a DamagedCheckpointError."""
        wanted, directory = _saved(like), self._directory / str(step)
        fault, record, state = "", {}, {}
        try:
            record = self._read_record(step)
            self._require_same_run(step, record, wanted)
            abstract = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), wanted
            )
            asked = ocp.args.StandardRestore(abstract)
            # not through the manager, which would wait for processes that failed here
            state = self._handler.restore(epath.Path(directory / "state"), args=asked)
        except (CheckpointError, jax.errors.JaxRuntimeError, MemoryError):
            raise  # not the checkpoint's fault
        except Exception as error:  # tensorstore raises bare Exceptions too
            fault = _brief(error)
        # every process reads its own part, and all must take the same way from here
        if not np.all(multihost_utils.process_allgather(np.asarray(not fault))):
            fault = fault or "another process cannot read its part"
        elif fingerprint(state) != record["arrays"]:
            fault = "the arrays read are not those that were saved"
        if fault:
            raise DamagedCheckpointError(f"{directory} is damaged: {fault}")
        return dataclasses.replace(like, **state), record["meta"]

    def _read_record(self, step: int) -> dict[str, Any]:
        record = json.loads((self._directory / str(step) / "meta" / "metadata").read_text())
        if record.pop("seal") != digest_of(record)[:32]:
            raise ValueError("meta/metadata is not what was saved")
        return record

    def _require_same_run(self, step: int, record: dict[str, Any], wanted: dict[str, Any]) -> None:
        directory = self._directory / str(step)
        metadata = self._handler.metadata(epath.Path(directory / "state")).tree
        stored = {tensor.name: _describe(tensor) for tensor in jax.tree.leaves(metadata)}
        here = {_name(path): _describe(leaf) for path, leaf in jax.tree.leaves_with_path(wanted)}
        different = [
            f"{name} is {stored.get(name, 'absent')}, not {here.get(name, 'wanted')}"
            for name in sorted(stored | here, reverse=True)  # what is trained first
            if stored.get(name) != here.get(name)
        ]
        if different:
            raise CheckpointError(
                f"{directory} was saved by a run with other settings:\n  {listed(different, 5)}"
                "\nResume it with its own settings, or choose another output"
            )
        if record["base"] != self._base:
            raise CheckpointError(
                f"{directory} was trained over the frozen base {record['base']}, and the one "
                f"loaded now is {self._base}. Set model.path to the weights that the run began "
                "with, or choose another output"
            )

    def _set_aside(self, damaged: dict[int, DamagedCheckpointError]) -> None:
        if not damaged:
            return
        for step, error in damaged.items() if jax.process_index() == 0 else ():
            aside = self._directory / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (self._directory / str(step)).rename(aside)
            _log.warning("%s\nIt is now %s, and an older one is used", error, aside.name)
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()

    @contextmanager
    def _write_errors_explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._manager.reload()  # it has already forgotten what the failed save would replace
            raise CheckpointError(
                f"a checkpoint in {self._directory} could not be written: {_brief(error)}\n"
                "Those before it are whole, and the same command goes on from them"
            ) from error

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """Orbax asks at every save which checkpoints stay."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self._keep :], *[step for step in self._ranked if step in steps][:1]}
        return [step in kept for step in steps]


def _brief(error: Exception) -> str:
    """The error's cause, without the configuration that tensorstore adds to it."""
    return repr(error.__cause__ or error).partition(" [tensorstore_spec=")[0]


def _saved(state: TrainState) -> dict[str, Any]:
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name != "frozen"}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _describe(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
