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
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from tqdm import tqdm

from laser_jax.batch import Batch
from laser_jax.config import (
    BackboneConfig,
    Config,
    ConfigError,
    LoraConfig,
    RetrieverConfig,
    as_dict,
    load_retriever_config,
    parse_train_command,
    save_retriever_config,
)
from laser_jax.data.pipeline import training_batches
from laser_jax.data.schema import TrainingRow
from laser_jax.data.sources import Source, describe_row, open_sources, rows_per_epoch
from laser_jax.data.tokenization import (
    PromptTokenizer,
    Tokenizer,
    load_tokenizer_for,
    query_content,
    special_token_ids,
    train_tokenizer,
)
from laser_jax.data.tokenizer_files import save_tokenizer
from laser_jax.evaluate.beir import BeirDataset, read_beir
from laser_jax.evaluate.retrieval import (
    format_table,
    require_instructions,
    retrieval_runs,
    score_runs,
)
from laser_jax.files.durable import folder_written_whole, write_atomically
from laser_jax.files.terminal import fail
from laser_jax.hf.adapters import merged_adapters
from laser_jax.hf.directory import read_backbone_config, resolve_directory
from laser_jax.hf.reading import load_sharded_params
from laser_jax.hf.writing import save_adapter, save_params
from laser_jax.inference.batch_encoder import LatentEncoder
from laser_jax.losses import Terms
from laser_jax.modeling.backbone import Backbone, Variables
from laser_jax.step import (
    FrozenTeacher,
    TrainState,
    abstract_variables,
    init_state,
    jit_train_step,
    make_train_step,
)
from laser_jax.train.checkpoint import (
    CheckpointError,
    Checkpoints,
    DamagedCheckpointError,
    fingerprint,
)
from laser_jax.train.dry_run import dry_run
from laser_jax.train.layout import Layout, describe_mesh, lay_out, number_of_steps
from laser_jax.train.output import OutputDirectory, StepLog, code_version, logged_lines
from laser_jax.train.processes import is_first, join_processes, local_rows, place_batch, say
from laser_jax.train.programs import StepPrograms
from laser_jax.train.selection import (
    best_steps,
    fingerprint_of,
    is_evaluated,
    is_out_of_patience,
    score_dev,
)
from laser_jax.train.stop import StopRequested, StopSignal
from laser_jax.train.telemetry import TensorBoard, Trace, require_tensorboard
from laser_jax.train.throughput import Meter


class TrainingError(RuntimeError):
    """A run that cannot go on."""


def _tokenizer_and_backbone(
    config: Config, directory: Path | None, rows: Iterable[TrainingRow]
) -> tuple[Tokenizer, BackboneConfig]:
    """Those of the model in `directory`, or, without one, of a model from scratch."""
    scratch = config.model.scratch
    if directory is not None:
        backbone = read_backbone_config(directory)
        config.model.require_named_backbone(backbone)
        return load_tokenizer_for(directory, backbone), backbone
    assert scratch is not None
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
    tokenizer = train_tokenizer(sorted(texts), scratch.vocab_size)
    return tokenizer, scratch.backbone(len(tokenizer))


def _load_teacher(
    config: Config, student: BackboneConfig, prompts: PromptTokenizer, mesh: Mesh
) -> tuple[FrozenTeacher | None, Variables | None]:
    directory = config.objective.teacher
    if directory is None:
        return None, None
    retriever = load_retriever_config(directory)
    _require_fit_teacher(directory, retriever, student, prompts)
    dtype = jnp.dtype(retriever.dtype)
    backbone = Backbone(retriever.backbone, dtype=dtype, param_dtype=dtype)
    like = abstract_variables(backbone, mesh, "params", dtype)
    variables = {"params": load_sharded_params(directory, retriever.backbone, like)}
    return FrozenTeacher(backbone, retriever.num_thinking_steps), variables


