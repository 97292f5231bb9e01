"""Trains a retriever: `python -m laser_jax.train --config configs/local.yaml [--dotted.key value]`.

The output directory holds `config.json`, `metrics.jsonl`, `checkpoints/`, and at the end
`model/` (Hugging Face layout with everything needed to use it), `adapter/` (PEFT, with LoRA) and
`results.json`. The same command again resumes where a stopped run was saved.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from laser_jax.checkpoint import Checkpoints, fingerprint
from laser_jax.config import (
    BackboneConfig,
    Config,
    ConfigError,
    RetrieverConfig,
    as_dict,
    parse_command_line,
    save_retriever_config,
)
from laser_jax.data.pipeline import Batch, training_batches
from laser_jax.data.schema import TrainingRow
from laser_jax.data.sources import Source, describe_row, open_sources, rows_per_epoch
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
from laser_jax.losses import Terms
from laser_jax.modeling.attention import choose_kernel
from laser_jax.modeling.backbone import Backbone, Variables
from laser_jax.sharding import make_mesh
from laser_jax.step import (
    FrozenTeacher,
    abstract_state,
    compile_train_step,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    make_train_step,
)
from laser_jax.training.output import MetricsLog, OutputDirectory, write_atomically
from laser_jax.training.stop import StopRequested, StopSignal


class TrainingError(RuntimeError):
    """A run that cannot go on."""


def _tokenizer_and_backbone(
    config: Config, rows: Iterable[TrainingRow]
) -> tuple[Tokenizer, BackboneConfig]:
    model = config.model
    if model.path is not None:
        backbone = read_backbone_config(model.path)
        model.require_named_backbone(backbone)
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
        ConfigError, DataError, DatasetError, HFError, TokenizationError, CheckpointError,
        OutputError, FileNotFoundError: bad input; the message names it.
        TrainingError: the loss is not finite.
    """
    with StopSignal() as stop:
        try:
            return _train(config, stop)
        except StopRequested as request:
            print(f"{request}: stopped outside the steps; the same command goes on from there")
            sys.exit(0)


