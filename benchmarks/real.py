"""LaSER and its baselines on a pretrained language model and real texts: trains, ranks, compares.

    python -m benchmarks.real --model DIR [--rows laser contrastive ...] [--split dev] [--others N]

One contrastive stage (K = 1) from the backbone comes first; every row goes on from its adapters,
with the same rows, batches and steps. What is trained stays under --work: finished runs are not
repeated, stopped ones go on, and --finished_only reports what is there. --first_adapter takes a
first stage that is trained already, such as benchmarks/adapters/smollm2-first. With --others every
set is ranked over the documents that are relevant to some query of the split and N others.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import measure
from benchmarks.ablation import CONFIGS, ROWS, train_once
from benchmarks.ablation_table import STEPS, commits_told
from benchmarks.measure import BenchmarkError, Report
from laser_jax.command_line import parse_train_command
from laser_jax.config import load_retriever_config
from laser_jax.evaluate.beir import read_beir
from laser_jax.evaluate.model import ModelOptions, evaluate_model
from laser_jax.evaluate.results import PER_QUERY_FILE, RESULTS_FILE, read_per_query
from laser_jax.evaluate.retrieval import EXPLICIT, latent
from laser_jax.files.durable import write_atomically
from laser_jax.train.run import TrainingError

FIRST, UNTRAINED = "first", "untrained"
"""The contrastive stage that all rows begin with, and the backbone as it comes."""
METRICS = ("nDCG@10", "Recall@100")
RESAMPLES = 10_000

Scores = dict[str, dict[str, dict[str, float]]]
"""Set -> run -> query -> nDCG@10."""


# --- training and ranking ----------------------------------------------------------------------


def train_command(options: argparse.Namespace, row: str, seed: int) -> list[str]:
    """The flags of laser_jax.train: the recipe, what the row changes, and where it begins."""
    folder = seed_folder(options, seed)
    command = ["--config", str(options.config), "--model.path", str(options.model)]
    if row == FIRST:
        command += ["--config", str(options.config.with_name(f"{options.config.stem}_first.yaml"))]
        steps = options.first_steps
    else:
        begun = options.first_adapter or folder / FIRST / "adapter"
        adapter = ["--model.adapter", str(begun)]
        command, steps = command + ROWS[row].arguments(folder) + adapter, options.steps
    return [
        *command,
        *("--train.steps", str(steps), "--train.seed", str(seed)),
        *("--data.eval", "null", "--output", str(folder / row)),
    ]


def seed_folder(options: argparse.Namespace, seed: int) -> Path:
    return options.work / f"seed-{seed}"


def pooled(data: Path, split: str, others: int, folder: Path) -> Path:
    """A BEIR directory with the queries of a split and a part of the corpus: all documents that are
    judged relevant, and `others` more. The draw depends on the set's name alone."""
    target = folder / f"{data.name}-{split}-{others}"
    if (target / "qrels").is_dir():
        return target
    dataset = read_beir(data, split)
    relevant = {id_ for grades in dataset.qrels.values() for id_, g in grades.items() if g > 0}
    rest = sorted(d.id for d in dataset.documents if d.id not in relevant)
    kept = relevant | set(random.Random(data.name).sample(rest, min(others, len(rest))))
    target.mkdir(parents=True, exist_ok=True)
    lines = (data / "corpus.jsonl").read_text().splitlines(keepends=True)
    chosen = [line for line in lines if json.loads(line)["_id"] in kept]
    write_atomically(target / "corpus.jsonl", "".join(chosen))
    write_atomically(target / "queries.jsonl", (data / "queries.jsonl").read_text())
    judged = (data / "qrels" / f"{split}.tsv").read_text()
    (target / ".qrels").mkdir(exist_ok=True)
    write_atomically(target / ".qrels" / f"{split}.tsv", judged)
    (target / ".qrels").rename(target / "qrels")
    return target


