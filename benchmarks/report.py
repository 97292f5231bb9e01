"""Turns what the benchmarks measured into docs/results.md, tables and figures.

    python -m benchmarks.report [--results benchmarks/results] [--output docs]

Reads every JSON file under the folder of results, in the order of their names, and writes nothing
that they do not say: the same files give the same page. A table is made by the `COLUMNS` of the
program that wrote the file, of the rows that its function `shown_rows` gives, where it has one;
where it has a function `further_tables` of the rows, that gives more, by their titles. A figure
(PNG and SVG, extra `bench`) is drawn by its function `plot`, or else of the rows' `seconds`, where
they hold some. `--check` writes nothing and says whether the page is what the files give.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import Columns, as_markdown, markdown_table
from benchmarks.targets import TARGETS, reached
from laser_jax.evaluation.plots import Interval, plot_intervals
from laser_jax.files import write_atomically

RESULTS, OUTPUT = Path("benchmarks/results"), Path("docs")
PAGE, FIGURES = "results.md", "results"
KEYS = {"benchmark", "command", "settings", "environment", "notes", "rows"}

HEAD = """# Results

Made by `python -m benchmarks.report` from the JSON files under `benchmarks/results`; not to be
edited by hand. What the columns mean, and how times are taken, is in
[benchmarks.md](benchmarks.md). Every table stands under its command, date, commit and machine."""

TAIL = """## What cannot be shown here

The paper's tables (nDCG@10 on BRIGHT and BRIGHT(v1.1), FollowIR, BrowseComp-Plus) need its six
backbones with their pretrained weights, 81,659 training rows and a node of GPUs or a TPU slice.
This repository was written where none of them was at hand: it trains small models from scratch
and measures speed on random weights of the real shapes. [reproduce.md](reproduce.md) has every
command from the hub to a BRIGHT table, with the hours to expect.

The times that are missing above, on one H100 or H200:

    python -m benchmarks.gpu --output FOLDER
    cp FOLDER/gpu.json benchmarks/results/gpu.json && python -m benchmarks.report

The CPU's timings are measured again, on an idle machine, by `python -m benchmarks.all`. What is no
timing, such as `ablation`, is not part of it: its command stands above its table."""


class ResultsError(ValueError):
    """A file that is no result to show. Names it."""


@dataclass(frozen=True)
class Result:
    """A report, and the name of its file without ending or, inside one of `gpu`, of its part."""

    name: str
    report: dict[str, Any]


def read_results(folder: Path) -> list[Result]:
    """All reports, in the order of their names; those inside another follow it.

    Raises:
        ResultsError: no file, or one that no benchmark wrote, or that is a `--quick` run.
    """
    files = sorted(folder.rglob("*.json"))
    if not files:
        raise ResultsError(f"{folder} holds no JSON file: run `python -m benchmarks.all` first")
    results = []
    for file in files:
        try:
            report = json.loads(file.read_text())
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ResultsError(f"{file}: not JSON: {error}") from error
        if not isinstance(report, dict) or set(report) != KEYS:
            raise ResultsError(f"{file}: no benchmark's file; the keys {sorted(KEYS)} are wanted")
        if "--quick" in report["command"].split():
            raise ResultsError(f"{file} was written by --quick, whose numbers mean nothing")
        name = file.relative_to(folder).with_suffix("").as_posix().replace("/", "-")
        results.append(Result(name, report))
        results += inner_results(name, report)
    return results


def inner_results(name: str, report: Mapping[str, Any]) -> Iterator[Result]:
    """The reports that the rows of a report hold (`gpu`)."""
    for number, row in enumerate(report["rows"]):
        if "report" in row:
            yield Result(f"{name}-{number}-{row['report']['benchmark']}", row["report"])


def program_of(result: Result) -> Any:
    """The module that wrote a report. Raises a ResultsError where it is not to be had."""
    name = result.report["benchmark"]
    try:
        program = importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        raise ResultsError(
            f"{result.name}: benchmarks/{name}.py, which wrote it, is wanted for its table: {error}"
        ) from error
    if not hasattr(program, "COLUMNS"):
        raise ResultsError(f"{result.name}: benchmarks/{name}.py has no COLUMNS")
    return program


def columns_of(result: Result) -> Columns:
    """The columns of the program that wrote a report."""
    return program_of(result).COLUMNS


def intervals(result: Result) -> list[Interval]:
    """The times of a report's rows, named by the columns before that of the time; a bare number
    is no name without its heading."""
    columns = list(columns_of(result).items())
    at = [i for i, (heading, _) in enumerate(columns) if heading.startswith("time")]
    timed = [row for row in result.report["rows"] if row.get("seconds")]
    if not at or len(timed) < 2:
        return []
    found = []
    for row in timed:
        cells = [(heading, cell(row)) for heading, cell in columns[: at[0]]]
        names = [f"{heading} = {cell}" if _is_number(cell) else cell for heading, cell in cells]
        spread = row["seconds"]
        label = ", ".join(name for name in names if name)
        found.append(Interval(label, names[0], spread["q1"], spread["median"], spread["q3"]))
    return found


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[\d,.]+", text) is not None


def figure_of(result: Result) -> Callable[[Path], None] | None:
    """What draws the figure of a report to a stem; None where there is none."""
    program = program_of(result)
    if hasattr(program, "plot"):
        return partial(program.plot, result.report["rows"])
    if found := intervals(result):
        return partial(plot_intervals, found, "seconds, median and quartiles")
    return None


def targets_table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Every target with the newest measurement."""
    rows = []
    for target in TARGETS:
        found = reached(target, reports)
        if found is None:
            rows.append([target.what, target.goal, "not measured", "", "", ""])
            continue
        spread = "" if found.quartiles is None else " ({:.3g} to {:.3g})".format(*found.quartiles)
        met = "yes" if target.met(found.value) else "NO"
        measured = f"{found.value:.3g}{target.unit}{spread}"
        rows.append([target.what, target.goal, measured, met, found.device, found.date[:10]])
    return markdown_table(["target", "goal", "measured (quartiles)", "met", "on", "date"], rows)


