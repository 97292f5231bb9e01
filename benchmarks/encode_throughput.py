"""Documents a second: ours, the published PyTorch loop, tuned PyTorch.

    python -m benchmarks.encode_throughput [--backbone NAME] [--full 8x128 8x512] [--documents 192]

Full batches: `--batches` batches of rows that are all as long, which nobody gains from by sorting.

The mix: `--documents` documents of the lengths that entailmentbank (single facts) and scifact
(abstracts) have in equal parts, shuffled by a fixed seed. The tokens are random, as speed depends
on lengths alone, and all contenders start from tokens. What they do with the lengths is the point:

ours                    LatentEncoder: sorted, at most `--batch_tokens` tokens a batch, few widths
published PyTorch       `--batch_size` rows in the order of arrival, padded to the longest of them
tuned, as published     tuned PyTorch with those batches
tuned, sorted           tuned PyTorch with our batches, padded to the longest row and not to a width

See benchmarks/torch_reference.py for what published and tuned mean.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import flops, measure, workload
from benchmarks.encoders import OURS, Encoders, require_same_vectors
from benchmarks.measure import Report, Row, Run, timing_fields
from benchmarks.targets import TUNED
from laser_jax.batch import Tokens
from laser_jax.data.buckets import IndexedRow
from laser_jax.data.tokenization import right_pad
from laser_jax.inference.batch_encoder import LatentEncoder
from laser_jax.train.throughput import forward_flops

FULL = [(8, 128), (8, 512)]
QUARTILES = (18, 24, 64, 257, 512)
"""Tokens of the shortest document of the mix, of the quarters and of the longest, measured on 192
prompts of both data sets, chat template included, by a byte-level BPE of 16,000 tokens trained on
them; at most 512 are kept."""
SHORT_BATCHES = (1, 8)
"""Of ours, for what is left over; those of `LatentRetriever`."""
AS_PUBLISHED, SORTED = "tuned, as published", "tuned, sorted"


@dataclass(frozen=True)
class Workload:
    """Rows to embed, and how each side cuts them into batches."""

    name: str
    rows: list[list[int]]
    batch_size: int
    """PyTorch's."""
    our_batch_size: int
    our_batch_tokens: int
    sorting_matters: bool


def workloads(options: argparse.Namespace, vocab_size: int) -> Iterator[Workload]:
    """The full batches, and the mix."""
    rng = np.random.default_rng(0)
    for rows, width in options.full:
        tokens = rng.integers(0, vocab_size, (options.batches * rows, width)).tolist()
        yield Workload(f"{rows}×{width}", tokens, rows, rows, rows * width, False)
    if options.documents > 0:
        quantiles = np.linspace(0, 1, options.documents)
        sorted_ = np.interp(quantiles, np.linspace(0, 1, len(QUARTILES)), QUARTILES).astype(int)
        mix = [rng.integers(0, vocab_size, n).tolist() for n in rng.permutation(sorted_)]
        ours, theirs = options.our_batch_size, options.batch_size
        yield Workload("mix", mix, theirs, ours, options.batch_tokens, True)


def arrival_batches(workload: Workload) -> list[list[IndexedRow]]:
    """Cut in the order of arrival."""
    indexed: list[IndexedRow] = list(enumerate(workload.rows))
    size = workload.batch_size
    return [indexed[start : start + size] for start in range(0, len(indexed), size)]


def padded(batch: Sequence[IndexedRow]) -> Tokens:
    """To the longest row."""
    rows = [row for _, row in batch]
    return Tokens(*right_pad(rows, 0, max(map(len, rows))))


