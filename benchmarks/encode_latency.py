"""Time to embed one batch: ours, the published PyTorch loop, a tuned PyTorch loop.

    python -m benchmarks.encode_latency [--backbone NAME] [--batches 1x128 8x512] [--steps 1 3]

For every batch shape (rows x tokens) and number K of thinking steps the contenders are timed in
turn. Rows are full: no contender gains from padding. Ours is the pure `laser_jax.encode` under
`jax.jit`, on unstacked layers. See benchmarks/torch_reference.py for PyTorch's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from benchmarks.encode_contenders import OURS, EncodeContenders
from benchmarks.measure import (
    Report,
    command_line,
    environment,
    positive,
    ratio_cell,
    seconds_cell,
    time_alternating,
    timing_fields,
    torch_threads,
)
from benchmarks.workload import (
    SHAPES,
    TINY,
    add_backbone,
    add_contenders,
    add_torch_compile,
    random_tokens,
)
from laser_jax.config import as_dict

BATCHES = [(1, 128), (8, 128), (8, 512)]


def rows_by_tokens(text: str) -> tuple[int, int]:
    """An argparse type: `8x128` is 8 rows of 128 tokens."""
    rows, found, tokens = text.partition("x")
    if not found:
        raise argparse.ArgumentTypeError(f"ROWSxTOKENS is wanted, such as 8x128, got {text}")
    return positive(rows), positive(tokens)


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> Report:
    """Checks and times the contenders on every batch.

    Raises:
        BenchmarkError: two contenders give different vectors.
    """
    backbone = SHAPES[TINY if options.quick else options.backbone]
    batches, steps = ([(2, 8)], [2]) if options.quick else (options.batches, options.steps)
    settings = {
        "backbone": as_dict(backbone),
        "dtype": options.dtype,
        "repeats": options.repeats,
        "torch_threads": torch_threads(),
    }
    encoders = EncodeContenders(
        backbone,
        options.dtype,
        options.attention,
        with_torch=not options.no_torch,
        torch_compile=options.torch_compile,
    )
    settings["attention"] = encoders.kernel
    report = Report("encode_latency", arguments, settings, environment())
    report.notes += encoders.notes
    rng = np.random.default_rng(0)
    for rows, width in batches:
        tokens = random_tokens(rng, rows, width, backbone.vocab_size)
        for K in steps:
            contenders = encoders.on(tokens, K)
            times = time_alternating(contenders, repeats=options.repeats)
            report.rows += [
                {"rows": rows, "tokens": width, "thinking_steps": K, "contender": name}
                | timing_fields(times, name, base=OURS)
                | {"rows_per_second": rows / float(np.median(times[name]))}
                for name in contenders
            ]
    return report


COLUMNS = {
    "encoder": lambda row: row["contender"],
    "batch": lambda row: f"{row['rows']}×{row['tokens']}",
    "K": lambda row: str(row["thinking_steps"]),
    "time (quartiles)": lambda row: seconds_cell(row["seconds"]),
    "× ours (quartiles)": lambda row: ratio_cell(row["ratio"]),
    "rows/s": lambda row: f"{row['rows_per_second']:.1f}",
}


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = command_line("encode_latency", __doc__)
    add_backbone(parser)
    add_contenders(parser)
    add_torch_compile(parser)
    shapes = " ".join(f"{rows}x{tokens}" for rows, tokens in BATCHES)
    parser.add_argument(
        "--batches", type=rows_by_tokens, nargs="+", default=BATCHES, help=f"default {shapes}"
    )
    parser.add_argument("--steps", type=positive, nargs="+", default=[1, 3], help="default 1 3")
    options = parser.parse_args(arguments)
    measure(options, arguments).finish(COLUMNS, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
