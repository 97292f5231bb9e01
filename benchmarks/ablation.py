"""What each part of the method is worth: trains every row on one world, with several seeds.

    python -m benchmarks.ablation --world default --seeds 3 [--rows laser gircse ...]
    python -m benchmarks.ablation --world entailmentbank --data ../shared/data/entailmentbank

Rows are LaSER, LaSER without each of its parts, its baselines, and LaSER trained at other K. All
rows of a seed share data, backbone, steps and settings. What is trained stays under --work:
finished runs are not repeated, stopped ones go on, and --finished_only reports what is there.

World `default` is the embedded one; a seed has its own world and backbone. Seeds count from 1, as
the recipe was chosen on the world of seed 0. The seeds of a data set share one backbone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from benchmarks.measure import (
    BenchmarkError,
    Report,
    environment,
    markdown_table,
    new_file,
    positive,
)
from laser_jax.batch_encoder import LatentEncoder
from laser_jax.config import (
    Config,
    ConfigError,
    PretrainConfig,
    as_dict,
    changes,
    listed,
    load_retriever_config,
    parse_command_line,
    parse_train_command,
)
from laser_jax.data.sources import open_source
from laser_jax.data.tokenization import PromptTokenizer, load_tokenizer
from laser_jax.data.world import SEPARATOR, World, WorldConfig, build_world, write_world
from laser_jax.encoder import load_pretrained
from laser_jax.evaluate import ModelOptions, evaluate_model
from laser_jax.evaluation.beir import read_beir
from laser_jax.evaluation.plots import plot_quality_by_steps
from laser_jax.evaluation.results import PER_QUERY_FILE, RESULTS_FILE, QueryScores, read_per_query
from laser_jax.evaluation.retrieval import EXPLICIT, latent
from laser_jax.evaluation.significance import grouped_bootstrap, paired_bootstrap
from laser_jax.evaluation.trajectory import read_trajectories, shares
from laser_jax.files import lock, write_atomically
from laser_jax.pretrain import pretrain
from laser_jax.train import TrainingError, train

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
METRICS = ("nDCG@10", "Hit@1", "Recall@100")
COMPARED = ("nDCG@10", "Hit@1")
"""Differences are given of these; resampling takes the most time of a report."""
STEPS = tuple(range(1, 9))
PROBE_FILE = "probe.json"
LM_ALONE = "backbone"
"""The probe's control: the row's thinking on the backbone as the language model left it."""
NUM_CROPS = 40_000
CROPPED_WORDS = 40
"""A crop is of a text's first words: a model reads 64 tokens of it (configs/texts.yaml)."""
CROP_SHARE = (0.2, 0.6)
"""The least and the largest share of them that is drawn."""
CROP_WORDS = (2, 16)
"""The fewest and the most that are drawn."""


# --- what is trained -------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One way to train, laid over the world's recipe."""

    title: str
    overlay: str | None = None
    """A file of configs/ablation."""
    K: int | None = None
    """Thinking steps in training, where the row changes them."""
    view: Literal["latent", "explicit"] = "latent"
    """How it is scored."""
    frozen_teacher: bool = False
    """Learns from the finished row `explicit`."""

    def arguments(self, folder: Path) -> list[str]:
        """Flags that follow the recipe's, for the seed whose runs are in `folder`."""
        given = ["--config", str(CONFIGS / "ablation" / self.overlay)] if self.overlay else []
        if self.K is not None:
            given += ["--objective.num_thinking_steps", str(self.K)]
        if self.frozen_teacher:
            given += ["--objective.teacher", str(folder / "explicit" / "model")]
        return given


