"""Trains a retriever: `python -m laser_jax.train --config configs/local.yaml [--dotted.key value]`.

The output directory holds `config.json`, `metrics.jsonl`, `checkpoints/`, and at the end
`model/` (Hugging Face layout with everything needed to use it), `adapter/` (PEFT, with LoRA) and
`results.json`. The same command again resumes where a stopped run was saved.
"""

import logging
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import jax

from laser_jax.command_line import ended_in_a_line, parse_train_command
from laser_jax.config import Config
from laser_jax.files.terminal import configure_logging
from laser_jax.train.dry_run import dry_run
from laser_jax.train.export import best_state, export_model, mixed_with_start, write_results
from laser_jax.train.loop import take_steps
from laser_jax.train.processes import is_first, join_processes
from laser_jax.train.setup import set_up
from laser_jax.train.stop import StopRequested, StopSignal

_log = logging.getLogger(__name__)


def train(config: Config) -> dict[str, Any]:
    """Runs or resumes the training that `config` describes, in this process or in all that
    `join_processes` has joined. Returns what `results.json` holds. Raises a TrainingError where the
    loss is not finite, and a SystemExit where a signal came; the same command goes on."""
    with StopSignal() as stop, ExitStack() as stack:
        try:
            with stop.interrupting():
                run, state = set_up(config, stack)
            (run.output / "results.json").unlink(missing_ok=True)  # an earlier end is none now
            began = time.monotonic()
            state, stopped = take_steps(run, state, stop)
            seconds, last = time.monotonic() - began, int(state.step)
            run.checkpoints.wait()  # the message below must be true
            if stopped:
                _log.info(
                    f"{stop.received}: saved at step {last} of {run.steps}; "
                    "the same command goes on from there"
                )
                sys.exit(0)
            with stop.interrupting():
                if config.train.export == "best":
                    state = best_state(run, state)
                state = mixed_with_start(run, state)
                export_model(run, state)
                return write_results(run, state, last, seconds)
        except StopRequested as request:
            _log.info(f"{request}: stopped outside the steps; the same command goes on from there")
            sys.exit(0)


def main(arguments: Sequence[str] | None = None) -> None:
    with ended_in_a_line():
        config, invocation = parse_train_command(arguments)
        if invocation.dry_run:
            dry_run(config, invocation)
            return
        join_processes(invocation)
        configure_logging(jax.process_index())
        if not is_first():
            logging.getLogger("laser_jax").setLevel(logging.WARNING)
        train(config)
