"""Many rows of tokens: batches, every K from one pass, compilation, a mesh, several processes."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys
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
    MeshConfig,
    RetrieverConfig,
    ScratchConfig,
    save_retriever_config,
)
from laser_jax.data.tokenization import right_pad
from laser_jax.encoder import encode
from laser_jax.hf.writing import save_params
from laser_jax.inference.batch_encoder import LatentEncoder, NotFiniteError
from laser_jax.modeling.backbone import Backbone, Variables
from laser_jax.sharding import make_mesh, shardings

SCRATCH = ScratchConfig(
    hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=24
)
CONFIG = RetrieverConfig(SCRATCH.backbone(30), num_thinking_steps=3)
ROWS = [[3, 1, 4], [9], [2, 6, 5], [3, 5, 8, 9, 7, 9, 3, 2], [8]]
EMBED = jax.jit(encode, static_argnames=("config", "num_thinking_steps"))


@pytest.fixture(scope="module")
def base() -> Variables:
    backbone = Backbone(CONFIG.backbone)
    drawn = nn.meta.unbox(jax.jit(backbone.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: rng.normal(0, 0.2, a.shape).astype(np.float32), drawn)


def embed(
    variables: Variables, rows: list[list[int]], k: int, config: RetrieverConfig = CONFIG
) -> np.ndarray:
    """The pure function over one padded batch."""
    ids_BT, lengths_B = right_pad(rows, 7, 8)
    mask_BT = np.arange(ids_BT.shape[1])[None, :] < lengths_B[:, None]
    return np.asarray(EMBED(variables, ids_BT, mask_BT, config=config, num_thinking_steps=k))


@pytest.fixture(scope="module")
def separate(base: Variables) -> np.ndarray:
    """[3, rows, D]: all rows at every K, each in a pass of its own."""
    return np.stack([embed(base, ROWS, k) for k in (1, 2, 3)])


@pytest.fixture(scope="module")
def alone(separate: np.ndarray) -> np.ndarray:
    """All rows with the config's K."""
    return separate[2]


def encoder(base: Variables, **settings: Any) -> LatentEncoder:
    settings = {"batch_size": 2, "length_multiple": 4, **settings}
    return LatentEncoder(base, CONFIG, **settings)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_vector_that_is_not_finite_is_refused_and_its_row_named(base, broken) -> None:
    params = dict(base["params"])
    table = np.array(params["embed_tokens"]["embedding"])
    table[6] = broken
    params["embed_tokens"] = {"embedding": table}
    with pytest.raises(NotFiniteError, match="the vector of row 2 is not finite") as caught:
        encoder({"params": params}).encode_tokens(ROWS, [1])
    assert caught.value.place == 2


def test_float16_is_named_as_the_usual_cause() -> None:
    assert "float16 ends at 65,504" in str(NotFiniteError("row 2", "float16"))
    assert "65,504" not in str(NotFiniteError("row 2", "bfloat16"))


def test_every_k_comes_from_one_pass_in_the_order_given(base, separate) -> None:
    vectors = encoder(base).encode_tokens(ROWS, [3, 1, 2])  # the last batch is half full
    np.testing.assert_allclose(vectors, separate[[2, 0, 1]], atol=1e-5)
    assert vectors.dtype == np.float32


def test_thoughts_alone_are_pooled_at_every_k(base) -> None:
    config = dataclasses.replace(CONFIG, pooling="thoughts")
    vectors = LatentEncoder(base, config, batch_size=5).encode_tokens(ROWS, [1, 2])
    for k, got in zip((1, 2), vectors, strict=True):
        wanted = embed(base, ROWS, k, config)
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_one_program_serves_every_batch_of_a_shape(base, compilations) -> None:
    many = encoder(base)
    with compilations() as compiled:
        many.encode_tokens(ROWS, [2])
    assert len(compiled) == 2  # rows of up to 4 and up to 8 tokens
    with compilations() as compiled:
        many.encode_tokens([*ROWS, *ROWS, [1, 2, 3]], [2])
    assert compiled == []


def test_other_weights_run_in_the_same_programs(base, alone, compilations) -> None:
    zeros = jax.tree.map(np.zeros_like, base)
    many = encoder(zeros)
    many.encode_tokens(ROWS, [3])
    with compilations() as compiled:
        vectors = encoder(base).encode_tokens(ROWS, [3])[0]
    assert compiled == []
    np.testing.assert_allclose(vectors, alone, atol=1e-5)
    np.testing.assert_array_equal(many.encode_tokens(ROWS, [3]), 0.0)


def test_the_attention_kernel_is_chosen_and_reported(base) -> None:
    many = encoder(base)
    assert (many.attention, many.attention_reason) == ("xla", "cuDNN runs on NVIDIA GPUs")
    assert encoder(base, attention="xla").attention_reason == "as asked"
    with pytest.raises(ConfigError, match="splash attention runs on TPUs"):
        encoder(base, attention="splash")


# --- shapes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ready(base: Variables) -> LatentEncoder:
    """Warmed up for rows of up to 16 tokens, in batches of 1, 3 or 8 rows, fewer of long ones."""
    made = encoder(base, batch_size=8, batch_tokens=64, length_multiple=8, short_batches=(1, 3))
    made.warm_up(16, [3])
    return made


def random_rows(count: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 30, n).tolist() for n in rng.integers(1, 17, count)]


