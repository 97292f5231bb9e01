"""How long it takes until a program is ready: training step and encode, scanned and unscanned.

    python -m benchmarks.compile_time [--backbones NAME ...] [--output FILE]

Each repeat starts two processes: one with an empty persistent cache (cold), one with the cache that
the first filled (warm). Scanned layers are compiled once and looped over; unscanned ones are laid
out one behind the other. Both trace the program anew; the cache saves the compilation alone.
Nothing but shapes is held, so that an 8B model needs no memory for its weights.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks.measure import (
    BenchmarkError,
    Report,
    Spread,
    command_line,
    environment,
    in_new_process,
    paired_ratio,
    ratio_cell,
    seconds_cell,
)
from benchmarks.train_step import OPTIMIZER, STEPS, base_config, one_device_mesh
from benchmarks.workload import (
    SHAPES,
    SMALL,
    TINY,
    TrainShape,
    add_dtype,
    add_train_shape,
    make_backbone,
    random_batch,
    random_variables,
    train_shape,
)
from laser_jax import encode
from laser_jax.config import Dtype, LoraConfig, RetrieverConfig, as_dict
from laser_jax.modeling.backbone import unstack_layers
from laser_jax.step import (
    abstract_state,
    jit_train_step,
    learning_rate_schedule,
    make_optimizer,
    make_train_step,
)


@dataclass(frozen=True)
class Case:
    """A program to compile."""

    backbone: str
    program: str
    """A key of `PROGRAMS`."""
    scanned: bool
    dtype: Dtype
    shape: TrainShape
    """Of the training batch; `encode` reads its queries."""


def lower_train_step(case: Case) -> Any:
    """The training step, traced and lowered."""
    config = SHAPES[case.backbone]
    settings = base_config(case.shape, case.dtype, LoraConfig())
    backbone = make_backbone(config, case.dtype, settings.lora)
    backbone = backbone.clone(param_dtype=jnp.float32, scan_layers=case.scanned)
    optimizer, mesh = make_optimizer(OPTIMIZER, STEPS), one_device_mesh()
    step = make_train_step(backbone, settings, optimizer, learning_rate_schedule(OPTIMIZER, STEPS))
    abstract = abstract_state(backbone, optimizer, mesh, jnp.dtype(case.dtype))
    with jax.set_mesh(mesh):
        return jit_train_step(step, abstract, mesh).lower(
            abstract, random_batch(case.shape, config.vocab_size), None
        )


def lower_encode(case: Case) -> Any:
    """The pure `encode`, traced and lowered."""
    config = SHAPES[case.backbone]
    backbone = make_backbone(config, case.dtype, None)
    variables = jax.eval_shape(lambda: random_variables(backbone))
    if not case.scanned:
        variables = jax.eval_shape(unstack_layers, variables)
    rows = jax.ShapeDtypeStruct((case.shape.queries, case.shape.query_tokens), jnp.int32)
    retriever = RetrieverConfig(config, case.shape.thinking_steps, dtype=case.dtype)
    return jax.jit(functools.partial(encode, config=retriever)).lower(variables, rows, rows)


PROGRAMS: dict[str, Callable[[Case], Any]] = {
    "train_step": lower_train_step,
    "encode": lower_encode,
}


@dataclass(frozen=True)
class Ready:
    """What it took to make a program ready."""

    trace_seconds: float
    compile_seconds: float
    cached: bool
    """Whether the persistent cache held it."""


def make_ready(cases: Sequence[Case], cache: Path) -> list[Ready]:
    """Traces and compiles every case with the persistent cache in `cache`. To be called in a new
    process, which has compiled nothing yet."""
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.jit(lambda x: x + 1).lower(jnp.zeros(3)).compile()  # starts the backend
    ready = []
    for case in cases:
        jax.clear_caches()  # what the case before has traced
        began = time.perf_counter()
        lowered = PROGRAMS[case.program](case)
        traced, entries = time.perf_counter(), set(cache.glob("*-cache"))
        started = time.perf_counter()
        lowered.compile()
        taken = time.perf_counter() - started
        ready.append(Ready(traced - began, taken, set(cache.glob("*-cache")) == entries))
    return ready


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> Report:
    """Compiles every case cold and warm, `options.repeats` times.

    Raises:
        BenchmarkError: the cache held a program of a cold process, or lacked one of a warm process.
    """
    shape = train_shape(options)
    backbones = [TINY] if options.quick else options.backbones
    cases = [
        Case(backbone, program, scanned, options.dtype, shape)
        for backbone in backbones
        for program in options.programs
        for scanned in (True, False)
    ]
    settings = {
        "backbones": {name: as_dict(SHAPES[name]) for name in backbones},
        "dtype": options.dtype,
        "shape": vars(shape),
        "lora": as_dict(LoraConfig()),
        "repeats": options.repeats,
    }
    # on a GPU this process must not take the memory of those that compile
    report = Report("compile_time", arguments, settings, in_new_process(environment))
    cold: list[list[Ready]] = []
    warm: list[list[Ready]] = []
    for _ in tqdm(range(options.repeats), desc="compile_time", disable=None):
        with tempfile.TemporaryDirectory() as directory:
            for runs, cached in ((cold, False), (warm, True)):
                runs.append(in_new_process(make_ready, cases, Path(directory)))
                wrong = [
                    case for case, r in zip(cases, runs[-1], strict=True) if r.cached != cached
                ]
                if wrong:
                    state = "lacked" if cached else "already held"
                    raise BenchmarkError(f"the persistent cache {state} {wrong}")
    for i, case in enumerate(cases):
        cold_seconds, warm_seconds = (
            [run[i].compile_seconds for run in runs] for runs in (cold, warm)
        )
        trace_seconds = [run[i].trace_seconds for run in cold]
        report.rows.append(
            {
                "backbone": case.backbone,
                "program": case.program,
                "layers": "scanned" if case.scanned else "unscanned",
                "trace": vars(Spread.of(trace_seconds)) | {"repeats": trace_seconds},
                "cold": vars(Spread.of(cold_seconds)) | {"repeats": cold_seconds},
                "warm": vars(Spread.of(warm_seconds)) | {"repeats": warm_seconds},
                "ratio": vars(paired_ratio(warm_seconds, cold_seconds)),
            }
        )
    return report


COLUMNS = {
    "program": lambda row: row["program"],
    "backbone": lambda row: row["backbone"],
    "layers": lambda row: row["layers"],
    "trace (quartiles)": lambda row: seconds_cell(row["trace"]),
    "compile, cold": lambda row: seconds_cell(row["cold"]),
    "compile, warm cache": lambda row: seconds_cell(row["warm"]),
    "warm / cold": lambda row: ratio_cell(row["ratio"]),
}


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = command_line("compile_time", __doc__, repeats=3)
    add_dtype(parser)
    add_train_shape(parser)
    parser.add_argument(
        "--backbones", choices=SHAPES, nargs="+", default=[SMALL], help=f"default {SMALL}"
    )
    parser.add_argument("--programs", choices=PROGRAMS, nargs="+", default=[*PROGRAMS])
    options = parser.parse_args(arguments)
    measure(options, arguments).finish(COLUMNS, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