def _require_fit_teacher(
    directory: str, teacher: RetrieverConfig, student: BackboneConfig, prompts: PromptTokenizer
) -> None:
    if teacher.backbone.vocab_size != student.vocab_size:
        raise ConfigError(
            f"objective.teacher {directory} has {teacher.backbone.vocab_size} tokens and the "
            f"model {student.vocab_size}; both must read the same tokens"
        )
    if teacher.prompt_checksum not in (None, prompts.checksum()):
        raise ConfigError(
            f"objective.teacher {directory} was trained with another tokenizer or other templates: "
            f"its prompt_checksum is {teacher.prompt_checksum}, and the model's "
            f"{prompts.checksum()}; both must read the same tokens. Train the teacher from the "
            "same model.path with the same prompt settings"
        )
    if teacher.pooling != "prompt_and_thoughts":
        raise ConfigError(
            f"objective.teacher {directory} pools its {teacher.pooling} alone (GIRCSE), and the "
            "explicit view of a teacher has none; name a model of objective.method: laser, such "
            "as configs/ablation/teacher.yaml trains"
        )


def _inputs(
    sources: Sequence[Source],
    prompts: PromptTokenizer,
    teacher_variables: Variables | None,
    ranked: dict[str, BeirDataset],
) -> dict[str, Any]:
    """What a resumed run must find as it was, and neither its config nor its state holds. `ranked`
    are the evaluation sets, by the names of their splits: another split may be ranked, but no other
    texts or judgements under the same name."""
    teacher = None if teacher_variables is None else fingerprint(teacher_variables)
    sets = {f"fingerprint of data.eval's {k}": fingerprint_of(v) for k, v in ranked.items()}
    return sets | {
        "number of training rows": rows_per_epoch(sources),
        "fingerprints of the training rows": [source.fingerprint for source in sources],
        "prompt_checksum": prompts.checksum(),
        "weights of objective.teacher": teacher,
    }


def _require_same_inputs(meta: dict[str, Any], inputs: dict[str, Any], directory: Path) -> None:
    """Raises a CheckpointError where a checkpoint was trained on others. What a checkpoint of an
    older release does not hold is not compared."""
    stored = meta.get("inputs", {})
    changed = [
        f"{name}: was {stored[name]}, is {value}"
        for name, value in inputs.items()
        if name in stored and stored[name] != value
    ]
    if changed:
        raise CheckpointError(
            f"{directory} was trained on other inputs:\n  " + "\n  ".join(changed) + "\nBring back "
            "those that the run began with, or choose another output"
        )


def _retriever_config(run: _Run, lora: LoraConfig | None) -> RetrieverConfig:
    config = run.config
    return RetrieverConfig(
        backbone=run.layout.backbone.config,
        num_thinking_steps=config.objective.num_thinking_steps,
        pooling=config.objective.pooling,
        prompt=config.prompt,
        dtype=config.model.dtype,
        lora=lora,
        prompt_checksum=run.prompts.checksum(),
    )


def export_model(run: _Run) -> None:
    """Writes `model/` (merged) and, with LoRA, `adapter/`. All processes take part."""
    config, backbone, output = run.config, run.layout.backbone.config, run.output
    variables = run.state.variables
    save_params(
        output / "model",
        variables,
        backbone,
        dtype=config.model.param_dtype,
        lora=config.lora,
        tokens=special_token_ids(run.tokenizer),
        merged=merged_adapters(resolve_directory(config.model.path)) if config.model.path else (),
    )
    if is_first():
        with folder_written_whole(output / "model") as folder:
            save_tokenizer(run.tokenizer, folder)
            save_retriever_config(_retriever_config(run, None), folder)
    if config.lora is not None:
        save_adapter(
            output / "adapter",
            variables["lora"],
            config.lora,
            backbone,
            base_model=config.model.path or "",
        )


