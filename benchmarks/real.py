"""LaSER and its baselines on a pretrained language model and real texts: trains, ranks, compares.

    python -m benchmarks.real --model smollm2 --sets DIR ... [--rows laser contrastive bm25 ...]

One contrastive stage (K = 1) from the backbone comes first; every row goes on from its adapters,
with the same rows, batches and steps. BM25, MiniLM and the backbone untrained are ranked where
--rows names them. What is trained stays under --work: finished runs are not repeated, stopped ones
go on, and --finished_only reports what is there. --first_adapter takes a first stage that is
trained already, such as benchmarks/adapters/smollm2-first. With --others every set is ranked over
the documents that are relevant to some query of the split and N others.
"""

import argparse
import contextlib
import json
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import baselines, measure, thoughts
from benchmarks.ablation import ROWS, train_once
from benchmarks.ablation_table import STEPS, commits_told, trained_by
from benchmarks.measure import BenchmarkError, Report
from laser_jax.command_line import parse_train_command
from laser_jax.config import RetrieverConfig, load_retriever_config, save_retriever_config
from laser_jax.evaluate.beir import read_beir
from laser_jax.evaluate.metrics import evaluate_run
from laser_jax.evaluate.model import ModelOptions, evaluate_model
from laser_jax.evaluate.results import PER_QUERY_FILE, RESULTS_FILE, read_per_query, write_results
from laser_jax.evaluate.retrieval import CONTROL, EXPLICIT, REWRITE, latent
from laser_jax.files.durable import write_atomically, write_json
from laser_jax.hf.directory import read_backbone_config
from laser_jax.models.directory import model_directory
from laser_jax.train.loop import TrainingError

FIRST, UNTRAINED = "first", "untrained"
"""The contrastive stage that all rows begin with, and the backbone as it comes, in the recipe."""
GIVEN = {UNTRAINED: "SmolLM2 untrained", **baselines.BASELINES}
"""Rows that nobody trains here."""
METRICS = ("nDCG@10", "Recall@100")
THOUGHTS_FILE = "thoughts.json"
RESAMPLES = 10_000

Scores = dict[str, dict[str, dict[str, float]]]
"""Set -> run -> query -> value of one metric."""


# --- training and ranking ----------------------------------------------------------------------


def train_command(options: argparse.Namespace, row: str, seed: int) -> list[str]:
    """The flags of laser_jax.train: the recipe, what the row changes, and where it begins."""
    folder = seed_folder(options, seed)
    command = [*(f"--config={c}" for c in options.config), "--model.path", str(options.model)]
    if row == FIRST:
        recipe = Path(options.config[0])
        command += ["--config", str(recipe.with_name(f"{recipe.stem}_first.yaml"))]
        steps = options.first_steps
    else:
        begun = options.first_adapter or folder / FIRST / "adapter"
        command += ["--model.adapter", str(begun), "--model.adapter_share"]
        command += [str(options.adapter_share), *ROWS[row].arguments(folder)]
        steps = options.steps * (2 if "--train.steps" in ROWS[row].flags else 1)  # twice as long
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
    target, judged = folder / f"{data.name}-{split}-{others}", Path("qrels", f"{split}.tsv")
    if (target / judged).is_file():
        return target
    dataset = read_beir(data, split)
    relevant = {id_ for grades in dataset.qrels.values() for id_, g in grades.items() if g > 0}
    rest = sorted(d.id for d in dataset.documents if d.id not in relevant)
    kept = relevant | set(random.Random(data.name).sample(rest, min(others, len(rest))))
    (target / judged).parent.mkdir(parents=True, exist_ok=True)
    lines = (data / "corpus.jsonl").read_text().splitlines(keepends=True)
    chosen = [line for line in lines if json.loads(line)["_id"] in kept]
    write_atomically(target / "corpus.jsonl", "".join(chosen))
    for copied in (Path("queries.jsonl"), judged):  # the last says that all is there
        write_atomically(target / copied, (data / copied).read_text())
    return target


def unranked(options: argparse.Namespace, output: Path) -> Iterator[tuple[Path, Path]]:
    """The sets without results under `output`: what is to be ranked, and where the results go."""
    for data in options.sets:
        target = output / options.split / data.name
        if not (target / RESULTS_FILE).is_file():
            if options.others is not None:
                data = pooled(data, options.split, options.others, options.work / "pools")
            yield data, target