def test_nothing_is_compiled_after_warming_up(ready, compilations) -> None:
    with compilations() as compiled:
        for count in (1, 2, 3, 4, 9, 30):
            ready.encode_tokens(random_rows(count, count), [3])
    assert compiled == []
    with compilations() as compiled:
        ready.encode_tokens([[1] * 17], [3])
    assert len(compiled) == 1


def test_a_row_has_the_same_vector_alone_and_in_any_batch_bucket_and_order(ready) -> None:
    rows = random_rows(23, 0)
    together = ready.encode_tokens(rows, [3])[0]
    one_by_one = np.concatenate([ready.encode_tokens([row], [3])[0] for row in rows])
    np.testing.assert_allclose(together, one_by_one, atol=1e-5)
    shuffled = np.random.default_rng(1).permutation(23)
    other = ready.encode_tokens([rows[i] for i in shuffled], [3])[0]
    np.testing.assert_allclose(other, together[shuffled], atol=1e-5)
    blocks = [[(i, rows[i]) for i in part] for part in np.split(shuffled, [5, 6, 20])]
    np.testing.assert_allclose(ready.encode_blocks(blocks, 23, [3])[0], together, atol=1e-5)


def test_in_bfloat16_company_moves_a_vector_by_no_more_than_its_rounding(base) -> None:
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), base)
    many = LatentEncoder(half, config, batch_size=8, length_multiple=16, short_batches=(1,))
    rows = random_rows(23, 0)
    with jax.numpy_dtype_promotion("standard"):  # jax's own attention mixes bfloat16 and float32
        together = many.encode_tokens(rows, [3])[0]
        one_by_one = np.concatenate([many.encode_tokens([row], [3])[0] for row in rows])
    assert ((together * one_by_one).sum(axis=-1)).min() > 1 - 1e-3
    np.testing.assert_allclose(together, one_by_one, atol=2e-2)


def test_another_batch_size_gives_the_same_vectors(base, alone) -> None:
    many = encoder(base).with_shapes(batch_size=5)
    assert many.buckets.batch_size == 5
    np.testing.assert_allclose(many.encode_tokens(ROWS, [3])[0], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("fixed", "per_token", "expected"),
    [(1.0, 0.125, 8), (0.0, 0.5, 0), (3.0, 0.0, 5 * 16), (-1.0, 0.25, 0)],
)
def test_what_a_batch_takes_beside_its_tokens_is_told_in_tokens(
    base, monkeypatch: pytest.MonkeyPatch, fixed: float, per_token: float, expected: int
) -> None:
    made = encoder(base).with_shapes(batch_size=5, short_batches=(1,), batch_tokens=1024)
    now = [0.0]

    def start(rows: list[list[int]], Ks: tuple[int, ...]) -> None:
        assert Ks == (1, 2)
        now[0] += fixed + per_token * len(rows) * 16

    monkeypatch.setattr(made, "start", start)
    monkeypatch.setattr("laser_jax.inference.batch_encoder.time.perf_counter", lambda: now[0])
    assert made.overhead(16, (1, 2)) == expected
    assert made.with_shapes(short_batches=()).overhead(16, (1, 2)) == 0


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
    assert many.buckets.sizes(8) == [{8: 8, 2: 4}[sizes[0]]]
    with jax.set_mesh(mesh):  # as in the trainer, and without
        np.testing.assert_allclose(many.encode_tokens(ROWS, [3])[0], alone, atol=1e-5)
    np.testing.assert_allclose(many.encode_tokens(ROWS, [3])[0], alone, atol=1e-5)


def test_weights_on_a_mesh_stay_as_they_lie_and_others_run_in_the_same_programs(
    base, alone, compilations
) -> None:
    mesh = make_mesh(MeshConfig(2, 2, 2))
    zeros, weights = on_mesh(jax.tree.map(np.zeros_like, base), mesh), on_mesh(base, mesh)
    many = encoder(zeros, mesh=mesh)
    many.encode_tokens(ROWS, [3])
    with jax.transfer_guard_device_to_device("disallow"), compilations() as compiled:
        other = encoder(weights, mesh=mesh)
        vectors = other.encode_tokens(ROWS, [3])[0]
    assert compiled == []
    assert other.variables is weights
    np.testing.assert_allclose(vectors, alone, atol=1e-5)


WORKER = """
import sys, jax, numpy as np, jax.numpy as jnp
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from laser_jax.config import MeshConfig
from laser_jax.inference.batch_encoder import LatentEncoder
from laser_jax.encoder import backbone_for, load_pretrained
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


def test_two_processes_both_get_the_vectors_of_one(
    base, separate, tmp_path: Path, one_device
) -> None:
    save_params(tmp_path, base, CONFIG.backbone, dtype=np.float32, lora=None)
    save_retriever_config(CONFIG, tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(i), str(tmp_path), str(ROWS)],
            stderr=subprocess.PIPE,
            env=one_device,
            text=True,
        )
        for i in range(2)
    ]
    said = [worker.communicate()[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    for i in range(2):
        vectors = np.load(tmp_path / f"{i}.npy")
        np.testing.assert_allclose(vectors, separate[[0, 2]], atol=1e-5)


def test_no_rows_give_no_vectors(base) -> None:
    vectors = encoder(base).encode_tokens([], [1, 2])
    assert vectors.shape == (2, 0, 16)
    assert vectors.dtype == np.float32


@pytest.mark.parametrize("steps", [[], [2, 0], [-1]])
def test_steps_below_one_are_refused(base, steps) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        encoder(base).encode_tokens(ROWS, steps)
