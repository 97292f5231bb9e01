"""Gradients through the latent loop against central differences in float64.

float64 leaves 1e-9 of rounding in a difference quotient, so a term of the gradient that is missing
or wrong by a millionth shows. JAX's own attention has a float32 softmax and is replaced by ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laser_jax.modeling.backbone
from laser_jax.config import BackboneConfig, LoraConfig, LossWeights, ObjectiveConfig, RopeScaling
from laser_jax.data.pipeline import Batch, Tokens
from laser_jax.losses import pool
from laser_jax.modeling.attention import KeyValues, counted_attention
from laser_jax.modeling.backbone import Backbone, Variables
from laser_jax.step import FrozenTeacher, objective_terms
from laser_jax.views import latent_view

STEP = 1e-5
RTOL = 1e-6
LORA = LoraConfig(rank=2, alpha=3.0)


@pytest.fixture(autouse=True)
def _float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def attention(q_BTNH: jax.Array, kv: KeyValues, kernel: str) -> jax.Array:
        return counted_attention(q_BTNH, kv, jnp.arange(1, q_BTNH.shape[1] + 1)[None, :])

    monkeypatch.setattr(laser_jax.modeling.backbone, "causal_attention", attention)
    with jax.enable_x64(True):
        yield


def backbone_of(family: str, lora: LoraConfig | None = None) -> Backbone:
    llama = family == "llama"
    config = BackboneConfig(
        family=family,  # pyright: ignore[reportArgumentType]
        vocab_size=19,
        hidden_size=8,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        intermediate_size=12,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=RopeScaling(4.0, 1.0, 4.0, 8) if llama else None,
        tie_word_embeddings=not llama,
        max_position_embeddings=32,
    )
    return Backbone(config, lora=lora, dtype=jnp.float64, param_dtype=jnp.float64)


def random_variables(backbone: Backbone) -> Variables:
    ids = jnp.ones((1, 2), jnp.int64)
    shapes = nn.meta.unbox(jax.eval_shape(backbone.init, jax.random.key(0), ids))
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(mean, 0.4, leaf.shape))

    return jax.tree.map_with_path(draw, shapes)


def tokens(lengths: list[int], seed: int) -> Tokens:
    ids_BT = np.random.default_rng(seed).integers(1, 19, (len(lengths), max(lengths)))
    return Tokens(jnp.asarray(ids_BT), jnp.asarray(lengths))


def training_batch() -> Batch:
    query, explicit = tokens([3, 5], seed=1), tokens([7, 9], seed=2)
    width = query.ids_BT.shape[1]
    behind = jnp.arange(width)[None, :] >= query.lengths_B[:, None]
    explicit_ids_BT = explicit.ids_BT.at[:, :width].set(
        jnp.where(behind, explicit.ids_BT[:, :width], query.ids_BT)
    )
    return Batch(
        query=query,
        documents=tokens([4, 2, 6, 3], seed=3),
        explicit=explicit.replace(ids_BT=explicit_ids_BT),
        keyframes_BK=jnp.asarray([[3, 4, 5], [6, 7, 7]]),
        contrast_BC=jnp.asarray([[True, True, True, False], [True, True, True, True]]),
    )


def assert_gradient(
    function: Callable[[Any], jax.Array],
    at: Any,
    gradient: Any,
) -> None:
    """The slope along a random direction of every leaf, and the leaf's gradient along it."""
    run = jax.jit(function)
    leaves, structure = jax.tree.flatten(at)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(at)]
    slopes = jax.tree.leaves(gradient)
    rng = np.random.default_rng(4)
    for i, (name, leaf, slope) in enumerate(zip(names, leaves, slopes, strict=True)):
        assert slope.dtype == jnp.float64, name
        assert jnp.abs(slope).max() > 0, f"{name} has no gradient"
        direction = rng.normal(size=leaf.shape)
        direction /= np.linalg.norm(direction)

        def moved(step: float, i: int = i, direction: np.ndarray = direction) -> jax.Array:
            return run(
                structure.unflatten([*leaves[:i], leaves[i] + step * direction, *leaves[i + 1 :]])
            )

        wanted = (moved(STEP) - moved(-STEP)) / (2 * STEP)
        got = (slope * direction).sum()
        scale = float(jnp.linalg.norm(slope))
        np.testing.assert_allclose(got, wanted, rtol=RTOL, atol=RTOL * scale, err_msg=name)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_latent_loop(family: str) -> None:
    backbone, prompts = backbone_of(family), tokens([1, 4, 6], seed=0)
    variables = random_variables(backbone)
    weights_BD = np.random.default_rng(5).normal(size=(3, 8))

    def function(variables: Variables) -> jax.Array:
        hidden_BKD = latent_view(
            backbone, variables, prompts.ids_BT, prompts.lengths_B, 4, "prompt_and_thoughts"
        )
        return (pool(hidden_BKD) * weights_BD).sum()

    assert_gradient(function, variables, jax.jit(jax.grad(function))(variables))


@pytest.mark.parametrize(("views", "lora"), [("fast", None), ("parity", LORA)])
def test_four_term_loss(views: str, lora: LoraConfig | None) -> None:
    backbone = backbone_of("qwen3", lora)
    variables, batch = random_variables(backbone), training_batch()
    trainable = "lora" if lora else "params"
    objective = ObjectiveConfig(
        weights=LossWeights(output=2.0, trajectory=3.0),
        temperature=0.3,
        output_temperature=0.2,
        trajectory_temperature=0.25,
        views=views,  # pyright: ignore[reportArgumentType]
    )

    def terms(trained: Any, *teacher: Any) -> dict[str, jax.Array]:
        student = variables | {trainable: trained}
        return objective_terms(backbone, student, batch, objective, jnp.ones(()), *teacher)

    def with_fixed_teacher(trained: Any) -> jax.Array:
        """No gradient flows into the teacher's side of the two distillations, so differences must
        keep it where it is."""
        shared, taught = terms(trained), terms(trained, FrozenTeacher(backbone, 3), variables)
        return (
            shared["latent"]
            + shared["explicit"]
            + 2.0 * taught["output"]
            + 3.0 * taught["trajectory"]
        )

    at = variables[trainable]
    gradient = jax.jit(jax.grad(lambda trained: terms(trained)["loss"]))(at)
    assert_gradient(with_fixed_teacher, at, gradient)


def test_gircse() -> None:
    backbone, batch = backbone_of("llama"), training_batch()
    variables = random_variables(backbone)
    objective = ObjectiveConfig(method="gircse", temperature=0.3)

    def terms(variables: Variables) -> dict[str, jax.Array]:
        return objective_terms(backbone, variables, batch, objective, jnp.ones(()))

    assert terms(variables)["penalty"] > 1e-3
    gradient = jax.jit(jax.grad(lambda variables: terms(variables)["loss"]))(variables)
    assert_gradient(lambda variables: terms(variables)["loss"], variables, gradient)