def title_of(result: Result) -> str:
    """What the program says of itself."""
    return (program_of(result).__doc__ or "").strip().partition("\n\n")[0].replace("\n", " ")


def page(results: Sequence[Result]) -> str:
    """The whole of docs/results.md."""
    reports = [result.report for result in results]
    parts = [HEAD, "## Targets", targets_table(reports)]
    for name in dict.fromkeys(report["benchmark"] for report in reports):
        of_program = [result for result in results if result.report["benchmark"] == name]
        parts += [f"## {name}", title_of(of_program[0])]
        for result in of_program:
            program, rows = program_of(result), result.report["rows"]
            shown = getattr(program, "shown_rows", list)(rows)
            parts.append(f"### {result.name}")
            parts.append(as_markdown({**result.report, "rows": shown}, program.COLUMNS))
            further = getattr(program, "further_tables", lambda rows: {})
            for title, table in further(rows).items():
                parts += [f"#### {title}", table]
            if figure_of(result):
                image = f"{FIGURES}/{result.name}"
                parts.append(f"![{result.name}]({image}.png) ([SVG]({image}.svg))")
    return "\n\n".join([*parts, TAIL]) + "\n"


def draw(results: Sequence[Result], folder: Path) -> None:
    """The figures; those of results that are gone are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = set()
    for result in results:
        if figure := figure_of(result):
            figure(folder / result.name)
            drawn.add(result.name)
    for file in folder.iterdir():
        if file.suffix in (".png", ".svg") and file.stem not in drawn:
            file.unlink()


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default {RESULTS}")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default {OUTPUT}")
    parser.add_argument("--check", action="store_true", help="write nothing; is the page as given?")
    options = parser.parse_args(arguments)
    try:
        results = read_results(options.results)
        text, file = page(results), options.output / PAGE
    except ResultsError as error:
        sys.exit(f"error: {error}")
    if options.check:
        if not file.is_file() or file.read_text() != text:
            sys.exit(f"error: {file} is not what {options.results} gives: run benchmarks.report")
        return
    draw(results, options.output / FIGURES)
    write_atomically(file, text)
    print(file)


if __name__ == "__main__":
    main(sys.argv[1:])
