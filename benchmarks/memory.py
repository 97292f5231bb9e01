"""Peak memory of embedding a batch and of a training step, on the device and on the host.

    python -m benchmarks.memory [--backbone NAME] [--batch 8x512] [--programs encode train_step]

Every contender has a process of its own, which makes weights and batch, runs once, gives back what
is free, forgets its peak (/proc/self/clear_refs, Linux with glibc) and runs `--repeats` times more:

host peak         the most resident memory in those runs (VmHWM)
before            what was resident before them: weights, optimizer, batch, libraries
working           the difference: what a run adds. On the CPU this is the device's memory too
device peak       on a GPU: the allocator's peak since the process began, weights included
XLA temporaries   ours: `compiled.memory_analysis()`, known before anything runs

The contenders are those of `encode_latency` and `train_step`; see there.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.encode_latency import rows_by_tokens
from benchmarks.load_memory import resident
from benchmarks.measure import (
    Report,
    command_line,
    environment,
    in_new_process,
    positive,
    torch_threads,
    torch_unusable,
)
from benchmarks.train_step import (
    OurTraining,
    base_config,
    compile_variant,
    set_up,
    torch_contenders,
    variants,
    why_no_torch,
)
from benchmarks.workload import (
    SHAPES,
    TINY,
    TrainShape,
    add_backbone,
    add_contenders,
    add_train_shape,
    drawn_unstacked,
    kernel_for,
    make_backbone,
    random_tokens,
    random_variables,
    train_shape,
)
from laser_jax import encode
from laser_jax.config import AttentionKernel, Dtype, LoraConfig, RetrieverConfig, as_dict

PYTORCH = ("published PyTorch", "tuned PyTorch")
OURS = "ours"
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One contender at one piece of work."""

    program: Literal["encode", "train_step"]
    contender: str
    backbone: str
    dtype: Dtype
    attention: Literal["auto"] | AttentionKernel
    rows: int
    tokens: int
    """Of `encode`."""
    thinking_steps: int
    """Of `encode`."""
    shape: TrainShape
    lora: LoraConfig | None
    gradcache: tuple[int, ...]
    remat: tuple[str, ...]
    repeats: int


Work = tuple[Callable[[], Any], dict[str, Any]]
"""A run, and what is known of its program."""


def memory_facts(compiled: Any) -> dict[str, Any]:
    """What XLA knows of a program's memory."""
    memory = compiled.memory_analysis()
    return {
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
    }


def encode_work(case: Case) -> Work:
    """Embeds one batch."""
    config = SHAPES[case.backbone]
    rng = np.random.default_rng(0)
    tokens = random_tokens(rng, case.rows, case.tokens, config.vocab_size)
    if case.contender == OURS:
        variables = drawn_unstacked(config, case.dtype)
        ids_BT = jnp.asarray(tokens.ids_BT)
        mask_BT = jnp.ones_like(ids_BT)
        program = functools.partial(
            encode,
            config=RetrieverConfig(config, case.thinking_steps, dtype=case.dtype),
            attention=kernel_for(case.attention, config, case.dtype),
        )
        compiled = jax.jit(program).lower(variables, ids_BT, mask_BT).compile()
        return functools.partial(compiled, variables, ids_BT, mask_BT), memory_facts(compiled)
    from benchmarks.torch_reference import TRANSCRIPTIONS, TorchEncoder, exported, left_padded, load

    [transcription] = [t for t in TRANSCRIPTIONS if t.name == case.contender]
    variables = random_variables(make_backbone(config, case.dtype, lora=None))
    with exported(variables, config, None, case.dtype) as export:
        model = load(export, transcription, train=False)
    rows = left_padded(tokens, str(model.device))
    return TorchEncoder(transcription, model, rows, case.thinking_steps), {}


def train_work(case: Case) -> Work:
    """Takes one optimizer step after the other."""
    config = SHAPES[case.backbone]
    setup = set_up(config, case.shape, case.dtype, case.lora)
    kernel = kernel_for(case.attention, config, case.dtype)
    base = base_config(case.shape, case.dtype, case.lora, kernel)
    if case.contender in PYTORCH:
        made = torch_contenders(setup, case.dtype, base.objective, [case.contender])
        return made[case.contender], {}
    config_of = variants(base, case.gradcache, [], case.remat, only=[case.contender])
    with jax.set_mesh(setup.mesh):
        compiled = compile_variant(config_of[case.contender], setup).program
        training = OurTraining(setup)
        training.restart()
    return functools.partial(training.run, compiled), memory_facts(compiled)


WORK: dict[str, Callable[[Case], Work]] = {"encode": encode_work, "train_step": train_work}