def rank(options: argparse.Namespace, model: Path, output: Path, name: str) -> None:
    """Ranks every set at every K and by the explicit view; what is finished is kept."""
    for data, target in unranked(options, output):
        written = options.rewrites and options.rewrites / f"{target.name}-{options.split}.jsonl"
        asked = ModelOptions(
            model=str(model),
            data=str(data),
            output=str(target),
            split=options.split,
            name=name,
            eval_thinking_steps=STEPS,
            metrics=METRICS,
            rewrites=str(written) if written else None,
            max_length=options.max_length,
            length_multiple=options.length_multiple,
        )
        evaluate_model(asked)
        if load_retriever_config(model).num_thinking_steps > 1:
            said = thoughts.words(model, read_beir(data, options.split))
            write_json(target / THOUGHTS_FILE, said)


def rank_given(options: argparse.Namespace, row: str) -> None:
    """Ranks every set by what is not trained here, a baseline also with the rationale."""
    if row == UNTRAINED:
        model = options.work / row / "model"
        model.mkdir(parents=True, exist_ok=True)
        for file in model_directory(options.model).iterdir():
            if not (model / file.name).exists():
                (model / file.name).symlink_to(file.resolve())
        config, _ = parse_train_command(train_command(options, "laser", 1))
        K, backbone = config.objective.num_thinking_steps, read_backbone_config(model)
        own = RetrieverConfig(backbone, num_thinking_steps=K, prompt=config.prompt)
        save_retriever_config(own, model)
        rank(options, model, model.parent, row)
        return
    for data, target in unranked(options, options.work / row):
        dataset = read_beir(data, options.split)
        runs = baselines.rankings(row, dataset)
        per_query = {how: evaluate_run(run, dataset.qrels, METRICS) for how, run in runs.items()}
        write_results(target, {"baseline": row, "data": str(data)}, per_query)


def run_missing(options: argparse.Namespace, rows: Sequence[str]) -> None:
    """Trains and ranks what is not finished, seed by seed, in the order of the rows."""
    for row in GIVEN.keys() & set(rows):
        rank_given(options, row)
    for seed in range(1, options.seeds + 1):
        for row in (row for row in rows if row not in GIVEN):
            train_once(train_command(options, row, seed))
            run = seed_folder(options, seed) / row
            rank(options, run / "model", run, row)
            jax.clear_caches()


# --- comparison --------------------------------------------------------------------------------


def read_scores(run: Path, split: str, sets: Sequence[str], metric: str = METRICS[0]) -> Scores:
    """One metric of every query of every set, by run."""
    return {
        name: {
            how: {query: values[metric] for query, values in queries.items()}
            for how, queries in read_per_query(run / split / name / PER_QUERY_FILE).items()
        }
        for name in sets
    }


def macro_difference(
    pairs: Mapping[int, tuple[Scores, str, Scores, str]], seed: int = 0
) -> dict[str, float]:
    """The macro average over sets of (ours - theirs), each (scores, run), and its 95 % interval:
    training seeds are drawn again, and queries within every set, the same ones for all seeds.

    Raises:
        BenchmarkError: the two, or two seeds, were not ranked on the same queries.
    """
    differences: dict[str, list[np.ndarray]] = {}
    asked: dict[str, list[str]] = {}
    for ours, our_run, theirs, their_run in pairs.values():
        for name in ours:
            a, b = ours[name][our_run], theirs[name][their_run]
            queries = asked.setdefault(name, list(a))
            if not a.keys() == b.keys() == set(queries):
                raise BenchmarkError(f"{name}: two rows were evaluated on different queries")
            differences.setdefault(name, []).append(np.array([a[q] - b[q] for q in queries]))
    rng = np.random.default_rng(seed)
    by_set = []  # of [seeds, resamples]
    for of_set in differences.values():
        drawn_RQ = rng.integers(0, len(of_set[0]), (RESAMPLES, len(of_set[0])))
        by_set.append([d[drawn_RQ].mean(axis=1) for d in of_set])
    means_SR = np.mean(by_set, axis=0)
    S = len(pairs)
    drawn_RS = rng.integers(0, S, (RESAMPLES, S))
    low, high = np.quantile(means_SR[drawn_RS.T, np.arange(RESAMPLES)].mean(axis=0), [0.025, 0.975])
    mean = np.mean([[d.mean() for d in of_set] for of_set in differences.values()])
    return {"difference": float(mean), "low": float(low), "high": float(high)}


