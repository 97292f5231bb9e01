"""Turns what the benchmarks measured into docs/results.md and its figures.

    python -m benchmarks.report [--results benchmarks/results] [--output docs]
    python -m benchmarks.report --show NAME

Reads every file under the folder of results (.json or .json.gz) in the order of their names and
writes nothing that they do not say: the same files give the same page. Of several measurements of
one thing the newest is taken. Figures are SVG and want matplotlib, the extra `bench`. `--check`
writes nothing and says whether the page is what the files give; `--show` prints one file whole,
with its command, commit, machine and notes.
"""

from __future__ import annotations

import gzip
import importlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.ablation_table import further_tables
from benchmarks.measure import as_markdown, markdown_table
from benchmarks.targets import PUBLISHED, PYTORCH, TARGETS, TUNED, reached, values_of
from laser_jax.evaluate.plots import plot_quality_by_steps
from laser_jax.files.durable import write_atomically

RESULTS, OUTPUT = Path("benchmarks/results"), Path("docs")
PAGE, FIGURES = "results.md", "results"
KEYS = {"benchmark", "command", "settings", "environment", "notes", "rows"}
QUALITY_COLUMNS = {
    "ablation": ("row", "K", "nDCG@10", "LaSER less this, nDCG@10"),
    "real": ("row", "K", "nDCG@10, macro", "less contrastive", "less itself at K = 1"),
}
UNSHOWN = ("laser_K1", "laser_K3", "laser_K6", "latent_rl", "without_colearning")
UNSHOWN += ("without_latent_view", "without_output", "without_trajectory")
DRAWN = ("laser", "laser_K1", "laser_K3", "laser_K6", "gircse", "without_explicit_view")
"""The rows of an ablation's figure."""


class ResultsError(ValueError):
    """A file that is no result to show. Names it."""


@dataclass(frozen=True)
class Result:
    """A report, and the name of its file without ending or, inside one of `gpu`, of its part."""

    name: str
    report: dict[str, Any]

    @property
    def machine(self) -> str:
        e = self.report["environment"]
        return e["device"].removeprefix("NVIDIA ") if e["backend"] == "gpu" else "CPU"


def read_results(folder: Path) -> list[Result]:
    """All reports, in the order of their names; those inside another follow it.

    Raises:
        ResultsError: no file, or one that no benchmark wrote, or that is a `--quick` run.
    """
    files = sorted([*folder.rglob("*.json"), *folder.rglob("*.json.gz")])
    if not files:
        raise ResultsError(f"{folder} holds no JSON file: run `python -m benchmarks.all cpu` first")
    results = []
    for file in files:
        try:
            data = file.read_bytes()
            report = json.loads(gzip.decompress(data) if file.suffix == ".gz" else data)
        except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ResultsError(f"{file}: not JSON: {error}") from error
        if not isinstance(report, dict) or set(report) != KEYS:
            raise ResultsError(f"{file}: no benchmark's file; the keys {sorted(KEYS)} are wanted")
        if "--quick" in report["command"].split():
            raise ResultsError(f"{file} was written by --quick, whose numbers mean nothing")
        name = file.relative_to(folder).as_posix().partition(".json")[0].replace("/", "-")
        results.append(Result(name, report))
        results += inner_results(name, report)
    return results


def inner_results(name: str, report: Mapping[str, Any]) -> Iterator[Result]:
    """The reports that the rows of a report hold (`gpu`)."""
    for number, row in enumerate(report["rows"]):
        if "report" in row:
            yield Result(f"{name}-{number}-{row['report']['benchmark']}", row["report"])


# --- tables ------------------------------------------------------------------------------------


