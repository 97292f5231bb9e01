"""Trains a retriever: `python -m laser_jax.train --config configs/local.yaml [--dotted.key value]`.

The output directory holds `config.json`, `metrics.jsonl`, `checkpoints/`, and at the end
`model/` (Hugging Face layout with everything needed to use it), `adapter/` (PEFT, with LoRA) and
`results.json`. The same command again resumes where a stopped run was saved.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from laser_jax.checkpoint import Checkpoints
from laser_jax.config import (
    BackboneConfig,
    Config,
    ConfigError,
    RetrieverConfig,
    as_dict,
    parse_command_line,
    save_retriever_config,
)
from laser_jax.data.pipeline import training_batches
from laser_jax.data.schema import TrainingRow, read_training_rows
from laser_jax.data.tokenization import (
    PromptTokenizer,
    Tokenizer,
    load_tokenizer,
    query_content,
    special_token_ids,
    train_tokenizer,
)
from laser_jax.encoder import LatentEncoder, backbone_for, load_pretrained
from laser_jax.evaluation.beir import read_beir
from laser_jax.evaluation.retrieval import (
    format_table,
    require_instructions,
    retrieval_runs,
    score_runs,
)
from laser_jax.hf import load_params, read_backbone_config, save_adapter, save_params
from laser_jax.modeling.backbone import Backbone, Variables
from laser_jax.sharding import make_mesh
from laser_jax.step import (
    FrozenTeacher,
    compile_train_step,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    make_train_step,
)


class TrainingError(RuntimeError):
    """A run that cannot go on."""


class StopSignal:
    """Remembers SIGTERM and SIGINT, so that the loop can save and leave between two steps."""

    def __init__(self) -> None:
        self.received: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


class MetricsLog:
    """`metrics.jsonl`: a line per logged step. A resumed run drops the lines after its start."""

    def __init__(self, path: Path, start: int):
        kept = []
        if path.is_file():
            # what follows the last line end was torn by a kill, and lies after every checkpoint
            lines = path.read_text().split("\n")[:-1]
            kept = [line for line in lines if json.loads(line)["step"] <= start]
        self.last: dict[str, float] = json.loads(kept[-1]) if kept else {}
        path.write_text("".join(f"{line}\n" for line in kept))
        self._file = path.open("a")

    def write(self, metrics: dict[str, float]) -> None:
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _tokenizer_and_backbone(
    config: Config, rows: Sequence[TrainingRow]
) -> tuple[Tokenizer, BackboneConfig]:
    model = config.model
    if model.path is not None:
        backbone = read_backbone_config(model.path)
        return load_tokenizer(model.path), backbone
    assert model.scratch is not None
    texts = {
        text
        for row in rows
        for text in (
            query_content(row.query, row.prompt, config.prompt),
            row.reasoning_query,
            *row.positive_passages,
            *row.negative_passages,
        )
    }
    tokenizer = train_tokenizer(sorted(texts), model.scratch.vocab_size)
    return tokenizer, model.scratch.backbone(len(tokenizer))


def _load_teacher(
    config: Config, student: BackboneConfig
) -> tuple[FrozenTeacher | None, Variables | None]:
    directory = config.objective.teacher
    if directory is None:
        return None, None
    variables, retriever = load_pretrained(directory)
    if retriever.backbone.vocab_size != student.vocab_size:
        raise ConfigError(
            f"objective.teacher {directory} has {retriever.backbone.vocab_size} tokens and the "
            f"model {student.vocab_size}; both must read the same tokens"
        )
    variables = jax.device_put(variables)
    teacher = FrozenTeacher(backbone_for(retriever, variables), retriever.num_thinking_steps)
    return teacher, variables


def _refuse_other_run(config: Config) -> None:
    """Raises a ConfigError when the output directory belongs to a run with another config."""
    path = Path(config.output) / "config.json"
    if not path.is_file():
        return
    changed = sorted(_differing_keys(json.loads(path.read_text()), as_dict(config)))
    if changed:
        raise ConfigError(
            f"{config.output} holds a run with another config (differs in {', '.join(changed)}); "
            "choose another --output, or delete that directory"
        )


def _claim_output(config: Config) -> Path:
    """Makes the output directory and marks it as this run's."""
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.json").write_text(json.dumps(as_dict(config), indent=2) + "\n")
    return output


def _differing_keys(a: Any, b: Any, prefix: str = "") -> list[str]:
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if a == b else [prefix]
    return [
        key
        for name in sorted({*a, *b})
        for key in _differing_keys(a.get(name), b.get(name), f"{prefix}.{name}" if prefix else name)
    ]


def export_model(
    output: Path,
    config: Config,
    backbone: BackboneConfig,
    variables: Variables,
    tokenizer: Tokenizer,
) -> RetrieverConfig:
    """Writes `model/` (merged) and, with LoRA, `adapter/`. Returns the retriever's config."""
    host = jax.device_get(variables)
    save_params(
        output / "model",
        host,
        backbone,
        dtype=config.model.param_dtype,
        lora=config.lora,
        **special_token_ids(tokenizer),
    )
    tokenizer.save_pretrained(output / "model")
    retriever = RetrieverConfig(
        backbone=backbone,
        num_thinking_steps=config.objective.num_thinking_steps,
        pooling=config.objective.pooling,
        prompt=config.prompt,
        dtype=config.model.dtype,
    )
    save_retriever_config(retriever, output / "model")
    if config.lora is not None:
        save_adapter(
            output / "adapter",
            host["lora"],
            config.lora,
            backbone,
            base_model=config.model.path or "",
        )
    return retriever


