"""Where the device's time goes: the kernels of `encode` or of a training step, by kind.

    python -m benchmarks.kernels --program encode [--batch 8x512] [--steps 3] [--hlo FILE]
    python -m benchmarks.kernels --program train_step --backbone qwen3-0.6b --dtype bfloat16

A profile of `--repeats` runs, read with jax's own reader. Kinds are the names that XLA and the
libraries give their kernels, without their numbers; matmuls and attention are put together whatever
library they come from. Times are of one run, the mean of all. What no kernel fills is `idle`: it is
of the span from the first kernel of a run to its last. `--hlo` also writes the compiled program.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.profiler import ProfileData

from benchmarks.encode_latency import rows_by_tokens
from benchmarks.measure import (
    BenchmarkError,
    Report,
    alone,
    command_line,
    environment,
    new_file,
    positive,
)
from benchmarks.train_step import OurTraining, base_config, compile_variant, set_up
from benchmarks.workload import (
    SHAPES,
    TINY,
    add_backbone,
    add_train_shape,
    drawn_unstacked,
    kernel_for,
    random_tokens,
    train_shape,
)
from laser_jax import encode
from laser_jax.config import LoraConfig, RetrieverConfig, as_dict

KINDS = (
    ("attention", r"fmha|flash|sdpa|cudnn"),
    ("matmul", r"gemm|nvjet|cutlass|xmma|cublas|wgmma|splitK|convolution|\bdot\b"),
    ("copy", r"memcpy|memset"),
)
IDLE = "idle"
LEAST_SHARE = 0.005
"""Kinds of less are one row of the report's table; the JSON has them all."""


@dataclass(frozen=True)
class Kernel:
    """A piece of the device's time, in nanoseconds."""

    name: str
    start: float
    end: float


def kind_of(name: str) -> str:
    """The kind of a kernel of that name: one of KINDS, or the name without its numbers."""
    for kind, pattern in KINDS:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    bare = re.sub(r"^void |[<(].*", "", name)
    return re.sub(r"([._]\d+)+$", "", bare)


def kernels_of(profile: ProfileData) -> list[Kernel]:  # pyright: ignore
    """What ran on the first device, in order of its beginning. On the CPU these are XLA's
    operations, the events that name one."""

    def events() -> Iterator[Any]:
        for plane in profile.planes:
            on_gpu = plane.name == "/device:GPU:0"
            if not on_gpu and plane.name != "/host:CPU":
                continue
            for line in plane.lines:
                if on_gpu and line.name.startswith("Stream"):
                    yield from line.events
                elif not on_gpu and jax.default_backend() == "cpu":
                    yield from (e for e in line.events if "hlo_op" in dict(e.stats))

    found = (Kernel(e.name, e.start_ns, e.start_ns + e.duration_ns) for e in events())
    return sorted(found, key=lambda kernel: kernel.start)


def covered(kernels: Iterable[Kernel]) -> float:
    """The time in which at least one of them runs; they come in order of their beginning."""
    total, reached = 0.0, -np.inf
    for kernel in kernels:
        total += max(0.0, kernel.end - max(kernel.start, reached))
        reached = max(reached, kernel.end)
    return float(total)


def profiled(run: Callable[[], Any], repeats: int) -> list[list[Kernel]]:
    """The kernels of each of several runs, which are waited for one by one.

    Raises:
        BenchmarkError: the profile holds no kernels.
    """
    jax.block_until_ready(run())
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # as in training/telemetry.py
    found = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            with alone(), jax.profiler.trace(folder, profiler_options=options):
                jax.block_until_ready(run())
            [file] = Path(folder).rglob("*.xplane.pb")
            found.append(kernels_of(ProfileData.from_file(str(file))))
    if not all(found):
        raise BenchmarkError(f"the profiler saw no kernel on {jax.devices()[0].device_kind}")
    return found


