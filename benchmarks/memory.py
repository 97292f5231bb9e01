"""Peak memory of embedding a batch and of a training step, on the device and on the host.

    python -m benchmarks.memory [--backbone NAME] [--programs encode train_step]

Every contender has a process of its own, which makes weights and batch, runs once, gives back what
is free, forgets its peak (/proc/self/clear_refs, Linux with glibc) and runs `--repeats` times more:

peak              the most resident memory in those runs (VmHWM)
before            what was resident before them: weights, optimizer, batch, libraries
overhead          the difference: what a run adds. On the CPU this is the device's memory too
device peak       on a GPU: the allocator's peak since the process began, weights included
XLA temporaries   ours: `compiled.memory_analysis()`, known before anything runs

The contenders are those of `encode_latency`, on 8 rows of 512 tokens, and of `train_step`.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import measure, train_step, workload
from benchmarks.encoders import OURS, Encoders
from benchmarks.measure import BenchmarkError, Report, Row, Run
from benchmarks.targets import PYTORCH

MIB = 2**20

Work = tuple[Run, dict[str, Any]]
"""A run, and what is known of its program."""


def encode_work(contender: str, options: argparse.Namespace) -> Work:
    """Embeds one batch."""
    encoders = Encoders(options, [contender] if contender in PYTORCH else ())
    (rows, width), vocab_size = options.batch, encoders.config.backbone.vocab_size
    tokens = workload.random_tokens(np.random.default_rng(0), rows, width, vocab_size)
    for transcription, model in encoders.torch_models.items():
        return transcription.encoder(model, tokens, options.thinking_steps), {}
    run = encoders.ours(tokens, options.thinking_steps)
    compiled: Any = run.func.lower(*run.args, **run.keywords).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return functools.partial(compiled, *run.args), {"temp_bytes": temporaries}


def train_work(contender: str, options: argparse.Namespace) -> Work:
    """Takes one optimizer step after the other."""
    setup, base = train_step.set_up(options)
    if contender in PYTORCH:
        return train_step.torch_contenders(setup, base, [contender])[contender], {}
    config = train_step.variants(base, options)[contender]
    with jax.set_mesh(setup.mesh):
        program, facts = train_step.compile_variant(config, setup)
        training = train_step.OurTraining(setup)
        training.restart()
    return functools.partial(training.run, program), facts


WORK: dict[str, Callable[[str, argparse.Namespace], Work]] = {
    "encode": encode_work,
    "train_step": train_work,
}


def resident(field: str) -> int:
    """Bytes of memory of this process, as /proc/self/status counts them."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def peak_of(program: str, contender: str, options: argparse.Namespace) -> Row:
    """Bytes, as this module's docstring says. To be called in a new process."""
    run, facts = WORK[program](contender, options)
    jax.block_until_ready(run())
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # or a run could use what the making left over
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    for _ in range(options.repeats):
        jax.block_until_ready(run())
    peak = resident("VmHWM")
    found = {"before_bytes": before, "peak_bytes": peak, "overhead_bytes": peak - before}
    return found | device_peak(contender) | facts


def device_peak(contender: str) -> dict[str, Any]:
    """The allocator's peak on an accelerator; nothing on the CPU, whose memory is the host's."""
    if jax.default_backend() == "cpu":
        return {}
    if contender in PYTORCH:
        import torch

        return {"device_peak_bytes": torch.cuda.max_memory_allocated()}
    stats = jax.devices()[0].memory_stats() or {}
    return {"device_peak_bytes": stats["peak_bytes_in_use"]}


def contenders_of(program: str, options: argparse.Namespace) -> tuple[Sequence[str], list[str]]:
    """All that can run here, and a note where PyTorch cannot."""
    torch, notes = train_step.torch_names(options)
    if program == "encode":
        return [OURS, *torch], notes
    return [*train_step.variants(train_step.base_config(options), options), *torch], notes


def fill(options: argparse.Namespace, report: Report) -> None:
    """Runs every contender in a process of its own, one after the other."""
    if not sys.platform.startswith("linux"):
        raise BenchmarkError(f"memory is read from /proc, which {sys.platform} has not")
    for program in options.programs:
        # on a GPU this process must not take the memory of those that are measured
        contenders, report.notes = measure.in_new_process(contenders_of, program, options)
        for contender in contenders:
            found = measure.in_new_process(peak_of, program, contender, options)
            report.rows.append({"program": program, "contender": contender} | found)


COLUMNS = {
    "contender": measure.value("contender"),
    "program": measure.value("program"),
    "before, MiB": measure.value("before_bytes", ",.0f", MIB),
    "peak, MiB": measure.value("peak_bytes", ",.0f", MIB),
    "overhead, MiB": measure.value("overhead_bytes", ",.0f", MIB),
    "device peak, MiB": measure.value("device_peak_bytes", ",.0f", MIB),
    "XLA temporaries, MiB": measure.value("temp_bytes", ",.0f", MIB),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    train_step.add_flags(parser)
    parser.add_argument("--programs", choices=WORK, nargs="+", default=[*WORK])
    parser.set_defaults(batch=(8, 512))


QUICK = {**train_step.QUICK, "batch": (2, 8)}
PROGRAM = measure.Program("memory", __doc__, fill, COLUMNS, add_flags, QUICK, 2, apart=True)

if __name__ == "__main__":
    PROGRAM.main(sys.argv[1:])
