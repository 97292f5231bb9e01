"""Compares evaluated models: `python -m laser_jax.evaluate compare DIR... [--output DIR]`.

Each DIR is one that `python -m laser_jax.evaluate model` wrote. The table has a row a model and
view, a column a data set and their average, as in the paper's tables. A cell is marked where it
differs from the baseline's by more than chance, corrected for the number of cells.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal

import numpy as np

from laser_jax.command_line import parse_command_line
from laser_jax.config import ConfigError
from laser_jax.evaluate.bright import EXAMPLES
from laser_jax.evaluate.plots import LatencyPoint, plot_latency_quality, require_matplotlib
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
from laser_jax.files.durable import write_atomically
from laser_jax.files.reading import DataError
from laser_jax.files.terminal import printable

PLOT_STEM = "latency_quality"
BETTER, WORSE = "▲", "▼"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompareOptions:
    """Compares evaluated models in one table, with marks of significance and a plot."""

    directories: tuple[str, ...] = ()
    """What laser_jax.evaluate --model wrote. They may stand without the flag."""
    output: str | None = None
    """A directory for report.md, report.json and the plot; None prints the table alone."""
    metric: str = "nDCG@10"
    runs: Literal["main", "all"] = "main"
    """`main`: the query alone, the latent view at the model's own K, the explicit view and
    rewrite-then-retrieve; `all` every run of the evaluations."""
    baseline: str | None = None
    """The name of the model that the others are tested against, at its own K; by default that of
    the first directory."""
    alpha: float = 0.05
    resamples: int = 10_000
    seed: int = 0
    plot: bool = True
    """Draw quality against the time of a query, where the evaluations measured it."""

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ConfigError(f"alpha must lie between 0 and 1, got {self.alpha}")
        if self.resamples < 1:
            raise ConfigError(f"resamples must be at least 1, got {self.resamples}")


@dataclass(frozen=True)
class Cell:
    """One row's result on one data set."""

    score: float
    difference: float | None = None
    """From the baseline; None in the baseline's row and where the baseline has no result."""
    p_value: float | None = None
    """Of the difference, corrected (Holm) for all cells of the table that are tested."""
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
    alpha: float


@dataclass(frozen=True)
class _Evaluated:
    directory: str
    column: str
    evaluation: Evaluation
    per_query: dict[str, QueryScores]

    def values(self, run: str, metric: str) -> dict[str, float]:
        return {query: scores[metric] for query, scores in self.per_query[run].items()}


def _read(directory: str, metric: str) -> _Evaluated:
    evaluation = read_evaluation(directory)
    if metric not in evaluation.metrics:
        raise DataError(
            f"{directory}: has no {metric}, only {', '.join(evaluation.metrics)}; evaluate again "
            "with it in --metrics, or choose another --metric"
        )
    per_query = read_per_query(Path(directory) / PER_QUERY_FILE)
    if set(per_query) != set(evaluation.scores):
        raise DataError(f"{directory}: {PER_QUERY_FILE} and results.json hold other runs")
    data = Path(evaluation.data).name
    column = data if evaluation.split in ("test", EXAMPLES) else f"{data} ({evaluation.split})"
    return _Evaluated(directory, column, evaluation, per_query)


def _shown_runs(evaluation: Evaluation, runs: str) -> list[str]:
    if runs == "all":
        return list(evaluation.scores)
    own = latent(evaluation.num_thinking_steps)
    wanted = dict.fromkeys([latent(1), own, EXPLICIT, *REWRITES])
    return [run for run in wanted if run in evaluation.scores]


