"""Compares evaluated models: `python -m laser_jax.evaluate compare DIR... [--output DIR]`.

Each DIR is one that `python -m laser_jax.evaluate model` wrote. The table has a row a model and
view, a column a data set and their average, as in the paper's tables. A cell is marked where it
differs from the baseline's by more than chance, corrected for the number of cells.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from laser_jax.command_line import parse_command_line
from laser_jax.config import ConfigError
from laser_jax.evaluate.bright import EXAMPLES, REWRITTEN
from laser_jax.evaluate.plots import LatencyPoint, can_draw, plot_latency_quality
from laser_jax.evaluate.results import (
    PER_QUERY_FILE,
    Evaluation,
    QueryScores,
    markdown_table,
    read_evaluation,
    read_per_query,
)
from laser_jax.evaluate.retrieval import CONTROL, EXPLICIT, REWRITES, latent
from laser_jax.evaluate.significance import holm, permutation_p_value
from laser_jax.files.claim import Claim
from laser_jax.files.durable import json_text, write_atomically
from laser_jax.files.reading import DataError
from laser_jax.files.terminal import printable
from laser_jax.settings import require

PLOT_STEM = "latency_quality"
BETTER, WORSE = "▲", "▼"
ALPHA = 0.05
"""The chance of a single false mark in a table, or more."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompareOptions:
    """Compares evaluated models in one table, with marks of significance and a plot."""

    directories: tuple[str, ...] = ()
    """What `evaluate model` wrote. They may stand without the flag."""
    output: str | None = None
    """A directory for report.md, report.json and the plot; None prints the table alone."""
    metric: str = "nDCG@10"
    runs: Literal["main", "all"] = "main"
    """`main`: K = 1, the latent view at the model's own K, the explicit view and
    rewrite-then-retrieve; `all`, and of an evaluation with none of these, every run."""
    baseline: str | None = None
    """The name of the model that the others are tested against, at its own K; by default that of
    the first directory."""


@dataclass(frozen=True)
class Cell:
    """One row's result on one data set."""

    score: float
    difference: float | None = None
    """From the baseline; None in the baseline's row and where the baseline has no result."""
    p_value: float | None = None
    """The difference's, corrected (Holm) for all cells of the table that are tested."""
    mark: str = ""


@dataclass(frozen=True)
class Row:
    """A model and one of its runs."""

    model: str
    run: str
    cells: dict[str, Cell]
    """Data set -> result; a data set may be missing."""
    average: float | None
    """Over the data sets; None where one is missing."""


@dataclass(frozen=True)
class Comparison:
    """What `report.json` holds."""

    metric: str
    columns: list[str]
    rows: list[Row]
    baseline: tuple[str, str]
    tested: int
    """Cells that were compared with the baseline."""
    alpha: float = ALPHA


@dataclass(frozen=True)
class _Directory:
    directory: str
    column: str
    evaluation: Evaluation
    per_query: dict[str, QueryScores]


Evaluated = Mapping[tuple[str, str], _Directory]
"""(model, column) -> evaluation."""


def _read(directory: str, metric: str) -> _Directory:
    evaluation = read_evaluation(directory)
    if metric not in evaluation.metrics:
        way_out = "evaluate again with it in --metrics, or choose another --metric"
        there = ", ".join(evaluation.metrics)
        raise DataError(f"{directory}: has no {metric}, only {there}; {way_out}")
    per_query = read_per_query(Path(directory) / PER_QUERY_FILE)
    if set(per_query) != set(evaluation.scores):
        raise DataError(f"{directory}: {PER_QUERY_FILE} and results.json hold other runs")
    data, split = Path(evaluation.data).name, evaluation.split.partition(REWRITTEN)[0]
    column = data if split in ("test", EXAMPLES) else f"{data} ({split})"
    return _Directory(directory, column, evaluation, per_query)


def read_all(options: CompareOptions) -> Evaluated:
    """Reads the directories. Raises a FileNotFoundError or DataError where one is no evaluation or
    lacks the metric, or two are of the same model and data."""
    evaluated: dict[tuple[str, str], _Directory] = {}
    for directory in options.directories:
        read = _read(directory, options.metric)
        key = model, column = read.evaluation.model, read.column
        if key in evaluated:
            raise DataError(
                f"{evaluated[key].directory} and {directory} are both of {model} on {column}; "
                "give one of them another --name when evaluating"
            )
        evaluated[key] = read
    return evaluated


def _baseline(evaluated: Evaluated, name: str | None) -> tuple[str, str]:
    """The model and the run that the others are tested against."""
    models = list(dict.fromkeys(model for model, _ in evaluated))
    model = name or models[0]
    if model not in models:
        raise ConfigError(f"baseline {model!r} is none of the models: {', '.join(models)}")
    own = {e.evaluation.num_thinking_steps for (m, _), e in evaluated.items() if m == model}
    if len(own) != 1:
        raise DataError(f"{model} was evaluated as models with different K: {sorted(own)}")
    return model, latent(own.pop())


def _shown_runs(evaluation: Evaluation, runs: str) -> list[str]:
    own = latent(evaluation.num_thinking_steps)
    wanted = dict.fromkeys([latent(1), own, EXPLICIT, *REWRITES] if runs == "main" else [])
    return [run for run in wanted if run in evaluation.scores] or list(evaluation.scores)


