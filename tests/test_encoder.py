"""From tokens to vectors: padding, batches, every K from one pass, and what does not load."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh

from laser_jax.config import (
    ConfigError,
    LoraConfig,
    MeshConfig,
    RetrieverConfig,
    ScratchConfig,
    save_retriever_config,
)
from laser_jax.encoder import LatentEncoder, backbone_for, encode, load_pretrained, right_padded
from laser_jax.hf import save_adapter, save_params
from laser_jax.modeling.backbone import Backbone, Variables, unstack_layers
from laser_jax.sharding import make_mesh, shardings

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


# --- many rows ---------------------------------------------------------------------------------


def encoder(base: Variables, **settings: Any) -> LatentEncoder:
    settings = {"batch_size": 2, "length_multiple": 4, **settings}
    return LatentEncoder(base, CONFIG, **settings)


def test_every_k_comes_from_one_pass_in_the_order_given(base, separate) -> None:
    vectors = encoder(base).encode_tokens(ROWS, [3, 1, 2])  # the last batch is half full
    np.testing.assert_allclose(vectors, separate[[2, 0, 1]], atol=1e-5)
    assert vectors.dtype == np.float32


def test_thoughts_alone_are_pooled_at_every_k(base) -> None:
    config = dataclasses.replace(CONFIG, pooling="thoughts")
    vectors = LatentEncoder(base, config, batch_size=5).encode_tokens(ROWS, [1, 2])
    for k, got in zip((1, 2), vectors, strict=True):
        wanted = EMBED(base, *padded(8, left=False), config=config, num_thinking_steps=k)
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The programs that XLA compiles within."""
    events: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_one_program_serves_every_batch_of_a_shape(base) -> None:
    many = encoder(base)
    with compilations() as compiled:
        many.encode_tokens(ROWS, [2])
    assert len(compiled) == 2  # rows of up to 4 and up to 8 tokens
    with compilations() as compiled:
        many.encode_tokens([*ROWS, *ROWS, [1, 2, 3]], [2])
    assert compiled == []


def test_other_weights_run_in_the_same_programs(base, alone) -> None:
    zeros = jax.tree.map(np.zeros_like, base)
    many = encoder(zeros)
    many.encode_tokens(ROWS, [3])
    with compilations() as compiled:
        vectors = many.with_variables(base).encode_tokens(ROWS, [3])[0]
    assert compiled == []
    np.testing.assert_allclose(vectors, alone, atol=1e-5)
    np.testing.assert_array_equal(many.encode_tokens(ROWS, [3]), 0.0)


def test_the_attention_kernel_is_chosen_and_reported(base) -> None:
    many = encoder(base)
    assert (many.attention, many.attention_reason) == ("xla", "cuDNN runs on NVIDIA GPUs")
    assert encoder(base, attention="xla").attention_reason == "as asked"
    with pytest.raises(ConfigError, match="splash attention runs on TPUs"):
        encoder(base, attention="splash")


# --- a mesh ------------------------------------------------------------------------------------


def on_mesh(base: Variables, mesh: Mesh) -> Variables:
    """The weights as the trainer holds them: each split by its logical axes."""
    init = Backbone(CONFIG.backbone).init
    layout = shardings(jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)), mesh)
    return jax.device_put(base, layout)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_a_mesh_gives_the_vectors_of_one_device(base, alone, sizes) -> None:
    mesh = make_mesh(MeshConfig(*sizes))
    many = encoder(on_mesh(base, mesh), batch_size=3, mesh=mesh)
    assert many.batch_size == {8: 8, 2: 4}[sizes[0]]
    with jax.set_mesh(mesh):  # as in the trainer, and without
        np.testing.assert_allclose(many.encode_tokens(ROWS, [3])[0], alone, atol=1e-5)
    np.testing.assert_allclose(many.encode_tokens(ROWS, [3])[0], alone, atol=1e-5)


def test_weights_on_a_mesh_stay_as_they_lie_and_others_run_in_the_same_programs(
    base, alone
) -> None:
    mesh = make_mesh(MeshConfig(2, 2, 2))
    zeros, weights = on_mesh(jax.tree.map(np.zeros_like, base), mesh), on_mesh(base, mesh)
    many = encoder(zeros, mesh=mesh)
    many.encode_tokens(ROWS, [3])
    with jax.transfer_guard_device_to_device("disallow"), compilations() as compiled:
        other = many.with_variables(weights)
        vectors = other.encode_tokens(ROWS, [3])[0]
    assert compiled == []
    assert other._variables is weights
    np.testing.assert_allclose(vectors, alone, atol=1e-5)


WORKER = """
import sys, jax, numpy as np, jax.numpy as jnp
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from laser_jax.config import MeshConfig
from laser_jax.encoder import LatentEncoder, backbone_for, load_pretrained
from laser_jax.sharding import make_mesh, shardings
variables, config = load_pretrained(sys.argv[3])
mesh = make_mesh(MeshConfig(1, 2, 1))
ids = jnp.zeros((1, 2), jnp.int32)
init = backbone_for(config, variables).init
layout = shardings(jax.eval_shape(init, jax.random.key(0), ids), mesh)
variables = jax.tree.map(
    lambda a, s: jax.make_array_from_callback(a.shape, s, lambda index: a[index]), variables, layout
)
encoder = LatentEncoder(variables, config, batch_size=3, length_multiple=8, mesh=mesh)
rows = eval(sys.argv[4])
np.save(f"{sys.argv[3]}/{sys.argv[2]}.npy", encoder.encode_tokens(rows, [1, 3]))
"""


def test_two_processes_both_get_the_vectors_of_one(base, separate, tmp_path: Path) -> None:
    directory = export(tmp_path, base)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(i), str(directory), str(ROWS)],
            stderr=subprocess.PIPE,
            env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
            text=True,
        )
        for i in range(2)
    ]
    said = [worker.communicate()[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    for i in range(2):
        vectors = np.load(directory / f"{i}.npy")
        np.testing.assert_allclose(vectors, separate[[0, 2]], atol=1e-5)


def test_no_rows_give_no_vectors(base) -> None:
    vectors = encoder(base).encode_tokens([], [1, 2])
    assert vectors.shape == (2, 0, 16)
    assert vectors.dtype == np.float32


@pytest.mark.parametrize("steps", [[], [2, 0], [-1]])
def test_steps_below_one_are_refused(base, steps) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        encoder(base).encode_tokens(ROWS, steps)


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