def train(config: Config) -> dict[str, Any]:
    """Runs or resumes the training that `config` describes, in this process or in all that
    `training.processes` has joined.

    Returns:
        What `results.json` holds: the scores of the evaluation (empty without `data.eval`), the
        last metrics, parameter counts, seconds, and the version and commit of the code.

    Raises:
        ConfigError, DataError, DatasetError, HFError, TokenizationError, CheckpointError,
        OutputError, FileNotFoundError: bad input; the message names it.
        TrainingError: the loss is not finite.
    """
    with StopSignal() as stop, ExitStack() as stack:
        try:
            with stop.interrupting():
                run = _set_up(config, stack)
            if not _take_steps(run, stop):
                run.checkpoints.wait()  # the message below must be true
                say(
                    f"{stop.received}: saved at step {int(run.state.step)} of {run.steps}; "
                    "the same command goes on from there"
                )
                sys.exit(0)
            with stop.interrupting():
                return _finish(run)
        except StopRequested as request:
            say(f"{request}: stopped outside the steps; the same command goes on from there")
            sys.exit(0)


@dataclass
class _Run:
    """Everything that the steps and the evaluation after them use."""

    config: Config
    output: Path
    sources: list[Source]
    tokenizer: Tokenizer
    prompts: PromptTokenizer
    test: BeirDataset | None
    dev: BeirDataset | None
    layout: Layout
    steps: int
    state: TrainState
    teacher_variables: Variables | None
    inputs: dict[str, Any]
    """See `_inputs`."""
    programs: StepPrograms
    batches_from: Callable[[int], Iterable[Batch]]
    checkpoints: Checkpoints
    scores: dict[int, float]
    """Of the dev split, by step."""
    log: StepLog
    evaluations: StepLog
    tensorboard: TensorBoard | None
    encoder: LatentEncoder | None = None
    """Without weights; see `_encoder`."""
    seconds: float = 0.0
    """In steps, from the first to the last, with saving and the dev split."""


def _set_up(config: Config, stack: ExitStack) -> _Run:
    """Checks the input, builds the state and restores the newest checkpoint. What is to be closed
    goes on the `stack`."""
    output = stack.enter_context(OutputDirectory(config))
    sources = open_sources(config.data)
    if config.train.tensorboard:
        require_tensorboard()
    test, dev = _read_evaluation(config)  # now, not after hours of training
    model = None if config.model.path is None else resolve_directory(config.model.path)
    tokenizer, backbone_config = _tokenizer_and_backbone(config, model, chain(*sources))
    prompts = PromptTokenizer(tokenizer, config.prompt)
    rows = rows_per_epoch(sources)
    steps = number_of_steps(config, rows)
    layout = lay_out(config, backbone_config, steps)
    mesh = layout.mesh
    say(f"attention: {layout.attention}")

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
            part=local_rows(mesh, config.train.batch_size),
        )

    batches_from(0)  # checks every row, before anything is written
    state = init_state(
        layout.backbone,
        layout.optimizer,
        layout.abstract,
        config.train.seed,
        model and (lambda like: load_sharded_params(model, backbone_config, like)),
    )
    teacher, teacher_variables = _load_teacher(config, backbone_config, prompts, mesh)
    ranked = {config.data.eval_split: test, config.data.dev_split: dev}
    inputs = _inputs(
        sources, prompts, teacher_variables, {k: v for k, v in ranked.items() if v is not None}
    )
    base = None if state.frozen is None else fingerprint(state.frozen)
    scores: dict[int, float] = {}
    checkpoints = stack.enter_context(
        closing(
            Checkpoints(
                output.path / "checkpoints",
                keep=config.train.keep_checkpoints,
                scores=scores,
                base=base,
            )
        )
    )
    restored = checkpoints.restore(state)
    meta: dict[str, Any] = {}
    if restored is not None:
        state, meta = restored
        output.require_same_config(meta["config"], str(output.path / "checkpoints"))
        _require_same_inputs(meta, inputs, output.path / "checkpoints")
        say(f"resumed at step {int(state.step)} from {output.path / 'checkpoints'}")
    output.claim()
    start = int(state.step)
    log, evaluations = _logs(output.path, start, meta, config, stack)
    scores.update({line["step"]: line[config.train.eval_metric] for line in evaluations.lines})
    tensorboard = None
    if config.train.tensorboard:
        tensorboard = stack.enter_context(closing(TensorBoard(output.path / "tensorboard", start)))
    trained, total = layout.parameters
    say(
        f"{rows} rows, {steps} steps of {config.train.batch_size} queries; "
        f"{trained:,} of {total:,} parameters are trained, on {mesh.size} {layout.platform} "
        f"device(s), mesh {describe_mesh(mesh)}"
    )
    stack.enter_context(jax.set_mesh(mesh))
    train_step = make_train_step(
        layout.backbone, config, layout.optimizer, layout.schedule, teacher
    )
    return _Run(
        config=config,
        output=output.path,
        sources=sources,
        tokenizer=tokenizer,
        prompts=prompts,
        test=test,
        dev=dev,
        layout=layout,
        steps=steps,
        state=state,
        teacher_variables=teacher_variables,
        inputs=inputs,
        programs=StepPrograms(jit_train_step(train_step, layout.abstract, mesh)),
        batches_from=batches_from,
        checkpoints=checkpoints,
        scores=scores,
        log=log,
        evaluations=evaluations,
        tensorboard=tensorboard,
    )


