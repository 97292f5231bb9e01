"""The end of a run: which step is exported, the files of the model, and the results."""

import logging
from dataclasses import asdict, replace
from typing import Any

import jax

from laser_jax.evaluate.retrieval import format_table, retrieval_runs, score_runs
from laser_jax.files.durable import write_json
from laser_jax.files.terminal import printable
from laser_jax.hf.writing import save_adapter
from laser_jax.step import TrainState
from laser_jax.train.checkpoint import DamagedCheckpointError
from laser_jax.train.model import load_starting_adapter, save_model
from laser_jax.train.processes import is_first
from laser_jax.train.selection import best_steps
from laser_jax.train.setup import Run

_log = logging.getLogger(__name__)


def best_state(run: Run, state: TrainState) -> TrainState:
    """The state of the best step on the dev split; where its checkpoint is lost, that of the best
    one which is there, with a warning. The last step's is always there: it is `state`."""
    split, last = run.config.data.dev_split, int(state.step)
    lost: list[str] = []
    for step in best_steps(run.evaluations.lines, run.config.train):
        if step != last:
            if lost and not (run.output / "checkpoints" / str(step)).is_dir():
                continue  # of no use to anybody while the best one was there
            try:
                state, _ = run.checkpoints.restore_step(step, state)
            except DamagedCheckpointError as error:
                lost.append(str(error))
                continue
        if lost:
            _log.warning(
                "\n".join(lost) + f"\nstep {step} is the best on {split} of those that are whole. "
                "Bring the checkpoint above back from a copy, and the same command exports it"
            )
        _log.info("the best step on %s is %d: exported and evaluated", split, step)
        break
    return state


def mixed_with_start(run: Run, state: TrainState) -> TrainState:
    """The state with `model.adapter_share` of the adapter that training began with (Wortsman et
    al., Robust fine-tuning of zero-shot models, 2022)."""
    config, share = run.config, run.config.model.adapter_share
    if share == 0 or config.lora is None:
        return state
    backbone = run.layout.backbone.config
    begun = load_starting_adapter(config.model, config.lora, backbone, state.trained)
    mixed = jax.tree.map(lambda a, b: share * a + (1 - share) * b, begun, state.trained)
    told = "exported and evaluated: %g of model.adapter, %g of what was trained"
    _log.info(told, share, 1 - share)
    return replace(state, trained=mixed)


def export_model(run: Run, state: TrainState) -> None:
    """Writes `model/` (merged) and, with LoRA, `adapter/`. All processes take part."""
    config, backbone, variables = run.config, run.layout.backbone, state.variables
    tokenizer, retriever = run.inputs.tokenizer, run.layout.retriever
    save_model(run.output / "model", variables, backbone, config.model, tokenizer, retriever)
    if config.lora is not None:
        adapter = (run.output / "adapter", variables["lora"], config.lora, backbone.config)
        save_adapter(*adapter, base_model=config.model.path or "")


def write_results(run: Run, state: TrainState, last: int, seconds: float) -> dict[str, Any]:
    """Ranks the test split at every K with the exported `state`, prints the table, and writes and
    returns what `results.json` holds. The steps took `seconds`, and ended with step `last`."""
    trained, total = run.layout.parameters
    evaluations = run.evaluations.lines
    results: dict[str, Any] = {
        "code": run.origin["code"],
        "metrics": run.log.last,
        "scores": _rank_test(run, state),
        "steps": last,
        "exported_step": int(state.step),
        "trained_parameters": trained,
        "parameters": total,
        "train_seconds": round(seconds, 1),
        "compile_seconds": {k: round(v, 1) for k, v in run.programs.compiled.items()},
        "id_counts": {
            split: [asdict(count) for count in dataset.id_counts]
            for split, dataset in run.inputs.ranked(run.config.data).items()
        },
    }
    if evaluations:
        results["dev"] = evaluations
        results["best_step"] = best_steps(evaluations, run.config.train)[0]
    if is_first():
        write_json(run.output / "results.json", results)
        print(f"model: {run.output / 'model'}", flush=True)
    return results


def _rank_test(run: Run, state: TrainState) -> dict[str, dict[str, float]]:
    """The scores of the test split, by view and K; {} without one."""
    test, data, Ks = run.inputs.test, run.config.data, run.config.train.eval_thinking_steps
    if test is None:
        return {}
    encoder = run.encoder(state.variables)
    runs = retrieval_runs(encoder, run.inputs.prompts, test, Ks, progress=is_first())
    scores = score_runs(runs, test)
    if is_first():
        title = f"{data.eval} ({data.eval_split}, {len(test.queries)} queries)"
        table = [title, format_table(scores), *map(str, test.id_counts)]
        print(printable("\n".join(table)), flush=True)
    return scores
