"""The latent loop gives one vector for one text, however it is padded, batched, laid out or run."""

from __future__ import annotations

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from laser_jax.batch import Tokens
from laser_jax.config import BackboneConfig, MeshConfig, Pooling, RetrieverConfig, RopeScaling
from laser_jax.encoder import encode, right_padded
from laser_jax.inference.batch_encoder import LatentEncoder
from laser_jax.losses import pool
from laser_jax.modeling.backbone import Backbone, Variables, unstack_layers
from laser_jax.modeling.packing import Rows
from laser_jax.modeling.rope import rope_at
from laser_jax.sharding import batch_sharding, make_mesh, shardings
from laser_jax.thinking import top_tokens
from laser_jax.views import latent_view

VOCAB = 88  # no other size in these models
LENGTHS = np.array([1, 11, 4, 7, 2, 9, 5, 3], np.int32)
B, T = len(LENGTHS), 11


def tiny(family: str) -> BackboneConfig:
    llama = family == "llama"
    return BackboneConfig(
        family=family,  # pyright: ignore[reportArgumentType]
        vocab_size=VOCAB,
        hidden_size=16,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        intermediate_size=24,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8) if llama else None,
        tie_word_embeddings=not llama,
        max_position_embeddings=64,
    )


@functools.cache
def random_variables(family: str) -> Variables:
    """Soft tokens far from uniform, and kernels small enough not to amplify rounding."""
    boxed = jax.eval_shape(Backbone(tiny(family)).init, jax.random.key(0), _ids())
    rng = np.random.default_rng(1)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        mean, std = {"embedding": (0, 0.5), "kernel": (0, 0.16), "scale": (1, 0.1)}[path[-1].key]
        return jnp.asarray(rng.normal(mean, std, leaf.shape), jnp.float32)

    return jax.tree.map_with_path(draw, nn.meta.unbox(boxed))


def _ids() -> np.ndarray:
    ids_BT = np.random.default_rng(0).integers(1, VOCAB, (B, T)).astype(np.int32)
    return np.where(np.arange(T) < LENGTHS[:, None], ids_BT, 0)


def right_mask() -> np.ndarray:
    return (np.arange(T) < LENGTHS[:, None]).astype(np.int32)


def to_left(rows_BT: np.ndarray) -> np.ndarray:
    return np.stack([np.roll(row, T - n) for row, n in zip(rows_BT, LENGTHS, strict=True)])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def thoughts(
    backbone: Backbone, K: int, pooling: Pooling, variables: Variables, ids_BT: Any, lengths_B: Any
) -> jax.Array:
    return latent_view(backbone, variables, Tokens(ids_BT, lengths_B), K, pooling)


def standard(K: int, pooling: Pooling = "prompt_and_thoughts", family: str = "qwen3") -> jax.Array:
    args = (random_variables(family), _ids(), LENGTHS)
    return thoughts(Backbone(tiny(family)), K, pooling, *args)


jitted_encode = jax.jit(encode, static_argnames=("config", "num_thinking_steps"))
CONFIG = RetrieverConfig(tiny("qwen3"), num_thinking_steps=3)


def assert_same(got: Any, wanted: Any) -> None:
    # un-normalised states reach 4; the entries of unit rows stay below 1
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * max(1.0, np.abs(wanted).max()))


@pytest.fixture(scope="module")
def embeddings() -> np.ndarray:
    """Right-padded, in a batch, scanned layers, one device."""
    got = jitted_encode(random_variables("qwen3"), _ids(), right_mask(), config=CONFIG)
    assert len(np.unique(np.round(got, 2), axis=0)) == B
    return np.asarray(got)


# --- the same vectors ------------------------------------------------------------------------


def test_padding_side_does_not_matter(embeddings: np.ndarray) -> None:
    variables = random_variables("qwen3")
    got = jitted_encode(variables, to_left(_ids()), to_left(right_mask()), config=CONFIG)
    assert_same(got, embeddings)


def test_tokens_of_the_padding_do_not_matter(embeddings: np.ndarray) -> None:
    garbage = np.where(right_mask() == 1, _ids(), 57)
    variables = random_variables("qwen3")
    got = jitted_encode(variables, garbage, right_mask().astype(bool), config=CONFIG)
    assert_same(got, embeddings)


