"""Orbax checkpoints: what is trained, the optimizer and the position in the data.

The frozen base under adapters is never saved again; it is rebuilt from where it came from.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from laser_jax.step import TrainState


class CheckpointError(ValueError):
    """A checkpoint that does not hold what it should. Names its directory and the tensors."""


class Checkpoints:
    """Numbered checkpoints in one directory, written in the background, the newest `keep` kept."""

    def __init__(self, directory: str | Path, keep: int):
        self._directory = Path(directory).absolute()
        self._manager = ocp.CheckpointManager(
            self._directory,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    def latest(self) -> int | None:
        """The newest step that was saved completely, None without any."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data: dict[str, Any]) -> None:
        """Starts saving.

        Args:
            state: the arrays are copied off the device before this returns, so that the next step
                may donate them.
            data: the data iterator's state, plain JSON types.
        """
        step = int(state.step)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_saved(state)), data=ocp.args.JsonSave(data)
            ),
        )

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state saved at `step`, laid out as `like` (whose frozen base is kept), and the data
        iterator's state.

        Raises:
            CheckpointError: when the checkpoint holds other tensors than `like` (another adapter
                rank, another optimizer).
        """
        self._require_same_tensors(step, _saved(like))
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), _saved(like)
        )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
            ),
        )
        return replace(like, **restored["state"]), restored["data"]

    def _require_same_tensors(self, step: int, wanted: dict[str, Any]) -> None:
        metadata = jax.tree.leaves(self._manager.item_metadata(step)["state"].tree)
        stored = {tensor.name: tensor.shape for tensor in metadata}
        shapes = {
            jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape
            for path, leaf in jax.tree.leaves_with_path(wanted)
        }
        different = [
            f"{name} is {stored.get(name, 'absent')}, not {shapes.get(name, 'wanted')}"
            for name in sorted(stored | shapes, reverse=True)  # what is trained first
            if stored.get(name) != shapes.get(name)
        ]
        if different:
            more = [f"... and {len(different) - 5} more"] if len(different) > 5 else []
            lines = "\n  ".join([*different[:5], *more])
            raise CheckpointError(
                f"{self._directory / str(step)} was saved by a run with other settings:\n  {lines}"
                "\nResume it with its own settings, or choose another output"
            )

    def close(self) -> None:
        """Waits for the save under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def _saved(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "trained": state.trained, "opt_state": state.opt_state}
