"""What each part of the method is worth: trains every row on one world, with several seeds.

    python -m benchmarks.ablation --seeds 3 [--rows laser gircse ...]

Rows are LaSER, LaSER without each of its parts, its baselines, and LaSER trained at other K. All
rows of a seed share world, backbone, steps and settings. What is trained stays under --work:
finished runs are not repeated, stopped ones go on, and --finished_only reports what is there.

A seed has its own embedded world and backbone. Seeds count from 1, as the recipe was chosen on the
world of seed 0. On a pretrained backbone and real texts the same rows are benchmarks/real.py's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from benchmarks import ablation_table, measure
from benchmarks.ablation_table import COLUMNS, METRICS, PROBE_FILE, STEPS
from benchmarks.measure import BenchmarkError, Report
from benchmarks.thoughts import read_trajectories, shares
from laser_jax.command_line import parse_command_line, parse_train_command
from laser_jax.config import ConfigError, as_dict, load_retriever_config
from laser_jax.data.tokenization import PromptTokenizer, load_tokenizer
from laser_jax.encoder import load_pretrained
from laser_jax.evaluate.beir import read_beir
from laser_jax.evaluate.model import ModelOptions, evaluate_model
from laser_jax.evaluate.results import RESULTS_FILE
from laser_jax.files.durable import write_atomically
from laser_jax.files.reading import read_yaml
from laser_jax.inference.batch_encoder import LatentEncoder
from laser_jax.pretrain.run import PretrainConfig, pretrain
from laser_jax.quickstart.world import SEPARATOR, World, WorldConfig, build_world, write_world
from laser_jax.settings import changes, from_dict, listed
from laser_jax.train.loop import TrainingError
from laser_jax.train.run import train

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LM_ALONE = "backbone"
"""The probe's control: the row's thinking on the backbone as the language model left it."""

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
    learns_from: tuple[str, str] | None = None
    """A setting, and what of a finished row of the same seed it names: `laser/adapter`."""
    flags: tuple[str, ...] = ()

    def arguments(self, folder: Path) -> list[str]:
        """Flags that follow the recipe's, for the seed whose runs are in `folder`."""
        given = ["--config", str(CONFIGS / "ablation" / self.overlay)] if self.overlay else []
        if self.K is not None:
            given += ["--objective.num_thinking_steps", str(self.K)]
        if self.learns_from is not None:
            given += [f"--{self.learns_from[0]}", str(folder / self.learns_from[1])]
        return [*given, *self.flags]


def _without(part: str, title: str, **changed: Any) -> dict[str, TrainedRow]:
    return {f"without_{part}": TrainedRow(f"without {title}", f"without_{part}.yaml", **changed)}


def _after_laser(title: str, overlay: str, *flags: str) -> TrainedRow:
    begun = ("model.adapter", "laser/adapter")
    return TrainedRow(f"LaSER, then {title}", f"{overlay}.yaml", learns_from=begun, flags=flags)


ROWS = {
    "laser": TrainedRow("LaSER"),
    "gircse": TrainedRow("GIRCSE", "gircse.yaml"),
    "contrastive": TrainedRow("contrastive", "contrastive.yaml"),
    "explicit": TrainedRow("explicit alone, reads the reasoning", "teacher.yaml", view="explicit"),
    **_without("explicit_view", "explicit view"),
    **_without("latent_view", "latent view"),
    **_without("trajectory", "trajectory"),
    **_without("output", "output distillation"),
    **_without("distillation", "either distillation"),
    **_without("colearning", "co-learning", learns_from=("objective.teacher", "explicit/model")),
    "documents_once": TrainedRow("LaSER, documents at K = 1", "documents_once.yaml"),
    "documents_once_K3": TrainedRow("K = 3, documents at K = 1", "documents_once.yaml", K=3),
    "latent_rl": TrainedRow("latent RL", "latent_rl.yaml"),
    "latent_rl_after_laser": _after_laser("latent RL", "latent_rl"),
    "draws_after_laser": _after_laser("draws alone", "latent_rl", "--objective.policy.weight", "0"),
    "infonce_after_laser": _after_laser("InfoNCE", "without_explicit_view"),
    "infonce_600_after_laser": _after_laser(
        "InfoNCE twice as long", "without_explicit_view", "--train.steps", "600"
    ),
    **{f"laser_K{K}": TrainedRow(f"LaSER trained at K = {K}", K=K) for K in (1, 3, 6)},
}
QUICK_ROWS = ("laser", "gircse", "explicit")

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

RECIPE = ("--config", str(CONFIGS / "world_pretrain.yaml"))
TRAINING = ("--config", str(CONFIGS / "quickstart.yaml"))


@dataclass(frozen=True)
class Seed:
    """World, backbone and runs of one seed, in a folder of their own."""

    number: int
    folder: Path
    quick: bool = False
    """A tiny model, in seconds."""
    config: WorldConfig = WORLD

    @property
    def data(self) -> Path:
        """The BEIR directory with `train.jsonl`, and `lm.jsonl` for the language model."""
        return self.folder / "data"

    @property
    def backbone(self) -> Path:
        """The directory of the causal-LM stage, from which every row starts."""
        return self.folder / LM_ALONE

    @property
    def world(self) -> World:
        """The generated world; equal for equal seeds."""
        return build_world(replace(self.config, seed=self.number))

    def finished(self, row: str, split: str) -> bool:
        """Whether the row is trained and evaluated."""
        files = ("results.json", f"{split}/{RESULTS_FILE}", f"{split}/{PROBE_FILE}")
        return all((self.folder / row / file).is_file() for file in files)