def compare(directories: Sequence[str], options: CompareOptions) -> Comparison:
    """Reads the evaluations and tests every cell against the baseline's of its column.

    Raises:
        FileNotFoundError, DataError: a directory is no evaluation, or two of them are of the same
            model and data, or of different queries of the same data.
        ConfigError: no evaluation is of the baseline.
    """
    evaluated = _read_all(directories, options.metric)
    baseline = model, run = _baseline(evaluated, options.baseline)
    cells: dict[tuple[str, str], dict[str, Cell]] = {}
    for (of, column), read in evaluated.items():
        base = evaluated.get((model, column))
        if base and run not in base.per_query:
            base = None
        for shown in _shown_runs(read.evaluation, options.runs):
            against = (base, run) if base and (of, shown) != baseline else None
            cells.setdefault((of, shown), {})[column] = _cell(read, shown, against, options)
    number = _correct(cells, options.alpha)
    columns = list(dict.fromkeys(column for _, column in evaluated))
    averages = [
        float(np.mean([cell.score for cell in row.values()])) if len(row) == len(columns) else None
        for row in cells.values()
    ]
    rows = [Row(*key, cells[key], of) for key, of in zip(cells, averages, strict=True)]
    return Comparison(options.metric, columns, rows, baseline, number, options.alpha)


def _read_all(directories: Sequence[str], metric: str) -> dict[tuple[str, str], _Evaluated]:
    """(model, column) -> evaluation."""
    evaluated: dict[tuple[str, str], _Evaluated] = {}
    for directory in directories:
        read = _read(directory, metric)
        key = (read.evaluation.model, read.column)
        if key in evaluated:
            raise DataError(
                f"{evaluated[key].directory} and {directory} are both of {key[0]} on {key[1]}; "
                "give one of them another --name when evaluating"
            )
        evaluated[key] = read
    return evaluated


def _baseline(evaluated: Mapping[tuple[str, str], _Evaluated], name: str | None) -> tuple[str, str]:
    """The model and the run that the others are tested against."""
    models = list(dict.fromkeys(model for model, _ in evaluated))
    model = name or models[0]
    if model not in models:
        raise ConfigError(f"baseline {model!r} is none of the models: {', '.join(models)}")
    own = {e.evaluation.num_thinking_steps for (m, _), e in evaluated.items() if m == model}
    if len(own) != 1:
        raise DataError(f"{model} was evaluated as models with different K: {sorted(own)}")
    return model, latent(own.pop())


def _cell(
    read: _Evaluated, run: str, against: tuple[_Evaluated, str] | None, options: CompareOptions
) -> Cell:
    """A result with the p-value that its test alone gives.

    Args:
        against: the baseline's evaluation on the same data and its run; None where nothing is to
            be tested.
    """
    score = read.evaluation.scores[run][options.metric]
    if against is None:
        return Cell(score)
    base, base_run = against
    values, others = read.values(run, options.metric), base.values(base_run, options.metric)
    if values.keys() != others.keys():
        raise DataError(
            f"{read.directory} and {base.directory} were evaluated on different queries of "
            f"{read.column}: {len(values.keys() ^ others.keys())} are in one of them alone"
        )
    ours, theirs = list(values.values()), [others[query] for query in values]
    p_value = permutation_p_value(ours, theirs, resamples=options.resamples, seed=options.seed)
    return Cell(score, float(np.mean(ours) - np.mean(theirs)), p_value)


def _correct(cells: Mapping[tuple[str, str], dict[str, Cell]], alpha: float) -> int:
    """Corrects the p-values in place for all that are tested, and marks what lies below alpha.
    Returns their number."""
    tested = [
        (row, column, cell.p_value, cell.difference)
        for row in cells.values()
        for column, cell in row.items()
        if cell.p_value is not None and cell.difference is not None
    ]
    corrected = holm([p_value for _, _, p_value, _ in tested])
    for (row, column, _, difference), p_value in zip(tested, corrected, strict=True):
        mark = "" if p_value >= alpha else BETTER if difference > 0 else WORSE
        row[column] = dataclasses.replace(row[column], p_value=p_value, mark=mark)
    return len(tested)