def _logs(
    output: Path, start: int, meta: dict[str, Any], config: Config, stack: ExitStack
) -> tuple[StepLog, StepLog]:
    """The logs of steps and of rankings of a run that begins after step `start`. The scores are
    those of the checkpoint's `meta`, never what `evaluations.jsonl` holds."""
    if config.train.eval_every is not None and meta and "evaluations" not in meta:
        say(
            f"the checkpoint of step {start} is an older release's, without the scores on "
            f"{config.data.dev_split}: the best step is chosen among those that are ranked now"
        )
    metrics = {line["step"]: line for line in logged_lines(output / "metrics.jsonl", start)}
    if last := meta.get("metrics"):
        metrics[last["step"]] = last
    return (
        stack.enter_context(
            closing(StepLog(output / "metrics.jsonl", [metrics[step] for step in sorted(metrics)]))
        ),
        stack.enter_context(
            closing(StepLog(output / "evaluations.jsonl", meta.get("evaluations", [])))
        ),
    )


def _read_evaluation(config: Config) -> tuple[BeirDataset | None, BeirDataset | None]:
    """The split that is ranked at the end, and the one that is ranked while training."""
    if config.data.eval is None:
        if config.train.eval_every is not None:
            raise ConfigError("train.eval_every wants data.eval, a BEIR directory to rank")
        return None, None
    test = _read_split(config, config.data.eval_split)
    if config.train.eval_every is None:
        return test, None
    dev = _read_split(config, config.data.dev_split)
    # the latent view alone is ranked, and the corpus is the same
    latent = {name: replace(query, reasoning=None) for name, query in dev.queries.items()}
    return test, replace(dev, queries=latent, documents=test.documents)


def _read_split(config: Config, split: str) -> BeirDataset:
    assert config.data.eval is not None
    dataset = read_beir(config.data.eval, split)
    require_instructions(dataset)
    dataset = replace(dataset, ignore_identical_ids=config.data.ignore_identical_ids)
    for count in dataset.id_counts:
        say(f"{config.data.eval} ({split}), {count}")
    return dataset


