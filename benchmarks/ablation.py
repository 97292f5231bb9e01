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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from benchmarks import ablation_table, measure
from benchmarks.ablation_table import METRICS, PROBE_FILE, STEPS
from benchmarks.measure import BenchmarkError, Report
from laser_jax.command_line import parse_command_line, parse_train_command
from laser_jax.config import ConfigError, as_dict, load_retriever_config
from laser_jax.data.sources import open_source
from laser_jax.data.tokenization import PromptTokenizer, load_tokenizer
from laser_jax.encoder import load_pretrained
from laser_jax.evaluate.beir import read_beir
from laser_jax.evaluate.model import ModelOptions, evaluate_model
from laser_jax.evaluate.results import RESULTS_FILE
from laser_jax.evaluate.trajectory import read_trajectories, shares
from laser_jax.files.durable import write_atomically
from laser_jax.inference.batch_encoder import LatentEncoder
from laser_jax.pretrain.run import PretrainConfig, pretrain
from laser_jax.quickstart.world import SEPARATOR, World, WorldConfig, build_world, write_world
from laser_jax.settings import changes, listed
from laser_jax.train.run import TrainingError, train

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DATA_SETS = ("entailmentbank", "strategyqa", "2wiki")
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
class TrainedRow:
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


def _without(part: str, title: str, **changed: Any) -> dict[str, TrainedRow]:
    return {f"without_{part}": TrainedRow(f"without {title}", f"without_{part}.yaml", **changed)}


ROWS = {
    "laser": TrainedRow("LaSER"),
    "gircse": TrainedRow("GIRCSE", "gircse.yaml"),
    "contrastive": TrainedRow("contrastive", "contrastive.yaml"),
    "explicit": TrainedRow("explicit alone, reads the reasoning", "teacher.yaml", view="explicit"),
    **_without("explicit_view", "explicit view"),
    **_without("latent_view", "latent view"),
    **_without("trajectory", "trajectory"),
    **_without("output", "output distillation"),
    **_without("colearning", "co-learning", frozen_teacher=True),
    **{f"laser_K{K}": TrainedRow(f"LaSER trained at K = {K}", K=K) for K in (1, 3, 6)},
}
QUICK_ROWS = ("laser", "gircse", "explicit")


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

    def built(self, seed: int) -> World | None:
        """The generated world of a seed; equal for equal seeds."""
        return build_world(replace(self.world, seed=seed)) if self.world else None


WORLD = WorldConfig(num_places=20)
"""The quickstart's."""
TINY_WORLD = replace(
    WORLD, num_places=8, num_relations=3, hops=2, num_dev_queries=8, num_test_queries=16
)
TINY = (
    *("--model.scratch.hidden_size", "16", "--model.scratch.num_layers", "1"),
    *("--model.scratch.head_dim", "8", "--model.scratch.intermediate_size", "32"),
    *("--steps", "4", "--batch_size", "8"),
)
SHORT = ("--train.steps", "2", "--train.batch_size", "8")
TINY_TRAIN = (*SHORT, "--objective.num_thinking_steps", "3", "--lora.rank", "2")


def _config(name: str) -> tuple[str, str]:
    return "--config", str(CONFIGS / f"{name}.yaml")


def setting_of(world: str, data: Path | None, quick: bool) -> Setting:
    """The setting that the command line names.

    Raises:
        ConfigError: a data set without its directory.
    """
    if world == "default":
        recipe, training = _config("world_pretrain"), _config("quickstart")
        if quick:
            recipe, training = (*recipe, *TINY), (*training, *TINY_TRAIN)
            return Setting("quick", recipe, training, TINY_WORLD, rows=QUICK_ROWS)
        return Setting("default", recipe, training, WORLD)
    data = data or Path("../shared/data") / world
    if not (data / "train.jsonl").is_file():
        raise ConfigError(
            f"{data / 'train.jsonl'} is missing: --world {world} wants --data DIR, a BEIR "
            "directory with a train.jsonl of LaSER rows"
        )
    recipe, crops, training = map(_config, ("texts_pretrain", "texts_crops", "texts"))
    if quick:
        return Setting(
            f"{world}-quick",
            (*recipe, *TINY),
            (*training, *SHORT),
            data=data,
            crops=(*crops, *SHORT),
            rows=QUICK_ROWS,
        )
    rows = tuple(row for row in ROWS if row != "laser_K3")  # K = 3 is the recipe's
    return Setting(world, recipe, training, data=data, crops=crops, rows=rows)


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
        return (self.folder.parent if self.setting.data else self.data) / "lm.jsonl"

    @property
    def language_model(self) -> Path:
        """The directory of the causal-LM stage."""
        return self.backbone_folder / LM_ALONE

    @property
    def backbone(self) -> Path:
        """What every row starts from."""
        crops = self.backbone_folder / "crops" / "model"
        return crops if self.setting.crops else self.language_model

    def finished(self, row: str, split: str) -> bool:
        """Whether the row is trained and evaluated."""
        files = ("results.json", f"{split}/{RESULTS_FILE}", f"{split}/{PROBE_FILE}")
        return all((self.folder / row / file).is_file() for file in files)


# --- training --------------------------------------------------------------------------------


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
        query = " ".join(words[i] for i in drawn)
        row = {"query": query, "reasoning_query": "", "prompt": instruction}
        rows.append(row | {"positive_passages": [whole[index]], "negative_passages": []})
    return rows


def _json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _announce(module: str, arguments: Sequence[str]) -> None:
    print(f"\n$ python -m {module} {shlex.join(arguments)}", flush=True)


