"""Compares evaluated models: `python -m laser_jax.report DIR... [--output DIR]`.

Each DIR is one that `python -m laser_jax.evaluate --model` wrote. The table has a row a model and
view, a column a data set and their average, as in the paper's tables. A cell is marked where it
differs from the baseline's by more than chance, corrected for the number of cells.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
from laser_jax.files.terminal import fail, printable
from laser_jax.search.trec import DatasetError

PLOT_STEM = "latency_quality"
BETTER, WORSE = "▲", "▼"


@dataclass(frozen=True)
class ReportOptions:
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
class Report:
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
        raise DatasetError(
            f"{directory}: has no {metric}, only {', '.join(evaluation.metrics)}; evaluate again "
            "with it in --metrics, or choose another --metric"
        )
    per_query = read_per_query(Path(directory) / PER_QUERY_FILE)
    if set(per_query) != set(evaluation.scores):
        raise DatasetError(f"{directory}: {PER_QUERY_FILE} and results.json hold other runs")
    data = Path(evaluation.data).name
    column = data if evaluation.split in ("test", EXAMPLES) else f"{data} ({evaluation.split})"
    return _Evaluated(directory, column, evaluation, per_query)


def _shown_runs(evaluation: Evaluation, runs: str) -> list[str]:
    if runs == "all":
        return list(evaluation.scores)
    own = latent(evaluation.num_thinking_steps)
    wanted = dict.fromkeys([latent(1), own, EXPLICIT, *REWRITES])
    return [run for run in wanted if run in evaluation.scores]


def compare(directories: Sequence[str], options: ReportOptions) -> Report:
    """Reads the evaluations and tests every cell against the baseline's of its column.

    Raises:
        FileNotFoundError, DatasetError: a directory is no evaluation, or two of them are of the
            same model and data, or of different queries of the same data.
        ConfigError: no evaluation is of the baseline.
    """
    evaluated: dict[tuple[str, str], _Evaluated] = {}
    for directory in directories:
        read = _read(directory, options.metric)
        key = (read.evaluation.model, read.column)
        if key in evaluated:
            raise DatasetError(
                f"{evaluated[key].directory} and {directory} are both of {key[0]} on {key[1]}; "
                "give one of them another --name when evaluating"
            )
        evaluated[key] = read
    models = list(dict.fromkeys(model for model, _ in evaluated))
    columns = list(dict.fromkeys(column for _, column in evaluated))
    base_model = options.baseline or models[0]
    if base_model not in models:
        raise ConfigError(f"baseline {base_model!r} is none of the models: {', '.join(models)}")
    own = {e.evaluation.num_thinking_steps for (m, _), e in evaluated.items() if m == base_model}
    if len(own) != 1:
        raise DatasetError(f"{base_model} was evaluated as models with different K: {sorted(own)}")
    base_run = latent(own.pop())

    cells: dict[tuple[str, str], dict[str, Cell]] = {}
    tested: list[tuple[tuple[str, str], str, float]] = []
    for (model, column), read in evaluated.items():
        base = evaluated.get((base_model, column))
        for run in _shown_runs(read.evaluation, options.runs):
            row = cells.setdefault((model, run), {})
            row[column] = Cell(read.evaluation.scores[run][options.metric])
            if (
                base is None
                or base_run not in base.per_query
                or (model, run)
                == (
                    base_model,
                    base_run,
                )
            ):
                continue
            ours = read.values(run, options.metric)
            theirs = base.values(base_run, options.metric)
            if ours.keys() != theirs.keys():
                raise DatasetError(
                    f"{read.directory} and {base.directory} were evaluated on different queries of "
                    f"{column}: {len(ours.keys() ^ theirs.keys())} are in one of them alone"
                )
            aligned = [theirs[query] for query in ours]
            p_value = permutation_p_value(
                list(ours.values()), aligned, resamples=options.resamples, seed=options.seed
            )
            difference = float(np.mean(list(ours.values())) - np.mean(aligned))
            row[column] = dataclasses.replace(row[column], difference=difference)
            tested.append(((model, run), column, p_value))
    for (row, column, _), p_value in zip(tested, holm([p for *_, p in tested]), strict=True):
        cell = cells[row][column]
        mark = "" if p_value >= options.alpha else BETTER if (cell.difference or 0) > 0 else WORSE
        cells[row][column] = dataclasses.replace(cell, p_value=p_value, mark=mark)
    return Report(
        metric=options.metric,
        columns=columns,
        rows=[
            Row(
                model,
                run,
                row,
                float(np.mean([cell.score for cell in row.values()]))
                if len(row) == len(columns)
                else None,
            )
            for (model, run), row in cells.items()
        ],
        baseline=(base_model, base_run),
        tested=len(tested),
        alpha=options.alpha,
    )


def format_report(report: Report) -> str:
    """The report as Markdown: scores times 100, the best of a column in bold."""
    best = {
        column: max(row.cells[column].score for row in report.rows if column in row.cells)
        for column in report.columns
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
            *(shown(row, column) for column in report.columns),
            "-" if row.average is None else f"{100 * row.average:.1f}",
        ]
        for row in report.rows
    ]
    model, run = report.baseline
    return (
        markdown_table([f"{report.metric} x 100", *report.columns, "Avg."], rows)
        + f"\n\n{BETTER} better, {WORSE} worse than {model}, {run}: two-sided paired permutation "
        f"test over queries,\np < {report.alpha} after Holm's correction for {report.tested} "
        "comparisons."
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


def write_report(directories: Sequence[str], report: Report, options: ReportOptions) -> None:
    """Writes report.md, report.json and, where there are times, the plot."""
    assert options.output is not None
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    if options.plot:
        series, untimed = _series(directories, report.metric)
        if series:
            plot_latency_quality(series, report.metric, output / PLOT_STEM)
        if untimed:
            print(
                f"not in the plot, as evaluated without --measure_time true: {', '.join(untimed)}"
            )
    write_atomically(output / "report.md", format_report(report) + "\n")
    text = json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n"
    write_atomically(output / "report.json", text)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    try:
        options = parse_command_line(
            ReportOptions, "python -m laser_jax.report", arguments, positional="directories"
        )
        directories = options.directories
        if not directories:
            raise ConfigError("name the directories that laser_jax.evaluate --model wrote")
        if options.output and options.plot:
            require_matplotlib()
        report = compare(directories, options)
        if options.output:
            write_report(directories, report, options)
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    print(printable(format_report(report)))
