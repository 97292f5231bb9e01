"""How the rows of benchmarks/ablation.py are compared, and shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure
from benchmarks.measure import BenchmarkError, Report, markdown_table
from laser_jax.config import load_retriever_config
from laser_jax.evaluate.results import PER_QUERY_FILE, QueryScores, read_per_query
from laser_jax.evaluate.retrieval import EXPLICIT, latent
from laser_jax.evaluate.significance import RESAMPLES, Interval, paired_bootstrap

METRICS = ("nDCG@10", "Hit@1", "Recall@100")
COMPARED = ("nDCG@10", "Hit@1")
"""Differences are given of these; resampling takes the most time of a report."""
STEPS = tuple(range(1, 9))
PROBE_FILE = "probe.json"

Values = dict[int, dict[str, float]]
"""Seed -> query -> value of one metric."""


@dataclass
class Result:
    """A row's finished runs: seed -> ..."""

    title: str
    scored: str
    """The run by which the row is judged."""
    K: int
    per_query: dict[int, dict[str, QueryScores]] = field(default_factory=dict)
    """... -> run -> query -> metric -> value."""
    code: dict[int, str] = field(default_factory=dict)
    """Which finished the training: the commit, or a version where there was no checkout."""
    probes: dict[int, dict[str, Any]] = field(default_factory=dict)

    def values(self, run: str, metric: str) -> Values:
        """One metric of one of the row's runs; empty where the row has no such run."""
        return {
            seed: {query: scores[metric] for query, scores in runs[run].items()}
            for seed, runs in self.per_query.items()
            if run in runs
        }

    def scores(self, run: str) -> dict[str, Any] | None:
        """All metrics over seeds; None where the row has no such run."""
        found = {metric: self.values(run, metric) for metric in METRICS}
        return {m: over_seeds(values) for m, values in found.items()} if found[METRICS[0]] else None


def read_result(title: str, view: str, runs: Mapping[int, Path], split: str) -> Result:
    """The finished runs of a row, by seed."""
    K = load_retriever_config(next(iter(runs.values())) / "model").num_thinking_steps
    result = Result(title, EXPLICIT if view == "explicit" else latent(K), K)
    for seed, run in runs.items():
        result.per_query[seed] = read_per_query(run / split / PER_QUERY_FILE)
        result.code[seed] = trained_by(run)
        if probes := json.loads((run / split / PROBE_FILE).read_text()):
            result.probes[seed] = probes
    return result


def trained_by(run: Path) -> str:
    """The commit of a finished run's code, or its version where there was no checkout."""
    code = json.loads((run / "results.json").read_text())["code"]
    return code.get("commit", code["version"])


def over_seeds(values: Values) -> dict[str, Any]:
    """Mean and spread of the seeds' means; the spread is the sample's standard deviation, None for
    one seed."""
    means = {seed: float(np.mean(list(queries.values()))) for seed, queries in values.items()}
    spread = float(np.std(list(means.values()), ddof=1)) if len(means) > 1 else None
    return {"mean": float(np.mean(list(means.values()))), "std": spread, "per_seed": means}


def grouped_bootstrap(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], *, confidence: float = 0.95
) -> Interval:
    """As `paired_bootstrap`, but whole groups of queries, of a training seed each, are drawn again
    as well (Davison and Hinkley 1997, section 3.8): G groups with replacement, then queries within
    each that was drawn. Every group weighs the same."""
    groups = [np.subtract(x, y) for x, y in zip(a, b, strict=True)]
    rng = np.random.default_rng(0)
    drawn_RG = rng.integers(0, len(groups), (RESAMPLES, len(groups)))
    means_RG = np.empty(drawn_RG.shape)
    for group, difference_Q in enumerate(groups):
        chosen_RG, Q = drawn_RG == group, len(difference_Q)
        means_RG[chosen_RG] = difference_Q[rng.integers(0, Q, (chosen_RG.sum(), Q))].mean(axis=1)
    low, high = np.quantile(means_RG.mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(np.mean([d.mean() for d in groups])), float(low), float(high))


def paired_difference(ours: Values, theirs: Values) -> dict[str, Any] | None:
    """`ours` less `theirs` over the seeds that both have; None without one.

    A query is paired with itself under the same seed. The pairs of all seeds are pooled and drawn
    again (`low`, `high`): the interval takes the trainings as given. In `over_seeds` the seeds are
    drawn again too, then queries within each; None for one seed."""
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    for seed in shared:
        if ours[seed].keys() != theirs[seed].keys():
            raise BenchmarkError(f"seed {seed}: two rows were evaluated on different queries")
    a = [list(ours[seed].values()) for seed in shared]
    b = [[theirs[seed][query] for query in ours[seed]] for seed in shared]
    pooled = paired_bootstrap([v for part in a for v in part], [v for part in b for v in part])
    grouped = grouped_bootstrap(a, b) if len(shared) > 1 else None
    drawn_too = grouped and {"low": grouped.low, "high": grouped.high}
    per_seed = {s: float(np.mean(x) - np.mean(y)) for s, x, y in zip(shared, a, b, strict=True)}
    return asdict(pooled) | {"over_seeds": drawn_too, "per_seed": per_seed}


