"""From tokens to vectors: padding, batches, every K from one pass, and what does not load."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from laser_jax.config import (
    LoraConfig,
    RetrieverConfig,
    ScratchConfig,
    save_retriever_config,
)
from laser_jax.encoder import (
    backbone_for,
    encode,
    load_pretrained,
    right_padded,
)
from laser_jax.hf import save_adapter, save_params
from laser_jax.modeling.backbone import Backbone, Variables, unstack_layers

SCRATCH = ScratchConfig(
    hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=24
)
CONFIG = RetrieverConfig(SCRATCH.backbone(30), num_thinking_steps=3)
LORA = LoraConfig(rank=2)
ROWS = [[3, 1, 4], [9], [2, 6, 5], [3, 5, 8, 9, 7, 9, 3, 2], [8]]
EMBED = jax.jit(encode, static_argnames=("config", "num_thinking_steps"))


@pytest.fixture(scope="module")
def variables() -> Variables:
    """Base weights and an adapter that matters."""
    backbone = Backbone(CONFIG.backbone, lora=LORA)
    drawn = nn.meta.unbox(jax.jit(backbone.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: rng.normal(0, 0.2, a.shape).astype(np.float32), drawn)


@pytest.fixture(scope="module")
def base(variables: Variables) -> Variables:
    return {"params": variables["params"]}


@pytest.fixture(scope="module")
def alone(base: Variables) -> np.ndarray:
    """Each row on its own, with the config's K."""
    return np.concatenate(
        [embed(base, np.array([row]), np.ones((1, len(row)), np.int32)) for row in ROWS]
    )


@pytest.fixture(scope="module")
def separate(base: Variables) -> np.ndarray:
    """[3, rows, D]: all rows at every K, each in a pass of its own."""
    return np.stack([embed(base, *padded(8, left=False), k) for k in (1, 2, 3)])


def embed(
    variables: Variables, ids_BT: np.ndarray, mask_BT: np.ndarray, k: int | None = None
) -> np.ndarray:
    return np.asarray(EMBED(variables, ids_BT, mask_BT, config=CONFIG, num_thinking_steps=k))


def padded(width: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """ROWS in a batch; the padding holds a valid, distracting token."""
    ids_BT, mask_BT = np.full((len(ROWS), width), 7), np.zeros((len(ROWS), width), np.int32)
    for b, row in enumerate(ROWS):
        real = slice(width - len(row), None) if left else slice(0, len(row))
        ids_BT[b, real], mask_BT[b, real] = row, 1
    return ids_BT, mask_BT


# --- the pure function -------------------------------------------------------------------------


def test_real_tokens_move_to_the_front() -> None:
    ids_BT = jnp.array([[0, 0, 5, 6], [5, 6, 0, 0], [0, 5, 6, 0], [1, 2, 3, 4]])
    mask_BT = jnp.array([[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]])
    moved_BT, lengths_B = right_padded(ids_BT, mask_BT)
    assert lengths_B.tolist() == [2, 2, 2, 4]
    rows = [ids[:n].tolist() for ids, n in zip(moved_BT, lengths_B, strict=True)]
    assert rows == [[5, 6], [5, 6], [5, 6], [1, 2, 3, 4]]


def test_a_row_without_real_tokens_counts_as_one_token() -> None:
    _, lengths_B = right_padded(jnp.ones((1, 3), jnp.int32), jnp.zeros((1, 3), jnp.bool_))
    assert lengths_B.tolist() == [1]


@pytest.mark.parametrize("left", [True, False])
def test_padding_and_company_do_not_change_a_vector(base, alone, left) -> None:
    for width in (8, 11):
        np.testing.assert_allclose(embed(base, *padded(width, left=left)), alone, atol=1e-5)


def test_vectors_are_unit_float32(base, alone) -> None:
    assert alone.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(alone, axis=-1), 1.0, rtol=1e-6)


def test_none_takes_the_configs_steps_and_less_than_one_is_refused(base, separate) -> None:
    batch = padded(8, left=False)
    np.testing.assert_allclose(embed(base, *batch), separate[2], atol=1e-6)
    with pytest.raises(ValueError, match="num_thinking_steps must be at least 1, got 0"):
        embed(base, *batch, 0)


def test_scanned_and_unstacked_layers_give_the_same_vectors(base, alone) -> None:
    unstacked = unstack_layers(base)
    assert not backbone_for(CONFIG, unstacked).scan_layers
    np.testing.assert_allclose(embed(unstacked, *padded(8, left=True)), alone, atol=1e-5)


# --- loading -----------------------------------------------------------------------------------


def export(directory: Path, variables: Variables, config: RetrieverConfig = CONFIG) -> Path:
    save_params(directory, variables, config.backbone, dtype=np.float32, lora=config.lora)
    save_retriever_config(dataclasses.replace(config, lora=None), directory)
    return directory


def test_an_exported_directory_loads_with_its_config(base, alone, tmp_path: Path) -> None:
    loaded, config = load_pretrained(export(tmp_path, base))
    assert config == CONFIG
    np.testing.assert_array_equal(
        embed(loaded, *padded(8, left=True)), embed(base, *padded(8, left=True))
    )


def test_merged_adapters_and_separate_ones_give_the_same_vectors(variables, tmp_path) -> None:
    batch = padded(8, left=False)
    separate = dataclasses.replace(CONFIG, lora=LORA)
    wanted = EMBED(variables, *batch, config=separate)
    assert np.abs(wanted - embed({"params": variables["params"]}, *batch)).max() > 1e-2
    merged, _ = load_pretrained(export(tmp_path / "merged", variables, separate))
    np.testing.assert_allclose(embed(merged, *batch), wanted, atol=1e-5)

    plain = export(tmp_path / "base", {"params": variables["params"]})
    save_adapter(
        tmp_path / "adapter", variables["lora"], LORA, CONFIG.backbone, base_model=str(plain)
    )
    loaded, _ = load_pretrained(plain, adapter=tmp_path / "adapter")
    np.testing.assert_allclose(embed(loaded, *batch), wanted, atol=1e-5)


def test_a_plain_hugging_face_directory_wants_a_config(base, tmp_path: Path) -> None:
    (export(tmp_path, base) / "laser_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"laser_config\.json is missing.*RetrieverConfig"):
        load_pretrained(tmp_path)
    loaded, config = load_pretrained(tmp_path, config=CONFIG)
    assert config is CONFIG
    assert set(loaded) == {"params"}


def test_a_config_of_another_backbone_is_refused(base, tmp_path: Path) -> None:
    other = dataclasses.replace(CONFIG.backbone, rope_theta=7.0)
    with pytest.raises(ValueError, match=r"differs from config\.json"):
        load_pretrained(export(tmp_path, base), config=RetrieverConfig(other))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "laser_config.json"])
def test_a_missing_file_is_named(base, tmp_path: Path, name) -> None:
    (export(tmp_path, base) / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_pretrained(tmp_path)


def test_a_spoilt_config_is_named(base, tmp_path: Path) -> None:
    file = export(tmp_path, base) / "laser_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pooling": "mean"}))
    with pytest.raises(ValueError, match=r"laser_config\.json: (.|\n)*mean"):
        load_pretrained(tmp_path)


def test_weights_load_in_the_configs_dtype(base, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    loaded, _ = load_pretrained(export(tmp_path, base, config))
    assert {a.dtype for a in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.bfloat16)}
