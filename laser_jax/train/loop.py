"""The loop over optimizer steps: what is due after each of them, and when it ends."""

import logging
import math
import statistics
import time
from collections import deque
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from laser_jax.batch import Batch
from laser_jax.data.sources import describe_row
from laser_jax.losses import Terms
from laser_jax.step import TrainState
from laser_jax.train.processes import is_first, place_batch
from laser_jax.train.selection import best_steps, is_evaluated, is_out_of_patience, score_dev
from laser_jax.train.setup import Run
from laser_jax.train.stop import StopSignal
from laser_jax.train.throughput import Meter

_log = logging.getLogger(__name__)


class TrainingError(ValueError):
    """A run that cannot go on."""


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


class Due(NamedTuple):
    """What is to be done after a step, in this order."""

    log: bool
    save: bool
    stop: bool
    rank: bool


Taken = tuple[int, Terms, Batch]
"""A step that may still be under way, what it found, and this process's part of its batch."""


def take_steps(run: Run, state: TrainState, stop: StopSignal) -> tuple[TrainState, bool]:
    """Trains until the last step, or until patience ends. Returns the last state, and whether a
    signal ended the steps before, in which case it is saved. A TrainingError says that a loss or
    gradient is not finite, a CheckpointError that a checkpoint cannot be written."""
    train, start = run.config.train, int(state.step)
    meter = Meter(run.config, run.inputs.backbone, list(run.layout.mesh.devices.flat))
    with ExitStack() as stack:
        bar: dict[str, Any] = {"desc": "train", "unit": "step", "mininterval": 1.0}
        bar["disable"] = None if is_first() else True
        progress = stack.enter_context(tqdm(total=run.steps, initial=start, **bar))
        trace = stack.enter_context(closing(Trace(run.output / "profile", train.profile_steps)))
        if _was_left_unranked(run, start):
            meter.spent(_rank_dev(run, state, stop))
        batches = iter(run.batches_from(start))
        if close := getattr(batches, "close", None):
            stack.callback(close)  # worker processes, where there are any
        unchecked: deque[Taken] = deque()
        norms: deque[float] = deque(maxlen=10)
        for step in range(start + 1, run.steps + 1):
            if is_out_of_patience(run.evaluations.lines, train):
                break
            rows = next(batches)
            trace.before(step)
            state, terms = _take_step(run, state, rows, meter)
            trace.after(step, terms)
            progress.update()
            due = _due(run, step, stop)
            unchecked.append((step, terms, rows))
            _look_at_steps(run, unchecked, norms, wait=due.log or due.save)
            if due.log:
                progress.set_postfix(loss=f"{_write_line(run, step, terms, meter):.3f}")
            if due.save:
                _save(run, step, state)
            if due.stop:
                return state, True
            if due.rank:
                meter.spent(_rank_dev(run, state, stop))
    return state, False


def _was_left_unranked(run: Run, step: int) -> bool:
    """Whether a run that is resumed was stopped before it could rank the step that it had saved."""
    ranked = {line["step"] for line in run.evaluations.lines}
    return step > 0 and is_evaluated(step, run.steps, run.config.train) and step not in ranked


def _take_step(run: Run, state: TrainState, rows: Batch, meter: Meter) -> tuple[TrainState, Terms]:
    """Starts a step; its arrays may still be under way."""
    batch = place_batch(rows, run.layout.mesh, run.config.train.batch_size)
    shapes = len(run.programs.compiled)
    state, terms = run.programs(state, batch, run.teacher_variables)
    for shape, seconds in list(run.programs.compiled.items())[shapes:]:
        meter.spent(seconds)
        with tqdm.external_write_mode():
            _log.info("compiled in %.1f s: %s", seconds, shape)
    meter.add(terms)
    if jax.process_count() > 1 and run.layout.platform == "cpu":
        jax.block_until_ready(terms)  # gloo hangs when steps of processes overlap
    return state, terms


def _due(run: Run, step: int, stop: StopSignal) -> Due:
    train, last = run.config.train, step == run.steps
    stopping, ranked = stop.should_stop(step), is_evaluated(step, run.steps, train)
    return Due(
        log=last or step % train.log_every == 0,
        save=last or stopping or ranked or step % train.checkpoint_every == 0,
        stop=stopping,
        rank=ranked,
    )


def _look_at_steps(run: Run, unchecked: deque[Taken], norms: deque[float], *, wait: bool) -> None:
    """Looks at the steps before the newest, while that one runs; at the newest only where it is
    waited for anyhow."""
    while len(unchecked) > (not wait):
        step, terms, rows = unchecked.popleft()
        if terms["finite"]:
            warn_where_far(step, float(terms["grad_norm"]), norms)
            continue
        if run.config.train.on_nonfinite == "skip":
            continue
        bad = [name for name, value in sorted(terms.items()) if not math.isfinite(value)]
        assert rows.rows_B is not None
        named = [describe_row(run.inputs.sources, int(row)) for row in rows.rows_B]
        raise TrainingError(
            f"step {step}: {', '.join(bad)} not finite, in the batch of "
            f"{', '.join(named[:8])}{f' and {len(named) - 8} more' if len(named) > 8 else ''}. The "
            f"last checkpoint in {run.output / 'checkpoints'} is kept; look at these rows, lower "
            "optimizer.learning_rate, train in float32, or set train.on_nonfinite: skip"
        )


def warn_where_far(step: int, norm: float, before: deque[float]) -> None:
    """Warns of a gradient more than 30 times the median of the 10 `before`, to which it is added:
    clipping leaves its direction, that of a few rows. (A plain retriever's worst was 17 times.)"""
    median = statistics.median(before) if len(before) == before.maxlen else math.inf
    before.append(norm)
    if norm > 30 * median and is_first():
        with tqdm.external_write_mode():
            _log.warning(
                f"step {step}: the gradient's norm is {norm:,.0f}, {norm / median:,.0f} times the "
                "median of the 10 steps before, so a few rows decide this step. Where it happens "
                "often, lower optimizer.learning_rate"
            )


def _write_line(run: Run, step: int, terms: Terms, meter: Meter) -> float:
    """Writes the step into the log, and returns its loss."""
    line = {"step": step} | {name: float(value) for name, value in sorted(terms.items())}
    del line["finite"], line["token_pairs"]
    run.log.write(line | meter.read())
    return line["loss"]


def _save(run: Run, step: int, state: TrainState) -> None:
    train, evaluations = run.config.train, run.evaluations.lines
    progressed = {"metrics": run.log.last, "evaluations": evaluations}
    meta = {"samples": step * train.batch_size} | progressed | run.origin
    run.checkpoints.save(state, meta, best_steps(evaluations, train))


def _rank_dev(run: Run, state: TrainState, stop: StopSignal) -> float:
    """Ranks the dev split, logs the scores and returns the seconds it took. The step is already
    saved, so that a signal may come at any time."""
    assert run.inputs.dev is not None
    began, step = time.monotonic(), int(state.step)
    with stop.interrupting():
        scores = score_dev(run.encoder(state.variables), run.inputs.prompts, run.inputs.dev)
    run.evaluations.write({"step": step} | scores)
    shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    with tqdm.external_write_mode():
        _log.info("step %d, %s: %s", step, run.config.data.dev_split, shown)
    return time.monotonic() - began
