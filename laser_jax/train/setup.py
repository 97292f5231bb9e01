"""From a config to a run that can take its next step: input is checked, the state is built, and the
newest checkpoint is restored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from laser_jax.batch import Batch
from laser_jax.config import BackboneConfig, Config, ConfigError, DataConfig, as_dict
from laser_jax.data.pipeline import training_batches
from laser_jax.data.prompts import query_content
from laser_jax.data.sources import Source, open_sources, rows_per_epoch
from laser_jax.data.tokenization import PromptTokenizer, Tokenizer
from laser_jax.evaluate.beir import BeirDataset, read_beir
from laser_jax.evaluate.retrieval import require_instructions
from laser_jax.files.claim import Claim
from laser_jax.files.durable import json_text
from laser_jax.hf.reading import load_sharded_params
from laser_jax.inference.batch_encoder import LatentEncoder
from laser_jax.modeling.backbone import Variables
from laser_jax.settings import changes, listed
from laser_jax.step import TrainState
from laser_jax.train.checkpoint import CheckpointError, Checkpoints, fingerprint
from laser_jax.train.layout import (
    Layout,
    StepPrograms,
    describe_mesh,
    lay_out,
    number_of_steps,
    step_programs,
)
from laser_jax.train.model import load_starting_adapter, starting_model
from laser_jax.train.output import (
    StepLog,
    claimed,
    code_version,
    logged_lines,
    open_boards,
    require_boards,
)
from laser_jax.train.processes import is_first, local_rows
from laser_jax.train.selection import fingerprint_of, trained_encoder
from laser_jax.train.state import init_state

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What a run reads."""

    sources: list[Source]
    model: Path | None  # the directory of the weights; None for a model from scratch
    backbone: BackboneConfig
    tokenizer: Tokenizer
    prompts: PromptTokenizer
    test: BeirDataset | None  # ranked at the end
    dev: BeirDataset | None  # ranked while training: the latent view alone, the same documents

    def ranked(self, data: DataConfig) -> dict[str, BeirDataset]:
        """The splits that are ranked, by their names."""
        splits = {data.eval_split: self.test, data.dev_split: self.dev}
        return {name: dataset for name, dataset in splits.items() if dataset is not None}


@dataclass(frozen=True)
class Run:
    """Everything that the steps and the evaluation use but the state, which the steps hand on."""

    config: Config
    output: Path
    inputs: Inputs
    layout: Layout
    steps: int
    teacher_variables: Variables | None
    programs: StepPrograms
    checkpoints: Checkpoints
    origin: dict[str, Any]  # in every checkpoint: config, code and fingerprints
    log: StepLog
    evaluations: StepLog
    encoder: Callable[[Variables], LatentEncoder]
    batches_from: Callable[[int], Iterable[Batch]]  # this process's rows of those after a step


def set_up(config: Config, stack: ExitStack) -> tuple[Run, TrainState]:
    """Checks the input, builds the state and restores the newest checkpoint. What is to be closed
    goes on the `stack`."""
    claim = stack.enter_context(claimed(config))
    inputs = read_inputs(config)
    rows = rows_per_epoch(inputs.sources)
    steps = number_of_steps(config, rows)
    layout = lay_out(config, inputs.backbone, steps, prompt_checksum=inputs.prompts.checksum())
    _log.info("attention: %s", layout.attention)
    part = local_rows(layout.mesh, config.train.batch_size)
    shards = layout.mesh.shape["data"] * layout.mesh.shape["fsdp"]

    def batches_from(step: int) -> Iterable[Batch]:
        rows = (inputs.sources, inputs.prompts, config)
        return training_batches(*rows, first_batch=step, part=part, shards=shards)

    batches_from(0)  # looks at every row, before anything is written
    state, teacher_variables = _new_state(config, inputs, layout)
    begun = state.trained if config.model.adapter_share else None
    origin = {
        "config": as_dict(config),
        "code": code_version(),
        "inputs": _fingerprints(config, inputs, teacher_variables, begun),
    }
    checkpoints = Checkpoints(
        claim.directory / "checkpoints",
        keep=config.train.keep_checkpoints,
        base=None if state.frozen is None else fingerprint(state.frozen),
    )
    stack.enter_context(closing(checkpoints))
    state, meta = _restored(state, checkpoints, claim, origin["inputs"])
    if is_first():
        claim.record(json_text(origin["config"]))
    log, evaluations = _open_logs(config, int(state.step), meta, stack)
    trained, total = layout.parameters
    _log.info(
        f"{rows} rows, {steps} steps of {config.train.batch_size} queries; "
        f"{trained:,} of {total:,} parameters are trained, on {layout.mesh.size} "
        f"{layout.platform} device(s), mesh {describe_mesh(layout.mesh)}"
    )
    stack.enter_context(jax.set_mesh(layout.mesh))
    adapted = replace(layout.retriever, lora=config.lora)
    run = Run(
        config=config,
        output=claim.directory,
        inputs=inputs,
        layout=layout,
        steps=steps,
        teacher_variables=teacher_variables,
        programs=step_programs(config, layout),
        checkpoints=checkpoints,
        origin=origin,
        log=log,
        evaluations=evaluations,
        encoder=partial(trained_encoder, config, adapted, layout.mesh),
        batches_from=batches_from,
    )
    return run, state


