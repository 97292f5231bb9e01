"""How fast training batches are made, on how much of a processor, and how much of them is padding.

    python -m benchmarks.data_pipeline [--rows FILE.jsonl] [--batch_size 32]

One epoch of the rows for every way of making batches, the ways in turn, each from a fresh iterator,
so that no token is remembered from the round before. Tokens are those of queries, documents and
explicit inputs, without padding; the tokenizer is a byte-level BPE trained on the texts of the rows
with the prompts and the chat template of training.

Worker processes take seconds to start: their clock begins with the first batch. Processor time is
that of this process and of its workers, reading the files included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import (
    BenchmarkError,
    Report,
    Spread,
    command_line,
    environment,
    in_turn,
    paired_ratio,
    positive,
    ratio_cell,
    seconds_cell,
)
from laser_jax.config import DataConfig, PromptConfig
from laser_jax.data.pipeline import Batch, training_batches
from laser_jax.data.sources import Source, open_source
from laser_jax.data.tokenization import PromptTokenizer, train_tokenizer
from laser_jax.prepare import PrepareConfig, prepare

ROWS = Path("../shared/data/entailmentbank/train.jsonl")
VOCABULARY = 8_000
STEPS = 3
"""K of the keyframes."""


@dataclass(frozen=True)
class Way:
    """A way of making batches."""

    name: str
    stored: bool = False
    threads: int = 1
    workers: int = 0
    window: int = 1


WAYS = (
    Way("1 thread"),
    Way("2 threads", threads=2),
    Way("1 worker process", workers=1),
    Way("2 worker processes", workers=2),
    Way("stored tokens, 1 thread", stored=True),
    Way("stored tokens, 2 threads", stored=True, threads=2),
    Way("1 thread, bucket_window 4", window=4),
    Way("1 thread, bucket_window 8", window=8),
    Way("1 thread, bucket_window 32", window=32),
)


@dataclass
class Made:
    """What a round made."""

    seconds: float = 0.0
    processor_seconds: float = 0.0
    batches: int = 0
    """In this time."""
    tokens: int = 0
    """In this time, without padding."""
    real: int = 0
    computed: int = 0
    """Tokens of all batches without and with padding."""
    shapes: set[Any] = field(default_factory=set)

    def add(self, batch: Batch, *, counts: bool) -> None:
        parts = [t for t in (batch.query, batch.documents, batch.explicit) if t is not None]
        real = sum(int(t.lengths_B.sum()) for t in parts)
        self.real += real
        self.computed += sum(t.ids_BT.size for t in parts)
        self.shapes.add(tuple(t.ids_BT.shape for t in parts))
        if counts:
            self.batches += 1
            self.tokens += real


def processor_seconds() -> float:
    """Of this process and of its living children."""
    ticks = 0
    for child in multiprocessing.active_children():
        # behind the name, which stands in brackets: user and system time are fields 14 and 15
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def make(way: Way, source: Source, prompts: PromptTokenizer, batch_size: int, number: int) -> Made:
    """Makes `number` batches."""
    data = DataConfig(
        train=str(source.path), threads=way.threads, workers=way.workers, bucket_window=way.window
    )
    made = Made()
    began, used = time.perf_counter(), processor_seconds()
    batches = iter(
        training_batches(
            [source],
            prompts,
            data,
            num_steps=STEPS,
            keyframes="paper",
            batch_size=batch_size,
            seed=0,
            need_explicit=True,
            shared_prefix=True,
        )
    )
    try:
        for i in range(number):
            made.add(next(batches), counts=i > 0 or not way.workers)
            if i == 0 and way.workers:
                began, used = time.perf_counter(), processor_seconds()
        made.seconds = time.perf_counter() - began
        made.processor_seconds = processor_seconds() - used
    finally:
        close: Any = getattr(batches, "close", None)
        if close is not None:
            close()
    return made


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> Report:
    """Makes an epoch in every way, in turn.

    Raises:
        BenchmarkError: two ways made different batches.
    """
    ways = (WAYS[0], WAYS[4], WAYS[6]) if options.quick else WAYS
    size = 4 if options.quick else options.batch_size
    source = open_source(options.rows)
    number = 8 if options.quick else max(2, len(source) // size)
    settings = {
        "rows": str(options.rows),
        "number_of_rows": len(source),
        "batch_size": size,
        "batches": number,
        "vocabulary": VOCABULARY,
        "repeats": options.repeats,
    }
    report = Report("data_pipeline", arguments, settings, environment())
    texts = (
        text
        for row in source
        for text in (row.query, row.prompt, row.reasoning_query, *row.positive_passages)
    )
    prompts = PromptTokenizer(train_tokenizer(texts, VOCABULARY), PromptConfig())
    with tempfile.TemporaryDirectory() as folder:
        prompts.tokenizer.save_pretrained(Path(folder, "tokenizer"))
        stored = Path(folder, "stored")
        prepare(
            PrepareConfig(
                str(options.rows),
                str(stored),
                tokenizer=str(Path(folder, "tokenizer")),
                store_tokens=True,
            )
        )
        sources = {False: source, True: open_source(stored)}
        rounds: dict[str, list[Made]] = {way.name: [] for way in ways}
        by_name = {way.name: way for way in ways}
        for name, counts in in_turn(list(rounds), repeats=options.repeats, warmup=1):
            way = by_name[name]
            made = make(way, sources[way.stored], prompts, size, number)
            if counts:
                rounds[name].append(made)
    first = ways[0].name
    for way in ways:
        made = rounds[way.name]
        if way.window == 1 and made[0].real != rounds[first][0].real:
            raise BenchmarkError(f"{way.name} made other batches than {first}")
        rates = [m.tokens / m.seconds for m in made]
        base = [m.tokens / m.seconds for m in rounds[first]]
        seconds = [m.seconds for m in made]
        report.rows.append(
            {"way": way.name}
            | {name: getattr(way, name) for name in ("stored", "threads", "workers", "window")}
            | {
                "seconds": vars(Spread.of(seconds)) | {"repeats": seconds},
                "tokens_per_second": vars(Spread.of(rates)),
                "ratio": vars(paired_ratio(rates, base)),
                "tokens_per_processor_second": float(
                    np.median([m.tokens / m.processor_seconds for m in made])
                ),
                "queries_per_second": float(
                    np.median([m.batches * size / m.seconds for m in made])
                ),
                "padding_share": 1 - made[0].real / made[0].computed,
                "shapes": len(made[0].shapes),
            }
        )
    report.notes.append(
        f"An epoch is {number} batches of {size} queries, each with 2 documents and an explicit "
        f"input, from {len(source):,} rows."
    )
    return report


COLUMNS = {
    "batches by": lambda row: row["way"],
    "time (quartiles)": lambda row: seconds_cell(row["seconds"]),
    "tokens/s": lambda row: f"{row['tokens_per_second']['median']:,.0f}",
    "× the first (quartiles)": lambda row: ratio_cell(row["ratio"]),
    "queries/s": lambda row: f"{row['queries_per_second']:,.0f}",
    "tokens a second of one core": lambda row: f"{row['tokens_per_processor_second']:,.0f}",
    "padding": lambda row: f"{row['padding_share']:.1%}",
    "shapes": lambda row: str(row["shapes"]),
}


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = command_line("data_pipeline", __doc__, repeats=3)
    parser.add_argument("--rows", type=Path, default=ROWS, help=f"default {ROWS}")
    parser.add_argument("--batch_size", type=positive, default=32, help="queries; default 32")
    options = parser.parse_args(arguments)
    measure(options, arguments).finish(COLUMNS, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
