"""Whole training runs on a handful of rows: what they write, how they stop and go on, and what
they refuse."""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import signal
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.profiler import ProfileData
from safetensors.numpy import load_file, save_file

import laser_jax
import laser_jax.train.export as export
import laser_jax.train.loop as loop
import laser_jax.train.run as program
import laser_jax.train.selection as selection
import laser_jax.train.setup as setup
from laser_jax.command_line import parse_command_line, parse_train_command
from laser_jax.config import Config, MeshConfig, RetrieverConfig
from laser_jax.data.tokenization import PromptTokenizer, load_tokenizer, right_pad
from laser_jax.encoder import load_pretrained
from laser_jax.files.claim import OutputError
from laser_jax.hf.directory import read_backbone_config
from laser_jax.hf.reading import load_adapter
from laser_jax.inference.batch_encoder import LatentEncoder
from laser_jax.sharding import make_mesh
from laser_jax.step import TrainState
from laser_jax.train.checkpoint import CheckpointError
from laser_jax.train.layout import Layout, StepPrograms
from laser_jax.train.output import StepLog, logged_lines
from laser_jax.train.selection import trained_encoder

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TRAINING_CONFIGS = sorted(
    {*CONFIGS.glob("*.yaml"), *CONFIGS.glob("ablation/*.yaml")} - {*CONFIGS.glob("world_*")}
)
PLACES = ("Ulm", "Bonn", "Jena", "Kiel", "Trier", "Worms", "Essen", "Halle", "Mainz", "Fulda")
QUERIES = [f"Which river flows through {place}?" for place in PLACES]
REASONINGS = [
    f"{place} lies in a valley.\n\nIts river is number {n}." for n, place in enumerate(PLACES)
]
PASSAGES = [f"River number {n} rises near {place}." for n, place in enumerate(PLACES)]
LORA = ("--lora.rank", "2", "--optimizer.learning_rate", "1e-2")
NO_EVAL = ("--data.eval", "null")
NO_TABLE = ("--train.eval_thinking_steps", "[2]")
STEPS = 4


@pytest.fixture(autouse=True, scope="module")
def _cached_compilation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Several runs below are the same program."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True, scope="module")
def _same_steps_are_traced_once() -> Iterator[None]:
    """Runs below that take the same step share the jitted function, so that it is traced once, and
    runs that begin from the same random weights share those."""
    steps: dict[str, Any] = {}
    states: dict[str, TrainState] = {}

    def step_programs(config: Config, layout: Layout) -> StepPrograms:
        train, what = config.train, (layout.teacher, layout.backbone, layout.abstract)
        parts = (train.steps, train.num_micro_batches, train.accumulation)
        key = repr((config.objective, config.views, config.optimizer, *parts, *what))
        if key not in steps:
            steps[key] = make_programs(config, layout)._jitted
        return StepPrograms(steps[key])

    def init_state(*given: Any) -> TrainState:
        *_, abstract, seed, load_base = given
        if load_base is not None:
            return make_state(*given)
        if (key := repr((abstract, seed))) not in states:
            states[key] = jax.device_get(make_state(*given))
        layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        return jax.device_put(jax.tree.map(np.copy, states[key]), layout)

    make_programs, make_state = setup.step_programs, setup.init_state
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "step_programs", step_programs)
        patch.setattr(setup, "init_state", init_state)
        yield


@pytest.fixture(autouse=True, scope="module")
def _kept_signal_handlers() -> Iterator[None]:
    """A run takes SIGTERM and SIGINT over."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _progress_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="laser_jax")


@pytest.fixture(autouse=True)
def _optax_promotes() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):  # optax takes a float to an integer power
        yield


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def training_row(n: int) -> dict[str, Any]:
    others = [PASSAGES[(n + i) % len(PASSAGES)] for i in (1, 2)]
    return {
        "query": QUERIES[n],
        "reasoning_query": REASONINGS[n],
        "prompt": "Find the river",
        "positive_passages": [PASSAGES[n]],
        "negative_passages": others,
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl and a BEIR directory, in one folder."""
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "train.jsonl", [training_row(n) for n in range(len(PLACES))])
    write_jsonl(
        folder / "corpus.jsonl",
        [{"_id": f"d{n}", "title": "", "text": text} for n, text in enumerate(PASSAGES)],
    )
    write_jsonl(
        folder / "queries.jsonl",
        [
            {"_id": f"q{n}", "text": QUERIES[n], "instruction": "Find", "reasoning": REASONINGS[n]}
            for n in range(3)
        ],
    )
    (folder / "qrels").mkdir()
    lines = ["query-id\tcorpus-id\tscore", *(f"q{n}\td{n}\t1" for n in range(3))]
    for split in ("dev", "test"):
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def arguments(data: Path) -> Callable[..., list[str]]:
    """The command line of a tiny run; later flags win."""

    def make(output: Path, *more: str) -> list[str]:
        settings = {
            "data.train": data / "train.jsonl",
            "data.eval": data,
            "data.length_multiple": 128,  # one shape
            "output": output,
            "model.scratch.vocab_size": 270,
            "model.scratch.hidden_size": 16,
            "model.scratch.num_layers": 2,
            "model.scratch.num_heads": 2,
            "model.scratch.num_kv_heads": 1,
            "model.scratch.head_dim": 8,
            "model.scratch.intermediate_size": 16,
            "objective.num_thinking_steps": 2,
            "train.batch_size": 8,
            "train.steps": STEPS,
            "train.log_every": 1,
            "train.checkpoint_every": 2,
            "train.eval_thinking_steps": "[1, 2]",
        }
        flags = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
        return ["--config", str(CONFIGS / "local.yaml"), *flags, *more]

    return make