def read_inputs(config: Config) -> Inputs:
    """Opens and checks all that is read, the evaluation's data too: now, not after hours."""
    sources = open_sources(config.data)
    require_boards(config.train)
    test, dev = read_evaluation(config)

    def texts() -> list[str]:
        found: set[str] = set()
        for row in (row for source in sources for row in source):
            found.add(query_content(row.query, row.prompt, config.prompt))
            found.update((row.reasoning_query, *row.positive_passages, *row.negative_passages))
        return sorted(found)

    model, tokenizer, backbone = starting_model(config.model, texts)
    prompts = PromptTokenizer(tokenizer, config.prompt)
    return Inputs(sources, model, backbone, tokenizer, prompts, test, dev)


def read_evaluation(config: Config) -> tuple[BeirDataset | None, BeirDataset | None]:
    """The split that is ranked at the end, and the one that is ranked while training."""
    if config.data.eval is None:
        if config.train.eval_every is not None:
            raise ConfigError("train.eval_every wants data.eval, a BEIR directory to rank")
        return None, None
    test = _read_split(config, config.data.eval, config.data.eval_split)
    if config.train.eval_every is None:
        return test, None
    dev = _read_split(config, config.data.eval, config.data.dev_split)
    latent = {name: replace(query, reasoning=None) for name, query in dev.queries.items()}
    return test, replace(dev, queries=latent, documents=test.documents)


def _read_split(config: Config, directory: str, split: str) -> BeirDataset:
    dataset = read_beir(directory, split)
    require_instructions(dataset.queries.values(), config.prompt.query_template)
    dataset = replace(dataset, ignore_identical_ids=config.data.ignore_identical_ids)
    for count in dataset.id_counts:
        _log.info("%s (%s), %s", directory, split, count)
    return dataset


def _new_state(
    config: Config, inputs: Inputs, layout: Layout
) -> tuple[TrainState, Variables | None]:
    """The state before the first step, and the variables of the frozen teacher."""
    model, backbone = inputs.model, inputs.backbone
    load = None if model is None else lambda like: load_sharded_params(model, backbone, like)
    state = init_state(layout.backbone, layout.optimizer, layout.abstract, config.train.seed, load)
    if config.model.adapter is not None and config.lora is not None:
        begun = load_starting_adapter(config.model, config.lora, backbone, state.trained)
        state = replace(state, trained=begun)
    teacher, like = layout.teacher, layout.abstract_teacher
    if teacher is None or like is None:
        return state, None
    directory = str(config.objective.teacher)
    params = load_sharded_params(directory, teacher.backbone.config, like["params"])
    return state, {"params": params}


def _fingerprints(
    config: Config, inputs: Inputs, teacher_variables: Variables | None, begun: Any
) -> dict[str, Any]:
    """What a resumed run must find as it was, and neither its config nor its state holds. Another
    split may be ranked, but no other texts or judgements under the same name. `begun` is the
    adapter where a part of it is exported."""
    teacher = None if teacher_variables is None else fingerprint(teacher_variables)
    ranked = inputs.ranked(config.data).items()
    return {
        f"fingerprint of data.eval's {split}": fingerprint_of(data) for split, data in ranked
    } | {
        "number of training rows": rows_per_epoch(inputs.sources),
        "fingerprints of the training rows": [s.facts.fingerprint for s in inputs.sources],
        "prompt_checksum": inputs.prompts.checksum(),
        "weights of objective.teacher": teacher,
        "weights of model.adapter": None if begun is None else fingerprint(begun),
    }


def _restored(
    state: TrainState, checkpoints: Checkpoints, claim: Claim, fingerprints: dict[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
    """The state of the newest checkpoint and its meta, or the given state and {}."""
    restored = checkpoints.restore(state)
    if restored is None:
        return state, {}
    state, meta = restored
    directory = claim.directory / "checkpoints"
    claim.require_same(meta["config"], directory)
    require_same_inputs(meta, fingerprints, directory)
    _log.info("resumed at step %d from %s", int(state.step), directory)
    return state, meta


def require_same_inputs(
    meta: dict[str, Any], fingerprints: dict[str, Any], directory: Path
) -> None:
    """Raises a CheckpointError where a checkpoint was trained on other inputs. A split that only
    one of the two ranks is not compared."""
    both = meta["inputs"].keys() & fingerprints.keys()
    stored, found = ({name: of[name] for name in both} for of in (meta["inputs"], fingerprints))
    if changed := changes(stored, found, source="inputs"):
        raise CheckpointError(
            f"{directory} was trained on other inputs:\n  {listed(changed)}\n"
            "Bring back those that the run began with, or choose another output"
        )


def _open_logs(
    config: Config, start: int, meta: dict[str, Any], stack: ExitStack
) -> tuple[StepLog, StepLog]:
    """The logs of steps and of rankings of a run that begins after step `start`. The scores are
    those of the checkpoint's `meta`, never what `evaluations.jsonl` holds."""
    path = Path(config.output) / "metrics.jsonl"
    lines = {line["step"]: line for line in logged_lines(path, start)}
    if last := meta.get("metrics"):
        lines[last["step"]] = last
    boards, ranked = open_boards(config, start, stack), meta.get("evaluations", [])
    return (
        StepLog(path, [lines[s] for s in sorted(lines)], [partial(b, "train") for b in boards]),
        StepLog(path.with_name("evaluations.jsonl"), ranked, [partial(b, "dev") for b in boards]),
    )
