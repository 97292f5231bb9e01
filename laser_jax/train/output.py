"""A run's output directory: one run at a time, always of the same config, and files that are either
whole or absent. And its logs, for people and for TensorBoard."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils

from laser_jax.config import Config, ConfigError, as_dict
from laser_jax.files.durable import lock, no_link, read_state, read_state_lines, write_atomically
from laser_jax.settings import changes, listed

# What a resumed run may change. The rest decides on what is trained or on which model is exported.
CHANGEABLE = (
    # nothing of what is trained
    "output",
    "data.eval_split",
    # their content counts, which every checkpoint knows
    "data.eval",
    "data.mixture.*.path",
    "model.path",
    "model.adapter",
    "objective.teacher",
    "data.train",
    "data.split",
    "data.threads",
    "data.workers",
    "train.checkpoint_every",
    "train.eval_thinking_steps",
    "train.keep_checkpoints",
    "train.log_every",
    "train.on_nonfinite",  # while everything is finite
    "train.peak_tflops",
    "train.profile_steps",
    "train.tensorboard",
    # rounding: the run goes on, but not bit for bit
    "mesh",
    "model.attention",
    "model.remat",
)


class OutputError(ValueError):
    """An output directory that this run cannot have. Names it and the way out."""


class OutputDirectory:
    """Locks the directory of a run for as long as the process lives.

    The lock is the kernel's (`flock` on `.lock`), so that it ends with the process, however that
    ends. On NFS it holds between machines, on a bucket mounted with gcsfuse only within one.
    Nothing else is written before `claim`; a run that fails before leaves no trace.

    All processes of a distributed run make it; process 0 alone touches the file system.

    Raises:
        OutputError: when another process holds the lock, when the directory holds a run with
            another config (`CHANGEABLE` lists what may differ), or when it is no mounted one.
    """

    def __init__(self, config: Config):
        self.path = Path(config.output)
        self._config = config
        self._lock: TextIO | None = None
        self._made: list[Path] = []
        self._claimed = False
        error: OutputError | OSError | None = None
        if jax.process_index() == 0:
            try:
                self._acquire()
            except (OutputError, OSError) as raised:
                error = raised
                self.close()
        if jax.process_count() > 1:
            granted = multihost_utils.broadcast_one_to_all(np.asarray(error is None))
            if not granted and error is None:
                error = OutputError(f"{self.path}: refused to process 0, which says why")
        if error is not None:
            raise error

    def claim(self) -> None:
        """Writes `config.json`, which makes the directory this run's. To be called when everything
        that can be wrong with the input has been looked at."""
        if jax.process_index() == 0:
            text = json.dumps(as_dict(self._config), indent=2) + "\n"
            write_atomically(self.path / "config.json", text)
        self._claimed = True

    def close(self) -> None:
        """Gives the lock back, and removes what was made for it if the run was never claimed."""
        if self._lock is None:
            return
        if not self._claimed and not (self.path / "config.json").exists():
            (self.path / ".lock").unlink()
            with suppress(OSError):  # not empty: somebody else's
                for directory in self._made:
                    directory.rmdir()
        self._lock.close()
        self._lock = None

    def __enter__(self) -> OutputDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _acquire(self) -> None:
        if "://" in str(self._config.output):
            raise OutputError(
                f"output {self._config.output}: a directory of a file system is wanted. Mount the "
                "bucket and name the directory; gcsfuse needs --implicit-dirs, and a bucket with "
                "hierarchical namespace or --rename-dir-limit above the files of a checkpoint"
            )
        while self._lock is None:
            missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another run has just removed what it had made
                self._lock = self._locked()
                self._made = missing
        file = self.path / "config.json"
        if (stored := read_state(file, dict)) is not None:
            self.require_same_config(stored, str(file))

    def _locked(self) -> TextIO | None:
        """The lock file, held; None where its last holder removed it while we were opening it."""
        path = self.path / ".lock"
        with ExitStack() as stack:
            file = stack.enter_context(open(path, "a+", opener=no_link))
            if not lock(file, wait=False):
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise OutputError(
                    f"{self.path} is being written by {holder}. Wait for that run or stop it, or "
                    "choose another --output"
                )
            if os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                return None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            stack.pop_all()
            return file

    def require_same_config(self, stored: dict[str, Any], source: str) -> None:
        """Raises an OutputError where a run with the config `stored`, read from `source`, cannot go
        on with this one."""
        try:
            changed = changes(stored, self._config, source=source)
        except ValueError as error:
            raise OutputError(
                f"{source} is no run's config: {error}. Choose another --output"
            ) from error
        changeable = CHANGEABLE
        if self._config.train.accumulation == "gradcache":  # rounding too; `plain` is another loss
            changeable += ("train.micro_batch_size",)
        refused = [
            change
            for change in changed
            if not any(fnmatch(change.key, c) or fnmatch(change.key, f"{c}.*") for c in changeable)
        ]
        if refused:
            raise OutputError(
                f"{self.path} holds a run with another config:\n  {listed(refused)}\n"
                "Choose another --output, or delete that directory"
            )


def code_version() -> dict[str, str]:
    """The package's version and, where it runs from a git checkout, the commit, with `+changes`
    where files differ from it, other than documents and what benchmarks have written."""
    here = Path(__file__).resolve()
    found = {"version": version("laser-jax")}

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(here.parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):  # no git, no checkout, or not of this file
            return None

    if git("ls-files", "--error-unmatch", str(here)) is not None:
        no_code = (":(top,exclude)docs", ":(top,exclude)benchmarks/results")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *no_code)
        changes = "+changes" if changed else ""
        found["commit"] = f"{git('rev-parse', 'HEAD') or ''}".strip() + changes
    return found


def logged_lines(path: Path, start: int) -> list[dict[str, Any]]:
    """The lines that a run which resumes at step `start` finds in its log, in process 0; elsewhere
    none. Damaged ones are as in `files.read_state_lines`."""
    if jax.process_index() > 0:
        return []
    lines = read_state_lines(path, lambda line: {**line, "step": int(line["step"])})
    return [line for line in lines if line["step"] <= start]


class StepLog:
    """A JSONL file with a line per step of interest, which begins anew with the lines given.

    Process 0 alone writes.

    Attributes:
        lines: all lines, those given and those written.
        show: is called with every line that is written.
    """

    def __init__(self, path: Path, lines: Sequence[dict[str, Any]]):
        self.lines = list(lines)
        self.show: Callable[[dict[str, Any]], None] | None = None
        self._file: TextIO | None = None
        if jax.process_index() == 0:
            write_atomically(path, "".join(f"{json.dumps(line)}\n" for line in lines))
            self._file = path.open("a")

    @property
    def last(self) -> dict[str, Any]:
        """{} without any line."""
        return self.lines[-1] if self.lines else {}

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line, which must hold `step`."""
        self.lines.append(line)
        if self.show is not None:
            self.show(line)
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


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
        if jax.process_index() == 0:
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
