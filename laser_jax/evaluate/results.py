"""The directory that an evaluation of a model leaves, written and read.

results.json            scores, differences and what was evaluated; written last
per_query.tsv           query_id, run and every metric
runs/*.trec             the rankings
quality_by_steps.svg    the first metric against K
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from laser_jax.config import ConfigError, as_dict, from_dict
from laser_jax.files.durable import write_atomically
from laser_jax.files.reading import DataError, parse_number, read_json, text_lines
from laser_jax.search.matching import IdCount
from laser_jax.search.trec import Run, write_trec_run

RESULTS_FILE, PER_QUERY_FILE = "results.json", "per_query.tsv"
PLOT_STEM = "quality_by_steps"
_PART = ".evaluation-"

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
        DataError: on a line of another form.
    """
    per_query: dict[str, QueryScores] = {}
    metrics: list[str] = []
    for number, (where, line) in enumerate(text_lines(path), start=1):
        fields = line.rstrip("\n").split("\t")
        if number == 1:
            if fields[:2] != ["query_id", "run"] or len(fields) < 3:
                raise DataError(f"{where}: wanted the header query_id, run, metrics")
            metrics = fields[2:]
            continue
        values = [value for field in fields[2:] if (value := parse_number(field)) is not None]
        if not len(fields) - 2 == len(values) == len(metrics):
            raise DataError(
                f"{where}: wanted query_id, run and {len(metrics)} numbers, got {line!r}"
            )
        query, run = fields[:2]
        per_query.setdefault(run, {})[query] = dict(zip(metrics, values, strict=True))
    return per_query


def claim_directory(output: Path, overwrite: bool) -> None:
    """Makes an output directory, or says now, not after the work, why it cannot be had."""
    if (output / RESULTS_FILE).exists() and not overwrite:
        raise ConfigError(
            f"{output} holds an evaluation: choose another --output, or --overwrite true"
        )
    output.mkdir(parents=True, exist_ok=True)


def write_evaluation(
    output: Path,
    evaluation: Evaluation,
    per_query: Mapping[str, QueryScores],
    runs: Mapping[str, Run] | None = None,
    draw: Callable[[Path], None] | None = None,
) -> None:
    """Writes the files of an evaluation into an existing directory, in place of an older one's.

    Args:
        per_query: run -> query -> metric -> value.
        runs: the rankings by their names.
        draw: writes the plot to a stem.
    """
    with _replaced_evaluation(output) as part:
        for name, run in (runs or {}).items():
            slug = re.sub(r"[^A-Za-z0-9]+", "-", name)
            write_trec_run(run, part / "runs" / f"{slug}.trec", slug)
        write_per_query(part / PER_QUERY_FILE, per_query)
        if draw is not None:
            draw(part / PLOT_STEM)
        text = json.dumps(as_dict(evaluation), indent=2, ensure_ascii=False) + "\n"
        write_atomically(part / RESULTS_FILE, text)


@contextmanager
def _replaced_evaluation(output: Path) -> Iterator[Path]:
    """Gives a folder for the files of an evaluation, which take the place of an older one when the
    block ends. If the block fails, the older one stays and nothing is left of the new one."""
    for abandoned in output.glob(f"{_PART}*"):  # of a killed process
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=_PART) as folder:
        part = Path(folder)
        (part / "runs").mkdir()
        yield part
        # the runs of the older one need not be those of the new one
        old = [output / RESULTS_FILE, output / PER_QUERY_FILE, *output.glob(f"{PLOT_STEM}.*")]
        for file in (*old, *(output / "runs").glob("*.trec")):
            file.unlink(missing_ok=True)
        (output / "runs").mkdir(exist_ok=True)
        written = [file for file in part.rglob("*") if file.is_file()]
        for file in sorted(written, key=lambda file: file.name == RESULTS_FILE):  # that one last
            file.replace(output / file.relative_to(part))


def read_evaluation(directory: str | Path) -> Evaluation:
    """Reads `results.json`.

    Raises:
        FileNotFoundError: when there is none.
        DataError: when it is not one that `write_evaluation` wrote.
    """
    path = Path(directory) / RESULTS_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: wanted a directory that python -m laser_jax.evaluate model wrote"
        )
    try:
        return from_dict(Evaluation, read_json(path), source=str(path))
    except (ConfigError, DataError) as error:
        raise DataError(f"{path}: no results of laser_jax.evaluate: {error}") from error


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table whose columns are aligned in plain text too: the first column to the
    left, the others to the right."""
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    pads = [str.ljust] + [str.rjust] * (len(header) - 1)

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(p(c, w) for p, c, w in zip(pads, cells, widths, strict=True))} |"

    rule = [f":{'-' * (widths[0] - 1)}"] + [f"{'-' * (width - 1)}:" for width in widths[1:]]
    return "\n".join(map(line, [header, rule, *rows]))