# --- training --------------------------------------------------------------------------------


def make_backbone(seed: Seed) -> None:
    """World and language model; what is finished is kept."""
    if not (seed.data / "lm.jsonl").is_file():
        write_world(seed.world, seed.data)
    arguments = [
        *(RECIPE + TINY if seed.quick else RECIPE),
        *("--texts", str(seed.data / "lm.jsonl"), "--eval", str(seed.data), "--eval_split", "dev"),
        *("--output", str(seed.backbone), "--seed", str(seed.number)),
    ]
    print(f"\n$ python -m laser_jax.pretrain {shlex.join(arguments)}", flush=True)
    pretrain(parse_command_line(PretrainConfig, "python -m laser_jax.pretrain", arguments))


def train_command(seed: Seed, row: str) -> list[str]:
    """The flags of laser_jax.train for a row. Nothing is ranked while it trains."""
    return [
        *(TRAINING + TINY_TRAIN if seed.quick else TRAINING),
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
    print(f"\n$ python -m laser_jax.train {shlex.join(arguments)}", flush=True)
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
        seed.folder.mkdir(parents=True, exist_ok=True)
        with measure.locked(seed.folder / ".lock"):
            make_backbone(seed)
        for row in rows:
            train_once(train_command(seed, row))
            evaluate_row(seed, row, split)


# --- the trajectory probe --------------------------------------------------------------------


def probe(seed: Seed, row: str, split: str) -> dict[str, Any] | None:
    """What every state of the row's model holds, and of the backbone before it was trained.

    Returns:
        None where nothing is thought (K = 1). Otherwise, for the row and with the row `laser` also
        for `LM_ALONE`: `documents` [K][H + 1], the share of queries where the state of step k alone
        ranks first the document of place h of the walk (0 is the start, H the answer); `tokens`
        [K][H + 1], the share where its likeliest token is that place's name; `entropy` [K], in
        nats, the mean.
    """
    own = load_retriever_config(seed.folder / row / "model")
    if own.num_thinking_steps == 1:
        return None
    world = seed.world
    models = {row: seed.folder / row / "model"}
    if row == "laser":
        models[LM_ALONE] = seed.backbone
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
    place_C = np.argsort(order) % len(world.places)
    rows = [prompts.query(q.text, q.instruction or "") for q in dataset.queries.values()]
    documents = [prompts.document(document.text) for document in dataset.documents]
    found = {}
    for name, directory in models.items():
        variables, config = load_pretrained(directory, config=own)
        encoder = LatentEncoder(variables, config, length_multiple=8)
        vectors_CD = encoder.encode_tokens(documents, [config.documents_at])[0]
        read = read_trajectories(variables, config, rows, vectors_CD)
        found[name] = {
            "documents": shares(place_C[read.first_QK], place_QH).tolist(),
            "tokens": shares(read.tokens_QKn[..., 0], np.array(names)[place_QH]).tolist(),
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
        asked = set(options.rows or (QUICK_ROWS if options.quick else ROWS))
        asked |= {f[1].partition("/")[0] for row in asked if (f := ROWS[row].learns_from)}
        rows = [row for row in ROWS if row in asked]  # a teacher before its pupil
        numbers = range(options.first_seed, options.first_seed + options.seeds)
        name, world = "quick" if options.quick else "default", WORLD
        if options.world is not None and not options.quick:
            name = options.world.stem
            world = from_dict(WorldConfig, read_yaml(options.world), source=str(options.world))
        given = (options.quick, TINY_WORLD if options.quick else world)
        seeds = [Seed(n, options.work / name / f"seed-{n}", *given) for n in numbers]
        if not options.finished_only:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for the tables
                run_missing(seeds, rows, options.split)
        titles = {row: (ROWS[row].title, ROWS[row].view) for row in rows}
        done = {
            r: {s.number: s.folder / r for s in seeds if s.finished(r, options.split)} for r in rows
        }
        ablation_table.fill(report, titles, done, options.split)
    except (ValueError, OSError, TrainingError) as error:
        raise BenchmarkError(str(error)) from error
    if not report.rows:
        raise BenchmarkError(f"nothing is finished under {options.work}")
    files = {seed.number: seed.backbone / "pretrain.json" for seed in seeds}
    texts = {number: file.read_text() for number, file in files.items() if file.is_file()}
    written = {number: json.loads(text).get("exact_match") for number, text in texts.items()}
    missing = {r: left for r, of in done.items() if (left := [n for n in numbers if n not in of])}
    world = as_dict(seeds[0].config)
    report.settings |= {"world": world, "exact_match": written, "not_run": missing}
    if missing:
        report.notes.append(f"Not run: {ablation_table.with_seeds(missing)}.")


def add_flags(parser: argparse.ArgumentParser) -> None:
    measure.add_numbers(parser, {"seeds": (3, "how many"), "first_seed": (1, "the first")})
    parser.add_argument("--world", type=Path, help="YAML of WorldConfig; default: the quickstart's")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="default: all of the world")
    parser.add_argument("--split", choices=("dev", "test"), default="test", help="default test")
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"), help="holds the runs")
    parser.add_argument("--finished_only", action="store_true", help="report, and train nothing")


def main(arguments: Sequence[str]) -> None:
    report = PROGRAM.main(arguments)
    for title, table in ablation_table.further_tables(report.rows).items():
        print(f"\n{title}:\n\n{table}")


PROGRAM = measure.Program("ablation", __doc__, fill, COLUMNS, add_flags, repeats=None)

if __name__ == "__main__":
    main(sys.argv[1:])