def targets_table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Every target with the newest measurement."""
    rows = []
    for target in TARGETS:
        found = reached(target, reports)
        if found is None:
            rows.append([target.what, target.goal_told, "not measured", "", target.device, ""])
            continue
        spread = "" if found.quartiles is None else " ({:.3g} to {:.3g})".format(*found.quartiles)
        met = "yes" if target.met(found.value) else "**NO**"
        measured = f"{found.value:.4g}{target.unit}{spread}"
        rows.append([target.what, target.goal_told, measured, met, found.device, found.date[:10]])
    return markdown_table(["target", "goal", "measured (quartiles)", "met", "on", "date"], rows)


@dataclass(frozen=True)
class Comparison:
    """A table with a line for each piece of work: the time of one contender, and how many times as
    long the others took in the same run. Of several runs the newest counts that timed one of the
    others too."""

    benchmark: str
    heading: str
    label: str
    """What a line is called: a template of a row's values."""
    base: str
    others: Sequence[str]
    contender: str = "{contender}"
    ratio: str = "ratio"
    only: Mapping[str, Any] = field(default_factory=dict)

    def table(self, results: Sequence[Result]) -> str:
        newest: dict[str, tuple[str, dict[str, Mapping[str, Any]]]] = {}
        for result in results:
            if result.report["benchmark"] != self.benchmark:
                continue
            date, found = result.report["environment"]["date"], {}
            for values in values_of(result.report):
                if self.only.items() <= values.items() and self.ratio in values:
                    values = dict(values) | {"machine": result.machine}
                    values["kind"] = "all weights" if values.get("full") else "adapters"
                    of = found.setdefault(self.label.format_map(values), {})
                    of[self.contender.format_map(values)] = values
            for label, rows in found.items():
                useful = self.base in rows and rows.keys() & set(self.others)
                if useful and (label not in newest or newest[label][0] < date):
                    newest[label] = date, rows
        lines = []
        for label, (date, rows) in sorted(newest.items()):
            ratios = [measure.ratio_cell(rows.get(o, {}).get(self.ratio)) for o in self.others]
            time = measure.seconds_cell(rows[self.base]["seconds"])
            lines.append([label, time, *(r.replace(" (", " × (") for r in ratios), date[:10]])
        return markdown_table([self.heading, self.base, *self.others, "date"], lines)


MODEL = "{machine}, {backbone}, {dtype}"
BATCH = f"{MODEL}, {{rows}}×{{tokens}}"
STEP = f"{MODEL}, {{kind}}, {{queries}}×{{query_tokens}}"
VARIANTS = ("parity", "gradcache / 2", "gradcache / 4", "plain / 4", "remat dots", "remat full")
COMPARISONS = (
    Comparison(
        "encode_latency", "embedding, K = 3", BATCH, "ours", PYTORCH, only={"thinking_steps": 3}
    ),
    Comparison(
        "encode_throughput",
        "many documents, K = 3",
        f"{MODEL}, {{workload}}",
        "ours",
        (PUBLISHED, TUNED, "tuned, as published", "tuned, sorted"),
    ),
    Comparison("train_step", "a training step", STEP, "fast", PYTORCH),
    Comparison("train_step", "ways to train", STEP, "fast", VARIANTS),
    Comparison(
        "encode_latency",
        "what thoughts cost",
        f"{{contender}}, {BATCH}",
        "K = 1",
        [f"K = {K}" for K in (2, 3, 5, 8)],
        "K = {thinking_steps}",
        "over_one_step",
    ),
    Comparison(
        "rewrite_latency",
        "a query",
        f"{MODEL}, batch {{rows}}",
        "standard retriever",
        ("latent, K = 3", "rewrite-then-retrieve"),
        "{method}",
    ),
    Comparison(
        "search",
        "exact top 100 (queries × documents × width)",
        "{machine}, {queries:,} × {documents:,} × {width:,}",
        "ours, from the host",
        ("ours, on the device", "NumPy", "PyTorch", "FAISS"),
    ),
)


def quality_tables(results: Sequence[Result]) -> Iterator[str]:
    """Some columns of every comparison of methods on test splits, without the rows `UNSHOWN`."""
    for result in compared(results, *QUALITY_COLUMNS):
        name = result.report["benchmark"]
        chosen, rows = QUALITY_COLUMNS[name], result.report["rows"]
        columns = importlib.import_module(f"benchmarks.{name}").PROGRAM.columns
        rows = [row for row in rows if row["row"] not in UNSHOWN]
        lines = [[columns[column](row) for column in chosen] for row in rows]
        yield f"{result.name}:\n\n{markdown_table(chosen, lines)}"


# --- the page ----------------------------------------------------------------------------------


def headline(reports: Sequence[Mapping[str, Any]]) -> str:
    """How many targets are met, and which are not."""
    found = [(target, reached(target, reports)) for target in TARGETS]
    missed = [
        f"{t.what}{t.device and f' on an {t.device}'}, {r.value:.3g}{t.unit} ({t.goal_told})"
        for t, r in found
        if r is not None and not t.met(r.value)
    ]
    absent = [t.what + (t.device and f" on an {t.device}") for t, r in found if r is None]
    told = [f"**{len(found) - len(missed) - len(absent)} of {len(found)} targets are met.**"]
    told += [f"Missed: {'; '.join(missed)}."] if missed else []
    return "\n\n".join([*told, *([f"Not measured: {'; '.join(absent)}."] if absent else [])])