def length_of(options: argparse.Namespace, run: Path) -> int:
    return options.max_length or load_retriever_config(run / "model").prompt.document_max_length


def find(options: argparse.Namespace, rows: Sequence[str]) -> dict[str, dict[int, Path]]:
    """The finished runs of the rows, by seed. What nobody trains stands beside every seed. Raises a
    BenchmarkError where a set was ranked with another `--others` or `--max_length`."""
    runs: dict[str, dict[int, Path]] = {}
    pool = "" if options.others is None else f"-{options.split}-{options.others}"
    for row in rows:
        for seed in range(1, options.seeds + 1):
            run = options.work / row if row in GIVEN else seed_folder(options, seed) / row
            places = [run / options.split / data.name / RESULTS_FILE for data in options.sets]
            for place in filter(Path.is_file, places):
                told = json.loads(place.read_text())
                if (ranked := Path(told["data"]).name) != place.parent.name + pool:
                    raise BenchmarkError(f"{place.parent} is of {ranked}: delete it")
                if (read := told.get("document_max_length")) and read != length_of(options, run):
                    raise BenchmarkError(f"{place.parent} was read to {read} tokens: delete it")
            if all(place.is_file() for place in places):
                runs.setdefault(row, {})[seed] = run
    return runs


def fill(options: argparse.Namespace, report: Report) -> None:
    """Runs what is missing, unless `--finished_only`, and compares.

    Raises:
        BenchmarkError: with the message of what training and evaluation raise.
    """
    rows = [row for row in (*ROWS, *GIVEN) if row in (options.rows or ROWS)]
    if options.first_adapter is None:
        rows = [FIRST, *rows]
    try:
        if not options.finished_only:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for the tables
                find(options, rows)  # what it refuses is said before the work
                for row in set(rows) - GIVEN.keys():  # a bad recipe ends it now
                    parse_train_command(train_command(options, row, 1))
                run_missing(options, rows)
        runs = find(options, rows)
        if not runs:
            raise BenchmarkError(f"nothing is finished under {options.work}")
        report.rows = [summarise(options, row, runs) for row in runs]
    except (ValueError, OSError, TrainingError) as error:
        raise BenchmarkError(str(error)) from error
    by = {r: {s: trained_by(run) for s, run in runs[r].items()} for r in runs if r not in GIVEN}
    report.notes += commits_told(by)


def scored_run(row: str, run: Path) -> tuple[int, str]:
    """K of a row, and the name of the run by which it is judged."""
    if row in baselines.BASELINES:
        return 1, latent(1)
    K = load_retriever_config(run / "model").num_thinking_steps
    view = ROWS[row].view if row in ROWS else "latent"
    return K, EXPLICIT if view == "explicit" else latent(K)


def summarise(
    options: argparse.Namespace, row: str, runs: Mapping[str, Mapping[int, Path]]
) -> dict[str, Any]:
    """A row of the report: means over seeds, and what the row is compared with."""
    names = [data.name for data in options.sets]

    def read(of: str, metric: str = METRICS[0]) -> dict[int, Scores]:
        found = runs.get(of, {})
        return {seed: read_scores(run, options.split, names, metric) for seed, run in found.items()}

    def means(run: str, scores: Mapping[int, Scores]) -> dict[str, float] | None:
        by_set = {
            name: float(np.mean([list(s[name][run].values()) for s in scores.values()]))
            for name in names
            if all(run in s[name] for s in scores.values())
        }
        return {**by_set, "macro": float(np.mean(list(by_set.values())))} if by_set else None

    def less(other: str, run: str | None = None, sets: Sequence[str] = names) -> Any:
        shared = sorted(scores.keys() & runs.get(other, {}).keys())
        if not shared or (other == row and run is None):
            return None
        theirs, their_run = read(other), run or scored_run(other, runs[other][shared[0]])[1]
        both = {s: [{n: of[s][n] for n in sets} for of in (scores, theirs)] for s in shared}
        return macro_difference({s: (a, scored, b, their_run) for s, (a, b) in both.items()})

    scores = read(row)
    K, scored = scored_run(row, next(iter(runs[row].values())))
    titles = {FIRST: "first stage alone", **GIVEN}
    return {
        "row": row,
        "title": titles.get(row) or ROWS[row].title,
        "K": K,
        "seeds": sorted(scores),
        "scored": scored,
        "scores": means(scored, scores),
        METRICS[1]: means(scored, read(row, METRICS[1])),
        "explicit": means(EXPLICIT, scores),
        "control": means(CONTROL, scores),
        "rewrite": means(REWRITE, scores),
        "by_steps": {str(k): means(latent(k), scores) for k in STEPS},
        "less_contrastive": less("contrastive"),
        "less_contrastive_by_set": {name: less("contrastive", sets=[name]) for name in names},
        "less_first": less(FIRST),
        "less_infonce": less("without_explicit_view"),
        "less_own_K1": less(row, latent(1)) if K > 1 else None,
        "thoughts": said_by(options, runs[row].values()) if K > 1 else [],
    }


