"""The causal-LM stage: it learns, counts what it writes right, and recognises a finished run."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file

import laser_jax.train.model as model_module
from laser_jax.command_line import parse_command_line
from laser_jax.config import (
    ConfigError,
    ModelConfig,
    OptimizerConfig,
    ScratchConfig,
)
from laser_jax.data.tokenization import load_tokenizer
from laser_jax.files.claim import OutputError
from laser_jax.hf.directory import read_backbone_config
from laser_jax.hf.reading import load_params
from laser_jax.modeling.backbone import Backbone
from laser_jax.pretrain import run as program
from laser_jax.pretrain.run import PretrainConfig, exact_match, pretrain
from laser_jax.pretrain.texts import LanguageRows

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SCRATCH = ScratchConfig(
    vocab_size=270,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=32,
)


@pytest.fixture(autouse=True)
def _optax_promotes() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):  # optax takes a float to an integer power
        yield


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    folder = tmp_path_factory.mktemp("pretrain")
    reasoning = {"prompt": "Find", "query": "Where is Ulm?", "reasoning": "In the south."}
    texts = write_jsonl(folder / "lm.jsonl", [{"text": "Ulm is south of Kiel."}, reasoning])
    write_jsonl(folder / "corpus.jsonl", [{"_id": "d", "text": "south"}])
    query = {"_id": "q", "text": "Where is Ulm?", "instruction": "Find"}
    write_jsonl(folder / "queries.jsonl", [query | {"reasoning": "In the south."}])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    return PretrainConfig(
        model=ModelConfig(scratch=SCRATCH),
        texts=str(texts),
        eval=str(folder),
        output=str(folder / "backbone"),
        optimizer=OptimizerConfig(learning_rate=3e-2),
        steps=60,
        batch_size=2,
        row_length=96,
        seed=1,
    )


@pytest.fixture(scope="module")
def report(config: PretrainConfig) -> dict[str, Any]:
    with jax.numpy_dtype_promotion("standard"):
        return pretrain(config)


# --- a run -------------------------------------------------------------------------------------


def test_the_loss_falls_until_the_reasoning_is_exact_match(report) -> None:
    assert report["loss"] < 0.2 * math.log(SCRATCH.vocab_size)
    assert report["exact_match"] == 1.0


def test_the_backbone_is_a_hugging_face_directory_with_tokenizer(config, report) -> None:
    backbone = read_backbone_config(config.output)
    params = load_params(config.output, backbone, dtype=np.float32)
    assert sum(a.size for a in jax.tree.leaves(params)) == report["parameters"]
    assert len(load_tokenizer(config.output)) == backbone.vocab_size


def test_a_finished_run_is_recognised_and_not_repeated(config, report, caplog) -> None:
    before = {p: p.stat().st_mtime_ns for p in Path(config.output).rglob("*")}
    caplog.set_level("INFO", logger="laser_jax")
    assert pretrain(config) == report
    assert "already trained" in caplog.text
    assert {p: p.stat().st_mtime_ns for p in Path(config.output).rglob("*")} == before


def test_settings_that_an_older_release_did_not_have_count_as_their_defaults(
    config, report
) -> None:
    file = Path(config.output) / "pretrain.json"
    written = file.read_text()
    older = json.loads(written)
    del older["config"]["model"]["remat"], older["texts_sha256"]
    file.write_text(json.dumps(older))
    try:
        assert pretrain(config) == older
    finally:
        file.write_text(written)


def test_the_output_of_other_texts_is_refused(config, report) -> None:
    file = Path(config.texts)
    written = file.read_text()
    file.write_text(written + written.splitlines()[0] + "\n")
    try:
        with pytest.raises(OutputError, match=r"another config:\n  texts_sha256 was '\w{64}', is"):
            pretrain(config)
    finally:
        file.write_text(written)


def test_the_output_of_another_config_is_refused(config, report) -> None:
    with pytest.raises(OutputError, match=r"another config:\n  seed was 1, is 2"):
        pretrain(dataclasses.replace(config, seed=2))


def test_the_output_may_be_spelled_otherwise(config, report) -> None:
    folder = Path(config.output)
    assert (
        pretrain(dataclasses.replace(config, output=f"{folder.parent}/./{folder.name}/")) == report
    )


@pytest.mark.parametrize("text", ["", "\0\0", "[]", "{}", '{"config": {}, "loss": null}'])
def test_a_damaged_report_is_no_finished_run(config, tmp_path, caplog, monkeypatch, text) -> None:
    monkeypatch.setattr(program, "read_language_rows", lambda _: pytest.exit("trains"))
    (tmp_path / "pretrain.json").write_text(text)
    with pytest.raises(pytest.exit.Exception, match="trains"):
        pretrain(dataclasses.replace(config, output=str(tmp_path)))
    assert "pretrain.json is damaged and counts as absent" in caplog.text


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"half")])
def test_a_finished_run_whose_weights_are_lost_is_trained_again(
    config, report, tmp_path, caplog, monkeypatch, damage
) -> None:
    output = shutil.copytree(config.output, tmp_path / "run")
    moved = dataclasses.replace(config, output=str(output))
    assert pretrain(moved) == report
    damage(output / "model.safetensors")
    monkeypatch.setattr(program, "read_language_rows", lambda _: pytest.exit("trains"))
    with pytest.raises(pytest.exit.Exception, match="trains"):
        pretrain(moved)
    assert "The backbone is trained again" in caplog.text


def test_a_backbone_of_nan_is_no_finished_run(config, report, tmp_path) -> None:
    spoilt = json.dumps(report | {"loss": math.nan})
    (tmp_path / "pretrain.json").write_text(spoilt)
    with pytest.raises(ConfigError, match="holds a backbone whose loss is nan"):
        pretrain(dataclasses.replace(config, output=str(tmp_path)))


@pytest.mark.parametrize(("every", "step"), [(2, 4), (99, 5)])
def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_nothing(
    config, tmp_path, monkeypatch, every, step
) -> None:
    monkeypatch.setattr(program, "_FINITE_EVERY", every)
    diverging = dataclasses.replace(
        config,
        eval=None,
        output=str(tmp_path / "out"),
        optimizer=OptimizerConfig(learning_rate=1e30, warmup_ratio=0),
        steps=5,
    )
    with pytest.raises(
        program.PretrainingError, match=rf"step {step}: .* optimizer\.learning_rate"
    ):
        pretrain(diverging)
    assert not (tmp_path / "out").exists()


# --- what is written right ---------------------------------------------------------------------


def test_a_row_is_right_when_all_that_counts_is_what_greedy_decoding_writes() -> None:
    backbone = Backbone(SCRATCH.backbone(40))
    variables = nn.meta.unbox(
        jax.jit(backbone.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    )
    start, length = 3, 6
    ids_BT = np.zeros((5, length), np.int32)
    ids_BT[:, :start] = 7 * np.arange(5)[:, None] + np.arange(start)[None, :]
    likeliest = jax.jit(lambda ids_BT: backbone.apply(variables, ids_BT).argmax(-1))
    for t in range(start, length):
        ids_BT[:, t] = likeliest(ids_BT)[:, t - 1]
    predict_BT = np.tile(np.arange(length) >= start, (5, 1))

    def share(ids_BT: np.ndarray) -> float:
        return exact_match(backbone, variables, LanguageRows(ids_BT, predict_BT), 2)

    assert share(ids_BT) == 1.0
    ids_BT[1, -1] = (ids_BT[1, -1] + 1) % 40  # one wrong token, the last
    assert share(ids_BT) == 0.8
    ids_BT[4, start] = (ids_BT[4, start] + 1) % 40  # in the batch that is filled up
    assert share(ids_BT) == 0.6
    predict_BT[1, -1] = False  # not counted any more
    assert share(ids_BT) == 0.8


def test_a_batch_in_which_nothing_is_predicted_loses_nothing(monkeypatch) -> None:
    logits = jnp.zeros((1, 3, 5))
    monkeypatch.setattr(program, "_predictions", lambda _, p, rows: (logits * p, *rows))
    rows: Any = (jnp.zeros((1, 3), jnp.int32), jnp.zeros((1, 3), bool))
    loss, gradient = jax.value_and_grad(lambda p: program._loss(None, p, rows))(1.0)  # pyright: ignore
    assert (loss, gradient) == (0, 0)


# --- order and bad input -----------------------------------------------------------------------


def test_every_epoch_has_every_row_once() -> None:
    rows = LanguageRows(np.arange(5)[:, None], np.ones((5, 1), bool))
    batches = program._batches(rows, 2, seed=0)
    drawn = [int(i) for _ in range(5) for i in next(batches).ids_BT[:, 0]]
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == list(range(5))
    assert drawn[:5] != drawn[5:]


def test_the_embedded_worlds_config_parses() -> None:
    parse_command_line(PretrainConfig, "p", ["--config", str(CONFIGS / "world_pretrain.yaml")])


def test_an_evaluation_without_reasonings_is_refused_before_training(config, tmp_path) -> None:
    folder = shutil.copytree(config.eval, tmp_path / "data")
    write_jsonl(folder / "queries.jsonl", [{"_id": "q", "text": "Where is Ulm?"}])
    other = dataclasses.replace(config, eval=str(folder), output=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"eval: no dev query .* carries a reasoning"):
        pretrain(other)
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_name_is_refused(config, report, tmp_path) -> None:
    named = ModelConfig(path=config.output, backbone="qwen3-8b")
    with pytest.raises(ConfigError, match=r"backbone is no qwen3-8b: "):
        pretrain(dataclasses.replace(config, model=named, output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_every_setting_of_the_model_counts(config, report, tmp_path, monkeypatch) -> None:
    """A hub id is resolved, the weights are stored in their dtype, the layers run as asked."""
    hub, loss, trained = {"mine/tiny": Path(config.output)}, program._loss, []

    def recorded(backbone: Backbone, *args: Any) -> jax.Array:
        trained.append(backbone)
        return loss(backbone, *args)

    monkeypatch.setattr(model_module, "model_directory", hub.__getitem__)
    monkeypatch.setattr(program, "_loss", recorded)
    asked = {"remat": "full", "attention": "xla"}
    model = ModelConfig(path="mine/tiny", param_dtype="bfloat16", **asked)
    output = tmp_path / "out"
    pretrain(dataclasses.replace(config, model=model, output=str(output), eval=None, steps=1))
    assert [{name: getattr(each, name) for name in asked} for each in trained] == [asked]
    stored = {a.dtype.name for a in load_file(output / "model.safetensors").values()}
    assert stored == {"bfloat16"}


def test_a_tokenizer_that_is_larger_than_the_embedding_is_refused(config, report, tmp_path) -> None:
    model = shutil.copytree(config.output, tmp_path / "model")
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["Danube"])
    tokenizer.save_pretrained(model)
    path = ModelConfig(path=str(model))
    with pytest.raises(ConfigError, match=rf"{model}: the tokenizer has \d+ token\(s\) without"):
        pretrain(dataclasses.replace(config, model=path, output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--texts", "absent.jsonl"), "absent.jsonl: no such file"),
        (("--row_length", "8"), "row_length 8"),
        (("--eval", "absent"), "absent/qrels"),
        (("--model.scratch", "null", "--model.path", "absent"), "absent"),
        (("--steps", "0"), "steps must be at least 1"),
        (("--model.attention", "splash"), "model.attention: splash cannot run here"),
        (
            ("--row_length", "64", "--model.scratch.max_position_embeddings", "63"),
            "row_length takes 64 positions, and the model has 63",
        ),
    ],
)
def test_bad_settings_are_named_and_leave_nothing(config, flags, named, tmp_path, capsys) -> None:
    arguments = ["--config", str(CONFIGS / "world_pretrain.yaml"), "--texts", config.texts]
    output = ["--output", str(tmp_path / "out"), "--steps", "1"]
    with pytest.raises(SystemExit) as caught:
        program.main([*arguments, *output, *flags])
    assert named in f"{caught.value.code} {capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()
