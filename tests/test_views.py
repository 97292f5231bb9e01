"""The two views of a query, made in one pass or in two."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser_jax.alignment import keyframe_positions
from laser_jax.batch import Batch, PackShape, Tokens
from laser_jax.config import BackboneConfig, LossWeights, ObjectiveConfig
from laser_jax.modeling.backbone import Backbone, Variables, unstack_layers
from laser_jax.step import FrozenTeacher, Views, loss_terms, read_views
from laser_jax.thinking import think
from laser_jax.views import ExplicitView, explicit_view, latent_view, read_both_views

K = 3
CONFIG = BackboneConfig(
    family="qwen3",
    vocab_size=53,
    hidden_size=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    intermediate_size=24,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    tie_word_embeddings=True,
    max_position_embeddings=64,
)
BACKBONE = Backbone(CONFIG)
QUERY_LENGTHS = np.array([2, 7, 4], np.int32)
LENGTHS = np.array([9, 8, 14], np.int32)  # the second chain of thought is empty: EOS alone follows
SEGMENT_ENDS = ([4, 7], [], [5, 6, 9, 12])
KEYFRAMES = np.stack(
    [
        keyframe_positions(ends, n - 1, K, "official")
        for ends, n in zip(SEGMENT_ENDS, LENGTHS, strict=True)
    ]
)


@functools.cache
def random_variables() -> Variables:
    """Soft tokens far from uniform, and kernels small enough not to amplify rounding."""
    boxed = jax.eval_shape(BACKBONE.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    rng = np.random.default_rng(2)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        mean, std = {"embedding": (0, 0.5), "kernel": (0, 0.16), "scale": (1, 0.1)}[path[-1].key]
        return jnp.asarray(rng.normal(mean, std, leaf.shape), jnp.float32)

    return jax.tree.map_with_path(draw, nn.meta.unbox(boxed))


def random_tokens(lengths: Any, seed: int) -> Tokens:
    width = -(-max(lengths) // 8) * 8
    ids_BT = np.random.default_rng(seed).integers(1, 53, (len(lengths), width))
    return Tokens(ids_BT.astype(np.int32), np.asarray(lengths, np.int32))


EXPLICIT = random_tokens(LENGTHS, seed=0)
QUERY = Tokens(EXPLICIT.ids_BT[:, :8], QUERY_LENGTHS)
BATCH = Batch(
    query=QUERY,
    documents=random_tokens([3, 8, 5, 6, 1, 7], seed=1),
    explicit=EXPLICIT,
    keyframes_BK=KEYFRAMES,
    contrast_BC=np.array([[1, 1, 1, 0, 1, 1], [1] * 6, [1, 0, 1, 1, 1, 1]], bool),
)


FAST = ObjectiveConfig(
    num_thinking_steps=K,
    temperature=0.1,
    output_temperature=0.1,
    trajectory_temperature=0.1,
    views="fast",
)
PARITY = dataclasses.replace(FAST, views="parity")


@jax.jit
def latent(variables: Variables, query: Tokens) -> jax.Array:
    return latent_view(BACKBONE, variables, query, K, "prompt_and_thoughts")


@jax.jit
def explicit(variables: Variables, tokens: Tokens, keyframes_BK: Any) -> ExplicitView:
    return explicit_view(BACKBONE, variables, tokens, keyframes_BK)


@jax.jit
def dual(variables: Variables, tokens: Tokens) -> tuple[jax.Array, ExplicitView]:
    prefix, view = read_both_views(BACKBONE, variables, tokens, QUERY_LENGTHS, KEYFRAMES)
    return think(BACKBONE, variables, [prefix], K, "prompt_and_thoughts")[0], view


def terms_of(
    backbone: Backbone,
    variables: Variables,
    batch: Batch,
    objective: ObjectiveConfig,
    *teacher: Any,
) -> Any:
    views = read_views(backbone, variables, batch, objective, *teacher)
    return loss_terms(views, batch.contrast_BC, objective, jnp.ones(()))


def assert_same(got: Any, wanted: Any) -> None:
    # un-normalised states reach 4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), got, wanted)


def relative_error(got: Any, wanted: Any) -> float:
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    squares = [(np.sum((a - b) ** 2), np.sum(np.square(b))) for a, b in pairs]
    return float(np.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares)))


# --- states --------------------------------------------------------------------------------------


def test_explicit_prefix_equals_latent_prefix() -> None:
    hidden_BKD, view = dual(random_variables(), EXPLICIT)
    assert_same(hidden_BKD, latent(random_variables(), QUERY))
    assert_same(view, explicit(random_variables(), EXPLICIT, KEYFRAMES))


def packed(shape: PackShape) -> Batch:
    return BATCH.replace(
        query=QUERY.replace(packed=PackShape(shape.packs, 13 if shape.packs == 1 else 7)),
        documents=BATCH.documents.replace(packed=shape),
        explicit=EXPLICIT.replace(packed=shape),
    )


def gradient_and_views(objective: ObjectiveConfig, batch: Batch) -> tuple[Any, Views]:
    @jax.jit
    def read(variables: Variables, batch: Batch) -> Any:
        def loss(variables: Variables) -> Any:
            views = read_views(BACKBONE, variables, batch, objective)
            terms = loss_terms(views, batch.contrast_BC, objective, jnp.ones(()))
            return terms["loss"], views

        return jax.grad(loss, has_aux=True)(variables)

    return read(random_variables(), batch)


@functools.cache
def padded() -> tuple[Any, Views]:
    read = jax.jit(functools.partial(read_views, BACKBONE, objective=PARITY))
    return shared(PARITY)[1]["loss"], read(random_variables(), BATCH)


@pytest.mark.parametrize(
    ("shape", "objective"), [(PackShape(1, 31), PARITY), (PackShape(3, 16), FAST)]
)
def test_rows_are_read_alike_without_their_padding(
    shape: PackShape, objective: ObjectiveConfig
) -> None:
    wanted, views = padded()
    got, packed_views = gradient_and_views(objective, packed(shape))
    assert_same(packed_views, views)
    assert relative_error(got, wanted) < 1e-5


def test_unstacked_layers_read_rows_alike_without_their_padding() -> None:
    forward = functools.partial(read_views, BACKBONE.clone(scan_layers=False), objective=FAST)
    got = jax.jit(forward)(unstack_layers(random_variables()), packed(PackShape(3, 16)))
    assert_same(got, padded()[1])


def test_thoughts_do_not_see_the_chain_of_thought() -> None:
    in_query = np.arange(EXPLICIT.ids_BT.shape[1]) < QUERY_LENGTHS[:, None]
    other = np.where(in_query, EXPLICIT.ids_BT, (EXPLICIT.ids_BT + 7) % 53)
    hidden_BKD, view = dual(random_variables(), EXPLICIT)
    other_hidden_BKD, other_view = dual(random_variables(), EXPLICIT.replace(ids_BT=other))
    np.testing.assert_array_equal(hidden_BKD, other_hidden_BKD)
    assert np.abs(view.final_BD - other_view.final_BD).max() > 0.1


def test_teacher_states_are_those_at_the_end_and_at_the_keyframes() -> None:
    view = explicit(random_variables(), EXPLICIT, KEYFRAMES)
    h_BTD, _ = jax.jit(lambda v: BACKBONE.apply(v, EXPLICIT.ids_BT, None, method="read"))(
        random_variables()
    )
    rows = np.arange(len(LENGTHS))
    assert_same(view.final_BD, h_BTD[rows, LENGTHS - 1])
    assert_same(view.keyframes_BKD, h_BTD[rows[:, None], KEYFRAMES])
    # M < K repeats the last segment; an empty chain of thought teaches by its last token
    assert_same(view.keyframes_BKD[0, 1], view.keyframes_BKD[0, 2])
    assert_same(view.keyframes_BKD[1], np.tile(view.final_BD[1], (K, 1)))


def test_explicit_padding_does_not_matter() -> None:
    behind = np.arange(EXPLICIT.ids_BT.shape[1]) >= LENGTHS[:, None]
    padded = EXPLICIT.replace(ids_BT=np.where(behind, 0, EXPLICIT.ids_BT))
    wanted = explicit(random_variables(), EXPLICIT, KEYFRAMES)
    assert_same(explicit(random_variables(), padded, KEYFRAMES), wanted)
    row = Tokens(EXPLICIT.ids_BT[:1, : LENGTHS[0]], LENGTHS[:1])
    alone = explicit(random_variables(), row, KEYFRAMES[:1])
    assert_same(alone.keyframes_BKD[0], wanted.keyframes_BKD[0])


# --- the objective -------------------------------------------------------------------------------


def values_and_gradients(objective: ObjectiveConfig, *teacher: Any) -> tuple[Any, Any]:
    """The terms by name, and the gradient of each."""

    def run(variables: Variables) -> Any:
        terms = terms_of(BACKBONE, variables, BATCH, objective, *teacher)
        return terms, terms

    @jax.jit
    def one_after_the_other(variables: Variables) -> Any:
        _, backward, terms = jax.vjp(run, variables, has_aux=True)
        each = dict(zip(terms, jnp.eye(len(terms)), strict=True))
        return jax.lax.map(lambda g: backward(g)[0], each), terms

    stacked, terms = one_after_the_other(random_variables())
    places = {name: i for i, name in enumerate(terms)}
    gradients = {name: jax.tree.map(lambda a, i=i: a[i], stacked) for name, i in places.items()}
    return terms, gradients


@functools.cache
def shared(objective: ObjectiveConfig) -> tuple[Any, Any]:
    return values_and_gradients(objective)


def test_one_pass_gives_the_loss_and_gradients_of_two() -> None:
    (fast, fast_gradients), (parity, parity_gradients) = shared(FAST), shared(PARITY)
    assert set(fast) == {"loss", "latent", "explicit", "output", "trajectory"}
    for name, term in parity.items():
        np.testing.assert_allclose(fast[name], term, rtol=1e-6, err_msg=name)
    assert relative_error(fast_gradients["loss"], parity_gradients["loss"]) < 1e-6


def test_unstacked_layers_give_the_same_terms() -> None:
    backbone = Backbone(CONFIG, scan_layers=False)
    run = jax.jit(lambda v: terms_of(backbone, v, BATCH, FAST))
    got = run(unstack_layers(random_variables()))
    for name, term in shared(FAST)[0].items():
        np.testing.assert_allclose(got[name], term, rtol=2e-5, err_msg=name)


def test_a_frozen_copy_teaches_what_the_model_itself_teaches() -> None:
    teacher = (FrozenTeacher(BACKBONE, K), random_variables())
    terms, gradients = values_and_gradients(FAST, *teacher)
    wanted_terms, wanted = shared(PARITY)
    for name, term in wanted_terms.items():
        np.testing.assert_allclose(terms[name], term, rtol=2e-6, err_msg=name)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients["explicit"]))
    # The teacher's side of the other terms is under stop_gradient when the model teaches itself.
    for name in ("latent", "output", "trajectory"):
        assert relative_error(gradients[name], wanted[name]) < 2e-6, name


def terms_under(objective: ObjectiveConfig, batch: Batch = BATCH) -> dict[str, jax.Array]:
    run = jax.jit(lambda v: terms_of(BACKBONE, v, batch, objective))
    return run(random_variables())


def test_plain_contrastive_training_reads_no_chain_of_thought() -> None:
    plain = LossWeights(explicit=0.0, output=0.0, trajectory=0.0)
    objective = dataclasses.replace(FAST, weights=plain)
    got = terms_under(objective, BATCH.replace(explicit=None, keyframes_BK=None))
    assert set(got) == {"loss", "latent"}
    wanted = shared(PARITY)[0]["latent"]
    np.testing.assert_allclose(got["loss"], wanted, rtol=2e-6)


def test_one_thinking_step_has_a_teacher_too() -> None:
    batch = BATCH.replace(keyframes_BK=KEYFRAMES[:, :1])
    got = terms_under(dataclasses.replace(FAST, num_thinking_steps=1), batch)
    assert all(np.isfinite(term) for term in got.values())
    assert {"explicit", "output", "trajectory"} < set(got)
    wanted = shared(PARITY)[0]
    # the teacher's final state is the same, but the documents no longer think
    assert got["explicit"] != pytest.approx(float(wanted["explicit"]), rel=1e-3)


def test_keyframes_teach_the_trajectory_alone() -> None:
    moved = terms_under(PARITY, BATCH.replace(keyframes_BK=KEYFRAMES[:, ::-1]))
    wanted = shared(PARITY)[0]
    for name in ("latent", "explicit", "output"):
        np.testing.assert_allclose(moved[name], wanted[name], rtol=1e-6)
    assert moved["trajectory"] != pytest.approx(float(wanted["trajectory"]), rel=1e-3)