def summarise(row: str, results: Mapping[str, Result]) -> dict[str, Any]:
    """A row of the report: scores over seeds, and what they are compared with."""
    result = results[row]
    laser, explicit = (results.get(name) if row != name else None for name in ("laser", "explicit"))
    seen = result.scores(EXPLICIT)
    return {
        "row": row,
        "title": result.title,
        "K": result.K,
        "seeds": sorted(result.per_query),
        "queries": sum(len(runs[result.scored]) for runs in result.per_query.values()),
        "scored": result.scored,
        "scores": result.scores(result.scored),
        "laser_minus": laser and _differences(laser, laser.scored, result, result.scored),
        "explicit": seen,
        # this row's explicit view less that of the row `explicit`
        "colearning": seen and explicit and _differences(result, EXPLICIT, explicit, EXPLICIT),
        "by_steps": {str(k): result.scores(latent(k)) for k in STEPS},  # as JSON has its keys
        "probe": _mean_probe(list(result.probes.values())),
        "trained_by": result.code,
    }


def _differences(ours: Result, our_run: str, theirs: Result, their_run: str) -> dict[str, Any]:
    return {
        metric: paired_difference(ours.values(our_run, metric), theirs.values(their_run, metric))
        for metric in COMPARED
    }


def _mean_probe(probes: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The probes' means over seeds; None without one."""
    if not probes:
        return None
    return {
        model: {what: np.mean([s[model][what] for s in probes], axis=0).tolist() for what in read}
        for model, read in probes[0].items()
    }


def fill(
    report: Report,
    titles: Mapping[str, tuple[str, str]],
    done: Mapping[str, Mapping[int, Path]],
    split: str,
) -> None:
    """Compares what is finished: `titles` are row -> title and the view by which it is judged,
    `done` row -> seed -> its run."""
    results = {row: read_result(*titles[row], runs, split) for row, runs in done.items() if runs}
    report.rows = [summarise(row, results) for row in results]
    report.notes += commits_told({row: result.code for row, result in results.items()})


def commits_told(code: Mapping[str, Mapping[int, str]]) -> list[str]:
    """For each commit that trained rows, which; the report's own commit only compares them."""
    rows: dict[str, dict[str, list[int]]] = {}
    for row, commits in code.items():
        for seed, commit in commits.items():
            rows.setdefault(commit, {}).setdefault(row, []).append(seed)
    if len(rows) == 1:
        return [f"All rows were trained by {next(iter(rows))}."]
    return [f"Trained by {commit}: {with_seeds(trained)}." for commit, trained in rows.items()]


def with_seeds(rows: Mapping[str, Sequence[int]]) -> str:
    """`row (seeds 1, 2); row (seed 3)`"""
    return "; ".join(
        f"{row} (seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))})"
        for row, seeds in rows.items()
    )


# --- tables ------------------------------------------------------------------------------------


def mean_cell(scores: Mapping[str, Any] | None, metric: str) -> str:
    """`mean ± spread`."""
    if scores is None:
        return ""
    spread = scores[metric]["std"]
    return f"{scores[metric]['mean']:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def difference_cell(differences: Mapping[str, Any] | None, metric: str, *, seeds: bool) -> str:
    """`difference [interval over queries]`, or the interval with seeds drawn too."""
    d = differences and differences[metric]
    interval = d and (d["over_seeds"] if seeds else d)
    if not d or not interval:
        return ""
    middle = "" if seeds else f"{d['difference']:+.3f} "
    return f"{middle}[{interval['low']:+.3f}, {interval['high']:+.3f}]"


COLUMNS = {
    "row": measure.value("title"),
    "K": measure.value("K"),
    "seeds": lambda row: str(len(row["seeds"])),
    "nDCG@10": lambda row: mean_cell(row["scores"], "nDCG@10"),
    "Hit@1": lambda row: mean_cell(row["scores"], "Hit@1"),
    "LaSER less this, nDCG@10": lambda r: difference_cell(r["laser_minus"], "nDCG@10", seeds=False),
    "seeds drawn too": lambda row: difference_cell(row["laser_minus"], "nDCG@10", seeds=True),
    "explicit view, nDCG@10": lambda row: mean_cell(row["explicit"], "nDCG@10"),
    "less explicit alone": lambda row: difference_cell(row["colearning"], "nDCG@10", seeds=False),
}


def steps_table(rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The metric at every K of inference, for every row that is judged by its latent view."""
    cells = [
        [row["title"], str(row["K"])]
        + [mean_cell(row["by_steps"][str(k)], metric).split(" ")[0] for k in STEPS]
        for row in rows
        if row["scored"] != EXPLICIT
    ]
    return markdown_table(["row", "trained at", *(f"K = {k}" for k in STEPS)], cells)


def probe_table(rows: Sequence[Mapping[str, Any]], what: str) -> str | None:
    """The probe's shares at every step, one line a row and place; None without a probe."""
    probes = {
        row["title"] if model == row["row"] else "language model alone": readings[what]
        for row in rows
        for model, readings in (row["probe"] or {}).items()
    }
    if not probes:
        return None
    K = max(map(len, probes.values()))
    cells = [
        [title if h == 1 else "", str(h), *(f"{step[h]:.2f}" for step in share)]
        + [""] * (K - len(share))
        for title, share in probes.items()
        for h in range(1, len(share[0]))
    ]
    return markdown_table(["row", "hop", *(f"state {k}" for k in range(1, K + 1))], cells)


def further_tables(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What is shown below the table of the scores, by title."""
    tables = {"nDCG@10 by K at inference": steps_table(rows, "nDCG@10")}
    first = "How often the state alone ranks first the document of hop h"
    likeliest = "How often the state's likeliest token is the name of hop h's place"
    for what, title in (("documents", first), ("tokens", likeliest)):
        if table := probe_table(rows, what):
            tables[title] = table
    return tables