def _train(config: Config, stop: StopSignal) -> dict[str, Any]:
    with ExitStack() as stack:
        with stop.interrupting():
            output = stack.enter_context(OutputDirectory(config))
            sources = open_sources(config.data)
            dataset = None
            if config.data.eval:
                dataset = read_beir(config.data.eval, config.data.eval_split)
                require_instructions(dataset)  # now, not after hours of training
            tokenizer, backbone_config = _tokenizer_and_backbone(config, chain(*sources))
            prompts = PromptTokenizer(tokenizer, config.prompt)
            _require_positions(config, backbone_config)

            mesh = make_mesh(config.mesh)
            rows_in_parallel = mesh.shape["data"] * mesh.shape["fsdp"]
            micro_batch = config.train.batch_size // config.train.num_micro_batches
            if micro_batch % rows_in_parallel:
                raise ConfigError(
                    f"train.{'micro_' if config.train.micro_batch_size else ''}batch_size "
                    f"{micro_batch} must be a multiple of the {rows_in_parallel} devices that "
                    "share the batch"
                )
            row_count = rows_per_epoch(sources)
            steps = config.train.steps
            if steps is None:
                steps = math.ceil(config.train.epochs * row_count / config.train.batch_size)

            kernel, reason = choose_kernel(
                config.model.attention,
                jax.default_backend(),
                config.model.dtype,
                backbone_config.head_dim,
            )
            print(f"attention: {kernel} ({reason})")
            backbone = Backbone(
                backbone_config,
                lora=config.lora,
                dtype=jnp.dtype(config.model.dtype),
                param_dtype=jnp.dtype(jnp.float32),
                attention=kernel,
                remat=config.model.remat,
            )
            optimizer = make_optimizer(config.optimizer, steps)
            schedule = learning_rate_schedule(config.optimizer, steps)
            base_dtype = jnp.dtype(config.model.param_dtype)
            abstract = abstract_state(backbone, optimizer, mesh, base_dtype)

            def load_base(like: Any) -> Any:
                assert config.model.path is not None
                params = load_params(config.model.path, backbone_config, dtype=base_dtype)
                return jax.tree.map(
                    lambda a, leaf: jax.device_put(a.astype(leaf.dtype), leaf.sharding),
                    params,
                    like,
                )

            state = init_state(
                backbone,
                optimizer,
                abstract,
                config.train.seed,
                load_base if config.model.path is not None else None,
            )
            teacher, teacher_variables = _load_teacher(config, backbone_config)
            base = None if state.frozen is None else fingerprint(state.frozen)

            def batches_from(step: int) -> Iterable[Batch]:
                return training_batches(
                    sources,
                    prompts,
                    config.data,
                    num_steps=config.objective.num_thinking_steps,
                    keyframes=config.objective.keyframes,
                    batch_size=config.train.batch_size,
                    seed=config.train.seed,
                    need_explicit=config.objective.need_explicit_view,
                    shared_prefix=config.views == "fast" and config.objective.teacher is None,
                    first_batch=step,
                )

            batches_from(0)  # checks every row, before anything is written
            output.claim()
            checkpoints = stack.enter_context(
                closing(
                    Checkpoints(
                        output.path / "checkpoints", keep=config.train.keep_checkpoints, base=base
                    )
                )
            )
            restored = checkpoints.restore(state)
            if restored is not None:
                state, _ = restored
                print(f"resumed at step {int(state.step)} from {output.path / 'checkpoints'}")
            trained_count = sum(a.size for a in jax.tree.leaves(state.trained))
            total_count = trained_count + sum(a.size for a in jax.tree.leaves(state.frozen))
            print(
                f"{row_count} rows, {steps} steps of {config.train.batch_size} queries; "
                f"{trained_count:,} of {total_count:,} parameters are trained, on "
                f"{jax.device_count()} {jax.default_backend()} device(s)"
            )
            start = int(state.step)
            log = stack.enter_context(closing(MetricsLog(output.path / "metrics.jsonl", start)))
            stack.enter_context(jax.set_mesh(mesh))
            step_fn = compile_train_step(
                make_train_step(backbone, config, optimizer, schedule, teacher), abstract, mesh
            )
            batches = iter(batches_from(start))

        def meta_at(step: int) -> dict[str, Any]:
            return {
                "samples": step * config.train.batch_size,
                "config": as_dict(config),
                "code": version("laser-jax"),
            }

        stops_on_nonfinite = config.train.on_nonfinite == "stop"
        metrics, before = log.last, None
        began = time.monotonic()
        progress = tqdm(total=steps, initial=start, desc="train", unit="step", mininterval=1.0)
        for step in range(start + 1, steps + 1):
            batch = next(batches)
            state, arrays = step_fn(state, batch, teacher_variables)
            progress.update()
            logged = step % config.train.log_every == 0 or step == steps
            stopping = stop.should_stop(step)
            saved = step % config.train.checkpoint_every == 0 or step == steps or stopping
            if stops_on_nonfinite:
                # the step before, while this one runs; this one only where it is waited for anyhow
                if before is not None:
                    _require_finite(*before, sources, output.path)
                if logged or saved:
                    _require_finite(step, arrays, batch, sources, output.path)
                before = (step, arrays, batch)
            if logged:
                metrics = {"step": step} | {k: float(v) for k, v in sorted(arrays.items())}
                del metrics["finite"]
                log.write(metrics)
                progress.set_postfix(loss=f"{metrics['loss']:.3f}")
            if saved:
                checkpoints.save(state, meta_at(step))
            if stopping:
                break
        progress.close()
        if close := getattr(batches, "close", None):
            close()  # worker processes, where there are any
        seconds = time.monotonic() - began
        if int(state.step) < steps:
            checkpoints.close()  # the message below must be true
            print(
                f"{stop.received}: saved at step {int(state.step)} of {steps}; "
                "the same command goes on from there"
            )
            sys.exit(0)

        with stop.interrupting():
            retriever = export_model(
                output.path, config, backbone_config, state.variables, tokenizer
            )
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
                split = config.data.eval_split
                print(f"{config.data.eval} ({split}, {len(dataset.queries)} queries)")
                print(format_table(results["scores"]))
            write_atomically(output.path / "results.json", json.dumps(results, indent=2) + "\n")
        print(f"model: {output.path / 'model'}")
        return results


def _require_positions(config: Config, backbone: BackboneConfig) -> None:
    """Raises a ConfigError where a prompt and its thoughts outgrow the model's positions."""
    for name in ("query_max_length", "document_max_length", "explicit_max_length"):
        longest = getattr(config.prompt, name) + config.objective.num_thinking_steps
        if longest > backbone.max_position_embeddings:
            raise ConfigError(
                f"prompt.{name} and {config.objective.num_thinking_steps} thinking steps take "
                f"{longest} positions, and the model has {backbone.max_position_embeddings}; "
                f"lower prompt.{name}"
            )


def _require_finite(
    step: int, arrays: Terms, batch: Batch, sources: Sequence[Source], output: Path
) -> None:
    if arrays["finite"]:
        return
    bad = [name for name, value in sorted(arrays.items()) if not math.isfinite(value)]
    assert batch.rows_B is not None
    rows = [describe_row(sources, int(row)) for row in batch.rows_B]
    raise TrainingError(
        f"step {step}: {', '.join(bad)} not finite, in the batch of "
        f"{', '.join(rows[:8])}{f' and {len(rows) - 8} more' if len(rows) > 8 else ''}. The last "
        f"checkpoint in {output / 'checkpoints'} is kept; look at these rows, lower "
        "optimizer.learning_rate, train in float32, or set train.on_nonfinite: skip"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    try:
        train(parse_command_line(Config, "python -m laser_jax.train", arguments))
    except (ValueError, OSError, TrainingError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