def _take_steps(run: _Run, stop: StopSignal) -> bool:
    """Trains until the last step, or until patience ends; False where a signal came first."""
    config, train = run.config, run.config.train
    start = int(run.state.step)
    meter = Meter(config, run.layout.backbone.config, list(run.layout.mesh.devices.flat))
    meta = {"config": as_dict(config), "code": code_version(), "inputs": run.inputs}
    began = time.monotonic()
    progress = tqdm(
        total=run.steps,
        initial=start,
        desc="train",
        unit="step",
        mininterval=1.0,
        disable=None if is_first() else True,
    )
    with closing(progress), ExitStack() as stack:
        trace = stack.enter_context(closing(Trace(run.output / "profile", train.profile_steps)))
        if start and is_evaluated(start, run.steps, train) and start not in run.scores:
            meter.spent(_rank_dev(run, stop))  # what a stopped run had not come to
        batches = iter(run.batches_from(start))
        if close := getattr(batches, "close", None):
            stack.callback(close)  # worker processes, where there are any
        before = None
        for step in range(start + 1, run.steps + 1):
            if is_out_of_patience(run.evaluations.lines, train):
                break
            local = next(batches)
            batch = place_batch(local, run.layout.mesh, train.batch_size)
            trace.before(step)
            shapes = len(run.programs.compiled)
            run.state, arrays = run.programs(run.state, batch, run.teacher_variables)
            if len(run.programs.compiled) > shapes:
                shape, seconds = list(run.programs.compiled.items())[-1]
                meter.spent(seconds)
                if is_first():
                    tqdm.write(f"compiled in {seconds:.1f} s: {shape}")
            trace.after(step, arrays)
            meter.add(arrays)
            progress.update()
            if jax.process_count() > 1 and run.layout.platform == "cpu":
                jax.block_until_ready(arrays)  # gloo hangs when steps of processes overlap
            logged = step % train.log_every == 0 or step == run.steps
            stopping = stop.should_stop(step)
            evaluated = is_evaluated(step, run.steps, train)
            saved = evaluated or stopping or step % train.checkpoint_every == 0 or step == run.steps
            if train.on_nonfinite == "stop":
                # the step before, while this one runs; this one only where it is waited for anyhow
                if before is not None:
                    _require_finite(*before, run)
                if logged or saved:
                    _require_finite(step, arrays, local, run)
                before = (step, arrays, local)
            if logged:
                line = {"step": step} | {k: float(v) for k, v in sorted(arrays.items())}
                del line["finite"], line["token_pairs"]
                line |= meter.read()
                run.log.write(line)
                if run.tensorboard is not None:
                    run.tensorboard.write("train", line)
                progress.set_postfix(loss=f"{line['loss']:.3f}")
            if saved:
                progressed = {
                    "samples": step * train.batch_size,
                    "metrics": run.log.last,
                    "evaluations": run.evaluations.lines,
                }
                run.checkpoints.save(run.state, progressed | meta)
            if stopping:
                return False
            if evaluated:
                meter.spent(_rank_dev(run, stop))
    run.seconds = time.monotonic() - began
    return True


def _rank_dev(run: _Run, stop: StopSignal) -> float:
    """Ranks the dev split, logs the scores and returns the seconds it took. The step is already
    saved, so that a signal may come at any time."""
    assert run.dev is not None
    began, step = time.monotonic(), int(run.state.step)
    with stop.interrupting():
        scores = score_dev(_encoder(run), run.prompts, run.dev)
    line = {"step": step} | scores
    run.evaluations.write(line)
    run.scores[step] = scores[run.config.train.eval_metric]
    if run.tensorboard is not None:
        run.tensorboard.write("dev", line)
    if is_first():
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        tqdm.write(f"step {step}, {run.config.data.dev_split}: {shown}")
    return time.monotonic() - began


def _encoder(run: _Run) -> LatentEncoder:
    """The model as it is now. Its programs are kept, so that nothing is compiled again, and its
    weights are not: on one device they are a copy."""
    config = run.config
    if run.encoder is None:
        encoder = LatentEncoder(
            run.state.variables,
            _retriever_config(run, config.lora),
            batch_size=config.train.eval_batch_size,
            length_multiple=config.data.length_multiple,
            # one device alone runs faster over separate layers, which the encoder then makes
            mesh=run.layout.mesh if run.layout.mesh.size > 1 else None,
        )
        run.encoder = encoder.without_variables()
        return encoder
    return run.encoder.with_variables(run.state.variables)