@pytest.mark.parametrize("row", [0, 4])
def test_a_row_alone_equals_the_row_in_a_batch(embeddings: np.ndarray, row: int) -> None:
    ids_1T = _ids()[row : row + 1, : LENGTHS[row]]
    got = jitted_encode(random_variables("qwen3"), ids_1T, np.ones_like(ids_1T), config=CONFIG)
    assert_same(got[0], embeddings[row])


def test_unstacked_layers_equal_scanned_layers(embeddings: np.ndarray) -> None:
    variables = unstack_layers(random_variables("qwen3"))
    assert_same(jitted_encode(variables, _ids(), right_mask(), config=CONFIG), embeddings)


def test_a_batch_over_eight_devices_equals_one_device(embeddings: np.ndarray) -> None:
    mesh = make_mesh(MeshConfig())
    variables = jax.device_put(random_variables("qwen3"), NamedSharding(mesh, PartitionSpec()))
    ids, mask = jax.device_put((_ids(), right_mask()), batch_sharding(mesh))
    assert ids.sharding.shard_shape(ids.shape) == (1, T)
    with jax.set_mesh(mesh):
        got = jitted_encode(variables, ids, mask, config=CONFIG)
    assert_same(got, embeddings)


def test_parameters_over_eight_devices_equal_one_device(embeddings: np.ndarray) -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    boxed = jax.eval_shape(Backbone(tiny("qwen3")).init, jax.random.key(0), _ids())
    variables = jax.device_put(random_variables("qwen3"), shardings(boxed, mesh))
    kernel = variables["params"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16 // 2, 24 // 2)
    ids, mask = jax.device_put((_ids(), right_mask()), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        got = jitted_encode(variables, ids, mask, config=CONFIG)
    assert_same(got, embeddings)


class _Rereader(Backbone):
    """Reads a whole sequence of input embeddings, without any cache."""

    def reread(self, x_BTD: jax.Array) -> jax.Array:
        rope = rope_at(jnp.arange(x_BTD.shape[1])[None, :], self.config)
        for layer in [*self.layers, self.last_layer]:
            x_BTD, _ = layer.read(x_BTD, Rows.of(rope, None))
        return self.norm(x_BTD)


def recomputed(family: str, K: int) -> np.ndarray:
    """The prompt's state and K - 1 thoughts, rereading everything for each of them."""
    config = tiny(family)
    variables = unstack_layers(random_variables(family))
    reader = _Rereader(config, scan_layers=False)
    reread = jax.jit(lambda x_BTD: reader.apply(variables, x_BTD, method="reread"))
    table_VD = np.asarray(variables["params"]["embed_tokens"]["embedding"])
    head = variables["params"].get("lm_head", variables["params"]["embed_tokens"])
    rows, x_BSD = np.arange(B), np.zeros((B, T + K, config.hidden_size), np.float32)
    x_BSD[:, :T] = table_VD[_ids()]
    hidden = []
    for k in range(K):
        hidden.append(np.asarray(reread(x_BSD))[rows, LENGTHS - 1 + k])
        logits_BV = hidden[-1] @ np.asarray(head["embedding"]).T
        p_BV = np.exp(logits_BV - logits_BV.max(axis=-1, keepdims=True))
        x_BSD[rows, LENGTHS + k] = p_BV / p_BV.sum(axis=-1, keepdims=True) @ table_VD
    return np.stack(hidden, axis=1)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_cached_thinking_equals_rereading_everything(family: str) -> None:
    wanted_BKD = recomputed(family, 4)
    assert_same(standard(4, family=family), wanted_BKD)
    assert_same(standard(3, "thoughts", family), wanted_BKD[:, 1:])


# --- K and pooling -----------------------------------------------------------------------------


def test_one_step_is_the_state_of_the_last_token() -> None:
    h_BTD, _ = jax.jit(lambda v: Backbone(tiny("qwen3")).apply(v, _ids(), None, method="read"))(
        random_variables("qwen3")
    )
    assert_same(standard(1)[:, 0], h_BTD[np.arange(B), LENGTHS - 1])


def test_more_steps_leave_the_earlier_ones_alone() -> None:
    assert_same(standard(4)[:, :2], standard(2))


def test_thoughts_leave_the_prompt_out() -> None:
    assert_same(standard(3, "thoughts"), standard(4)[:, 1:])
    config = RetrieverConfig(tiny("qwen3"), num_thinking_steps=3, pooling="thoughts")
    got = jitted_encode(random_variables("qwen3"), _ids(), right_mask(), config=config)
    assert_same(got, pool(standard(4)[:, 1:]))


def test_thinking_changes_the_embedding() -> None:
    assert np.abs(pool(standard(3)) - pool(standard(1))).max() > 0.05


def test_embeddings_are_unit_rows_of_the_configured_number_of_steps(
    embeddings: np.ndarray,
) -> None:
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    assert embeddings.dtype == np.float32
    assert_same(embeddings, pool(standard(3)))


@pytest.mark.parametrize("K", [0, -1])
def test_fewer_than_one_step_is_refused(K: int) -> None:
    variables = random_variables("qwen3")
    with pytest.raises(ValueError, match=f"at least 1, got {K}"):
        encode(variables, _ids(), right_mask(), config=CONFIG, num_thinking_steps=K)
    encoder = LatentEncoder(variables, CONFIG)
    with pytest.raises(ValueError, match="at least 1"):
        encoder.encode_tokens([[1, 2]], [1, K])
    with pytest.raises(ValueError, match="at least 1"):
        encoder.encode_tokens([[1, 2]], [])


def test_right_padding_moves_rows_and_keeps_their_order() -> None:
    ids_BT, lengths_B = right_padded(
        jnp.asarray(to_left(_ids())), jnp.asarray(to_left(right_mask()))
    )
    np.testing.assert_array_equal(np.where(right_mask() == 1, ids_BT, 0), _ids())
    np.testing.assert_array_equal(lengths_B, LENGTHS)
    _, lengths_B = right_padded(jnp.ones((2, 3), jnp.int32), jnp.zeros((2, 3), jnp.int32))
    np.testing.assert_array_equal(lengths_B, [1, 1])


# --- looking inside ------------------------------------------------------------------------------


def test_top_tokens_are_the_likeliest_with_their_probabilities_and_entropy() -> None:
    variables, backbone = random_variables("llama"), Backbone(tiny("llama"))
    hidden_BKD = standard(3, family="llama")
    got = jax.jit(lambda v, h: top_tokens(backbone, v, h, 5))(variables, hidden_BKD)

    head_VD = np.asarray(variables["params"]["lm_head"]["embedding"], np.float64)
    logits = np.asarray(hidden_BKD, np.float64) @ head_VD.T
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    order = np.argsort(-p, axis=-1)[..., :5]
    np.testing.assert_array_equal(got.ids_BKn, order)
    np.testing.assert_allclose(
        got.probabilities_BKn, np.take_along_axis(p, order, axis=-1), atol=1e-5
    )
    np.testing.assert_allclose(got.entropy_BK, -(p * np.log(p)).sum(axis=-1), atol=1e-4)


# --- what is compiled ----------------------------------------------------------------------------


def largest_with_vocabulary(function: Any, *args: Any) -> int:
    """Elements of the largest array with a vocabulary axis in the compiled program."""
    text = jax.jit(function).lower(*args).compile().as_text()
    shapes = [list(map(int, dims.split(","))) for dims in re.findall(r"\w\[([\d,]+)\]", text)]
    return max(int(np.prod(shape)) for shape in shapes if VOCAB in shape)


def test_logits_exist_for_one_position_only() -> None:
    variables = random_variables("qwen3")
    ids_BT, mask_BT = np.tile(_ids(), (4, 3)), np.ones((4 * B, 3 * T), np.int32)
    allowed = VOCAB * max(4 * B, tiny("qwen3").hidden_size)

    def embed(variables: Variables) -> jax.Array:
        return encode(variables, ids_BT, mask_BT, config=CONFIG)

    assert largest_with_vocabulary(embed, variables) <= allowed
    gradient = jax.grad(lambda v: embed(v).sum())
    assert largest_with_vocabulary(gradient, variables) <= allowed * CONFIG.num_thinking_steps
    logits = Backbone(tiny("qwen3")).apply
    assert largest_with_vocabulary(logits, variables, ids_BT) >= mask_BT.size * VOCAB
