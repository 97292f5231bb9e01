"""Orbax checkpoints: what is trained, the optimizer and the position in the data.

The frozen base under adapters is never saved again; it is rebuilt from where it came from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from laser_jax.step import TrainState


class Checkpoints:
    """Numbered checkpoints in one directory, written in the background, the newest `keep` kept."""

    def __init__(self, directory: str | Path, keep: int):
        self._manager = ocp.CheckpointManager(
            Path(directory).absolute(),
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
            ValueError: when the checkpoint holds other tensors than `like` (another adapter rank,
                another optimizer).
        """
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), _saved(like)
        )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
            ),
        )
        return like.replace(**restored["state"]), restored["data"]

    def close(self) -> None:
        """Waits for the save under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def _saved(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "trained": state.trained, "opt_state": state.opt_state}
