"""The options of programs that run a model, and limits of positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from laser_jax.config import (
    BackboneConfig,
    ConfigError,
    PromptConfig,
    RetrieverConfig,
    save_retriever_config,
)
from laser_jax.hf.directory import read_backbone_config
from laser_jax.inference.options import (
    EncoderOptions,
    SplitConfig,
    local_mesh,
    read_retriever_config,
)

QWEN = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 16,
    "vocab_size": 300,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """The config.json of a model as Hugging Face lays it out."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    return tmp_path


@pytest.fixture
def backbone(released: Path) -> BackboneConfig:
    return read_backbone_config(released)


def test_options_change_what_the_model_says_of_itself(
    released: Path, backbone: BackboneConfig
) -> None:
    save_retriever_config(RetrieverConfig(backbone, num_thinking_steps=2), released)
    own = EncoderOptions(model=str(released)).retriever_config()
    assert own == RetrieverConfig(backbone, num_thinking_steps=2)
    changed = EncoderOptions(
        model=str(released), num_thinking_steps=5, compute_dtype="bfloat16", max_length=700
    ).retriever_config()
    prompt = PromptConfig(query_max_length=700, document_max_length=700, explicit_max_length=1212)
    assert changed == RetrieverConfig(
        backbone, num_thinking_steps=5, dtype="bfloat16", prompt=prompt
    )


@pytest.mark.parametrize(
    ("preset", "positions", "limits"),
    [
        ("official", 40960, (8192, 8192, 8704)),
        ("official", 2048, (1024, 1024, 1536)),
        ("official", 1024, (512, 512, 1024)),
        ("official-bare", 40960, (512, 512, 1024)),
    ],
)
def test_a_preset_reads_as_much_as_the_released_code_and_the_model_has_room_for(
    released: Path, preset: str, positions: int, limits: tuple[int, int, int]
) -> None:
    (released / "config.json").write_text(json.dumps(QWEN | {"max_position_embeddings": positions}))
    prompt = read_retriever_config(released, preset).prompt
    found = prompt.query_max_length, prompt.document_max_length, prompt.explicit_max_length
    assert found == limits


@pytest.mark.parametrize("name", ["batch_size", "devices", "max_length", "num_thinking_steps"])
def test_options_below_one_are_refused(name: str) -> None:
    values: dict[str, Any] = {name: 0}
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
        EncoderOptions(model="x", **values)


def test_a_model_has_only_so_many_positions(released: Path, backbone: BackboneConfig) -> None:
    save_retriever_config(RetrieverConfig(backbone), released)
    with pytest.raises(ConfigError, match=r"max_length 40449.* take 40961 positions, .* has 40960"):
        EncoderOptions(model=str(released), max_length=40449).retriever_config()


def test_devices_that_are_not_there_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=f"devices is 99, and this process has {len(jax.devices())}"
    ):
        local_mesh(SplitConfig(), 99)
    assert local_mesh(SplitConfig(), 1) is None
    mesh = local_mesh(SplitConfig(), 2)
    assert mesh is not None
    assert mesh.size == 2
    split = local_mesh(SplitConfig(fsdp=2, tensor=2))
    assert split is not None
    assert dict(split.shape) == {"data": len(jax.devices()) // 4, "fsdp": 2, "tensor": 2}
    with pytest.raises(ConfigError, match="does not multiply to the 2 devices"):
        local_mesh(SplitConfig(fsdp=3), 2)