def train(config: Config) -> dict[str, Any]:
    """Runs or resumes the training that `config` describes.

    Returns:
        What `results.json` holds: the scores of the evaluation (empty without `data.eval`), the
        last metrics, parameter counts and seconds.

    Raises:
        ConfigError, DataError, DatasetError, HFError, TokenizationError, FileNotFoundError: bad
            input; the message names it.
        TrainingError: the loss is not finite.
    """
    stop = StopSignal()
    _refuse_other_run(config)
    rows = read_training_rows(config.data.train)
    dataset = read_beir(config.data.eval, config.data.eval_split) if config.data.eval else None
    if dataset is not None:
        require_instructions(dataset)  # now, not after hours of training
    tokenizer, backbone_config = _tokenizer_and_backbone(config, rows)
    prompts = PromptTokenizer(tokenizer, config.prompt)

    mesh = make_mesh(config.mesh)
    rows_in_parallel = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.train.batch_size % rows_in_parallel:
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} must be a multiple of the "
            f"{rows_in_parallel} devices that share the batch"
        )
    steps = config.train.steps
    if steps is None:
        steps = math.ceil(config.train.epochs * len(rows) / config.train.batch_size)

    backbone = Backbone(
        backbone_config,
        lora=config.lora,
        dtype=jnp.dtype(config.model.dtype),
        param_dtype=jnp.dtype(jnp.float32),
    )
    optimizer = make_optimizer(config.optimizer, steps)
    schedule = learning_rate_schedule(config.optimizer, steps)
    base = None
    if config.model.path is not None:
        dtype = jnp.dtype(config.model.param_dtype)
        base = {"params": load_params(config.model.path, backbone_config, dtype=dtype)}
    state, layouts = init_state(
        backbone, optimizer, mesh, config.train.seed, base, jnp.dtype(config.model.param_dtype)
    )
    del base
    teacher, teacher_variables = _load_teacher(config, backbone_config)
    batches = iter(
        training_batches(
            rows,
            prompts,
            config.data,
            num_steps=config.objective.num_thinking_steps,
            keyframes=config.objective.keyframes,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            need_explicit=config.objective.need_explicit_view,
        )
    )

    output = _claim_output(config)  # not before everything is read: bad input leaves nothing behind
    checkpoints = Checkpoints(output / "checkpoints", config.train.keep_checkpoints)
    if (latest := checkpoints.latest()) is not None:
        state, data_state = checkpoints.restore(latest, state)
        batches.set_state(data_state)
        print(f"resumed at step {latest} from {output / 'checkpoints'}")
    trained_count = sum(a.size for a in jax.tree.leaves(state.trained))
    total_count = trained_count + sum(a.size for a in jax.tree.leaves(state.frozen))
    print(
        f"{len(rows)} rows, {steps} steps of {config.train.batch_size} queries; "
        f"{trained_count:,} of {total_count:,} parameters are trained, on "
        f"{jax.device_count()} {jax.default_backend()} device(s)"
    )

    start = int(state.step)
    log = MetricsLog(output / "metrics.jsonl", start)
    with jax.set_mesh(mesh), closing(checkpoints), closing(log):
        step_fn = compile_train_step(
            make_train_step(backbone, config, optimizer, schedule, teacher), layouts, mesh
        )
        metrics = log.last
        began = time.monotonic()
        progress = tqdm(total=steps, initial=start, desc="train", unit="step", mininterval=1.0)
        for step in range(start + 1, steps + 1):
            state, arrays = step_fn(state, next(batches), teacher_variables)
            progress.update()
            logged = step % config.train.log_every == 0 or step == steps
            stopping = stop.received is not None  # read once, as it may come at any moment
            saved = step % config.train.checkpoint_every == 0 or step == steps or stopping
            if logged or saved:
                metrics = {"step": step} | {k: float(v) for k, v in sorted(arrays.items())}
                _require_finite(metrics, output)
            if logged:
                log.write(metrics)
                progress.set_postfix(loss=f"{metrics['loss']:.3f}")
            if saved:
                checkpoints.save(state, batches.get_state())
            if stopping:
                break
        progress.close()
    seconds = time.monotonic() - began
    if stop.received and int(state.step) < steps:
        print(
            f"{stop.received}: saved at step {int(state.step)} of {steps}; "
            "the same command goes on from there"
        )
        sys.exit(0)

    retriever = export_model(output, config, backbone_config, state.variables, tokenizer)
    results: dict[str, Any] = {
        "metrics": metrics,
        "scores": {},
        "steps": steps,
        "trained_parameters": trained_count,
        "parameters": total_count,
        "train_seconds": round(seconds, 1),
        "steps_timed": steps - start,
    }
    if dataset is not None:
        encoder = LatentEncoder(
            state.variables,
            replace(retriever, lora=config.lora),
            batch_size=config.train.eval_batch_size,
            length_multiple=config.data.length_multiple,
        )
        runs = retrieval_runs(
            encoder, prompts, dataset, config.train.eval_thinking_steps, progress=True
        )
        results["scores"] = score_runs(runs, dataset)
        print(f"{config.data.eval} ({config.data.eval_split}, {len(dataset.queries)} queries)")
        print(format_table(results["scores"]))
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"model: {output / 'model'}")
    return results


def _require_finite(metrics: dict[str, float], output: Path) -> None:
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise TrainingError(
            f"step {metrics['step']}: {', '.join(bad)} not finite. The last checkpoint in "
            f"{output / 'checkpoints'} is kept; lower optimizer.learning_rate, or train in float32"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    try:
        train(parse_command_line(Config, "python -m laser_jax.train", arguments))
    except (ValueError, OSError, TrainingError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
