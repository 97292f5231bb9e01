"""What a dry run says of a run, and that it touches nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

import laser_jax.train.dry_run as module
from laser_jax.command_line import Invocation
from laser_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    LoraConfig,
    LossWeights,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    PolicyConfig,
    PromptConfig,
    RetrieverConfig,
    ScratchConfig,
    TrainConfig,
    save_retriever_config,
)
from laser_jax.data.pipeline import training_batches
from laser_jax.data.sources import open_sources
from laser_jax.data.tokenization import PromptTokenizer, load_tokenizer, train_tokenizer
from laser_jax.hf.directory import read_backbone_config
from laser_jax.train.dry_run import devices_to_compile_for, dry_run
from laser_jax.train.throughput import step_flops

REPOSITORY = Path(__file__).resolve().parents[1]
SCRATCH = ScratchConfig(
    vocab_size=270,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=24,
)
PROMPT = PromptConfig(query_max_length=48, document_max_length=64, explicit_max_length=120)
B, G, K = 8, 2, 2


@pytest.fixture(autouse=True)
def _optax_promotes() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):  # optax takes a float to an integer power
        yield


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "train.jsonl"
    with file.open("w") as lines:
        for n in range(20):
            row = {
                "query": f"Where does river {n} rise?",
                "reasoning_query": "It is long.\n\n" * (1 + n % 3),
                "prompt": "Find",
                "positive_passages": [f"River {n} rises here."],
                "negative_passages": ["There are hills. " * (1 + n % 2)],
            }
            lines.write(json.dumps(row) + "\n")
    return file


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory without weights: a dry run needs none."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["Where does river 1 rise? There are hills. It is long."], 270)
    tokenizer.save_pretrained(folder)
    values = {
        "model_type": "qwen3",
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 24,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def config(rows: str, **changes: Any) -> Config:
    settings: dict[str, Any] = {
        "model": ModelConfig(scratch=SCRATCH),
        "data": DataConfig(train=rows),
        "prompt": PROMPT,
        "objective": ObjectiveConfig(num_thinking_steps=K),
        "train": TrainConfig(batch_size=B),
        "output": "nowhere/at/all",
    }
    return Config(**(settings | changes))


HERE = Invocation(dry_run=True)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what takes the time."""
    sizes = dict.fromkeys(("peak_bytes", "argument_bytes", "temporary_bytes"), 0)
    monkeypatch.setattr(module, "_compile", lambda *_: sizes | {"compile_seconds": 0.0})


# --- a small model -----------------------------------------------------------------------------


