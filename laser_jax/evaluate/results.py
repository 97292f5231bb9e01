"""The directory that an evaluation of a model leaves, written and read.

results.json      scores, differences and what was evaluated; written last
per_query.tsv     query_id, run and every metric
runs/*.trec       the rankings
quality_by_steps.png, .svg
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from laser_jax.config import ConfigError, as_dict, from_dict
from laser_jax.files.durable import write_atomically
from laser_jax.files.reading import parse_number, read_json, text_lines
from laser_jax.search.matching import IdCount
from laser_jax.search.trec import DatasetError

RESULTS_FILE, PER_QUERY_FILE = "results.json", "per_query.tsv"

Scores = dict[str, dict[str, float]]
"""Run -> metric -> mean."""
QueryScores = dict[str, dict[str, float]]
"""Query id -> metric -> value."""


@dataclass(frozen=True)
class Difference:
    """The mean of `metric` over queries for `run` less that for `against`, with its interval."""

    run: str
    against: str
    metric: str
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """What `results.json` holds."""

    model: str
    """What it is called in tables."""
    data: str
    split: str
    num_thinking_steps: int
    """The model's own K."""
    metrics: list[str]
    documents: int
    queries: int
    queries_without_relevant: int
    bad_lines: int
    """Lines of the data that were left out."""
    scores: Scores
    differences: list[Difference]
    confidence: float
    resamples: int
    seed: int
    milliseconds_per_query: dict[str, float] = field(default_factory=dict)
    """Run -> time to embed a query; empty where it was not measured."""
    writing_milliseconds_per_query: dict[str, float] = field(default_factory=dict)
    """Run -> time to write the text that a query is read with, where the file of rewrites says."""
    shortened: dict[str, int] = field(default_factory=dict)
    """`documents`, or `queries` and how they were read -> how many did not fit into the model's
    limits and lost their ends; empty in files of older versions."""
    id_counts: list[IdCount] = field(default_factory=list)
    """Ids that match nothing, and documents with their query's id; empty in files of older
    versions."""


def model_name(directory: str | Path) -> str:
    """What a model is called: its directory, less a last part `model`."""
    path = Path(directory)
    return str(path.parent if path.name == "model" and path.parent.name else path)


def write_per_query(path: Path, per_query: Mapping[str, QueryScores]) -> None:
    """Writes run -> query -> metric -> value as a table: query_id, run, the metrics."""
    metrics = list(next(iter(next(iter(per_query.values())).values())))
    lines = ["\t".join(["query_id", "run", *metrics])]
    for run, queries in per_query.items():
        lines += [
            "\t".join([query, run, *(repr(values[m]) for m in metrics)])
            for query, values in queries.items()
        ]
    write_atomically(path, "\n".join(lines) + "\n")


def read_per_query(path: Path) -> dict[str, QueryScores]:
    """Reads what `write_per_query` wrote: run -> query -> metric -> value.

    Raises:
        FileNotFoundError: when it is missing.
        DatasetError: on a line of another form.
    """
    per_query: dict[str, QueryScores] = {}
    metrics: list[str] = []
    for number, (where, line) in enumerate(text_lines(path), start=1):
        fields = line.rstrip("\n").split("\t")
        if number == 1:
            if fields[:2] != ["query_id", "run"] or len(fields) < 3:
                raise DatasetError(f"{where}: wanted the header query_id, run, metrics")
            metrics = fields[2:]
            continue
        values = [value for field in fields[2:] if (value := parse_number(field)) is not None]
        if not len(fields) - 2 == len(values) == len(metrics):
            raise DatasetError(
                f"{where}: wanted query_id, run and {len(metrics)} numbers, got {line!r}"
            )
        query, run = fields[:2]
        per_query.setdefault(run, {})[query] = dict(zip(metrics, values, strict=True))
    return per_query


def write_evaluation(directory: Path, evaluation: Evaluation) -> None:
    """Writes `results.json`."""
    text = json.dumps(as_dict(evaluation), indent=2, ensure_ascii=False) + "\n"
    write_atomically(directory / RESULTS_FILE, text)


def read_evaluation(directory: str | Path) -> Evaluation:
    """Reads `results.json`.

    Raises:
        FileNotFoundError: when there is none.
        DatasetError: when it is not one that `write_evaluation` wrote.
    """
    path = Path(directory) / RESULTS_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: wanted a directory that python -m laser_jax.evaluate --model wrote"
        )
    try:
        return from_dict(Evaluation, read_json(path), source=str(path))
    except (ConfigError, DatasetError) as error:
        raise DatasetError(f"{path}: no results of laser_jax.evaluate: {error}") from error


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table whose columns are aligned in plain text too, the first to the
    left."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])