def contenders_on(
    workload: Workload, encoders: Encoders, thinking_steps: int
) -> dict[str, tuple[Run, int]]:
    """By name what embeds the whole of a workload, and the tokens that it computes with padding."""
    encoder = LatentEncoder(
        encoders.variables,
        encoders.config,
        batch_size=workload.our_batch_size,
        batch_tokens=workload.our_batch_tokens,
        short_batches=SHORT_BATCHES,
        attention=encoders.kernel,
    )
    sorted_batches = list(encoder.buckets.batches([list(enumerate(workload.rows))]))
    shapes = [encoder.buckets.shape([row for _, row in batch]) for batch in sorted_batches]
    found: dict[str, tuple[Run, int]] = {
        OURS: (
            lambda: encoder.encode_tokens(workload.rows, [thinking_steps])[0],
            sum(rows * width for rows, width in shapes),
        )
    }
    for transcription, model in encoders.torch_models.items():
        ways = {transcription.name: arrival_batches(workload)}
        if transcription.name == TUNED and workload.sorting_matters:
            ways = {AS_PUBLISHED: arrival_batches(workload), SORTED: sorted_batches}
        for name, batches in ways.items():
            found[name] = torch_run(transcription, model, batches, thinking_steps)
    return found


def torch_run(
    transcription: Any, model: Any, batches: Sequence[Sequence[IndexedRow]], thinking_steps: int
) -> tuple[Run, int]:
    """A transcription on these batches, its vectors in the order of the rows."""
    tokens = [padded(batch) for batch in batches]
    encoders = [transcription.encoder(model, t, thinking_steps) for t in tokens]
    places = np.argsort([place for batch in batches for place, _ in batch])

    def run() -> np.ndarray:
        return np.concatenate([encode().cpu().numpy() for encode in encoders])[places]

    return run, sum(t.ids_BT.size for t in tokens)


def fill(options: argparse.Namespace, report: Report) -> None:
    """Checks and times the contenders on every workload.

    Raises:
        BenchmarkError: two contenders give different vectors.
    """
    encoders = Encoders.that_can_run(options, report)
    K, backbone = options.thinking_steps, encoders.config.backbone
    for workload_ in workloads(options, backbone.vocab_size):
        contenders = contenders_on(workload_, encoders, K)
        runs = {name: run for name, (run, _) in contenders.items()}
        wanted_ND = runs[OURS]()
        for name in runs.keys() - {OURS}:
            require_same_vectors(name, runs[name](), wanted_ND, options.dtype)
        times, best = flops.time_beside_ceilings(runs, options)
        lengths = list(map(len, workload_.rows))
        needed = forward_flops(backbone, flops.encode_reading(lengths, K))
        for name, (_, computed) in contenders.items():
            row: Row = {"contender": name, "workload": workload_.name, "thinking_steps": K}
            row |= {"documents": len(lengths), "tokens": sum(lengths), "flops": needed}
            row |= timing_fields(times, name, base=OURS)
            median = row["seconds"]["median"]
            row["documents_per_second"] = len(lengths) / median
            row["tokens_per_second"] = sum(lengths) / median
            row["padding_share"] = 1 - sum(lengths) / computed
            report.rows.append(row | best.shares(needed, median))


COLUMNS = {
    "encoder": measure.value("contender"),
    "documents": measure.value("workload"),
    "K": measure.value("thinking_steps"),
    "time (quartiles)": measure.seconds(),
    "× ours (quartiles)": measure.ratio(),
    "docs/s": measure.value("documents_per_second", ",.1f"),
    "tokens/s": measure.value("tokens_per_second", ",.0f"),
    "padding": measure.value("padding_share", ".0%"),
    "of large matmul": measure.value("of_matmul", ".0%"),
    "MFU, data sheet": measure.value("mfu", ".0%"),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    workload.add_contenders(parser)
    measure.add_shapes(parser, "full", ("rows", "tokens"), FULL)
    numbers = {
        "batches": (2, "of each full shape"),
        "thinking_steps": (3, "K"),
        "batch_size": (8, "rows of PyTorch's batches in the mix"),
        "our_batch_size": (16, "the most rows of ours; for CPUs"),
        "batch_tokens": (2048, "the most tokens of ours; for CPUs"),
    }
    measure.add_numbers(parser, numbers)
    text = "of the mix, 0 for none; default 192"
    parser.add_argument("--documents", type=int, default=192, help=text)


QUICK = {"backbone": workload.TINY, "full": [(2, 32)], "documents": 8}
QUICK |= {"batch_size": 4, "our_batch_size": 4}
PROGRAM = measure.Program(
    "encode_throughput", __doc__, fill, COLUMNS, add_flags, quick=QUICK, repeats=5
)

if __name__ == "__main__":
    PROGRAM.main(sys.argv[1:])