ROWS = {
    "laser": Row("LaSER"),
    "gircse": Row("GIRCSE", "gircse.yaml"),
    "contrastive": Row("contrastive", "contrastive.yaml"),
    "explicit": Row("explicit alone, reads the reasoning", "teacher.yaml", view="explicit"),
    "without_explicit_view": Row("without explicit view", "without_explicit_view.yaml"),
    "without_latent_view": Row("without latent view", "without_latent_view.yaml"),
    "without_trajectory": Row("without trajectory", "without_trajectory.yaml"),
    "without_output": Row("without output distillation", "without_output.yaml"),
    "without_colearning": Row(
        "without co-learning", "without_colearning.yaml", frozen_teacher=True
    ),
    "laser_K1": Row("LaSER trained at K = 1", K=1),
    "laser_K3": Row("LaSER trained at K = 3", K=3),
    "laser_K6": Row("LaSER trained at K = 6", K=6),
}
QUICK_ROWS = ("laser", "gircse", "explicit")
DRAWN = ("laser", "laser_K1", "laser_K3", "laser_K6", "gircse", "without_explicit_view")
"""The rows of the figure."""


@dataclass(frozen=True)
class Setting:
    """A world with its recipe: the same for every row and seed."""

    name: str
    pretrain: tuple[str, ...]
    """Flags of laser_jax.pretrain and, below, of laser_jax.train."""
    train: tuple[str, ...]
    world: WorldConfig | None = None
    """Generated from every seed; None where `data` holds the texts."""
    data: Path | None = None
    crops: tuple[str, ...] = ()
    """Flags of laser_jax.train for the backbone's second stage; a data set's alone."""
    rows: tuple[str, ...] = tuple(ROWS)
    """What is trained where no rows are asked for."""
    length_multiple: int = 8

    def built(self, seed: int) -> World | None:
        """The generated world of a seed; equal for equal seeds."""
        if self.world is None:
            return None
        return build_world(replace(self.world, seed=seed))


WORLD = WorldConfig(num_places=20, final_separator=True)
"""The quickstart's."""
TINY_WORLD = replace(
    WORLD, num_places=8, num_relations=3, hops=2, num_dev_queries=8, num_test_queries=16
)
TINY = (
    *("--model.scratch.hidden_size", "16", "--model.scratch.num_layers", "1"),
    *("--model.scratch.head_dim", "8", "--model.scratch.intermediate_size", "32"),
    *("--steps", "4", "--batch_size", "8"),
)
TINY_TRAIN = (
    *("--objective.num_thinking_steps", "3", "--train.steps", "2", "--train.batch_size", "8"),
    *("--lora.rank", "2"),
)


def setting_of(world: str, data: Path | None, quick: bool) -> Setting:
    """The setting that the command line names.

    Raises:
        ConfigError: a data set without its directory.
    """
    if world == "default":
        recipe = ("--config", str(CONFIGS / "world_pretrain.yaml"))
        training = ("--config", str(CONFIGS / "quickstart.yaml"))
        if quick:
            return Setting(
                "quick", (*recipe, *TINY), (*training, *TINY_TRAIN), TINY_WORLD, rows=QUICK_ROWS
            )
        return Setting("default", recipe, training, WORLD)
    data = data or Path("../shared/data") / world
    if not (data / "train.jsonl").is_file():
        raise ConfigError(
            f"{data / 'train.jsonl'} is missing: --world {world} wants --data DIR, a BEIR "
            "directory with a train.jsonl of LaSER rows"
        )
    recipe = ("--config", str(CONFIGS / "texts_pretrain.yaml"))
    crops = ("--config", str(CONFIGS / "texts_crops.yaml"))
    training = ("--config", str(CONFIGS / "texts.yaml"))
    if quick:
        shorter = ("--train.steps", "2", "--train.batch_size", "8")
        return Setting(
            f"{world}-quick",
            (*recipe, *TINY),
            (*training, *shorter),
            data=data,
            crops=(*crops, *shorter),
            rows=QUICK_ROWS,
        )
    rows = tuple(row for row in ROWS if row != "laser_K3")  # K = 3 is the recipe's
    return Setting(world, recipe, training, data=data, crops=crops, rows=rows)


