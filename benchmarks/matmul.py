"""The matmuls that a model is made of, alone: XLA's and PyTorch's.

    python -m benchmarks.matmul [--backbone NAME] [--rows 8 1024 4096]

Every contender multiplies the same random matrices and must give the same product. Rows are tokens
that are read (batch × width), or the few rows of a thinking step. Where a program is as fast as its
matmuls, this says how much faster than PyTorch it can be.

projection    [rows, D] x [D, F]
LM head       [rows, D] x [V, D] transposed; only where rows are few, as in a thinking step
soft token    [rows, V] x [V, D]; likewise
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import (
    BenchmarkError,
    Report,
    Run,
    command_line,
    environment,
    positive,
    ratio_cell,
    seconds_cell,
    time_alternating,
    timing_fields,
    torch_device,
    torch_threads,
    torch_unusable,
)
from benchmarks.workload import SHAPES, TINY, add_backbone
from laser_jax.config import BackboneConfig, as_dict
from laser_jax.modeling.attention import exact_matmuls

OURS, TORCH = "XLA", "PyTorch"
FEW = 64
"""More rows than a thinking step has do not meet the vocabulary."""


def shapes_of(backbone: BackboneConfig, rows: int) -> dict[str, tuple[int, int, int, bool]]:
    """Rows, inner and outer size, and whether the weight lies transposed, by name."""
    D, F, V = backbone.hidden_size, backbone.intermediate_size, backbone.vocab_size
    shapes = {"projection": (rows, D, F, False)}
    if rows <= FEW:
        shapes |= {"LM head": (rows, D, V, True), "soft token": (rows, V, D, False)}
    return shapes


def contenders_for(x: np.ndarray, w: np.ndarray, transposed: bool, dtype: Any) -> dict[str, Run]:
    """Those that can run here, by name."""

    @jax.jit
    def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
        with exact_matmuls(dtype):
            return x @ (w.T if transposed else w)

    arrays = [jnp.asarray(a, dtype) for a in (x, w)]
    found: dict[str, Run] = {OURS: functools.partial(multiply, *arrays)}
    if torch_unusable() is None:
        import torch

        device = torch_device()
        tx, tw = (torch.from_numpy(a).to(device, getattr(torch, dtype)) for a in (x, w))

        @torch.inference_mode()
        def torch_multiply() -> Any:
            product = tx @ (tw.T if transposed else tw)
            if device == "cuda":
                torch.cuda.synchronize()
            return product

        found[TORCH] = torch_multiply
    return found


def as_float32(product: Any) -> np.ndarray:
    """The product on the host."""
    if isinstance(product, jax.Array):
        return np.asarray(product, np.float32)
    return product.float().cpu().numpy()


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> Report:
    """Checks and times every product.

    Raises:
        BenchmarkError: two contenders give different products.
    """
    backbone = SHAPES[TINY if options.quick else options.backbone]
    settings = {
        "backbone": as_dict(backbone),
        "dtype": options.dtype,
        "repeats": options.repeats,
        "torch_threads": torch_threads(),
    }
    report = Report("matmul", arguments, settings, environment())
    if reason := torch_unusable():
        report.notes.append(f"PyTorch is not measured: {reason}.")
    rng = np.random.default_rng(0)
    for rows in [2] if options.quick else options.rows:
        for name, (m, inner, outer, transposed) in shapes_of(backbone, rows).items():
            x = rng.standard_normal((m, inner), np.float32) / np.float32(inner**0.5)
            shape = (outer, inner) if transposed else (inner, outer)
            contenders = contenders_for(
                x, rng.standard_normal(shape, np.float32), transposed, options.dtype
            )
            wanted = as_float32(contenders[OURS]())
            for other, run in contenders.items():
                off = float(np.abs(as_float32(run()) - wanted).max())
                if not off <= (1e-4 if options.dtype == "float32" else 0.1):
                    raise BenchmarkError(f"{other}'s {name} is another product: {off:.2g} off")
            times = time_alternating(contenders, repeats=options.repeats)
            flops = 2 * m * inner * outer
            moved = (m * inner + inner * outer + m * outer) * jnp.dtype(options.dtype).itemsize
            for contender in contenders:
                seconds = float(np.median(times[contender]))
                report.rows.append(
                    {"contender": contender, "what": name, "rows": m, "shape": [inner, outer]}
                    | timing_fields(times, contender, base=OURS)
                    | {"flops_per_second": flops / seconds, "bytes_per_second": moved / seconds}
                )
    return report


COLUMNS = {
    "matmul": lambda row: row["what"],
    "rows × weight": lambda row: f"{row['rows']:,} × [{row['shape'][0]:,}, {row['shape'][1]:,}]",
    "by": lambda row: row["contender"],
    "time (quartiles)": lambda row: seconds_cell(row["seconds"]),
    "× XLA's (quartiles)": lambda row: ratio_cell(row["ratio"]),
    "GFLOP/s": lambda row: f"{row['flops_per_second'] / 1e9:,.0f}",
    "GB/s": lambda row: f"{row['bytes_per_second'] / 1e9:,.1f}",
}


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = command_line("matmul", __doc__)
    add_backbone(parser)
    parser.add_argument(
        "--rows", type=positive, nargs="+", default=[8, 1024, 4096], help="default 8 1024 4096"
    )
    options = parser.parse_args(arguments)
    measure(options, arguments).finish(COLUMNS, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