def compare(evaluated: Evaluated, options: CompareOptions) -> Comparison:
    """Tests every cell of the table against the baseline's of its column. Raises a DataError where
    two are of different queries of the same data, and a ConfigError where none is the baseline."""
    metric = options.metric
    baseline = model, run = _baseline(evaluated, options.baseline)
    cells: dict[tuple[str, str], dict[str, Cell]] = {}
    tests: list[tuple[dict[str, Cell], str, float, float]] = []
    for (of, column), read in evaluated.items():
        base = evaluated.get((model, column))
        for shown in _shown_runs(read.evaluation, options.runs):
            row = cells.setdefault((of, shown), {})
            row[column] = Cell(read.evaluation.scores[shown][metric])
            if base and run in base.per_query and (of, shown) != baseline:
                tests.append((row, column, *_tested(read, shown, base, run, metric)))
    corrected = holm([p_value for *_, p_value in tests])
    for (row, column, difference, _), p_value in zip(tests, corrected, strict=True):
        mark = "" if p_value >= ALPHA else BETTER if difference > 0 else WORSE
        row[column] = Cell(row[column].score, difference, p_value, mark)
    columns = list(dict.fromkeys(column for _, column in evaluated))
    rows = []
    for key, row in cells.items():
        average = float(np.mean([cell.score for cell in row.values()]))
        rows.append(Row(*key, row, average if len(row) == len(columns) else None))
    return Comparison(metric, columns, rows, baseline, len(tests))


def _tested(
    read: _Directory, run: str, base: _Directory, base_run: str, metric: str
) -> tuple[float, float]:
    """How much better a run is than the baseline's, and the p-value that its test alone gives."""
    ours, theirs = (
        {query: scores[metric] for query, scores in of.per_query[name].items()}
        for of, name in ((read, run), (base, base_run))
    )
    if ours.keys() != theirs.keys():
        raise DataError(
            f"{read.directory} and {base.directory} were evaluated on different queries of "
            f"{read.column}: {len(ours.keys() ^ theirs.keys())} are in one of them alone"
        )
    values, others = list(ours.values()), [theirs[query] for query in ours]
    return float(np.mean(values) - np.mean(others)), permutation_p_value(values, others)


def format_comparison(comparison: Comparison) -> str:
    """The table as Markdown: scores times 100, the best of a column in bold."""
    best = {
        column: max(row.cells[column].score for row in comparison.rows if column in row.cells)
        for column in comparison.columns
    }
    rows = []
    for row in comparison.rows:
        shown = [f"{row.model}, {row.run}"]
        for column in comparison.columns:
            if cell := row.cells.get(column):
                bold = "**" if cell.score == best[column] else ""
                shown.append(f"{bold}{100 * cell.score:.1f}{bold}{cell.mark}")
            else:
                shown.append("-")
        rows.append([*shown, "-" if row.average is None else f"{100 * row.average:.1f}"])
    table = markdown_table([f"{comparison.metric} x 100", *comparison.columns, "Avg."], rows)
    model, run = comparison.baseline
    return (
        f"{table}\n\n{BETTER} better, {WORSE} worse than {model}, {run}: two-sided paired "
        f"permutation test over queries,\np < {comparison.alpha} after Holm's correction for "
        f"{comparison.tested} comparisons."
    )


def _series(evaluated: Evaluated, metric: str) -> dict[str, list[LatencyPoint]]:
    """What the plot shows: a line a model over its K, points for its explicit view and for
    rewrite-then-retrieve, each a mean over the data sets on which it was timed."""
    timed: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for read in evaluated.values():
        evaluation = read.evaluation
        writing = evaluation.writing_milliseconds_per_query
        for run, milliseconds in evaluation.milliseconds_per_query.items():
            if run not in REWRITES or run in writing:  # else most of its time is unknown
                pair = milliseconds + writing.get(run, 0.0), evaluation.scores[run][metric]
                timed.setdefault((evaluation.model, run), []).append(pair)
    series: dict[str, list[LatencyPoint]] = {}
    for (model, run), pairs in timed.items():
        what = "latent view"
        if run == EXPLICIT:  # the text is read here; the time to write it is not in it
            what = "explicit (reading alone)"
        elif run in REWRITES:
            what = f"{run} (writing and reading)"
        if run != CONTROL:
            place = np.mean(pairs, axis=0).tolist()
            point = LatencyPoint(*place, label=run.removeprefix("latent "))
            series.setdefault(f"{model}, {what}", []).append(point)
    return series


def _write_report(evaluated: Evaluated, comparison: Comparison, output: Path) -> None:
    """Writes report.md, report.json and, where there are times, the plot."""
    series = _series(evaluated, comparison.metric)
    with Claim(output, "report.json", lambda report: []) as claim:
        if series and can_draw():
            plot_latency_quality(series, comparison.metric, output / PLOT_STEM)
        write_atomically(output / "report.md", format_comparison(comparison) + "\n")
        claim.record(json_text(asdict(comparison)))
    untimed = [e.directory for e in evaluated.values() if not e.evaluation.milliseconds_per_query]
    if untimed:
        without = "not in the plot, as evaluated without --measure_time true"
        _log.warning("%s: %s", without, ", ".join(untimed))


def main(program: str, arguments: Sequence[str]) -> None:
    options = parse_command_line(CompareOptions, f"{program} DIR...", arguments, "directories")
    usage = f"{program} DIR... [options], where each DIR is one that python -m laser_jax.evaluate"
    require(bool(options.directories), f"no directories to compare: {usage} model wrote")
    evaluated = read_all(options)
    comparison = compare(evaluated, options)
    if options.output:
        _write_report(evaluated, comparison, Path(options.output))
    print(printable(format_comparison(comparison)))