def _restore_best(run: _Run) -> None:
    """Takes the state of the best step on the dev split; where its checkpoint is lost, that of the
    best one which is there, and says so. The last step's is always there."""
    split, last = run.config.data.dev_split, int(run.state.step)
    lost: list[str] = []
    for step in best_steps(run.evaluations.lines, run.config.train):
        if step != last:
            if lost and not (run.output / "checkpoints" / str(step)).is_dir():
                continue  # of no use to anybody while the best one was there
            try:
                run.state, _ = run.checkpoints.restore_step(step, run.state)
            except DamagedCheckpointError as error:
                lost.append(str(error))
                continue
        if lost:
            say("\n".join(lost))
            say(
                f"step {step} is the best on {split} of those that are whole. Bring the checkpoint "
                "above back from a copy, and the same command exports it"
            )
        say(f"the best step on {split} is {step}: exported and evaluated")
        return


def _finish(run: _Run) -> dict[str, Any]:
    """Exports the model, ranks the test split at every K and writes `results.json`."""
    config = run.config
    last = int(run.state.step)
    run.checkpoints.wait()
    if config.train.export == "best":
        _restore_best(run)
    export_model(run)
    trained, total = run.layout.parameters
    results: dict[str, Any] = {
        "code": code_version(),
        "metrics": run.log.last,
        "scores": {},
        "steps": last,
        "exported_step": int(run.state.step),
        "trained_parameters": trained,
        "parameters": total,
        "train_seconds": round(run.seconds, 1),
        "compile_seconds": {k: round(v, 1) for k, v in run.programs.compiled.items()},
    }
    if run.evaluations.lines:
        results["dev"] = run.evaluations.lines
        results["best_step"] = best_steps(run.evaluations.lines, config.train)[0]
    results["id_counts"] = {
        split: [asdict(count) for count in dataset.id_counts]
        for split, dataset in ((config.data.eval_split, run.test), (config.data.dev_split, run.dev))
        if dataset is not None
    }
    if run.test is not None:
        runs = retrieval_runs(
            _encoder(run),
            run.prompts,
            run.test,
            config.train.eval_thinking_steps,
            progress=is_first(),
        )
        results["scores"] = score_runs(runs, run.test)
        split = config.data.eval_split
        say(f"{config.data.eval} ({split}, {len(run.test.queries)} queries)")
        say("\n".join([format_table(results["scores"]), *map(str, run.test.id_counts)]))
    if is_first():
        write_atomically(run.output / "results.json", json.dumps(results, indent=2) + "\n")
    say(f"model: {run.output / 'model'}")
    return results


def _require_finite(step: int, arrays: Terms, batch: Batch, run: _Run) -> None:
    if arrays["finite"]:
        return
    bad = [name for name, value in sorted(arrays.items()) if not math.isfinite(value)]
    assert batch.rows_B is not None
    rows = [describe_row(run.sources, int(row)) for row in batch.rows_B]
    raise TrainingError(
        f"step {step}: {', '.join(bad)} not finite, in the batch of "
        f"{', '.join(rows[:8])}{f' and {len(rows) - 8} more' if len(rows) > 8 else ''}. The last "
        f"checkpoint in {run.output / 'checkpoints'} is kept; look at these rows, lower "
        "optimizer.learning_rate, train in float32, or set train.on_nonfinite: skip"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    try:
        config, invocation = parse_train_command(arguments)
        if invocation.dry_run:
            dry_run(config, invocation)
            return
        join_processes(invocation)
        train(config)
    except (ValueError, OSError, ImportError, TrainingError) as error:
        fail(error)
