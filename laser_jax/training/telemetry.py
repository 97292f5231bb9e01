"""What a run shows beside its log: TensorBoard scalars and an XProf trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from laser_jax.config import ConfigError
from laser_jax.training.processes import is_first


class TensorBoard:
    """Scalars in `directory`; a resumed run replaces those after its start. The first process alone
    writes.

    Raises:
        ConfigError: tensorboardX is not installed.
    """

    def __init__(self, directory: Path, start: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "train.tensorboard wants tensorboardX: pip install laser-jax[tensorboard]"
            ) from error
        self._writer: Any = None
        if is_first():
            self._writer = SummaryWriter(str(directory), purge_step=start + 1)

    def write(self, group: str, line: dict[str, Any]) -> None:
        """A log line, which holds `step`."""
        if self._writer is not None:
            for name, value in line.items():
                if name != "step":
                    self._writer.add_scalar(f"{group}/{name}", value, line["step"])
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Trace:
    """Records the steps from `first` to `last`, both included, for XProf."""

    def __init__(self, directory: Path, steps: tuple[int, int] | None):
        self._directory = directory
        self._first, self._last = steps or (0, 0)
        self._on = False

    def before(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(str(self._directory))
            self._on = True

    def after(self, step: int, arrays: Any) -> None:
        """`arrays` of the step: the last one is waited for, or the trace would miss it."""
        if self._on and step == self._last:
            jax.block_until_ready(arrays)
            self.close()

    def close(self) -> None:
        """Ends a trace that a stopped run would leave open."""
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