def format_comparison(comparison: Comparison) -> str:
    """The table as Markdown: scores times 100, the best of a column in bold."""
    best = {
        column: max(row.cells[column].score for row in comparison.rows if column in row.cells)
        for column in comparison.columns
    }

    def shown(row: Row, column: str) -> str:
        cell = row.cells.get(column)
        if cell is None:
            return "-"
        text = f"{100 * cell.score:.1f}"
        return (f"**{text}**" if cell.score == best[column] else text) + cell.mark

    rows = [
        [
            f"{row.model}, {row.run}",
            *(shown(row, column) for column in comparison.columns),
            "-" if row.average is None else f"{100 * row.average:.1f}",
        ]
        for row in comparison.rows
    ]
    model, run = comparison.baseline
    return (
        markdown_table([f"{comparison.metric} x 100", *comparison.columns, "Avg."], rows)
        + f"\n\n{BETTER} better, {WORSE} worse than {model}, {run}: two-sided paired permutation "
        f"test over queries,\np < {comparison.alpha} after Holm's correction for "
        f"{comparison.tested} comparisons."
    )


def _series(
    directories: Sequence[str], metric: str
) -> tuple[dict[str, list[LatencyPoint]], list[str]]:
    """What the plot shows: a line a model over its K, points for its explicit view and for
    rewrite-then-retrieve, each a mean over the data sets on which it was timed; and the directories
    that hold no times."""
    timed: dict[str, dict[str, list[tuple[float, float]]]] = {}
    untimed = []
    for directory in directories:
        evaluation = read_evaluation(directory)
        if not evaluation.milliseconds_per_query:
            untimed.append(directory)
        writing = evaluation.writing_milliseconds_per_query
        for run, milliseconds in evaluation.milliseconds_per_query.items():
            if run in REWRITES and run not in writing:  # most of its time is unknown
                continue
            pair = milliseconds + writing.get(run, 0.0), evaluation.scores[run][metric]
            timed.setdefault(evaluation.model, {}).setdefault(run, []).append(pair)
    series: dict[str, list[LatencyPoint]] = {}
    for model, runs in timed.items():
        for run, pairs in runs.items():
            point = LatencyPoint(
                *np.mean(pairs, axis=0).tolist(), label=run.removeprefix("latent ")
            )
            if run == EXPLICIT:  # the text is read here; the time to write it is not in it
                series[f"{model}, explicit (reading alone)"] = [point]
            elif run in REWRITES:
                series[f"{model}, {run} (writing and reading)"] = [point]
            elif run != CONTROL:
                series.setdefault(f"{model}, latent view", []).append(point)
    return series, untimed


def write_report(
    directories: Sequence[str], comparison: Comparison, output: Path, *, plot: bool
) -> None:
    """Writes report.md, report.json and, where there are times, the plot."""
    output.mkdir(parents=True, exist_ok=True)
    if plot:
        series, untimed = _series(directories, comparison.metric)
        if series:
            plot_latency_quality(series, comparison.metric, output / PLOT_STEM)
        if untimed:
            logger.warning(
                "not in the plot, as evaluated without --measure_time true: %s", ", ".join(untimed)
            )
    write_atomically(output / "report.md", format_comparison(comparison) + "\n")
    text = json.dumps(asdict(comparison), indent=2, ensure_ascii=False) + "\n"
    write_atomically(output / "report.json", text)


def main(program: str, arguments: Sequence[str]) -> None:
    """The command line: directories, then options."""
    directories = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    options = parse_command_line(CompareOptions, f"{program} DIR...", arguments[len(directories) :])
    if not directories:
        raise ConfigError(
            f"no directories to compare: {program} DIR... [options], where each DIR is one that "
            "python -m laser_jax.evaluate model wrote"
        )
    if options.output and options.plot:
        require_matplotlib()
    comparison = compare(directories, options)
    if options.output:
        write_report(directories, comparison, Path(options.output), plot=options.plot)
    print(printable(format_comparison(comparison)))