def said_by(options: argparse.Namespace, runs: Iterable[Path]) -> list[dict[str, float]]:
    """`thoughts.words` of every step, the mean over sets and seeds."""
    files = [r / options.split / d.name / THOUGHTS_FILE for r in runs for d in options.sets]
    found = [json.loads(file.read_text()) for file in files if file.is_file()]
    return [
        {kind: float(np.mean([step[kind] for step in steps])) for kind in thoughts.KINDS}
        for steps in zip(*found, strict=True)
    ]


# --- the program -------------------------------------------------------------------------------


def _macro(key: str) -> measure.Cell:
    return lambda row: f"{row[key]['macro']:.3f}" if row.get(key) else ""


def _told(d: Mapping[str, float] | None) -> str:
    return "" if d is None else f"{d['difference']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"


def _by_set(row: measure.Row) -> str:
    """Every set's mean, and in how far it is the contrastive row's."""
    return ", ".join(
        f"{name} {value:.3f} {_told(row.get('less_contrastive_by_set', {}).get(name))}".rstrip()
        for name, value in row["scores"].items()
        if name != "macro"
    )


COLUMNS = {
    "row": measure.value("title"),
    "K": measure.value("K"),
    "seeds": lambda row: str(len(row["seeds"])),
    "nDCG@10, macro": _macro("scores"),
    "Recall@100": _macro(METRICS[1]),
    "less contrastive": lambda row: _told(row["less_contrastive"]),
    "less first stage": lambda row: _told(row.get("less_first")),
    "less InfoNCE alone": lambda row: _told(row.get("less_infonce")),
    "less itself at K = 1": lambda row: _told(row["less_own_K1"]),
    "given the rationale": _macro("explicit"),
    "given another's": _macro("control"),
    "given its own": _macro("rewrite"),
    "by set, and less contrastive": _by_set,
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", help="the backbone: default smollm2")
    text = "the recipe, with FILE_first.yaml beside it for the first stage; more are laid over it"
    parser.add_argument("--config", nargs="+", default=["configs/smollm2.yaml"], help=text)
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
    text = "of the first stage's adapter in what every row exports (model.adapter_share)"
    parser.add_argument("--adapter_share", type=float, default=0.0, help=text)
    text = "default: all that are trained, in this order"
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, *GIVEN], help=text)
    parser.add_argument("--split", choices=("dev", "test"), default="dev", help="default dev")
    parser.add_argument("--others", type=measure.positive, help="default: the whole corpus")
    text = "tokens of a query and of a document that are ranked; default: the recipe's"
    parser.add_argument("--max_length", type=measure.positive, help=text)
    text = "holds SET-SPLIT.jsonl of laser rewrite, to be read as a rationale too"
    parser.add_argument("--rewrites", type=Path, help=text)
    parser.add_argument("--work", type=Path, default=Path("runs/real"), help="holds the runs")
    text = "train nothing, report what is finished"
    parser.add_argument("--finished_only", action="store_true", help=text)


PROGRAM = measure.Program("real", __doc__, fill, COLUMNS, add_flags, repeats=None)


def main(arguments: Sequence[str]) -> None:
    cells = [
        [row["title"], str(k), *(f"{100 * step[kind]:.1f} %" for kind in thoughts.KINDS)]
        for row in PROGRAM.main(arguments).rows
        for k, step in enumerate(row["thoughts"], start=1)
    ]
    print(f"\nWhose words a thought's {thoughts.TOP} likeliest tokens are:\n")
    print(measure.markdown_table(["row", "step", *thoughts.KINDS], cells))


if __name__ == "__main__":
    main(sys.argv[1:])