def make_backbone(seed: Seed) -> None:
    """The language model and, on a data set, its training on crops; what is finished is kept."""
    number = str(1 if seed.setting.data else seed.number)
    arguments = [
        *seed.setting.pretrain,
        *("--texts", str(seed.texts), "--eval", str(seed.data), "--eval_split", "dev"),
        *("--output", str(seed.language_model), "--seed", number),
    ]
    _announce("laser_jax.pretrain", arguments)
    pretrain(parse_command_line(PretrainConfig, "python -m laser_jax.pretrain", arguments))
    if seed.setting.crops:
        crops = str(seed.backbone_folder / "crops.jsonl")
        train_once(
            [
                *seed.setting.crops,
                *("--model.path", str(seed.language_model), "--data.train", crops),
                *("--train.seed", number, "--output", str(seed.backbone.parent)),
            ]
        )


def train_command(seed: Seed, row: str) -> list[str]:
    """The flags of laser_jax.train for a row. Nothing is ranked while it trains."""
    return [
        *seed.setting.train,
        *ROWS[row].arguments(seed.folder),
        *("--model.path", str(seed.backbone), "--train.seed", str(seed.number)),
        *("--data.train", str(seed.data / "train.jsonl"), "--data.eval", "null"),
        *("--output", str(seed.folder / row)),
    ]


def train_once(arguments: Sequence[str]) -> None:
    """Trains, or finds that it is trained.

    Raises:
        ConfigError: the directory holds a finished run of another config.
    """
    config, _ = parse_train_command(arguments)
    output = Path(config.output)
    if (output / "results.json").is_file():
        file = output / "config.json"
        if changed := changes(json.loads(file.read_text()), config, source=str(file)):
            raise ConfigError(
                f"{output} holds a finished run with another config:\n  {listed(changed)}\n"
                "Choose another --work, or delete that directory"
            )
        return
    _announce("laser_jax.train", arguments)
    train(config)
    jax.clear_caches()  # no later row has the same programs


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
            eval_thinking_steps=STEPS,
            metrics=METRICS,
            length_multiple=8,
        )
        evaluate_model(options)
    if not (run / split / PROBE_FILE).is_file():
        probes = probe(seed, row, split)
        write_atomically(run / split / PROBE_FILE, json.dumps(probes, indent=1) + "\n")
    jax.clear_caches()


def run_missing(seeds: Sequence[Seed], rows: Sequence[str], split: str) -> None:
    """Trains and evaluates what is not finished. Other processes may run other rows of the same
    seeds; one of them makes the backbone and the others wait for it."""
    for seed in seeds:
        seed.backbone_folder.mkdir(parents=True, exist_ok=True)
        with measure.locked(seed.backbone_folder / ".lock"):
            write_texts(seed)
            make_backbone(seed)
        for row in rows:
            train_once(train_command(seed, row))
            evaluate_row(seed, row, split)


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


# --- the program -----------------------------------------------------------------------------


def fill(options: argparse.Namespace, report: Report) -> None:
    """Runs what is missing, unless `--finished_only`, and compares.

    Raises:
        BenchmarkError: with the message of what training and evaluation raise.
    """
    try:
        setting = setting_of(options.world, options.data, options.quick)
        asked = set(options.rows or setting.rows)
        if "without_colearning" in asked:
            asked.add("explicit")
        rows = [row for row in ROWS if row in asked]  # a teacher before its pupil
        numbers = range(options.first_seed, options.first_seed + options.seeds)
        folder = options.work / setting.name
        seeds = [Seed(setting, number, folder / f"seed-{number}") for number in numbers]
        if not options.finished_only:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for the tables
                run_missing(seeds, rows, options.split)
        titles = {row: (ROWS[row].title, ROWS[row].view) for row in rows}
        done = {
            row: {s.number: s.folder / row for s in seeds if s.finished(row, options.split)}
            for row in rows
        }
        ablation_table.fill(report, titles, done, options.split)
    except (ValueError, OSError, TrainingError) as error:
        raise BenchmarkError(str(error)) from error
    if not report.rows:
        raise BenchmarkError(f"nothing is finished under {options.work}")
    written = {}
    for seed in seeds:
        if (file := seed.language_model / "pretrain.json").is_file():
            written[seed.number] = json.loads(file.read_text()).get("written_right")
    report.settings |= {
        "world": as_dict(setting.world) if setting.world else str(setting.data),
        "written_right": written,
        "not_run": {
            row: missing
            for row, runs in done.items()
            if (missing := [number for number in numbers if number not in runs])
        },
    }
    if report.settings["not_run"]:
        missing = ablation_table.with_seeds(report.settings["not_run"])
        report.notes.append(f"Not run: {missing}.")


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world", choices=("default", *DATA_SETS), default="default")
    parser.add_argument("--data", type=Path, help="a data set's; default ../shared/data/WORLD")
    measure.add_numbers(parser, {"seeds": (3, "how many"), "first_seed": (1, "the first")})
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="default: all of the world")
    parser.add_argument("--split", choices=("dev", "test"), default="test", help="default test")
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"), help="holds the runs")
    text = "train nothing, report what is finished"
    parser.add_argument("--finished_only", action="store_true", help=text)


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    report = PROGRAM.main(arguments)
    for title, table in ablation_table.further_tables(report.rows).items():
        print(f"\n{title}:\n\n{table}")


PROGRAM = measure.Program(
    "ablation", __doc__, fill, ablation_table.COLUMNS, add_flags, repeats=None
)

if __name__ == "__main__":
    main(sys.argv[1:])