def rank(options: argparse.Namespace, model: Path, output: Path, name: str) -> None:
    """Ranks every set at every K and by the explicit view; what is finished is kept."""
    for data in options.sets:
        target = output / options.split / data.name
        if (target / RESULTS_FILE).is_file():
            continue
        if options.others is not None:
            data = pooled(data, options.split, options.others, options.work / "pools")
        evaluate_model(
            ModelOptions(
                model=str(model),
                data=str(data),
                output=str(target),
                split=options.split,
                name=name,
                eval_thinking_steps=STEPS,
                metrics=METRICS,
                length_multiple=options.length_multiple,
            )
        )
        jax.clear_caches()


def run_missing(options: argparse.Namespace, rows: Sequence[str]) -> None:
    """Trains and ranks what is not finished, seed by seed, in the order of the rows."""
    for seed in range(1, options.seeds + 1):
        for row in rows:
            train_once(train_command(options, row, seed))
            run = seed_folder(options, seed) / row
            rank(options, run / "model", run, row)
            jax.clear_caches()


# --- comparison --------------------------------------------------------------------------------


def read_scores(run: Path, split: str, sets: Sequence[str]) -> Scores:
    """nDCG@10 of every query of every set, by run."""
    return {
        name: {
            how: {query: values[METRICS[0]] for query, values in queries.items()}
            for how, queries in read_per_query(run / split / name / PER_QUERY_FILE).items()
        }
        for name in sets
    }


def macro_difference(
    pairs: Mapping[int, tuple[Scores, str, Scores, str]], seed: int = 0
) -> dict[str, float]:
    """The macro average over sets of (ours - theirs), each (scores, run), and its 95 % interval:
    training seeds are drawn again, and queries within every set.

    Raises:
        BenchmarkError: the two were not ranked on the same queries.
    """
    differences = []
    for ours, our_run, theirs, their_run in pairs.values():
        by_set = []
        for name in ours:
            a, b = ours[name][our_run], theirs[name][their_run]
            if a.keys() != b.keys():
                raise BenchmarkError(f"{name}: two rows were evaluated on different queries")
            by_set.append(np.array([a[query] - b[query] for query in a]))
        differences.append(by_set)
    rng = np.random.default_rng(seed)
    # [seeds, resamples]: the macro average with the queries of every set drawn again
    means_SR = np.array(
        [
            np.mean(
                [d[rng.integers(0, len(d), (RESAMPLES, len(d)))].mean(axis=1) for d in by_set],
                axis=0,
            )
            for by_set in differences
        ]
    )
    S = len(differences)
    drawn_RS = rng.integers(0, S, (RESAMPLES, S))
    low, high = np.quantile(means_SR[drawn_RS.T, np.arange(RESAMPLES)].mean(axis=0), [0.025, 0.975])
    mean = np.mean([[d.mean() for d in by_set] for by_set in differences])
    return {"difference": float(mean), "low": float(low), "high": float(high)}


def fill(options: argparse.Namespace, report: Report) -> None:
    """Runs what is missing, unless `--finished_only`, and compares.

    Raises:
        BenchmarkError: with the message of what training and evaluation raise.
    """
    names = [data.name for data in options.sets]
    rows = [row for row in ROWS if row in (options.rows or ROWS)]
    if options.first_adapter is None:
        rows = [FIRST, *rows]
    try:
        if not options.finished_only:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for the tables
                parse_train_command(train_command(options, rows[0], 1))  # a bad recipe ends it now
                run_missing(options, rows)
        found: dict[str, dict[int, Scores]] = {}
        code: dict[str, dict[int, str]] = {}
        for row in rows:
            for seed in range(1, options.seeds + 1):
                run = seed_folder(options, seed) / row
                ranked = [run / options.split / name / RESULTS_FILE for name in names]
                if (run / "results.json").is_file() and all(file.is_file() for file in ranked):
                    found.setdefault(row, {})[seed] = read_scores(run, options.split, names)
                    trained_by = json.loads((run / "results.json").read_text())["code"]
                    commit = trained_by.get("commit", trained_by["version"])
                    code.setdefault(row, {})[seed] = commit
        if not found:
            raise BenchmarkError(f"nothing is finished under {options.work}")
        report.rows = [summarise(options, row, found) for row in found]
    except (ValueError, OSError, TrainingError) as error:
        raise BenchmarkError(str(error)) from error
    report.notes += commits_told(code)


