"""Documents a second: ours, the published PyTorch loop, tuned PyTorch.

    python -m benchmarks.encode_throughput [--backbone NAME] [--full 8x128 8x512] [--data FOLDER]

Full batches: `--batches` batches of rows that are all as long, which nobody gains from by sorting.

The mix: `--documents` documents, half of them of entailmentbank (single facts) and half of scifact
(abstracts), drawn and shuffled by a fixed seed. Lengths are those of their prompts, chat template
included, in a byte-level BPE that is trained on the two corpora; the tokens themselves are random,
as speed depends on lengths alone. All contenders start from tokens. What they do with the lengths
is the point:

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
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import flops, measure, workload
from benchmarks.encoders import OURS, Encoders, require_same_vectors
from benchmarks.measure import Report, Row, Run, timing_fields
from laser_jax.batch import Tokens
from laser_jax.config import PromptConfig
from laser_jax.data.buckets import IndexedRow
from laser_jax.data.tokenization import PromptTokenizer, right_pad, train_tokenizer
from laser_jax.evaluate.beir import read_corpus
from laser_jax.inference.batch_encoder import LatentEncoder
from laser_jax.train.throughput import forward_flops

FULL = [(8, 128), (8, 512)]
DATA = ("../shared/data", "shared/data")
SETS = ("entailmentbank", "scifact")
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


def mixed_lengths(
    data: Path, documents: int, longest: int, vocabulary: int, most: int | None
) -> list[int]:
    """Tokens of the prompts of `documents` documents, in the order of their arrival.

    Args:
        most: documents of each corpus that are looked at; None looks at all.
    """
    rng = np.random.default_rng(0)
    corpora = [read_corpus(data / name)[:most] for name in SETS]
    texts = [[document.text for document in corpus] for corpus in corpora]
    tokenizer = train_tokenizer((text for corpus in texts for text in corpus), vocabulary)
    prompts = PromptTokenizer(tokenizer, PromptConfig(document_max_length=longest))
    drawn = [
        corpus[int(i)]
        for corpus in texts
        for i in rng.choice(len(corpus), documents // len(SETS), replace=False)
    ]
    lengths = [len(prompts.document(text)) for text in drawn]
    return [lengths[int(i)] for i in rng.permutation(len(lengths))]


def arrival_batches(workload: Workload) -> list[list[IndexedRow]]:
    """Cut in the order of arrival."""
    indexed: list[IndexedRow] = list(enumerate(workload.rows))
    size = workload.batch_size
    return [indexed[start : start + size] for start in range(0, len(indexed), size)]


def padded(batch: Sequence[IndexedRow]) -> Tokens:
    """To the longest row."""
    rows = [row for _, row in batch]
    return Tokens(*right_pad(rows, 0, max(map(len, rows))))


class Contenders:
    """What embeds the whole of a workload, and how much of it was padding."""

    def __init__(self, encoders: Encoders, workload: Workload, thinking_steps: int):
        self.runs: dict[str, Run] = {}
        self.padding: dict[str, float] = {}
        self._real = sum(map(len, workload.rows))
        encoder = LatentEncoder(
            encoders.variables,
            encoders.config,
            batch_size=workload.our_batch_size,
            batch_tokens=workload.our_batch_tokens,
            short_batches=SHORT_BATCHES,
            attention=encoders.kernel,
        )
        sorted_batches = list(encoder.buckets.batches([list(enumerate(workload.rows))]))
        shapes = [encoder.buckets.shape([row for _, row in b]) for b in sorted_batches]
        self._add(
            OURS,
            lambda: encoder.encode_tokens(workload.rows, [thinking_steps])[0],
            sum(rows * width for rows, width in shapes),
        )
        for transcription, model in encoders.torch_models.items():
            ways = {transcription.name: arrival_batches(workload)}
            if transcription.name.startswith("tuned") and workload.sorting_matters:
                ways = {AS_PUBLISHED: arrival_batches(workload), SORTED: sorted_batches}
            for name, batches in ways.items():
                self._add_torch(name, transcription, model, batches, thinking_steps)

    def _add(self, name: str, run: Run, computed: int) -> None:
        self.runs[name], self.padding[name] = run, 1 - self._real / computed

    def _add_torch(
        self,
        name: str,
        transcription: Any,
        model: Any,
        batches: Sequence[Sequence[IndexedRow]],
        thinking_steps: int,
    ) -> None:
        from benchmarks.torch_reference import TorchEncoder, left_padded

        tokens = [padded(batch) for batch in batches]
        encoders = [
            TorchEncoder(transcription, model, left_padded(t, str(model.device)), thinking_steps)
            for t in tokens
        ]
        places = np.argsort([place for batch in batches for place, _ in batch])

        def run() -> np.ndarray:
            return np.concatenate([encode().cpu().numpy() for encode in encoders])[places]

        self._add(name, run, sum(t.ids_BT.size for t in tokens))


def workloads(options: argparse.Namespace, vocab_size: int, report: Report) -> Iterator[Workload]:
    """The full batches, and the mix where its data are there."""
    rng = np.random.default_rng(0)
    for rows, width in options.full:
        tokens = rng.integers(0, vocab_size, (options.batches * rows, width)).tolist()
        yield Workload(f"{rows}×{width}", tokens, rows, rows, rows * width, False)
    if options.documents == 0:
        return
    absent = [name for name in SETS if not (options.data / name).is_dir()]
    if absent:
        report.notes.append(f"The mix is not measured: {options.data} has no {', '.join(absent)}.")
        return
    longest, vocabulary = options.longest, options.vocabulary
    most = 200 if options.quick else None
    lengths = mixed_lengths(options.data, options.documents, longest, vocabulary, most)
    q = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1]).astype(int).tolist()
    report.notes.append(
        f"The mix: {len(lengths)} documents of {sum(lengths):,} tokens (quartiles {q}, at most "
        f"{longest}), by a BPE of {vocabulary:,} tokens trained on the two corpora."
    )
    rows = [rng.integers(0, vocab_size, length).tolist() for length in lengths]
    ours, theirs = options.our_batch_size, options.batch_size
    yield Workload("mix", rows, theirs, ours, options.batch_tokens, True)


def fill(options: argparse.Namespace, report: Report) -> None:
    """Checks and times the contenders on every workload.

    Raises:
        BenchmarkError: two contenders give different vectors.
    """
    encoders = Encoders(options)
    report.settings["attention"] = encoders.kernel
    report.notes += encoders.notes
    K, of = options.thinking_steps, flops.ceiling_sizes(quick=options.quick)
    backbone = encoders.config.backbone
    for workload_ in workloads(options, backbone.vocab_size, report):
        contenders = Contenders(encoders, workload_, K)
        wanted_ND = contenders.runs[OURS]()
        for name in contenders.runs.keys() - {OURS}:
            require_same_vectors(name, contenders.runs[name](), wanted_ND, options.dtype)
        ceiling = flops.ceiling_runs(options.dtype, of)
        for run in ceiling.values():
            jax.block_until_ready(run())
        # the comparison of the vectors has warmed all of them up
        both = contenders.runs | ceiling
        times = measure.time_alternating(both, repeats=options.repeats, warmup=0)
        best = flops.ceilings(times, options.dtype, of)
        lengths = list(map(len, workload_.rows))
        needed = forward_flops(backbone, flops.encode_reading(lengths, K))
        for name in contenders.runs:
            row: Row = {"contender": name, "workload": workload_.name, "thinking_steps": K}
            row |= {"documents": len(lengths), "tokens": sum(lengths), "flops": needed}
            row |= timing_fields(times, name, base=OURS)
            median = row["seconds"]["median"]
            row["documents_per_second"] = len(lengths) / median
            row["tokens_per_second"] = sum(lengths) / median
            row["padding_share"] = contenders.padding[name]
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
    workload.add_backbone(parser)
    workload.add_contenders(parser)
    batch = measure.sizes_of("rows", "tokens")
    text = f"default {' '.join(f'{rows}x{tokens}' for rows, tokens in FULL)}"
    parser.add_argument("--full", type=batch, nargs="*", default=FULL, help=text)
    there = Path(next((folder for folder in DATA if Path(folder).is_dir()), DATA[0]))
    parser.add_argument("--data", type=Path, default=there, help=f"default {' or '.join(DATA)}")
    numbers = {
        "batches": (2, "of each full shape"),
        "thinking_steps": (3, "K"),
        "longest": (512, "tokens of the longest prompt of the mix"),
        "vocabulary": (16_000, "of the tokenizer that is trained on the mix's corpora"),
        "batch_size": (8, "rows of PyTorch's batches in the mix"),
        "our_batch_size": (16, "the most rows of ours; for CPUs"),
        "batch_tokens": (2048, "the most tokens of ours; for CPUs"),
    }
    measure.add_numbers(parser, numbers)
    text = "of the mix, 0 for none; default 192"
    parser.add_argument("--documents", type=int, default=192, help=text)


QUICK = {"backbone": workload.TINY, "full": [(2, 32)], "documents": 8, "longest": 96}
QUICK |= {"vocabulary": 300, "batch_size": 4, "our_batch_size": 4}
PROGRAM = measure.Program(
    "encode_throughput", __doc__, fill, COLUMNS, add_flags, quick=QUICK, repeats=5
)

if __name__ == "__main__":
    PROGRAM.main(sys.argv[1:])