# --- training --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seed:
    """Data, backbone and runs of one seed, in a folder of their own. The seeds of a data set share
    its backbone, which lies beside their folders."""

    setting: Setting
    number: int
    folder: Path

    @property
    def data(self) -> Path:
        """The BEIR directory with `train.jsonl`."""
        return self.setting.data or self.folder / "data"

    @property
    def backbone_folder(self) -> Path:
        """Holds the backbone and what it reads."""
        return self.folder.parent if self.setting.data else self.folder

    @property
    def texts(self) -> Path:
        """What the language model reads."""
        return self.folder.parent / "lm.jsonl" if self.setting.data else self.data / "lm.jsonl"

    @property
    def language_model(self) -> Path:
        """The directory of the causal-LM stage."""
        return self.backbone_folder / LM_ALONE

    @property
    def backbone(self) -> Path:
        """What every row starts from."""
        if self.setting.crops:
            return self.backbone_folder / "crops" / "model"
        return self.language_model

    def finished(self, row: str, split: str) -> bool:
        """Whether the row is trained and evaluated."""
        files = ("results.json", f"{split}/{RESULTS_FILE}", f"{split}/{PROBE_FILE}")
        return all((self.folder / row / file).is_file() for file in files)


def write_texts(seed: Seed) -> None:
    """Generates the world, or joins a data set's corpus and training rows for the LM stage and
    crops its corpus for the stage after it."""
    if seed.texts.is_file():
        return
    world = seed.setting.built(seed.number)
    if world is not None:
        write_world(world, seed.data)
        return
    texts = [document.text for document in read_beir(seed.data, "dev").documents]
    rows = seed.data / "train.jsonl"
    crops = crop_rows(texts, open_source(rows)[0].prompt, NUM_CROPS, np.random.default_rng(0))
    write_atomically(seed.backbone_folder / "crops.jsonl", _json_lines(crops))
    corpus = _json_lines([{"text": text} for text in texts])
    write_atomically(seed.texts, corpus + rows.read_text())


