"""What thinking costs: the time to embed a batch with K thinking steps, against K = 1.

    python -m benchmarks.thinking_overhead [--backbone NAME] [--batch 8x128] [--steps 1 2 3 5 8]

Every encoder at every K is timed in turn, and each is compared with itself at K = 1, which is an
ordinary last-token retriever. See benchmarks/torch_reference.py for PyTorch's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from benchmarks.encode_contenders import EncodeContenders
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
    torch_threads,
)
from benchmarks.workload import SHAPES, TINY, add_backbone, add_contenders, random_tokens
from laser_jax.config import as_dict

STEPS = [1, 2, 3, 5, 8]


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> Report:
    """Checks and times every encoder at every K.

    Raises:
        BenchmarkError: two encoders give different vectors.
    """
    backbone = SHAPES[TINY if options.quick else options.backbone]
    rows, width = (2, 8) if options.quick else options.batch
    steps = [1, 2] if options.quick else sorted({1, *options.steps})
    settings = {
        "backbone": as_dict(backbone),
        "dtype": options.dtype,
        "rows": rows,
        "tokens": width,
        "repeats": options.repeats,
        "torch_threads": torch_threads(),
    }
    encoders = EncodeContenders(
        backbone, options.dtype, options.attention, with_torch=not options.no_torch
    )
    settings["attention"] = encoders.kernel
    report = Report("thinking_overhead", arguments, settings, environment())
    report.notes += encoders.notes
    tokens = random_tokens(np.random.default_rng(0), rows, width, backbone.vocab_size)
    contenders: dict[tuple[str, int], Run] = {
        (name, K): run for K in steps for name, run in encoders.on(tokens, K).items()
    }
    times = time_alternating(contenders, repeats=options.repeats)
    report.rows = [
        {"contender": name, "thinking_steps": K} | timing_fields(times, (name, K), base=(name, 1))
        for name, K in sorted(contenders)
    ]
    return report


COLUMNS = {
    "encoder": lambda row: row["contender"],
    "K": lambda row: str(row["thinking_steps"]),
    "time (quartiles)": lambda row: seconds_cell(row["seconds"]),
    "× its K = 1 (quartiles)": lambda row: ratio_cell(row["ratio"]),
}


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = command_line("thinking_overhead", __doc__)
    add_backbone(parser)
    add_contenders(parser)
    parser.add_argument("--batch", type=rows_by_tokens, default=(8, 128), help="default 8x128")
    parser.add_argument(
        "--steps",
        type=positive,
        nargs="+",
        default=STEPS,
        help=f"default {' '.join(map(str, STEPS))}; 1 is always among them",
    )
    options = parser.parse_args(arguments)
    measure(options, arguments).finish(COLUMNS, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