def summarise(
    options: argparse.Namespace, row: str, found: Mapping[str, Mapping[int, Scores]]
) -> dict[str, Any]:
    """A row of the report: means over seeds, and what the row is compared with."""
    model = seed_folder(options, min(found[row])) / row / "model"
    K = load_retriever_config(model).num_thinking_steps
    view = ROWS[row].view if row != FIRST else "latent"
    scored = EXPLICIT if view == "explicit" else latent(K)
    scores = found[row]

    def means(run: str) -> dict[str, float] | None:
        by_set = {
            name: float(np.mean([list(s[name][run].values()) for s in scores.values()]))
            for name in next(iter(scores.values()))
            if all(run in s[name] for s in scores.values())
        }
        return {**by_set, "macro": float(np.mean(list(by_set.values())))} if by_set else None

    def less(other: str, run: str | None = None) -> dict[str, float] | None:
        theirs = found.get(other, {})
        shared = sorted(scores.keys() & theirs.keys())
        if not shared or (other == row and run is None):
            return None
        their_K = load_retriever_config(seed_folder(options, shared[0]) / other / "model")
        their_run = run or latent(their_K.num_thinking_steps)
        return macro_difference({s: (scores[s], scored, theirs[s], their_run) for s in shared})

    return {
        "row": row,
        "title": ROWS[row].title if row != FIRST else "first stage alone",
        "K": K,
        "seeds": sorted(scores),
        "scored": scored,
        "scores": means(scored),
        "explicit": means(EXPLICIT),
        "by_steps": {str(k): means(latent(k)) for k in STEPS},
        "less_contrastive": less("contrastive"),
        "less_own_K1": less(row, latent(1)) if K > 1 else None,
    }


# --- the program -------------------------------------------------------------------------------


def _macro(key: str) -> measure.Cell:
    return lambda row: "" if row[key] is None else f"{row[key]['macro']:.3f}"


def _interval(key: str) -> measure.Cell:
    def cell(row: measure.Row) -> str:
        d = row[key]
        return "" if d is None else f"{d['difference']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"

    return cell


COLUMNS = {
    "row": measure.value("title"),
    "K": measure.value("K"),
    "seeds": lambda row: str(len(row["seeds"])),
    "nDCG@10, macro": _macro("scores"),
    "less contrastive": _interval("less_contrastive"),
    "less itself at K = 1": _interval("less_own_K1"),
    "explicit view": _macro("explicit"),
    "by set": lambda row: ", ".join(
        f"{name} {value:.3f}" for name, value in row["scores"].items() if name != "macro"
    ),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="the backbone's directory")
    text = "the recipe; FILE_first.yaml beside it is laid over it for the first stage"
    parser.add_argument("--config", type=Path, default=CONFIGS / "smollm2.yaml", help=text)
    parser.add_argument("--sets", type=Path, nargs="+", required=True, help="BEIR directories")
    measure.add_numbers(
        parser,
        {
            "seeds": (1, "how many"),
            "first_steps": (150, "of the contrastive stage"),
            "steps": (150, "of every row after it"),
            "length_multiple": (16, "of the encoder's batches"),
        },
    )
    text = "a first stage that is trained, instead of one for every seed"
    parser.add_argument("--first_adapter", type=Path, help=text)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="default: all, in this order")
    parser.add_argument("--split", choices=("dev", "test"), default="dev", help="default dev")
    parser.add_argument("--others", type=measure.positive, help="default: the whole corpus")
    parser.add_argument("--work", type=Path, default=Path("runs/real"), help="holds the runs")
    text = "train nothing, report what is finished"
    parser.add_argument("--finished_only", action="store_true", help=text)


PROGRAM = measure.Program("real", __doc__, fill, COLUMNS, add_flags, repeats=None)

if __name__ == "__main__":
    PROGRAM.main(sys.argv[1:])