def crop_rows(
    texts: Sequence[str], instruction: str, count: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Training rows whose query is some words of a text, in their order, and whose positive is that
    text: a retrieval task without labels. Texts of fewer than four words are left out; the others
    follow each other in passes, each in an order of its own.

    Raises:
        BenchmarkError: no text has four words.
    """
    whole = [text for text in texts if len(text.split()) >= 2 * CROP_WORDS[0]]
    if not whole:
        raise BenchmarkError(f"the corpus has no text of {2 * CROP_WORDS[0]} words to crop")
    order = np.concatenate([rng.permutation(len(whole)) for _ in range(-(-count // len(whole)))])
    rows = []
    for index in order[:count]:
        words = whole[index].split()[:CROPPED_WORDS]
        kept = int(np.clip(len(words) * rng.uniform(*CROP_SHARE), *CROP_WORDS))
        drawn = np.sort(rng.choice(len(words), kept, replace=False))
        rows.append(
            {
                "query": " ".join(words[i] for i in drawn),
                "reasoning_query": "",
                "prompt": instruction,
                "positive_passages": [whole[index]],
                "negative_passages": [],
            }
        )
    return rows


def _json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _say(module: str, arguments: Sequence[str]) -> None:
    print(f"\n$ python -m {module} {shlex.join(arguments)}", flush=True)


def make_backbone(seed: Seed) -> None:
    """The language model and, on a data set, its training on crops; what is finished is kept."""
    arguments = [
        *seed.setting.pretrain,
        *("--texts", str(seed.texts), "--eval", str(seed.data), "--eval_split", "dev"),
        *("--output", str(seed.language_model), "--seed", str(_backbone_seed(seed))),
    ]
    _say("laser_jax.pretrain", arguments)
    pretrain(parse_command_line(PretrainConfig, "python -m laser_jax.pretrain", arguments))
    if seed.setting.crops:
        _train(
            [
                *seed.setting.crops,
                *("--model.path", str(seed.language_model)),
                *("--data.train", str(seed.backbone_folder / "crops.jsonl")),
                *("--train.seed", str(_backbone_seed(seed))),
                *("--output", str(seed.backbone.parent)),
            ]
        )


def _backbone_seed(seed: Seed) -> int:
    return 1 if seed.setting.data else seed.number


def train_command(seed: Seed, row: str) -> list[str]:
    """The flags of laser_jax.train for a row. Nothing is ranked while it trains."""
    return [
        *seed.setting.train,
        *ROWS[row].arguments(seed.folder),
        *("--model.path", str(seed.backbone), "--train.seed", str(seed.number)),
        *("--data.train", str(seed.data / "train.jsonl"), "--data.eval", "null"),
        *("--output", str(seed.folder / row)),
    ]


def train_row(seed: Seed, row: str) -> None:
    """Trains a row, or finds that it is trained.

    Raises:
        ConfigError: the directory holds a finished run of another config.
    """
    _train(train_command(seed, row))


def _train(arguments: Sequence[str]) -> None:
    config, _ = parse_train_command(arguments)
    output = Path(config.output)
    if (output / "results.json").is_file():
        _require_same(config, output)
        return
    _say("laser_jax.train", arguments)
    train(config)
    jax.clear_caches()  # no later row has the same programs


def _require_same(config: Config, output: Path) -> None:
    file = output / "config.json"
    if changed := changes(json.loads(file.read_text()), config, source=str(file)):
        raise ConfigError(
            f"{output} holds a finished run with another config:\n  {listed(changed)}\n"
            "Choose another --work, or delete that directory"
        )


def evaluate_row(seed: Seed, row: str, split: str) -> None:
    """Ranks the split at every K and by the explicit view, and reads the trajectories."""
    run = seed.folder / row
    if not (run / split / RESULTS_FILE).is_file():
        options = ModelOptions(
            model=str(run / "model"),
            data=str(seed.data),
            output=str(run / split),
            split=split,
            name=row,
            thinking_steps=STEPS,
            metrics=METRICS,
            length_multiple=seed.setting.length_multiple,
            plot=False,
        )
        evaluate_model(options)
    if not (run / split / PROBE_FILE).is_file():
        probes = probe(seed, row, split)
        write_atomically(run / split / PROBE_FILE, json.dumps(probes, indent=1) + "\n")
    jax.clear_caches()


# --- the trajectory probe --------------------------------------------------------------------


def probe(seed: Seed, row: str, split: str) -> dict[str, Any] | None:
    """What every state of the row's model holds, and of the backbone before it was trained.

    Returns:
        None where nothing is walked (a data set) or thought (K = 1). Otherwise, for the row and
        with the row `laser` also for `LM_ALONE`: `documents` [K][H + 1], the share of queries
        where the state of step k alone ranks first the document of place h of the walk (0 is the
        start, H the answer); `tokens` [K][H + 1], the share where its likeliest token is that
        place's name; `entropy` [K], in nats, the mean.
    """
    world = seed.setting.built(seed.number)
    own = load_retriever_config(seed.folder / row / "model")
    if world is None or own.num_thinking_steps == 1:
        return None
    models = {row: seed.folder / row / "model"}
    if row == "laser":
        models[LM_ALONE] = seed.language_model
    dataset = read_beir(seed.data, split)
    walks = {(q.query_id, q.text): q.walk.places for q in (*world.dev, *world.test)}
    asked = [(query.id, query.text) for query in dataset.queries.values()]
    if not walks.keys() >= set(asked):
        raise BenchmarkError(
            f"{seed.data} holds the world of another version; choose another --work"
        )
    prompts = PromptTokenizer(load_tokenizer(models[row]), own.prompt)
    names = [_name_token(prompts, name) for name in world.places]
    if len(set(names)) < len(names):
        raise BenchmarkError(
            f"{models[row]}: two places begin with the same token, so a token tells no place; give "
            "the tokenizer a larger vocabulary (model.scratch.vocab_size)"
        )
    place_QH = np.array([walks[query] for query in asked])
    document_of = {document.id: c for c, document in enumerate(dataset.documents)}
    order = np.array([document_of[id_] for id_, _ in world.documents])
    rows = [prompts.query(q.text, q.instruction or "") for q in dataset.queries.values()]
    documents = [prompts.document(document.text) for document in dataset.documents]
    found = {}
    for name, directory in models.items():
        variables, config = load_pretrained(directory, config=own)
        encoder = LatentEncoder(variables, config, length_multiple=8)
        vectors_CD = encoder.encode_tokens(documents, [config.num_thinking_steps])[0]
        read = read_trajectories(variables, config, rows, vectors_CD)
        found[name] = {
            "documents": shares(read.first_QK, order[place_QH]).tolist(),
            "tokens": shares(read.token_QK, np.array(names)[place_QH]).tolist(),
            "entropy": read.entropy_QK.mean(axis=0, dtype=np.float64).tolist(),
        }
    return found


def _name_token(prompts: PromptTokenizer, name: str) -> int:
    """The first token of a place's name as a reasoning writes it."""
    return prompts.tokenizer(f" {name}.{SEPARATOR}", add_special_tokens=False)["input_ids"][0]


# --- comparing -------------------------------------------------------------------------------


@dataclass
class Result:
    """A row's finished runs: seed -> ..."""

    K: int
    per_query: dict[int, dict[str, QueryScores]] = field(default_factory=dict)
    """... -> run -> query -> metric -> value."""
    seconds: dict[int, float] = field(default_factory=dict)
    code: dict[int, str] = field(default_factory=dict)
    """Which finished the training: the commit, or a version where there was no checkout."""
    probes: dict[int, dict[str, Any]] = field(default_factory=dict)


def read_result(seeds: Sequence[Seed], row: str, split: str) -> Result | None:
    """What is finished of a row; None where nothing is."""
    done = [seed for seed in seeds if seed.finished(row, split)]
    if not done:
        return None
    result = Result(load_retriever_config(done[0].folder / row / "model").num_thinking_steps)
    for seed in done:
        run = seed.folder / row
        result.per_query[seed.number] = read_per_query(run / split / PER_QUERY_FILE)
        results = json.loads((run / "results.json").read_text())
        result.seconds[seed.number] = results["train_seconds"]
        code = results["code"]
        result.code[seed.number] = code.get("commit", code["version"])
        if probes := json.loads((run / split / PROBE_FILE).read_text()):
            result.probes[seed.number] = probes
    return result


Values = dict[int, dict[str, float]]
"""Seed -> query -> value of one metric."""


def values_of(result: Result, run: str, metric: str) -> Values:
    """One metric of one of the row's runs; empty where the row has no such run."""
    return {
        seed: {query: scores[metric] for query, scores in runs[run].items()}
        for seed, runs in result.per_query.items()
        if run in runs
    }


def over_seeds(values: Values) -> dict[str, Any]:
    """Mean and spread of the seeds' means; the spread is the sample's standard deviation, None for
    one seed."""
    means = {seed: float(np.mean(list(queries.values()))) for seed, queries in values.items()}
    spread = float(np.std(list(means.values()), ddof=1)) if len(means) > 1 else None
    return {"mean": float(np.mean(list(means.values()))), "std": spread, "per_seed": means}


def paired_difference(ours: Values, theirs: Values) -> dict[str, Any] | None:
    """`ours` less `theirs` over the seeds that both have; None without one.

    A query is paired with itself under the same seed: same world, backbone and batches. The pairs
    of all seeds are pooled and drawn again (`low`, `high`): the interval takes the trainings as
    given. In `over_seeds` the seeds are drawn again too, then queries within each; None for one
    seed.
    """
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
    return asdict(pooled) | {
        "over_seeds": grouped and {"low": grouped.low, "high": grouped.high},
        "per_seed": {
            seed: float(np.mean(x) - np.mean(y)) for seed, x, y in zip(shared, a, b, strict=True)
        },
    }


def scored_run(row: str, result: Result) -> str:
    """The run by which a row is judged."""
    return EXPLICIT if ROWS[row].view == "explicit" else latent(result.K)


def summarise(row: str, results: Mapping[str, Result]) -> dict[str, Any]:
    """A row of the report: scores over seeds, and what they are compared with."""
    result = results[row]
    runs = next(iter(result.per_query.values()))
    scored = scored_run(row, result)

    def scores(run: str) -> dict[str, Any] | None:
        if run not in runs:
            return None
        return {metric: over_seeds(values_of(result, run, metric)) for metric in METRICS}

    laser_minus = colearning = None
    if "laser" in results and row != "laser":
        laser = results["laser"]
        laser_minus = _differences(laser, scored_run("laser", laser), result, scored)
    if "explicit" in results and row != "explicit" and EXPLICIT in runs:
        colearning = _differences(result, EXPLICIT, results["explicit"], EXPLICIT)
    return {
        "row": row,
        "title": ROWS[row].title,
        "K": result.K,
        "seeds": sorted(result.per_query),
        "queries": sum(len(runs[scored]) for runs in result.per_query.values()),
        "scored": scored,
        "scores": scores(scored),
        "laser_minus": laser_minus,
        "explicit": scores(EXPLICIT),
        "colearning": colearning,  # this row's explicit view less that of the row `explicit`
        "by_steps": {str(k): scores(latent(k)) for k in STEPS},  # as JSON has its keys
        "probe": _mean_probe(result),
        "train_seconds": result.seconds,
        "trained_by": result.code,
    }


def _differences(ours: Result, our_run: str, theirs: Result, their_run: str) -> dict[str, Any]:
    return {
        metric: paired_difference(
            values_of(ours, our_run, metric), values_of(theirs, their_run, metric)
        )
        for metric in COMPARED
    }


def _mean_probe(result: Result) -> dict[str, Any] | None:
    """The probes' means over seeds."""
    if not result.probes:
        return None
    probes = list(result.probes.values())
    return {
        model: {
            what: np.mean([seed[model][what] for seed in probes], axis=0).tolist()
            for what in readings
        }
        for model, readings in probes[0].items()
    }


# --- the report ------------------------------------------------------------------------------


def _mean_cell(scores: Mapping[str, Any] | None, metric: str) -> str:
    if scores is None:
        return ""
    spread = scores[metric]["std"]
    return f"{scores[metric]['mean']:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def _difference_cell(differences: Mapping[str, Any] | None, metric: str, seeds: bool) -> str:
    if differences is None or differences[metric] is None:
        return ""
    d = differences[metric]
    interval = d["over_seeds"] if seeds else d
    if interval is None:
        return ""
    middle = "" if seeds else f"{d['difference']:+.3f} "
    return f"{middle}[{interval['low']:+.3f}, {interval['high']:+.3f}]"


COLUMNS = {
    "row": lambda row: row["title"],
    "K": lambda row: str(row["K"]),
    "seeds": lambda row: str(len(row["seeds"])),
    "nDCG@10": lambda row: _mean_cell(row["scores"], "nDCG@10"),
    "Hit@1": lambda row: _mean_cell(row["scores"], "Hit@1"),
    "LaSER less this, nDCG@10": lambda row: _difference_cell(row["laser_minus"], "nDCG@10", False),
    "seeds drawn too": lambda row: _difference_cell(row["laser_minus"], "nDCG@10", True),
    "explicit view, nDCG@10": lambda row: _mean_cell(row["explicit"], "nDCG@10"),
    "less explicit alone": lambda row: _difference_cell(row["colearning"], "nDCG@10", False),
}


def steps_table(rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The metric at every K of inference, for every row that is judged by its latent view."""
    cells = [
        [row["title"], str(row["K"])]
        + [_mean_cell(row["by_steps"][str(k)], metric).split(" ")[0] for k in STEPS]
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
    for what, title in (
        ("documents", "How often the state alone ranks first the document of hop h"),
        ("tokens", "How often the state's likeliest token is the name of hop h's place"),
    ):
        if table := probe_table(rows, what):
            tables[title] = table
    return tables


def plot(rows: Sequence[Mapping[str, Any]], stem: Path) -> None:
    """Draws nDCG@10 by K at inference (the paper's Figure 5) to `stem`.png and .svg."""
    curves = {
        row["title"] if ROWS[row["row"]].K else f"{row['title']} trained at K = {row['K']}": {
            k: row["by_steps"][str(k)]["nDCG@10"]["mean"] for k in STEPS
        }
        for row in rows
        if row["row"] in DRAWN
    }
    plot_quality_by_steps(curves, {}, "nDCG@10", stem)


def commits_told(results: Mapping[str, Result]) -> list[str]:
    """For each commit that trained rows, which; the report's own commit only compares them."""
    rows: dict[str, dict[str, list[int]]] = {}
    for row, result in results.items():
        for seed, commit in result.code.items():
            rows.setdefault(commit, {}).setdefault(row, []).append(seed)
    if len(rows) == 1:
        return [f"All rows were trained by {next(iter(rows))}."]
    return [f"Trained by {commit}: {_with_seeds(trained)}." for commit, trained in rows.items()]


def _with_seeds(rows: Mapping[str, Sequence[int]]) -> str:
    """`row (seeds 1, 2); row (seed 3)`"""
    return "; ".join(
        f"{row} (seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))})"
        for row, seeds in rows.items()
    )


def _not_run(seeds: Sequence[Seed], rows: Sequence[str], split: str) -> dict[str, list[int]]:
    """The rows that seeds lack, each with those seeds."""
    lacking = {
        row: [seed.number for seed in seeds if not seed.finished(row, split)] for row in rows
    }
    return {row: numbers for row, numbers in lacking.items() if numbers}


def run_missing(seeds: Sequence[Seed], rows: Sequence[str], split: str) -> None:
    """Trains and evaluates what is not finished. Other processes may run other rows of the same
    seeds; one of them makes the backbone and the others wait for it."""
    for seed in seeds:
        seed.backbone_folder.mkdir(parents=True, exist_ok=True)
        with (seed.backbone_folder / ".lock").open("w") as file:
            lock(file, wait=True)
            write_texts(seed)
            make_backbone(seed)
        for row in rows:
            train_row(seed, row)
            evaluate_row(seed, row, split)


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> Report:
    """Runs what is missing, unless `--finished_only`, and compares.

    Raises:
        ConfigError, BenchmarkError, TrainingError, and what training and evaluation raise: the
            message names the culprit.
    """
    setting = setting_of(options.world, options.data, options.quick)
    asked = set(options.rows or setting.rows)
    if "without_colearning" in asked:
        asked.add("explicit")
    rows = [row for row in ROWS if row in asked]  # a teacher before its pupil
    numbers = range(options.first_seed, options.first_seed + options.seeds)
    seeds = [
        Seed(setting, number, options.work / setting.name / f"seed-{number}") for number in numbers
    ]
    where = environment()
    if not options.finished_only:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the tables
            run_missing(seeds, rows, options.split)
    found = {row: read_result(seeds, row, options.split) for row in rows}
    results = {row: result for row, result in found.items() if result is not None}
    not_run = _not_run(seeds, rows, options.split)
    language_models = [seed.language_model / "pretrain.json" for seed in seeds]
    settings = {
        "world": as_dict(setting.world) if setting.world else str(setting.data),
        "seeds": list(numbers),
        "split": options.split,
        "metrics": list(METRICS),
        "written_right": {
            seed.number: json.loads(file.read_text()).get("written_right")
            for seed, file in zip(seeds, language_models, strict=True)
            if file.is_file()
        },
        "not_run": not_run,
    }
    report = Report("ablation", arguments, settings, where)
    report.rows = [summarise(row, results) for row in results]
    report.notes += commits_told(results)
    if not_run:
        report.notes.append(f"Not run: {_with_seeds(not_run)}.")
    return report


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    worlds = ("default", "entailmentbank", "strategyqa", "2wiki")
    parser.add_argument("--world", choices=worlds, default="default")
    parser.add_argument("--data", type=Path, help="a data set's; default ../shared/data/WORLD")
    parser.add_argument("--seeds", type=positive, default=3, help="how many; default 3")
    parser.add_argument("--first_seed", type=positive, default=1, help="default 1")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="default: all of the world")
    parser.add_argument("--split", choices=("dev", "test"), default="test", help="default test")
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"), help="holds the runs")
    parser.add_argument(
        "--finished_only", action="store_true", help="train nothing, report what is finished"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run?")
    parser.add_argument("--output", type=new_file, help="write the numbers to this JSON file")
    options = parser.parse_args(arguments)
    try:
        report = measure(options, arguments)
        if not report.rows:
            raise BenchmarkError(f"nothing is finished under {options.work}")
    except (ValueError, OSError, BenchmarkError, TrainingError) as error:
        sys.exit(f"error: {error}")
    report.finish(COLUMNS, options.output)
    for title, table in further_tables(report.rows).items():
        print(f"\n{title}:\n\n{table}")


if __name__ == "__main__":
    main(sys.argv[1:])