def test_a_step_is_compiled_for_the_mesh_and_nothing_is_left_behind(
    rows: Path, directory: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    there = config(
        str(rows),
        model=ModelConfig(path=str(directory)),
        lora=LoraConfig(rank=2),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
    )
    found = dry_run(there, HERE)
    said = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []

    assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert found["device"] == "8 x cpu"
    assert found["trained_parameters"] < found["parameters"] / 2
    # the arguments are the state without its gradient, the batch, and what little is padded
    state = found["state_bytes"]
    assert state / 2 < found["argument_bytes"] < 2 * state
    assert found["peak_bytes"] >= found["argument_bytes"]
    assert found["temporary_bytes"] > 0
    for part in (
        "device      8 x cpu, mesh data 2, fsdp 2, tensor 2",
        f"model       {found['parameters']:,} parameters",
        "in the first 3 batches of the rows",
        f"compiled    {found['widest']} in ",
        "memory      ",
    ):
        assert part in said


def test_batches_are_counted_where_rows_and_tokenizer_are_there(
    rows: Path, directory: Path, uncompiled
) -> None:
    there = config(str(rows), model=ModelConfig(path=str(directory)))
    found = dry_run(there, HERE)
    tokens, pairs, padding, buckets, widths = 0.0, 0.0, 0.0, Counter(), []
    prompts = PromptTokenizer(load_tokenizer(directory), PROMPT)
    batches = training_batches(open_sources(there.data), prompts, there)
    for batch, _ in zip(batches, range(3), strict=False):  # 20 rows are 3 batches
        assert batch.explicit is not None
        lengths = [*batch.documents.lengths_B, *batch.explicit.lengths_B]
        tokens += sum(map(int, lengths)) / 3
        pairs += sum(int(n) * (int(n) + 1) / 2 for n in lengths) / 3
        padding += (1 - sum(lengths) / (batch.documents.size + batch.explicit.size)) / 3
        shape = [part.ids_BT.shape[1] for part in (batch.query, batch.documents, batch.explicit)]
        widths.append(shape)
        buckets["queries {}, documents {}, explicit {}".format(*shape)] += 1
    assert found["buckets"] == buckets
    assert found["tokens_per_step"] == round(tokens)
    assert found["padding_share"] == pytest.approx(padding, rel=1e-5)
    widest = [max(width) for width in zip(*widths, strict=True)]
    assert found["widest"] == "queries 8 x {}, documents 16 x {}, explicit 8 x {}".format(*widest)
    backbone = read_backbone_config(directory)
    flops = step_flops(there, backbone, tokens, pairs)
    assert found["flops_per_step"] == pytest.approx(flops)


LIMITS = {
    "fast": ({}, [64] * G + [120]),
    "parity": ({"objective": ObjectiveConfig(num_thinking_steps=K, views="parity")}, None),
    "latent": (
        {"objective": ObjectiveConfig(weights=LossWeights(1.0, 0.0, 0.0, 0.0, teacher=1.0))},
        [64] * G + [48],
    ),
}


@pytest.mark.parametrize("case", LIMITS)
@pytest.mark.parametrize("with_rows", [False, True])
def test_without_rows_or_tokenizer_the_prompts_limits_count(
    case: str, with_rows: bool, rows: Path, uncompiled, capsys
) -> None:
    changes, read = LIMITS[case]
    read = read or [64] * G + [120, 48]
    found = dry_run(config(str(rows) if with_rows else "absent.jsonl", **changes), HERE)
    explicit = "" if case == "latent" else ", explicit 128"  # a multiple of 32
    assert found["buckets"] == {f"queries 48, documents 64{explicit}": 1}
    padded = [128 if length == 120 else length for length in read]
    assert found["tokens_per_step"] == B * sum(padded)
    assert "at the limits of the prompts" in capsys.readouterr().out


def test_the_eos_behind_an_official_explicit_input_may_make_it_wider(uncompiled) -> None:
    official: dict[str, Any] = {"truncation": "sequence", "segmentation": "token"}
    prompt = replace(PROMPT, explicit_max_length=128, **official)
    found = dry_run(config("absent.jsonl", prompt=prompt), HERE)
    assert found["buckets"] == {"queries 48, documents 64, explicit 160": 1}


def test_a_frozen_teacher_has_no_flops_by_formula(
    directory: Path, tmp_path: Path, uncompiled, capsys
) -> None:
    save_retriever_config(RetrieverConfig(SCRATCH.backbone(SCRATCH.vocab_size)), tmp_path)
    objective = ObjectiveConfig(num_thinking_steps=K, teacher=str(tmp_path))
    found = dry_run(config("absent.jsonl", objective=objective), HERE)
    assert found["flops_per_step"] is None
    assert "FLOPs" not in capsys.readouterr().out


def test_a_step_that_reinforces_is_compiled_with_all_its_updates(capsys) -> None:
    weights = LossWeights(explicit=0.0, output=0.0, trajectory=0.0)
    policy = PolicyConfig(rollouts=2, kl=0.1, updates=2)
    objective = ObjectiveConfig("latent_rl", K, weights=weights, policy=policy)
    there = config(
        "absent.jsonl", objective=objective, mesh=MeshConfig(data=8), lora=LoraConfig(rank=2)
    )
    found = dry_run(there, HERE)
    assert found["widest"] == "queries 8 x 48, documents 16 x 64"
    assert found["temporary_bytes"] > 0
    assert found["flops_per_step"] is None
    assert "compiled    queries 8 x 48" in capsys.readouterr().out


# --- the paper's models ------------------------------------------------------------------------


def test_the_8b_model_is_compiled_as_a_command_from_its_name_alone(tmp_path: Path) -> None:
    flags = {
        "config": REPOSITORY / "configs" / "paper.yaml",
        "model.path": "Qwen/Qwen3-8B",
        "model.backbone": "qwen3-8b",
        "model.dtype": "bfloat16",
        "model.param_dtype": "bfloat16",
        "mesh.fsdp": 8,
        "data.train": "absent.jsonl",
        "prompt.query_max_length": 32,
        "prompt.document_max_length": 32,
        "prompt.explicit_max_length": 64,
        "train.batch_size": 8,
        "objective.num_thinking_steps": 1,  # compiled sooner
        "dry_run": 8,
    }
    command = [sys.executable, "-m", "laser_jax.train"]
    command += [str(part) for key, value in flags.items() for part in (f"--{key}", value)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    said = done.stdout
    assert "device      8 x cpu, mesh data 1, fsdp 8, tensor 1" in said
    total, trained = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:par|tra)", said))
    assert total - trained == 8_190_735_360
    state = float(re.search(r"state +([\d.]+) GiB a device", said)[1])  # pyright: ignore
    # The base in bfloat16; of the adapters, with Adam and the gradient 16 bytes each, the matrix of
    # every projection that faces the model's width is split, and the other lies on all devices.
    split = 36 * 7 * 64 * 4096
    expected = 2 * 8_190_735_360 / 8 + 16 * (split / 8 + trained - split)
    assert state == pytest.approx(expected / 2**30, rel=0.01)
    peak = float(re.search(r"memory +([\d.]+) GiB a device at most", said)[1])  # pyright: ignore
    assert peak > state - 4 * trained / 2**30  # the gradient is no argument


# --- what cannot be had ------------------------------------------------------------------------


def test_devices_are_asked_for_before_jax_makes_its_own() -> None:
    jax.devices()
    with pytest.raises(ConfigError, match="--dry_run 4: jax has already made its devices"):
        dry_run(config("absent.jsonl"), Invocation(dry_run="4"))


def test_what_a_run_refuses_is_refused_here(directory: Path) -> None:
    refused = {
        "train.batch_size 12": {"train": TrainConfig(batch_size=12)},
        "prompt.query_max_length": {"prompt": PromptConfig(query_max_length=5000)},
        "is no qwen3-8b: .*hidden_size is 16, not 4096": {
            "model": ModelConfig(path=str(directory), backbone="qwen3-8b")
        },
        "model.attention: cudnn": {"model": ModelConfig(scratch=SCRATCH, attention="cudnn")},
    }
    for message, changes in refused.items():
        with pytest.raises(ConfigError, match=message):
            dry_run(config("absent.jsonl", **changes), HERE)


def test_a_teacher_that_a_run_refuses_is_refused_here(tmp_path: Path) -> None:
    save_retriever_config(RetrieverConfig(SCRATCH.backbone(269)), tmp_path)
    objective = ObjectiveConfig(num_thinking_steps=K, teacher=str(tmp_path))
    with pytest.raises(ConfigError, match="has 269 tokens and the model 270"):
        dry_run(config("absent.jsonl", objective=objective), HERE)


def test_an_absent_model_without_a_name_is_named() -> None:
    with pytest.raises(ConfigError, match=r"Qwen/Qwen3-8B: no such directory.*model\.backbone"):
        dry_run(config("absent.jsonl", model=ModelConfig(path="Qwen/Qwen3-8B")), HERE)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed: this is no error"
)
def test_a_tpu_slice_wants_libtpu() -> None:
    with pytest.raises(ConfigError, match=r"--dry_run v5e:4x4: .*pip install 'laser-jax\[tpu\]'"):
        devices_to_compile_for("v5e:4x4")


@pytest.mark.parametrize("topology", ["b300:8", "h100:8"])
def test_an_unknown_device_is_answered_with_names(topology: str) -> None:
    with pytest.raises(ConfigError, match=rf"--dry_run {topology}: .*Names are such as v5e:4x4"):
        devices_to_compile_for(topology)
