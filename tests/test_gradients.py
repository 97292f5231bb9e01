"""Gradients through the latent loop against central differences in float64.

float64 leaves 1e-9 of rounding in a difference quotient, so a term of the gradient that is missing
or wrong by a millionth shows. JAX's own attention has a float32 softmax and is replaced by ours.

Run as a program, this file prints how far the gradients of a training step in float32 are from
those in float64 (`test_no_form_of_the_backward_pass_...`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import laser_jax.modeling.backbone
from laser_jax.batch import Batch, Tokens
from laser_jax.config import (
    BackboneConfig,
    Config,
    DataConfig,
    LossWeights,
    ModelConfig,
    ObjectiveConfig,
    RopeScaling,
    ScratchConfig,
    TrainConfig,
)
from laser_jax.losses import pool
from laser_jax.modeling.attention import KeyValues, counted_attention
from laser_jax.modeling.backbone import Backbone, Variables
from laser_jax.step import (
    FrozenTeacher,
    TrainState,
    loss_terms,
    make_train_step,
    read_views,
)
from laser_jax.views import latent_view

STEP = 1e-5
RTOL = 1e-6


@pytest.fixture(autouse=True)
def _float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def attention(q_BTNH: jax.Array, kv: KeyValues, kernel: str) -> jax.Array:
        return counted_attention(q_BTNH, kv, jnp.arange(1, q_BTNH.shape[1] + 1)[None, :])

    monkeypatch.setattr(laser_jax.modeling.backbone, "causal_attention", attention)
    with jax.enable_x64(True):
        yield


def backbone_of(family: str) -> Backbone:
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
    return Backbone(config, dtype=jnp.float64, param_dtype=jnp.float64)


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
        hidden_BKD = latent_view(backbone, variables, prompts, 4, "prompt_and_thoughts")
        return (pool(hidden_BKD) * weights_BD).sum()

    assert_gradient(function, variables, jax.jit(jax.grad(function))(variables))


def test_four_term_loss() -> None:
    """In one pass; test_views has that two give the same gradient."""
    backbone = backbone_of("qwen3")
    variables, batch = random_variables(backbone), training_batch()
    objective = ObjectiveConfig(
        weights=LossWeights(output=2.0, trajectory=3.0),
        temperature=0.3,
        output_temperature=0.2,
        trajectory_temperature=0.25,
    )

    def terms(trained: Any, *teacher: Any) -> dict[str, jax.Array]:
        student = {"params": trained}
        views = read_views(backbone, student, batch, objective, *teacher)
        return loss_terms(views, batch.contrast_BC, objective, jnp.ones(()))

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

    at = variables["params"]
    gradient = jax.jit(jax.grad(lambda trained: terms(trained)["loss"]))(at)
    assert_gradient(with_fixed_teacher, at, gradient)


def test_gircse() -> None:
    backbone, batch = backbone_of("llama"), training_batch()
    variables = random_variables(backbone)
    objective = ObjectiveConfig(method="gircse", temperature=0.3)

    def loss(variables: Variables) -> tuple[jax.Array, jax.Array]:
        views = read_views(backbone, variables, batch, objective)
        terms = loss_terms(views, batch.contrast_BC, objective, jnp.ones(()))
        return terms["loss"], terms["penalty"]

    gradient, penalty = jax.jit(jax.grad(loss, has_aux=True))(variables)
    assert penalty > 1e-3
    assert_gradient(lambda variables: loss(variables)[0], variables, gradient)


# --- at the sizes of training, as XLA compiles it ------------------------------------------------

QUERIES = 4
TRAINED = ScratchConfig(
    hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, intermediate_size=64
).backbone(vocab_size=32)
WATCHED = ObjectiveConfig(
    num_thinking_steps=2, temperature=0.5, output_temperature=0.5, trajectory_temperature=0.5
)


def long_batch() -> Batch:
    """Rows of 64 tokens: XLA has other kernels for them than for short ones."""
    rng = np.random.default_rng(0)

    def rows(count: int) -> Tokens:
        ids_BT = rng.integers(1, 32, (count, 64)).astype(np.int32)
        return Tokens(ids_BT, rng.integers(32, 65, count).astype(np.int32))

    query, explicit = rows(QUERIES), rows(QUERIES)
    return Batch(
        query=Tokens(explicit.ids_BT[:, :32], query.lengths_B - 32 + 1),
        documents=rows(2 * QUERIES),
        explicit=explicit,
        keyframes_BK=np.stack([explicit.lengths_B - 8, explicit.lengths_B - 2], axis=1),
        contrast_BC=np.ones((QUERIES, 2 * QUERIES), bool),
    )


def step_gradient(params: Any, batch: Batch, layers: dict[str, Any], **train: Any) -> Any:
    """The gradient that `make_train_step` hands to its optimizer."""
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradient, *_: (jax.tree.map(jnp.zeros_like, gradient), gradient),
    )
    config = Config(
        ModelConfig(scratch=ScratchConfig()),
        DataConfig(),
        lora=None,
        objective=WATCHED,
        train=TrainConfig(batch_size=QUERIES, **train),
    )
    backbone = Backbone(TRAINED, reverse_only=True, **layers)
    step = make_train_step(backbone, config, keep, optax.constant_schedule(0.0))
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, zero, params, None, keep.init(params))
    return jax.jit(step)(state, batch, None)[0].opt_state


def watch() -> dict[str, float]:
    """The largest relative error of any leaf's gradient, by form of the backward pass."""
    batch = long_batch()
    with jax.enable_x64(True):
        wide = Backbone(TRAINED, dtype=jnp.float64, param_dtype=jnp.float64)
        exact = random_variables(wide)["params"]

        def loss(params: Any) -> jax.Array:
            views = read_views(wide, {"params": params}, batch, WATCHED)
            return loss_terms(views, batch.contrast_BC, WATCHED, jnp.ones(()))["loss"]

        wanted, exact = jax.device_get((jax.jit(jax.grad(loss))(exact), exact))

    def error(got: Any) -> float:
        errors = jax.tree.map(
            lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b)), got, wanted
        )
        return max(jax.tree.leaves(errors))

    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), exact)
    in_parts = {"micro_batch_size": QUERIES // 2}
    return {
        "whole batch": error(step_gradient(params, batch, {})),
        "gradcache": error(step_gradient(params, batch, {"remat": "dots"}, **in_parts)),
    }


def test_no_form_of_the_backward_pass_is_compiled_to_another_gradient() -> None:
    """In a process of its own, since the others compile without XLA's fusions. Only LLVM is kept
    from optimising: a Jacobian of all terms, with norms written the other way round, was off by 0.8
    and more all the same. It takes a while, since there is one program a form."""
    flags = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    errors = json.loads(done.stdout.splitlines()[-1])
    assert set(errors) == {"whole batch", "gradcache"}
    assert max(errors.values()) < 1e-4, errors


if __name__ == "__main__":
    print(json.dumps(watch()))
