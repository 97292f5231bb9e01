"""What a run shows beside its log: TensorBoard scalars and an XProf trace."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jax

from laser_jax.config import ConfigError
from laser_jax.train.processes import is_first


def require_tensorboard() -> None:
    """Raises a ConfigError where tensorboardX is not installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise ConfigError(
            "train.tensorboard wants tensorboardX: pip install laser-jax[tensorboard]"
        )


class TensorBoard:
    """Scalars in `directory`; a resumed run replaces those after its start. The first process alone
    writes."""

    def __init__(self, directory: Path, start: int):
        from tensorboardX import SummaryWriter

        self._writer: Any = None
        if is_first():
            # its flush() leaves out what is still in its queue, so it is told to flush by itself
            self._writer = SummaryWriter(
                str(directory),
                purge_step=start + 1,
                flush_secs=10,
                filename_suffix=f".{start}",  # else two of the same second are one file
            )

    def write(self, group: str, line: dict[str, Any]) -> None:
        """A log line, which holds `step`."""
        if self._writer is not None:
            for name, value in line.items():
                if name != "step":
                    self._writer.add_scalar(f"{group}/{name}", value, line["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Trace:
    """Records the steps `steps[0]` to `steps[1]`, both included, for XProf.

    Python's own calls are left out: as it ends, XLA's tracer of them (jaxlib 0.10) reaches into the
    state of every other thread, and a data worker that ends at that moment takes the run down with
    a segmentation fault.
    """

    def __init__(self, directory: Path, steps: tuple[int, int] | None):
        self._directory = directory
        self._first, self._last = steps or (0, 0)
        self.recording = False

    def before(self, step: int) -> None:
        if step == self._first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            jax.profiler.start_trace(str(self._directory), profiler_options=options)
            self.recording = True

    def after(self, step: int, arrays: Any) -> None:
        """`arrays` of the step: the last one is waited for, or the trace would miss it."""
        if self.recording and step == self._last:
            jax.block_until_ready(arrays)
            self.close()

    def close(self) -> None:
        """Ends a trace that a stopped run would leave open."""
        if self.recording:
            jax.profiler.stop_trace()
            self.recording = False