@pytest.fixture(scope="module")
def run(arguments) -> Callable[..., dict[str, Any]]:
    def make(output: Path, *more: str) -> dict[str, Any]:
        return program.train(parse_command_line(Config, "train", arguments(output, *more)))

    return make


# --- a whole run -------------------------------------------------------------------------------


class Finished:
    """A run that went through, and the encoder with which it evaluated itself."""

    def __init__(self, output: Path, results: dict[str, Any], encoder: LatentEncoder):
        self.output = output
        self.results = results
        self.encoder = encoder


def finish(run, output: Path, *more: str) -> Finished:
    encoders = []

    def record(encoder: LatentEncoder, *args: Any, **kwargs: Any) -> Any:
        encoders.append(encoder)
        return retrieval_runs(encoder, *args, **kwargs)

    retrieval_runs = export.retrieval_runs
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(export, "retrieval_runs", record)
        return Finished(output, run(output, *more), *encoders)


@pytest.fixture(scope="module")
def full(run, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finish(run, tmp_path_factory.mktemp("full") / "\N{WORLD MAP}")


@pytest.fixture(scope="module")
def lora(run, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finish(run, tmp_path_factory.mktemp("lora") / "run", *LORA)


def test_the_settings_that_a_run_leaves_are_a_file_of_settings(full: Finished, arguments) -> None:
    again = parse_command_line(Config, "train", ["--config", str(full.output / "config.json")])
    assert again == parse_command_line(Config, "train", arguments(full.output))


def test_a_finished_run_that_is_started_again_is_not_finished_until_its_new_end(
    full: Finished, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`launch/train.sh` takes results.json for the end of the run that it watches."""
    output = Path(shutil.copytree(full.output, tmp_path / "run"))

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "export_model", interrupted)
    with pytest.raises(KeyboardInterrupt), jax.numpy_dtype_promotion("standard"):
        run(output)
    assert (output / "model").is_dir()
    assert not (output / "results.json").exists()


CLOCKED = ("queries_per_second", "tokens_per_second")


def metrics_of(output: Path) -> list[dict[str, float]]:
    """Without what the clock decides."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKED} for line in lines]


def encode(
    variables: Any, config: RetrieverConfig, rows: list[list[int]], steps: int
) -> np.ndarray:
    ids_BT, lengths_B = right_pad(rows, 0, 32)
    mask_BT = np.arange(ids_BT.shape[1]) < lengths_B[:, None]
    run = jax.jit(laser_jax.encode, static_argnames=("config", "num_thinking_steps"))
    return run(variables, ids_BT, mask_BT, config=config, num_thinking_steps=steps)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_export_gives_the_trainers_own_vectors(kind, request) -> None:
    finished: Finished = request.getfixturevalue(kind)
    variables, config = laser_jax.load_pretrained(finished.output / "model")
    prompts = PromptTokenizer(load_tokenizer(finished.output / "model"), config.prompt)
    assert config.num_thinking_steps == 2
    assert config.prompt == finished.encoder.config.prompt
    rows = [prompts.query(text, "Find the river") for text in QUERIES[:4]]
    own = finished.encoder.encode_tokens(rows, [1, 2])
    for k in (1, 2):
        np.testing.assert_allclose(encode(variables, config, rows, k), own[k - 1], atol=1e-5)


def test_the_adapter_and_the_merged_model_are_of_the_same_weights(lora: Finished) -> None:
    merged, config = load_pretrained(lora.output / "model")
    adapter, settings = load_adapter(lora.output / "adapter", config.backbone)
    assert settings.rank == 2
    own = lora.encoder.variables["lora"]["last_layer"]["mlp"]["up_proj"]
    ours = adapter["last_layer"]["mlp"]["up_proj"]
    np.testing.assert_array_equal(ours["lora_a"], own["lora_a"])
    base = lora.encoder.variables["params"]["last_layer"]["mlp"]["up_proj"]["kernel"]
    kernel = merged["params"]["last_layer"]["mlp"]["up_proj"]["kernel"]
    update = settings.scale * ours["lora_a"] @ ours["lora_b"]
    np.testing.assert_allclose(kernel, np.asarray(base) + update, atol=1e-6)
    assert np.abs(update).max() > 0


def test_training_goes_on_from_an_adapter(
    full: Finished, lora: Finished, run, arguments, tmp_path: Path, capsys, caplog
) -> None:
    base = ("--model.scratch", "null", "--model.path", str(full.output / "model"), *LORA)
    begun = str(lora.output / "adapter")
    still = ("--optimizer.learning_rate", "0", "--train.steps", "1")
    part = ("--model.adapter", begun, "--model.adapter_share", "0.25")
    run(tmp_path / "still", *base, *NO_TABLE, *still, *part)
    assert "exported and evaluated: 0.25 of model.adapter, 0.75 of what was" in caplog.text
    first, still_there = (
        load_file(output / "adapter" / "adapter_model.safetensors")
        for output in (lora.output, tmp_path / "still")
    )
    assert first.keys() == still_there.keys()
    assert any(np.abs(value).max() > 0 for key, value in first.items() if "lora_B" in key)
    for key, value in first.items():
        np.testing.assert_array_equal(value, still_there[key])

    config, _ = parse_train_command(arguments(tmp_path / "run", *base, *still, *part))
    backbone = read_backbone_config(full.output / "model")
    layout = SimpleNamespace(backbone=SimpleNamespace(config=backbone))
    tree, _ = load_adapter(begun, backbone)
    count, further = (
        jnp.zeros((), jnp.int32),
        jax.tree.map(lambda value: jnp.asarray(value + 1), tree),
    )
    state = TrainState(count, count, further, None, ())
    mixed = export.mixed_with_start(cast(Any, SimpleNamespace(config=config, layout=layout)), state)
    for value, was in zip(*map(jax.tree.leaves, (mixed.trained, tree)), strict=True):
        np.testing.assert_allclose(value, was + 0.75, rtol=1e-6)

    for flags, why in (
        (("--model.adapter_share", "0.25"), "adapter_share wants model.adapter"),
        (
            ("--lora.rank", "3", "--model.adapter", begun),
            f"model.adapter {begun} has other settings than lora:\n  rank was 3, is 2",
        ),
        (
            ("--model.path", str(lora.output / "model"), "--model.adapter", begun),
            "this adapter is merged into",
        ),
        (
            ("--lora", "null", "--model.adapter", begun),
            "model.adapter is to be trained on and lora is not set",
        ),
        (("--model.adapter", "no_such"), "no_such/adapter_config.json"),
    ):
        assert why in refusal(arguments(tmp_path / "run", *base, *flags), capsys)
        assert not (tmp_path / "run").exists()


def test_a_run_writes_its_config_metrics_and_results(full: Finished, lora: Finished) -> None:
    for finished in (full, lora):
        results = json.loads((finished.output / "results.json").read_text())
        assert results == finished.results
        assert set(results["scores"]) == {"latent K=1", "latent K=2", "explicit"}
        assert set(results["scores"]["explicit"]) == {"nDCG@10", "Recall@100", "Hit@1"}
        assert results["id_counts"] == {"test": []}
        assert [line["step"] for line in metrics_of(finished.output)] == [1, 2, 3, 4]
        assert results["metrics"].items() >= metrics_of(finished.output)[-1].items()
        assert all(results["metrics"][rate] > 0 for rate in CLOCKED)
    assert full.results["trained_parameters"] == full.results["parameters"]
    assert lora.results["trained_parameters"] < lora.results["parameters"] / 2
    assert not (full.output / "adapter").exists()


def test_a_finished_run_is_not_trained_again(full: Finished, run, caplog) -> None:
    weights = (full.output / "model" / "model.safetensors").read_bytes()
    again = run(full.output)
    assert "resumed at step 4" in caplog.text
    assert again["metrics"] == full.results["metrics"]
    assert again["scores"] == full.results["scores"]
    assert (full.output / "model" / "model.safetensors").read_bytes() == weights


# --- stopping and going on ---------------------------------------------------------------------


def stop_before_batch(number: int, patch: pytest.MonkeyPatch) -> None:
    """Sends this process a SIGTERM while the batch of step `number` is fetched."""
    training_batches = setup.training_batches

    class Stopping:
        def __init__(self, batches: Any):
            self._batches = iter(batches)
            self._fetched = 0
            self.get_state = self._batches.get_state
            self.set_state = self._batches.set_state

        def __iter__(self) -> Stopping:
            return self

        def __next__(self) -> Any:
            self._fetched += 1
            if self._fetched == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return next(self._batches)

    patch.setattr(setup, "training_batches", lambda *a, **k: Stopping(training_batches(*a, **k)))


def saved_state(output: Path, step: int) -> Any:
    return ocp.StandardCheckpointer().restore(output / "checkpoints" / str(step) / "state")


@pytest.mark.parametrize(("kind", "flags"), [("full", ()), ("lora", LORA)])
def test_a_stopped_run_goes_on_bit_for_bit(kind, flags, request, run, tmp_path, caplog) -> None:
    whole: Finished = request.getfixturevalue(kind)
    output = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_before_batch(3, patch)
        with pytest.raises(SystemExit) as caught:
            run(output, *flags, *NO_EVAL)
    assert caught.value.code == 0
    assert "SIGTERM: saved at step 3 of 4" in caplog.text
    assert not (output / "model").exists()

    run(output, *flags, *NO_EVAL)
    assert "resumed at step 3" in caplog.text
    for name in ("model/model.safetensors", "model/tokenizer.json"):
        assert (output / name).read_bytes() == (whole.output / name).read_bytes(), name
    assert metrics_of(output) == metrics_of(whole.output)
    pairs = [saved_state(folder, STEPS) for folder in (output, whole.output)]
    jax.tree.map(np.testing.assert_array_equal, *pairs)


def test_lines_after_the_checkpoint_are_dropped_from_the_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_jsonl(path, [{"step": step, "loss": 0.5} for step in (10, 20, 30)])
    log = StepLog(path, logged_lines(path, 20))
    log.write({"step": 30, "loss": 0.25})
    assert [(m["step"], m["loss"]) for m in metrics_of(tmp_path)] == [
        (10, 0.5),
        (20, 0.5),
        (30, 0.25),
    ]


@pytest.fixture
def spoilt(full, tmp_path) -> tuple[str, ...]:
    """Flags of a run whose model gives NaN."""
    model = shutil.copytree(full.output / "model", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = np.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return ("--model.scratch", "null", "--model.path", str(model), "--train.log_every", "3")


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(
    spoilt, arguments, tmp_path, capsys
) -> None:
    message = refusal(arguments(tmp_path / "run", *spoilt), capsys)
    assert "step 1: " in message
    assert "loss, " in message
    assert "train.jsonl:" in message  # the rows of the batch
    assert [p for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()] == []


def test_steps_that_are_not_finite_are_skipped_and_counted_on_request(
    spoilt, run, tmp_path
) -> None:
    output = tmp_path / "run"
    run(output, *spoilt, "--train.on_nonfinite", "skip", "--data.eval", "null")
    last = metrics_of(output)[-1]
    assert (last["step"], last["skipped_steps"]) == (STEPS, STEPS)


def test_a_gradient_far_beyond_those_before_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    norms = deque[float](maxlen=10)
    for step, norm in enumerate([1e6] + [2.0, 3.0] * 5 + [75.0, 91.0, 4.0, 2500.0], 1):
        loop.warn_where_far(step, norm, norms)
    assert [record.message.partition(" of the 10 steps")[0] for record in caplog.records] == [
        "step 13: the gradient's norm is 91, 30 times the median",
        "step 15: the gradient's norm is 2,500, 833 times the median",
    ]


def test_the_norm_of_every_step_is_looked_at(run, tmp_path, monkeypatch) -> None:
    seen: dict[int, float] = {}
    monkeypatch.setattr(loop, "warn_where_far", lambda step, norm, _: seen.update({step: norm}))
    run(tmp_path / "run", "--train.log_every", "1", *NO_EVAL)
    logged = {line["step"]: line["grad_norm"] for line in metrics_of(tmp_path / "run")}
    assert seen == logged


# --- choosing a checkpoint -----------------------------------------------------------------------

CHOSEN = {1: 0.25, 2: 0.75, 3: 0.75, 4: 0.5}
EVERY_STEP = ("--train.eval_every", "1", "--train.keep_checkpoints", "1")


def score_as_chosen(
    patch: pytest.MonkeyPatch, *, first: int = 1, stop_at: int | None = None
) -> list[int]:
    """Gives the dev split the scores above, from step `first` on, and sends this process a SIGTERM
    while step `stop_at` is ranked. The list fills with the steps."""
    ranked: list[int] = []

    def score_dev(*_: Any) -> dict[str, float]:
        step = first + len(ranked)
        ranked.append(step)
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"nDCG@10": CHOSEN[step], "Recall@100": 1.0, "Hit@1": 0.0}

    patch.setattr(loop, "score_dev", score_dev)
    return ranked


def evaluations_of(output: Path) -> list[tuple[int, float]]:
    lines = (output / "evaluations.jsonl").read_text().splitlines()
    return [(line["step"], line["nDCG@10"]) for line in map(json.loads, lines)]


def checkpoints_of(output: Path) -> set[str]:
    return {path.name for path in (output / "checkpoints").iterdir() if path.name.isdigit()}


@pytest.fixture(scope="module")
def best(run, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run that is ranked after every step and exports the best."""
    output = tmp_path_factory.mktemp("best") / "run"
    with pytest.MonkeyPatch.context() as patch:
        score_as_chosen(patch)
        return finish(run, output, *EVERY_STEP, "--train.export", "best")


def test_the_best_checkpoint_is_kept_beside_the_newest(best: Finished) -> None:
    assert evaluations_of(best.output) == list(CHOSEN.items())
    assert checkpoints_of(best.output) == {"2", "4"}
    assert [line["nDCG@10"] for line in best.results["dev"]] == list(CHOSEN.values())


def test_the_best_step_is_exported_and_evaluated(best: Finished) -> None:
    assert (best.results["steps"], best.results["exported_step"]) == (4, 2)
    exported, _ = load_pretrained(best.output / "model")
    trained = {step: saved_state(best.output, step)["trained"] for step in (2, 4)}
    jax.tree.map(np.testing.assert_array_equal, exported["params"], trained[2])
    last = trained[4]["norm"]["scale"]
    assert not np.array_equal(exported["params"]["norm"]["scale"], last)
    ranked_with = best.encoder.variables["params"]["norm"]["scale"]
    np.testing.assert_array_equal(ranked_with, trained[2]["norm"]["scale"])


def test_ranking_changes_nothing_of_what_is_trained(best: Finished, full: Finished) -> None:
    assert metrics_of(best.output) == metrics_of(full.output)
    pairs = [saved_state(folder, STEPS) for folder in (best.output, full.output)]
    jax.tree.map(np.testing.assert_array_equal, *pairs)


@pytest.mark.parametrize("stop_at", [2, 4])
def test_a_run_that_is_stopped_while_it_ranks_ranks_that_step_first(
    stop_at: int, best: Finished, run, tmp_path, caplog
) -> None:
    output, flags = tmp_path / "run", (*EVERY_STEP, "--train.export", "best")
    with pytest.MonkeyPatch.context() as patch:
        ranked = score_as_chosen(patch, stop_at=stop_at)
        with pytest.raises(SystemExit) as caught:
            run(output, *flags)
    assert caught.value.code == 0
    assert "SIGTERM: stopped outside the steps" in caplog.text
    assert ranked == list(range(1, stop_at + 1))
    assert str(stop_at) in checkpoints_of(output)
    assert evaluations_of(output) == list(CHOSEN.items())[: stop_at - 1]

    with pytest.MonkeyPatch.context() as patch:
        ranked = score_as_chosen(patch, first=stop_at)
        results = run(output, *flags)
    assert f"resumed at step {stop_at}" in caplog.text
    assert ranked == list(range(stop_at, STEPS + 1))
    for name in ("evaluations.jsonl", "model/model.safetensors"):
        assert (output / name).read_bytes() == (best.output / name).read_bytes(), name
    assert metrics_of(output) == metrics_of(best.output)
    assert checkpoints_of(output) == checkpoints_of(best.output)
    assert results["scores"] == best.results["scores"]


def test_patience_ends_a_run_for_good(best: Finished, run, tmp_path, caplog) -> None:
    output, flags = tmp_path / "run", (*EVERY_STEP, *NO_TABLE, "--train.patience", "1")
    with pytest.MonkeyPatch.context() as patch:
        ranked = score_as_chosen(patch)
        results = run(output, *flags)
        # step 3 is as good as step 2, and no better
        assert evaluations_of(output) == list(CHOSEN.items())[:3]
        assert (results["steps"], results["exported_step"]) == (3, 3)
        before = (output / "model" / "model.safetensors").read_bytes()
    assert ranked == [1, 2, 3]
    with pytest.MonkeyPatch.context() as patch:
        ranked = score_as_chosen(patch, first=3)
        again = run(output, *flags)
    assert ranked == [3]  # the score of the last step is in no checkpoint
    assert "resumed at step 3" in caplog.text
    assert again["metrics"] == results["metrics"]
    assert again["compile_seconds"] == {}
    assert metrics_of(output) == metrics_of(best.output)[:3]
    assert (output / "model" / "model.safetensors").read_bytes() == before


BEST = (*EVERY_STEP, *NO_TABLE, "--train.export", "best")


@pytest.fixture
def best_again(best: Finished, tmp_path: Path, run, monkeypatch) -> Callable[[], dict[str, Any]]:
    """Gives the command of a finished run again, on the copy of its output in tmp_path / "run"."""
    shutil.copytree(best.output, tmp_path / "run")
    score_as_chosen(monkeypatch, first=STEPS)
    return lambda: run(tmp_path / "run", *BEST)


def forge(path: Path) -> None:
    lines = [{"step": step, "nDCG@10": step / 10} for step in CHOSEN]
    write_jsonl(path, lines)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [Path.unlink, forge, zero])
def test_the_scores_that_choose_are_those_of_the_checkpoints(
    best: Finished, best_again, tmp_path: Path, damage: Any
) -> None:
    damage(tmp_path / "run" / "evaluations.jsonl")
    assert best_again()["exported_step"] == 2
    assert evaluations_of(tmp_path / "run") == list(CHOSEN.items())
    weights = Path("model", "model.safetensors")
    assert (tmp_path / "run" / weights).read_bytes() == (best.output / weights).read_bytes()


def truncate_arrays(checkpoint: Path) -> None:
    for file in (checkpoint / "state" / "d").iterdir():
        os.truncate(file, file.stat().st_size // 2)


# What orbax was reading when it failed may be collected after its event loop is closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("damage", [shutil.rmtree, truncate_arrays])
def test_without_the_best_checkpoint_the_best_of_the_others_is_exported(
    best: Finished, best_again, tmp_path: Path, caplog, damage: Any
) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "2"
    damage(checkpoint)
    results = best_again()
    said = caplog.text
    assert (results["exported_step"], results["best_step"]) == (4, 2)
    assert f"{checkpoint} is damaged: " in said
    assert "step 4 is the best on dev of those that are whole. Bring the checkpoint" in said
    shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.copytree(best.output / "checkpoints" / "2", checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        score_as_chosen(patch, first=STEPS)
        assert best_again()["exported_step"] == 2


@pytest.mark.parametrize("damage", [Path.unlink, zero])
def test_the_last_metrics_outlive_their_log(
    best: Finished, best_again, tmp_path: Path, damage: Any
) -> None:
    damage(tmp_path / "run" / "metrics.jsonl")
    assert best_again()["metrics"] == best.results["metrics"]


def test_other_judgements_under_a_splits_name_are_noticed(best_again, data: Path) -> None:
    for split in ("dev", "test"):
        qrels = data / "qrels" / f"{split}.tsv"
        before = qrels.read_text()
        qrels.write_text(before.replace("q0\td0", "q0\td1"))
        try:
            with pytest.raises(CheckpointError, match=rf"fingerprint of data\.eval's {split} was"):
                best_again()
        finally:
            qrels.write_text(before)


def test_without_its_config_a_run_is_known_by_its_checkpoint(
    best: Finished, run, tmp_path: Path
) -> None:
    output = shutil.copytree(best.output, tmp_path / "run")
    (output / "config.json").unlink()
    with pytest.raises(OutputError, match=r"another config:\n  train\.patience was None, is 3"):
        run(output, *BEST, "--train.patience", "3")
    assert not (output / "config.json").exists()


def test_the_second_ranking_compiles_nothing(run, tmp_path, monkeypatch) -> None:
    compiled: list[str] = []

    def record(event: str, *_: Any, **__: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    score_dev, counts = loop.score_dev, []

    def counting(*arguments: Any) -> dict[str, float]:
        before = len(compiled)
        scores = score_dev(*arguments)
        counts.append(len(compiled) - before)
        return scores

    monkeypatch.setattr(selection, "BATCH_SIZE", 16)  # which no other run has compiled
    monkeypatch.setattr(loop, "score_dev", counting)
    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        results = run(tmp_path / "run", "--train.eval_every", "2", *NO_TABLE)
    finally:
        jax.monitoring.unregister_event_duration_listener(record)
    assert counts[0] > 0
    assert counts[1:] == [0]
    assert len(results["dev"]) == 2
    assert set(results["dev"][0]) == {"step", "nDCG@10", "Recall@100", "Hit@1"}


def test_between_rankings_one_device_keeps_no_copy_of_the_weights(
    full, arguments, tmp_path, compilations
) -> None:
    variables, retriever = load_pretrained(full.output / "model")
    config = parse_command_line(Config, "train", arguments(tmp_path))
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    encoder = trained_encoder(config, retriever, mesh, variables)
    vectors = encoder.encode_tokens([[1, 2, 3]], [2])
    copies = [weakref.ref(leaf) for leaf in jax.tree.leaves(encoder.variables)]
    del encoder
    gc.collect()
    assert {copy() for copy in copies} == {None}
    with compilations() as compiled:
        encoder = trained_encoder(config, retriever, mesh, variables)
        again = encoder.encode_tokens([[1, 2, 3]], [2])
        np.testing.assert_array_equal(again, vectors)
    assert compiled == []


def test_a_run_leaves_scalars_and_a_trace_where_it_is_asked_to(run, tmp_path) -> None:
    flags = ("--train.tensorboard", "true", "--train.profile_steps", "[4, 9]", *NO_EVAL)
    run(tmp_path / "run", *flags)
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    [trace] = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    planes = ProfileData.from_file(str(trace)).planes
    names = [event.name for plane in planes for line in plane.lines for event in line.events]
    assert any("Execute" in name for name in names)
    # Python's calls begin with a dollar; the tracer of them crashes where another thread ends
    assert not [name for name in names if name.startswith("$")]


# --- other objectives ---------------------------------------------------------------------------

FOUR_TERMS = {"latent", "explicit", "output", "trajectory"}
TERMS = {
    "documents_once": FOUR_TERMS,
    "gircse": {"contrastive", "penalty", "step_1", "step_2"},
    "latent_rl": {"latent", "reward", "entropy", "groups_without_spread", "clipped"},
    "without_colearning": FOUR_TERMS,
    "without_latent_view": FOUR_TERMS,
}
BESIDE_TERMS = {
    *("step", "loss", "grad_norm", "learning_rate", "documents", "masked_negatives"),
    *("tokens", "padding_share", "skipped_steps", "thinking_steps", *CLOCKED),
}


@pytest.mark.parametrize("name", TERMS)
def test_an_ablation_takes_a_step(name: str, full: Finished, run, tmp_path: Path) -> None:
    """Of the others, that change weights alone, test_step has which terms are left."""
    overlay = CONFIGS / "ablation" / f"{name}.yaml"
    small = ("--train.steps", "1", "--model.scratch.num_layers", "1")
    more = ["--config", str(overlay), *NO_EVAL, *small]
    # the flags above name K, which the ablations without thinking set to 1
    if "num_thinking_steps: 1" in overlay.read_text():
        more += ["--objective.num_thinking_steps", "1"]
    if name == "without_colearning":
        more += ["--objective.teacher", str(full.output / "model")]
    metrics = run(tmp_path / "run", *more)["metrics"]
    assert set(metrics) - BESIDE_TERMS == TERMS[name]
    assert np.isfinite(metrics["loss"])
    _, retriever = load_pretrained(tmp_path / "run" / "model")
    assert retriever.pooling == ("thoughts" if name == "gircse" else "prompt_and_thoughts")


@pytest.mark.parametrize("path", TRAINING_CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses(path: Path) -> None:
    if path.stem.startswith("smollm2_"):  # laid over the recipe of that name
        before = ["--config", str(path.with_name("smollm2.yaml"))]
    else:
        before = [] if "model:" in path.read_text() else ["--model.path", "a_directory"]
    parse_command_line(Config, "train", [*before, "--config", str(path)])


# --- bad input -----------------------------------------------------------------------------------


def refusal(arguments: list[str], capsys) -> str:
    """What the program says when it exits with an error."""
    with pytest.raises(SystemExit) as caught:
        program.main(arguments)
    assert caught.value.code not in (0, None)
    return f"{caught.value.code} {capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--objective.temprature", "1"), ["did you mean objective.temperature?"]),
        (("--train.seed", "soon"), ["train.seed", "soon"]),
        (("--objective.num_thinking_steps", "0"), ["objective.num_thinking_steps", "got 0"]),
        (("--config", "absent.yaml"), ["absent.yaml"]),
        (("--data.train", "absent.jsonl"), ["absent.jsonl", "no such file"]),
        (("--data.eval", "absent"), ["absent/qrels/test.tsv"]),
        (("--data.eval_split", "train"), ["train.tsv", "splits present: dev, test"]),
        (("--train.eval_every", "2", "--data.dev_split", "train"), ["train.tsv", "dev, test"]),
        (("--train.eval_every", "2", *NO_EVAL), ["train.eval_every wants data.eval"]),
        (("--model.scratch", "null", "--model.path", "absent"), ["absent"]),
        (("--model.path", "absent"), ["exactly one of model.path", "model.scratch"]),
        (("--objective.teacher", "absent"), ["absent/laser_config.json"]),
        (("--train.batch_size", "12"), ["train.batch_size 12", "8 devices"]),
        (("--mesh.fsdp", "3"), ["mesh", "8 devices"]),
        (
            ("--prompt.explicit_max_length", "4097"),
            ["prompt.explicit_max_length takes 4097 positions", "has 4096"],
        ),
        (("--prompt.query_max_length", "4"), ["prompt.query_max_length"]),
        (("--prompt.document_max_length", "4"), ["prompt.document_max_length"]),
        (("--prompt.explicit_max_length", "128"), ["prompt.explicit_max_length 128"]),
        (("--model.scratch.vocab_size", "100"), ["100"]),
    ],
)
def test_bad_settings_are_named_and_leave_nothing(
    flags, named, arguments, tmp_path, capsys
) -> None:
    message = refusal(arguments(tmp_path / "run", *flags), capsys)
    for part in named:
        assert part in message
    assert list(tmp_path.iterdir()) == []


def without(key: str) -> str:
    return json.dumps({k: v for k, v in training_row(1).items() if k != key})


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "not valid JSON"),
        ("[]", "wanted a JSON object, got list"),
        (without("reasoning_query"), "field 'reasoning_query' is missing"),
        (without("positive_passages"), "field 'positive_passages' is missing"),
        (json.dumps(training_row(1) | {"query": 3}), "'query' must be a string, got int"),
        (json.dumps(training_row(1) | {"positive_passages": []}), "'positive_passages' is empty"),
        (json.dumps(training_row(1) | {"query": " \n\t"}), "'query' is empty"),
        (
            json.dumps(training_row(1) | {"positive_passages": ["a", "\u3000 "]}),
            "item 1 of 'positive_passages' is empty",
        ),
        (b'{"query": "\xff"}', "not UTF-8"),
    ],
)
def test_a_bad_row_is_named_by_its_line(line, named, arguments, tmp_path, capsys) -> None:
    file = tmp_path / "rows.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    file.write_bytes(json.dumps(training_row(0)).encode() + b"\n" + line + b"\n")
    message = refusal(arguments(tmp_path / "run", "--data.train", str(file)), capsys)
    assert f"{file}:2: {named}" in message
    assert not (tmp_path / "run").exists()


def test_a_row_without_negatives_is_named(arguments, tmp_path, capsys) -> None:
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, [training_row(0), training_row(1) | {"negative_passages": []}])
    message = refusal(arguments(tmp_path / "run", "--data.train", str(file)), capsys)
    assert "rows.jsonl:2" in message
    assert "data.group_size" in message
    assert not (tmp_path / "run").exists()


def test_an_absent_tensorboard_is_named_before_anything_is_written(
    arguments, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    message = refusal(arguments(tmp_path / "run", "--train.tensorboard", "true"), capsys)
    assert "pip install 'laser-jax[tensorboard]'" in message
    assert list(tmp_path.iterdir()) == []


def test_a_query_without_instruction_is_named_before_training(
    data, arguments, tmp_path, capsys
) -> None:
    folder = shutil.copytree(data, tmp_path / "data")
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{n}", "text": "Where?"} for n in range(3)])
    message = refusal(arguments(tmp_path / "run", "--data.eval", str(folder)), capsys)
    assert "query q0 has no instruction" in message
    assert not (tmp_path / "run").exists()


def test_both_rankings_follow_the_rule_on_ids_and_say_so(data, arguments, tmp_path, caplog) -> None:
    folder = shutil.copytree(data, tmp_path / "data")
    for name in ("queries.jsonl", "qrels/dev.tsv", "qrels/test.tsv"):
        (folder / name).write_text((folder / name).read_text().replace("q1", "d2"))
    more = ("--data.eval", str(folder), "--train.eval_every", "2")
    parse = functools.partial(parse_command_line, Config, "train")
    config = parse(arguments(tmp_path / "run", *more))
    for dataset in setup.read_evaluation(config):
        assert dataset.exclusions()["d2"] == ("d2",)
    out = caplog.text
    for split in ("dev", "test"):
        assert f"({split}), documents with the id of their query, dropped from its ranking" in out
    config = parse(arguments(tmp_path / "run", *more, "--data.ignore_identical_ids", "false"))
    assert setup.read_evaluation(config)[1].exclusions()["d2"] == ()


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda d: truncate(d / "model.safetensors"), "model.safetensors"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
        (lambda d: (d / "tokenizer.json").unlink(), "holds no tokenizer"),
        (lambda d: (d / "chat_template.jinja").unlink(), "no chat template"),
        (lambda d: (d / "config.json").unlink(), "model/config.json"),
        (lambda d: edit_json(d / "config.json", model_type="gpt2"), "'gpt2' is not supported"),
        (lambda d: edit_json(d / "config.json", num_hidden_layers=3), "missing: model.layers.2"),
    ],
)
def test_a_bad_model_is_named(full, spoil, named, arguments, tmp_path, capsys) -> None:
    model = shutil.copytree(full.output / "model", tmp_path / "model")
    spoil(model)
    flags = ("--model.scratch", "null", "--model.path", str(model))
    message = refusal(arguments(tmp_path / "run", *flags), capsys)
    assert named in message
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_larger_than_the_embedding_is_refused(
    full, arguments, tmp_path, capsys
) -> None:
    model = shutil.copytree(full.output / "model", tmp_path / "model")
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["Danube"])
    tokenizer.save_pretrained(model)
    flags = ("--model.scratch", "null", "--model.path", str(model))
    message = refusal(arguments(tmp_path / "run", *flags), capsys)
    assert (
        f"{model}: the tokenizer has 1 token(s) without an embedding, 'Danube' = 270: the model's"
        in message
    )
    assert not (tmp_path / "run").exists()


def test_a_model_of_another_name_is_refused(full, arguments, tmp_path, capsys) -> None:
    model = ("--model.scratch", "null", "--model.path", str(full.output / "model"))
    named = ("--model.backbone", "qwen3-0.6b")
    message = refusal(arguments(tmp_path / "run", *model, *named), capsys)
    assert f"model.path {model[-1]} is no qwen3-0.6b: " in message
    assert "hidden_size is 16, not 1024" in message
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_vocabulary_is_refused(full, arguments, tmp_path, capsys) -> None:
    teacher = ("--objective.teacher", str(full.output / "model"))
    smaller = ("--model.scratch.vocab_size", "265")
    message = refusal(arguments(tmp_path / "run", *teacher, *smaller), capsys)
    assert f"objective.teacher {teacher[1]} has 270 tokens and the model 265" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompt_checksum": "0123"}, "its prompt_checksum is 0123, and the model's "),
        ({"pooling": "thoughts"}, "pools its thoughts alone (GIRCSE)"),
    ],
)
def test_a_teacher_that_reads_or_pools_otherwise_is_refused(
    full, changes, named, arguments, tmp_path, capsys
) -> None:
    teacher = shutil.copytree(full.output / "model", tmp_path / "teacher")
    edit_json(teacher / "laser_config.json", **changes)
    flags = ("--objective.teacher", str(teacher))
    message = refusal(arguments(tmp_path / "run", *flags), capsys)
    assert f"objective.teacher {teacher} " in message
    assert named in message
    assert not (tmp_path / "run").exists()


def test_other_weights_of_the_teacher_are_refused_on_resume(
    full, run, arguments, tmp_path, capsys
) -> None:
    teacher = shutil.copytree(full.output / "model", tmp_path / "teacher")
    overlay = ("--config", str(CONFIGS / "ablation" / "without_colearning.yaml"))
    small = ("--train.steps", "1", "--model.scratch.num_layers", "1")
    flags = (*overlay, "--objective.teacher", str(teacher), *small, *NO_EVAL)
    run(tmp_path / "run", *flags)
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})
    message = refusal(arguments(tmp_path / "run", *flags), capsys)
    assert "checkpoints was trained on other inputs:\n  weights of objective.teacher was" in message


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (slice(8), "number of training rows was 10, is 8"),
        (slice(None, None, -1), "fingerprints of the training rows.0 was"),
    ],
)
def test_other_training_rows_are_refused_on_resume(
    full, rows, named, data, arguments, tmp_path, capsys
) -> None:
    output = shutil.copytree(full.output, tmp_path / "run")
    before = (data / "train.jsonl").read_bytes()
    write_jsonl(data / "train.jsonl", [training_row(n) for n in range(len(PLACES))][rows])
    try:
        message = refusal(arguments(output), capsys)
    finally:
        (data / "train.jsonl").write_bytes(before)
    assert "checkpoints was trained on other inputs:\n  " in message
    assert named in message
    assert "Bring back those that the run began with, or choose another output" in message


def test_the_output_of_another_config_is_refused_and_kept(full, arguments, capsys) -> None:
    before = {p: p.stat().st_mtime_ns for p in full.output.rglob("[!.]*")}
    message = refusal(arguments(full.output, "--optimizer.learning_rate", "1"), capsys)
    assert "another config:\n  optimizer.learning_rate was 0.0005, is 1.0" in message
    assert {p: p.stat().st_mtime_ns for p in full.output.rglob("[!.]*")} == before


def test_an_output_that_is_a_file_is_named(arguments, tmp_path, capsys) -> None:
    (tmp_path / "run").write_text("mine")
    assert str(tmp_path / "run") in refusal(arguments(tmp_path / "run"), capsys)
    assert (tmp_path / "run").read_text() == "mine"


def test_a_missing_extra_ends_with_one_line(arguments, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = refusal(
        arguments(tmp_path / "run", "--data.train", f"{tmp_path}/rows.parquet"), capsys
    )
    assert "rows.parquet: reading and writing Parquet and Arrow needs pyarrow" in message
    assert "pip install 'laser-jax[parquet]'" in message
