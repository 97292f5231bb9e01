"""Ours against ours: layers scanned or apart, and the attention kernels that can run here.

    python -m benchmarks.encode_variants [--backbone NAME] [--batch 8x512] [--steps 1 3]

All of them embed the same batch from the same weights and must give the same vectors.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.encode_contenders import require_same_vectors
from benchmarks.encode_latency import rows_by_tokens
from benchmarks.measure import (
    Report,
    Run,
    command_line,
    environment,
    positive,
    ratio_cell,
    seconds_cell,
    time_alternating,
    timing_fields,
)
from benchmarks.workload import (
    SHAPES,
    TINY,
    add_backbone,
    kernel_for,
    make_backbone,
    random_tokens,
    random_variables,
)
from laser_jax import encode
from laser_jax.config import AttentionKernel, RetrieverConfig, as_dict
from laser_jax.modeling.backbone import unstack_layers

BASE = "layers apart"


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> Report:
    """Checks and times every variant at every K.

    Raises:
        BenchmarkError: two of them give different vectors.
    """
    backbone = SHAPES[TINY if options.quick else options.backbone]
    rows, width = (2, 8) if options.quick else options.batch
    steps = [2] if options.quick else options.steps
    chosen = kernel_for("auto", backbone, options.dtype)
    kernels: dict[AttentionKernel, None] = dict.fromkeys((chosen, "xla"))
    settings = {
        "backbone": as_dict(backbone),
        "dtype": options.dtype,
        "kernels": list(kernels),
        "repeats": options.repeats,
    }
    report = Report("encode_variants", arguments, settings, environment())
    stacked = random_variables(make_backbone(backbone, options.dtype, lora=None))
    layouts = {BASE: unstack_layers(stacked), "layers scanned": stacked}
    tokens = random_tokens(np.random.default_rng(0), rows, width, backbone.vocab_size)
    ids_BT = jnp.asarray(tokens.ids_BT)
    mask_BT = jnp.ones_like(ids_BT)
    for K in steps:
        contenders: dict[str, Run] = {}
        ready: dict[str, float] = {}
        for layout, variables in layouts.items():
            for kernel in kernels:
                program = functools.partial(
                    encode,
                    config=RetrieverConfig(backbone, K, dtype=options.dtype),
                    attention=kernel,
                )
                name, began = f"{layout}, {kernel}", time.perf_counter()
                compiled: Any = jax.jit(program).lower(variables, ids_BT, mask_BT).compile()
                ready[name] = time.perf_counter() - began
                contenders[name] = functools.partial(compiled, variables, ids_BT, mask_BT)
        base = next(iter(contenders))
        wanted_BD = np.asarray(contenders[base]())
        for name, run in contenders.items():
            require_same_vectors(name, np.asarray(run()), wanted_BD, options.dtype)
        times = time_alternating(contenders, repeats=options.repeats)
        report.rows += [
            {"variant": name, "rows": rows, "tokens": width, "thinking_steps": K}
            | timing_fields(times, name, base=base)
            | {"ready_seconds": ready[name]}
            for name in contenders
        ]
    return report


COLUMNS = {
    "variant": lambda row: row["variant"],
    "batch": lambda row: f"{row['rows']}×{row['tokens']}",
    "K": lambda row: str(row["thinking_steps"]),
    "time (quartiles)": lambda row: seconds_cell(row["seconds"]),
    "× the first (quartiles)": lambda row: ratio_cell(row["ratio"]),
    "trace and compile, s": lambda row: f"{row['ready_seconds']:.1f}",
}


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = command_line("encode_variants", __doc__)
    add_backbone(parser)
    parser.add_argument("--batch", type=rows_by_tokens, default=(8, 512), help="default 8x512")
    parser.add_argument("--steps", type=positive, nargs="+", default=[1, 3], help="default 1 3")
    options = parser.parse_args(arguments)
    jax.config.update("jax_enable_compilation_cache", False)  # the compile times are to be real
    measure(options, arguments).finish(COLUMNS, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