def peak_of(case: Case) -> dict[str, Any]:
    """Bytes, as this module's docstring says. To be called in a new process."""
    run, facts = WORK[case.program](case)
    jax.block_until_ready(run())
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # or a run could use what the making left over
    before = resident("self", "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    for _ in range(case.repeats):
        jax.block_until_ready(run())
    peak = resident("self", "VmHWM")
    host = {"peak": peak, "before": before, "working": peak - before}
    found = {f"host_{name}_bytes": value for name, value in host.items()}
    return found | device_peak(case) | facts


def device_peak(case: Case) -> dict[str, Any]:
    """The allocator's peak on an accelerator; nothing on the CPU, whose memory is the host's."""
    if jax.default_backend() == "cpu":
        return {}
    if case.contender in PYTORCH:
        import torch

        return {"device_peak_bytes": torch.cuda.max_memory_allocated()}
    stats = jax.devices()[0].memory_stats() or {}
    return {"device_peak_bytes": stats["peak_bytes_in_use"]}


@dataclass(frozen=True)
class Surroundings:
    """What is known of the machine."""

    environment: dict[str, Any]
    torch_threads: int | None
    why_no_torch: dict[str, str | None]
    """By program; None where PyTorch can run it."""


def surroundings(dtype: Dtype, lora: LoraConfig | None) -> Surroundings:
    """To be called in a new process: it takes the device."""
    absent = {"encode": torch_unusable(), "train_step": why_no_torch(dtype, lora)}
    return Surroundings(environment(), torch_threads(), absent)


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> Report:
    """Runs every case in a process of its own, one after the other."""
    backbone = TINY if options.quick else options.backbone
    lora = None if options.full else LoraConfig(rank=options.lora_rank, alpha=options.lora_rank / 2)
    gradcache, remat, programs = options.gradcache, options.remat, options.programs
    (rows, width), shape = options.batch, train_shape(options)
    if options.quick:
        (rows, width), gradcache, remat = (2, 8), [], []
    # on a GPU this process must not take the memory of those that are measured
    around = in_new_process(surroundings, options.dtype, lora)
    settings = {
        "backbone": as_dict(SHAPES[backbone]),
        "dtype": options.dtype,
        "attention": options.attention,
        "thinking_steps": options.thinking_steps,
        "shape": vars(shape),
        "lora": None if lora is None else as_dict(lora),
        "torch_threads": around.torch_threads,
    }
    report = Report("memory", arguments, settings, around.environment)
    base = base_config(shape, options.dtype, lora)
    wanted: dict[Any, list[str]] = {
        "encode": [OURS],
        "train_step": list(variants(base, gradcache, [], remat, only=options.only)),
    }
    for program in programs:
        reason = "--no_torch" if options.no_torch else around.why_no_torch[program]
        if reason is None:
            wanted[program] += PYTORCH
        else:
            report.notes.append(f"PyTorch's {program} is not measured: {reason}.")
        for contender in wanted[program]:
            case = Case(
                program,
                contender,
                backbone,
                options.dtype,
                options.attention,
                rows,
                width,
                options.thinking_steps,
                shape,
                lora,
                tuple(gradcache),
                tuple(remat),
                options.repeats,
            )
            row = {"program": program, "contender": contender}
            row["work"] = f"{rows}×{width}" if program == "encode" else _sizes(shape)
            report.rows.append(row | in_new_process(peak_of, case))
    return report


def _sizes(shape: TrainShape) -> str:
    return (
        f"{shape.queries} × ({shape.query_tokens}, {shape.explicit_tokens}, "
        f"{shape.documents_per_query}×{shape.document_tokens})"
    )


def _mib(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: f"{row[key] / MIB:,.0f}" if key in row else ""


COLUMNS = {
    "contender": lambda row: row["contender"],
    "program": lambda row: row["program"],
    "work": lambda row: row["work"],
    "host peak, MiB": _mib("host_peak_bytes"),
    "before": _mib("host_before_bytes"),
    "working": _mib("host_working_bytes"),
    "device peak, MiB": _mib("device_peak_bytes"),
    "XLA temporaries, MiB": _mib("temp_bytes"),
    "XLA arguments, MiB": _mib("argument_bytes"),
}


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = command_line("memory", __doc__, repeats=2)
    add_backbone(parser)
    add_contenders(parser)
    add_train_shape(parser)
    parser.add_argument("--batch", type=rows_by_tokens, default=(8, 512), help="default 8x512")
    parser.add_argument("--full", action="store_true", help="train all weights, not adapters")
    parser.add_argument("--lora_rank", type=positive, default=64, help="default 64")
    parser.add_argument("--gradcache", type=positive, nargs="*", default=[2, 4])
    parser.add_argument("--remat", choices=("dots", "full"), nargs="*", default=["dots", "full"])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of our steps: fast and these")
    parser.add_argument("--programs", choices=WORK, nargs="+", default=[*WORK])
    options = parser.parse_args(arguments)
    measure(options, arguments).finish(COLUMNS, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
