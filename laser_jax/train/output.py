"""A run's output directory: who may have it, and its logs, for people and for TensorBoard."""

import json
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from laser_jax.config import Config, TrainConfig, as_dict
from laser_jax.files.claim import Claim, OutputError
from laser_jax.files.durable import json_text, read_state, read_state_lines, write_atomically
from laser_jax.files.terminal import extra
from laser_jax.settings import changes

# What a resumed run may change. The rest decides on what is trained or on which model is exported.
CHANGEABLE = (
    # nothing of what is trained
    *("output", "data.eval_split", "data.threads", "data.workers", "train.checkpoint_every"),
    *("train.eval_thinking_steps", "train.keep_checkpoints", "train.log_every"),
    *("train.peak_tflops", "train.profile_steps", "train.tensorboard", "train.wandb"),
    "train.on_nonfinite",  # while everything is finite
    # their content counts, which every checkpoint knows
    *("data.eval", "data.mixture.*.path", "data.train", "data.split"),
    *("model.path", "model.adapter", "objective.teacher"),
    # rounding: the run goes on, but not bit for bit
    *("mesh", "model.attention", "model.remat"),
)


@contextmanager
def claimed(config: Config) -> Iterator[Claim]:
    """The claim on a run's directory, whose record is `config.json`. All processes of a run make
    it; process 0 alone touches the file system, and is to write the record. Raises as
    `Claim`; where process 0 is refused, the others are too."""
    # rounding too; with `plain` it is another loss
    rounding = ("train.micro_batch_size",) if config.train.accumulation == "gradcache" else ()
    changeable = (*CHANGEABLE, *rounding)
    changed = partial(changes, settings=config, source="config", changeable=changeable)
    claim = Claim(config.output, "config.json", changed)
    error: OutputError | OSError | None = None
    with ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                stack.enter_context(claim)
            except (OutputError, OSError) as raised:
                error = raised
        if jax.process_count() > 1:
            granted = multihost_utils.broadcast_one_to_all(np.asarray(error is None))
            if not granted and error is None:
                error = OutputError(f"{config.output}: refused to process 0, which says why")
        if error is not None:
            raise error
        yield claim


def code_version() -> dict[str, str]:
    """The package's version and, in a git checkout, the commit, with `+changes` where files differ
    from it, other than documents and what benchmarks have written."""
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
    none. Damaged ones are as in `files.durable.read_state_lines`."""
    if jax.process_index() > 0:
        return []
    lines = read_state_lines(path, lambda line: {**line, "step": int(line["step"])})
    return [line for line in lines if line["step"] <= start]


class StepLog:
    """A JSONL file with a line per step of interest, which begins anew with the `lines` given and
    has all of them there. Process 0 alone writes; what `show` holds is called with every line."""

    def __init__(
        self, path: Path, lines: Sequence[dict[str, Any]], show: Sequence[Callable[..., None]] = ()
    ):
        self.lines, self._path, self._show = list(lines), path, show
        if jax.process_index() == 0:
            write_atomically(path, "".join(f"{json.dumps(line)}\n" for line in lines))

    @property
    def last(self) -> dict[str, Any]:
        """{} without any line."""
        return self.lines[-1] if self.lines else {}

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line, which must hold `step`."""
        self.lines.append(line)
        for show in self._show:
            show(line)
        if jax.process_index() == 0:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")


Board = Callable[[str, dict[str, Any]], None]
"""Draws a log line, which holds `step`, in a group of its own."""


def require_boards(config: TrainConfig) -> None:
    """Raises an ImportError, which names the extra, where what draws the metrics is missing."""
    with extra("tensorboard", "train.tensorboard"):
        if config.tensorboard:
            import tensorboardX  # noqa: F401
    with extra("wandb", "train.wandb"):
        if config.wandb:
            import wandb  # noqa: F401  # pyright: ignore[reportMissingImports]


def open_boards(config: Config, start: int, stack: ExitStack) -> list[Board]:
    """What draws the metrics of a run that begins after step `start`: the first process alone."""
    boards, output = [], Path(config.output)
    if jax.process_index() == 0 and config.train.tensorboard:
        boards.append(stack.enter_context(tensorboard(output / "tensorboard", start)))
    if jax.process_index() == 0 and config.train.wandb:
        settings = as_dict(config)
        boards.append(stack.enter_context(wandb_run(config.train.wandb, output, settings)))
    return boards


@contextmanager
def tensorboard(directory: Path, start: int) -> Iterator[Board]:
    """Scalars in `directory`; a resumed run replaces those after its start."""
    # not its SummaryWriter, whose thread dies of a full disk: the training would wait for it
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
    from tensorboardX.summary import scalar

    directory.mkdir(parents=True, exist_ok=True)
    # without a suffix two of the same second are one file
    with closing(EventsWriter(str(directory / "events"), f".{start}")) as writer:
        writer.write_event(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))

        def draw(group: str, line: dict[str, Any]) -> None:
            for name in sorted(line.keys() - {"step"}):
                summary = scalar(f"{group}/{name}", line[name])
                writer.write_event(Event(wall_time=time.time(), step=line["step"], summary=summary))
            writer.flush()

        yield draw


@contextmanager
def wandb_run(project: str, directory: Path, config: dict[str, Any]) -> Iterator[Board]:
    """A run of Weights & Biases, which a resumed training goes on with. How it logs in, or that it
    stays offline, is for wandb's own variables."""
    import wandb  # pyright: ignore[reportMissingImports]

    known = directory / "wandb.json"
    id_ = read_state(known, lambda values: str(values["id"])) or secrets.token_hex(8)
    write_atomically(known, json_text({"id": id_}))
    where: dict[str, Any] = {"project": project, "dir": str(directory), "id": id_}
    run: Any = wandb.init(config=config, resume="allow", **where)

    def draw(group: str, line: dict[str, Any]) -> None:
        values = {f"{group}/{name}": value for name, value in line.items() if name != "step"}
        run.log(values, step=line["step"])

    try:
        yield draw
    finally:
        run.finish()