HEAD = """# Results

Made by `python -m benchmarks.report` from the files under `benchmarks/results`; not to be edited by
hand. How times are taken is in [benchmarks.md](benchmarks.md). Ratios are times of the others over
ours in the same run, so above 1 ours is faster; in brackets are quartiles. `python -m
benchmarks.report --show NAME` prints a file whole, with its command, commit and machine. Goals that
were given up are in [benchmarks.md](benchmarks.md#goals-that-were-given-up)."""

QUALITY = """## Quality

Small models trained from scratch in embedded worlds, two to five seeds, mean ± spread
([ablation.md](ablation.md)); a pretrained model on real texts ([real.md](real.md))."""

TAIL = """The paper's own tables (BRIGHT, FollowIR, BrowseComp-Plus) need its six backbones, 81,659
training rows and a node of GPUs or a TPU slice: [reproduce.md](reproduce.md) has every command, and
the hours. The timings are measured again by `python -m benchmarks.all cpu --output FILE` on an idle
machine, and by `... gpu`; the file belongs into `benchmarks/results`."""


def page(results: Sequence[Result]) -> str:
    """The whole of docs/results.md."""
    reports = [result.report for result in results]
    figures = [f"![{r.name}]({FIGURES}/{r.name}.svg)" for r in compared(results, "ablation")]
    parts = [HEAD, headline(reports), "## Targets", targets_table(reports)]
    parts += [QUALITY, *quality_tables(results), " ".join(figures)]
    parts += ["## Speed", *(of.table(results) for of in COMPARISONS)]
    parts += [TAIL, f"The files: {', '.join(r.name for r in results)}."]
    return "\n\n".join(parts) + "\n"


def compared(results: Sequence[Result], *benchmarks: str) -> list[Result]:
    """Comparisons of methods on test splits; of names that differ in date alone, the newest."""
    newest = {}
    for result in results:
        rows = {row.get("row") for row in result.report["rows"]}
        on_test = result.report["settings"].get("split") != "dev"
        if result.report["benchmark"] in benchmarks and on_test and "gircse" in rows:
            newest[result.name[len("2026-11-26") :]] = result
    return list(newest.values())


def draw(results: Sequence[Result], folder: Path) -> None:
    """A figure of every ablation, nDCG@10 by K (the paper's Figure 5), as SVG with text as text;
    whatever else lies in the folder is removed."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    for result in compared(results, "ablation"):
        curves = {
            f"{row['title']}" + ("" if "K =" in row["title"] else f", trained at K = {row['K']}"): {
                int(k): scores["nDCG@10"]["mean"] for k, scores in row["by_steps"].items()
            }
            for row in result.report["rows"]
            if row["row"] in DRAWN
        }
        with tempfile.TemporaryDirectory() as made:
            with matplotlib.rc_context({"svg.fonttype": "none"}):
                plot_quality_by_steps(curves, {}, "nDCG@10", Path(made, result.name))
            text = Path(made, f"{result.name}.svg").read_text()
        write_atomically(folder / f"{result.name}.svg", text)


def shown(result: Result) -> str:
    """One report whole. Where its program is gone, every number of its rows is a column."""
    rows = result.report["rows"]
    try:
        program = importlib.import_module(f"benchmarks.{result.report['benchmark']}")
    except ModuleNotFoundError:
        program = None
    columns = getattr(program, "COLUMNS", None) or {
        key: measure.value(key, "" if isinstance(found, int | str) else ".6g")
        for key, found in rows[0].items()
        if isinstance(found, int | float | str) or "median" in (found or ())
    }
    parts = [as_markdown(result.report, columns)]
    if result.report["benchmark"] == "ablation":
        parts += [f"{title}:\n\n{table}" for title, table in further_tables(rows).items()]
    return "\n\n".join(parts)


def main(arguments: Sequence[str]) -> None:
    parser = measure.empty_parser("report", __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default {RESULTS}")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default {OUTPUT}")
    parser.add_argument("--check", action="store_true", help="write nothing; is the page as given?")
    parser.add_argument("--show", metavar="NAME", help="print one file whole")
    options = parser.parse_args(arguments)
    try:
        results = {result.name: result for result in read_results(options.results)}
        if options.show is not None:
            if options.show not in results:
                raise ResultsError(f"--show {options.show}: the files are {', '.join(results)}")
            print(shown(results[options.show]))
            return
        text, file = page(list(results.values())), options.output / PAGE
    except ResultsError as error:
        sys.exit(f"error: {error}")
    if options.check:
        if not file.is_file() or file.read_text() != text:
            sys.exit(f"error: {file} is not what {options.results} gives: run benchmarks.report")
        return
    draw(list(results.values()), options.output / FIGURES)
    write_atomically(file, text)
    print(file)


if __name__ == "__main__":
    main(sys.argv[1:])