def rows_of(runs: Sequence[Sequence[Kernel]]) -> list[dict[str, Any]]:
    """A row for each kind, the longest first, and one for the time that no kernel fills."""
    seconds: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    span = idle = 0.0
    for kernels in runs:
        whole = max(kernel.end for kernel in kernels) - kernels[0].start
        span += whole
        idle += whole - covered(kernels)
        for kernel in kernels:
            seconds[kind_of(kernel.name)] += kernel.end - kernel.start
            counts[kind_of(kernel.name)] += 1
    scale = 1e-9 / len(runs)
    kinds = [(kind, seconds[kind]) for kind in sorted(seconds, key=lambda kind: -seconds[kind])]
    return [
        {
            "kind": kind,
            "kernels": counts[kind] / len(runs),
            "seconds": taken * scale,
            "share": taken / span,
        }
        for kind, taken in [*kinds, (IDLE, idle)]
    ]


def encoding(options: argparse.Namespace) -> tuple[Any, Callable[[], Any]]:
    """The compiled `encode` of a full batch, layers apart, and its run."""
    backbone = SHAPES[TINY if options.quick else options.backbone]
    rows, width = (2, 8) if options.quick else options.batch
    variables = drawn_unstacked(backbone, options.dtype)
    program = functools.partial(
        encode,
        config=RetrieverConfig(backbone, options.steps, dtype=options.dtype),
        attention=kernel_for("auto", backbone, options.dtype),
    )
    tokens = random_tokens(np.random.default_rng(0), rows, width, backbone.vocab_size)
    ids_BT = jnp.asarray(tokens.ids_BT)
    arguments = (variables, ids_BT, jnp.ones_like(ids_BT))
    compiled = jax.jit(program).lower(*arguments).compile()
    return compiled, functools.partial(compiled, *arguments)


def training(options: argparse.Namespace) -> tuple[Any, Callable[[], Any]]:
    """The compiled LoRA step `fast` of benchmarks/train_step.py, and its run."""
    backbone = SHAPES[TINY if options.quick else options.backbone]
    lora = LoraConfig(rank=options.lora_rank, alpha=options.lora_rank / 2)
    setup = set_up(backbone, train_shape(options), options.dtype, lora)
    kernel = kernel_for("auto", backbone, options.dtype)
    config = base_config(train_shape(options), options.dtype, lora, kernel)
    with jax.set_mesh(setup.mesh):
        program = compile_variant(config, setup).program
    state = OurTraining(setup)
    state.restart()
    return program, functools.partial(state.run, program)


PROGRAMS = {"encode": encoding, "train_step": training}


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> Report:
    """Profiles the program.

    Raises:
        BenchmarkError: the profile holds no kernels.
    """
    settings = {
        "backbone": as_dict(SHAPES[TINY if options.quick else options.backbone]),
        "dtype": options.dtype,
        "program": options.program,
        "shape": vars(train_shape(options)) if options.program == "train_step" else options.batch,
        "repeats": options.repeats,
    }
    report = Report("kernels", arguments, settings, environment())
    compiled, run = PROGRAMS[options.program](options)
    if options.hlo is not None:
        options.hlo.write_text(compiled.as_text())
    report.rows = rows_of(profiled(run, options.repeats))
    return report


COLUMNS = {
    "kind": lambda row: row["kind"],
    "kernels": lambda row: f"{row['kernels']:g}",
    "ms": lambda row: f"{1000 * row['seconds']:.3f}",
    "share": lambda row: f"{row['share']:.1%}",
}


def shown_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the report's table: small kinds are put together, before what is idle."""
    small = [row for row in rows if row["share"] < LEAST_SHARE and row["kind"] != IDLE]
    if len(small) < 2:
        return list(rows)
    sums = {key: sum(row[key] for row in small) for key in ("kernels", "seconds", "share")}
    large = [row for row in rows if row not in small]
    return [*large[:-1], {"kind": f"{len(small)} kinds of less", **sums}, large[-1]]


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = command_line("kernels", __doc__, repeats=3)
    parser.add_argument("--program", choices=PROGRAMS, default="encode", help="default encode")
    add_backbone(parser)
    parser.add_argument("--batch", type=rows_by_tokens, default=(8, 512), help="default 8x512")
    parser.add_argument("--steps", type=positive, default=3, help="default 3")
    add_train_shape(parser)
    parser.add_argument("--lora_rank", type=positive, default=64, help="default 64")
    parser.add_argument("--hlo", type=new_file, help="write the compiled program to this file")
    options = parser.parse_args(arguments)
    measure(options, arguments).finish(COLUMNS, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
