"""Time to embed one batch, and what each thinking step costs: ours, published and tuned PyTorch.

    python -m benchmarks.encode_latency [--batches 1x128 8x512] [--num_thinking_steps 1 3]

For every batch shape (rows x tokens) all contenders at all numbers K of thinking steps are timed in
turn. Each is compared with ours at the same K, with itself at K = 1 where 1 is among the steps,
which is an ordinary last-token retriever, and with what the device can do. Rows are full: no
contender gains from padding. Ours is the pure `laser_jax.encode` under `jax.jit` on unstacked
layers. See benchmarks/torch_reference.py for PyTorch's.

Reading the prompts and each thought are two kinds of work: the first is bound by matmuls, the
second by reading the weights. Two ceilings are measured in turn with the encoders, a large matmul
and a large copy, and the roofline is the sum of both kinds at the slower ceiling of each:

    roofline = max(FLOPs / matmul, bytes / copy) of reading + (K - 1) times that of a thought
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from benchmarks import flops, kernels, measure, workload
from benchmarks.encoders import OURS, Encoders
from benchmarks.measure import Report, Row, Run, paired_ratio, positive, timing_fields
from laser_jax.train.throughput import forward_flops

BATCHES = [(1, 128), (8, 128), (8, 512)]


def fill(options: argparse.Namespace, report: Report) -> None:
    """Checks and times the contenders on every batch.

    Raises:
        BenchmarkError: two contenders give different vectors.
    """
    encoders = Encoders.that_can_run(options, report)
    backbone, rng = encoders.config.backbone, np.random.default_rng(0)
    for rows, width in options.batches:
        tokens = workload.random_tokens(rng, rows, width, backbone.vocab_size)
        contenders: dict[tuple[str, int], Run] = {
            (name, K): run
            for K in options.num_thinking_steps
            for name, run in encoders.on(tokens, K).items()
        }
        times, best = flops.time_beside_ceilings(contenders, options)
        for name, K in contenders:
            row: Row = {"rows": rows, "tokens": width, "thinking_steps": K, "contender": name}
            row |= timing_fields(times, (name, K), base=(OURS, K))
            if (name, 1) in times:
                row["over_one_step"] = vars(paired_ratio(times[name, K], times[name, 1]))
            median = row["seconds"]["median"]
            row["rows_per_second"] = rows / median
            lengths = [width] * rows
            needed = forward_flops(backbone, flops.encode_reading(lengths, K))
            row |= best.shares(needed, median)
            least = flops.roofline(lengths, K, backbone, options.dtype, best)
            row["roofline_fraction"] = least / median
            if options.profile and name == OURS:
                row["kernels"] = kernels.profiled(contenders[name, K])
            report.rows.append(row)


COLUMNS = {
    "encoder": measure.value("contender"),
    "batch": measure.batch_cell,
    "K": measure.value("thinking_steps"),
    "time (quartiles)": measure.seconds(),
    "× ours (quartiles)": measure.ratio(),
    "× its K = 1 (quartiles)": measure.ratio("over_one_step"),
    "rows/s": measure.value("rows_per_second", ".1f"),
    "of roofline": measure.value("roofline_fraction", ".0%"),
    "of large matmul": measure.value("of_matmul", ".0%"),
    "MFU, data sheet": measure.value("mfu", ".0%"),
    "kernels": kernels.told,
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    workload.add_contenders(parser)
    measure.add_shapes(parser, "batches", ("rows", "tokens"), BATCHES)
    text = "default 1 3"
    parser.add_argument("--num_thinking_steps", type=positive, nargs="+", default=[1, 3], help=text)
    parser.add_argument("--profile", action="store_true", help="the kernels of ours, by kind")


QUICK = {"backbone": workload.TINY, "batches": [(2, 8)], "num_thinking_steps": [1, 2]}
PROGRAM = measure.Program("encode_latency", __doc__, fill, COLUMNS, add_flags, QUICK)

if __name__ == "__main__":
    PROGRAM.main(sys.argv[1:])
