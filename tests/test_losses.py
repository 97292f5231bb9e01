"""The loss terms against plain numpy, and who gets a gradient from them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser_jax.config import LossWeights, ObjectiveConfig
from laser_jax.losses import (
    ExplicitView,
    Views,
    gircse_loss,
    info_nce,
    laser_loss,
    normalize,
    pool,
    score_kl,
)

B, K, D, C = 3, 4, 5, 6
OBJECTIVE = ObjectiveConfig(
    num_thinking_steps=K,
    weights=LossWeights(latent=0.5, explicit=0.7, output=2.0, trajectory=3.0),
    temperature=0.2,
    output_temperature=0.3,
    trajectory_temperature=0.4,
)
POSITIVES = jnp.arange(B) * (C // B)
EVERYTHING = jnp.ones((B, C), bool)
ONE = jnp.ones(())


def draw(*shape: int, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def inputs() -> dict[str, jax.Array]:
    """The arrays of `laser_loss` that carry gradients, by name."""
    return {
        "hidden_BKD": draw(B, K, D, seed=0),
        "final_BD": draw(B, D, seed=1),
        "keyframes_BKD": draw(B, K, D, seed=2),
        "documents_CD": normalize(draw(C, D, seed=3)),
        "teacher_documents_CD": normalize(draw(C, D, seed=4)),
    }


compiled = jax.jit(laser_loss, static_argnames="objective")


def loss(
    arrays: dict[str, Any],
    contrast_BC: jax.Array = EVERYTHING,
    teacher_scores_BG: jax.Array | None = None,
    **changes: Any,
) -> dict[str, jax.Array]:
    fixed = {
        "positives_B": POSITIVES,
        "contrast_BC": contrast_BC,
        "objective": OBJECTIVE,
        "distillation_scale": ONE,
    }
    given = dict(arrays)
    final_BD, keyframes_BKD = given.pop("final_BD"), given.pop("keyframes_BKD")
    explicit = None if final_BD is None else ExplicitView(final_BD, keyframes_BKD)
    hidden_BKD = given.pop("hidden_BKD")
    hidden_CKD = jnp.zeros((C, K, D))
    views = Views(hidden_BKD, hidden_CKD, explicit, None, teacher_scores_BG)
    return compiled(views, **(given | fixed | changes))


def gradients(term: str, contrast_BC: jax.Array = EVERYTHING) -> dict[str, jax.Array]:
    return jax.grad(lambda arrays: loss(arrays, contrast_BC)[term])(inputs())


def np_log_softmax(scores: Any, temperature: float) -> np.ndarray:
    scaled = np.asarray(scores, np.float64) / temperature
    return scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))


def np_unit(x: Any) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def np_kl(teacher: np.ndarray, student: np.ndarray, temperature: float) -> float:
    log_p, log_q = np_log_softmax(teacher, temperature), np_log_softmax(student, temperature)
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())


def test_four_terms_equal_the_formulas() -> None:
    a = inputs()
    docs, teacher_docs = np.asarray(a["documents_CD"]), np.asarray(a["teacher_documents_CD"])
    scores = np_unit(np.asarray(a["hidden_BKD"], np.float64).mean(axis=1)) @ docs.T
    teacher = np_unit(a["final_BD"]) @ teacher_docs.T
    rows = np.arange(B)
    wanted = {
        "latent": -np_log_softmax(scores, 0.2)[rows, POSITIVES].mean(),
        "explicit": -np_log_softmax(teacher, 0.2)[rows, POSITIVES].mean(),
        "output": np_kl(teacher, scores, 0.3),
        "trajectory": np_kl(
            np_unit(a["keyframes_BKD"]) @ teacher_docs.T, np_unit(a["hidden_BKD"]) @ docs.T, 0.4
        ),
    }
    got = loss(a)
    assert set(got) == {"loss", *wanted}
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-6, err_msg=name)
    total = 0.5 * wanted["latent"] + 0.7 * wanted["explicit"]
    total += 2.0 * wanted["output"] + 3.0 * wanted["trajectory"]
    np.testing.assert_allclose(got["loss"], total, rtol=2e-6)


def test_warm_up_scales_the_two_distillations_alone() -> None:
    half, full = loss(inputs(), distillation_scale=jnp.asarray(0.5)), loss(inputs())
    for name in ("latent", "explicit", "output", "trajectory"):
        assert half[name] == full[name]
    missing = 0.5 * (2.0 * full["output"] + 3.0 * full["trajectory"])
    np.testing.assert_allclose(half["loss"], full["loss"] - missing, rtol=1e-6)


def test_a_weight_of_zero_takes_a_term_out() -> None:
    weights = LossWeights(latent=1.0, explicit=0.0, output=0.0, trajectory=0.0)
    got = loss(inputs(), objective=dataclasses.replace(OBJECTIVE, weights=weights))
    assert got["loss"] == got["latent"]


def test_without_an_explicit_view_the_contrastive_term_is_left() -> None:
    got = loss(inputs() | {"final_BD": None, "keyframes_BKD": None})
    assert set(got) == {"loss", "latent"}
    np.testing.assert_allclose(got["loss"], 0.5 * got["latent"], rtol=1e-6)


# --- scores of another teacher -------------------------------------------------------------------

G = C // B
TAUGHT = dataclasses.replace(
    OBJECTIVE,
    weights=dataclasses.replace(OBJECTIVE.weights, teacher=0.9),
    teacher_temperature=1.7,
)


def test_given_scores_are_distilled_over_the_own_passages_of_a_query() -> None:
    a, given_BG = inputs(), 3.0 * draw(B, G, seed=13)
    scores = np_unit(np.asarray(a["hidden_BKD"], np.float64).mean(axis=1))
    scores = scores @ np.asarray(a["documents_CD"]).T
    rows = []
    for b in range(B):
        log_p = np_log_softmax(given_BG[b], 1.7)
        log_q = np_log_softmax(scores[b, b * G : (b + 1) * G], 0.2)
        rows.append((np.exp(log_p) * (log_p - log_q)).sum())
    got, without = loss(a, teacher_scores_BG=given_BG, objective=TAUGHT), loss(a)
    np.testing.assert_allclose(got["teacher"], np.mean(rows), rtol=2e-6)
    np.testing.assert_allclose(got["loss"], without["loss"] + 0.9 * np.mean(rows), rtol=2e-6)
    # neither the rest of the pool nor a mask of false negatives counts
    masked = jnp.zeros((B, C), bool).at[jnp.arange(B), POSITIVES].set(True)
    again = loss(a, masked, given_BG, objective=TAUGHT)
    np.testing.assert_allclose(again["teacher"], got["teacher"], rtol=1e-6)


def test_a_row_without_given_scores_has_no_such_loss_and_no_gradient() -> None:
    a, given_BG = inputs(), draw(B, G, seed=13).at[1].set(jnp.nan)

    def teacher(arrays: dict[str, Any], given_BG: jax.Array) -> jax.Array:
        return loss(arrays, teacher_scores_BG=given_BG, objective=TAUGHT)["teacher"]

    gradient = jax.grad(teacher)(a, given_BG)
    moved = {name for name, value in gradient.items() if value.any()}
    assert moved == {"hidden_BKD", "documents_CD"}
    assert all(jnp.isfinite(value).all() for value in gradient.values())
    assert not gradient["hidden_BKD"][1].any()
    assert gradient["hidden_BKD"][0].any()
    assert teacher(a, jnp.full((B, G), jnp.nan)) == 0
    with_scores = [teacher(a, jnp.full((B, G), jnp.nan).at[b].set(given_BG[b])) for b in (0, 2)]
    np.testing.assert_allclose(teacher(a, given_BG), sum(with_scores), rtol=1e-6)


# --- documents that do not count -----------------------------------------------------------------


@pytest.mark.parametrize("removed", [1, 5])
def test_masked_document_counts_as_if_it_were_not_in_the_pool(removed: int) -> None:
    kept = np.delete(np.arange(C), removed)
    masked, a = EVERYTHING.at[:, removed].set(False), inputs()
    smaller = a | {name: a[name][kept] for name in ("documents_CD", "teacher_documents_CD")}
    positives_B = jnp.asarray([kept.tolist().index(p) for p in POSITIVES.tolist()])
    got = loss(a, masked)
    wanted = loss(smaller, EVERYTHING[:, kept], positives_B=positives_B)
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6, err_msg=name)

    def total(arrays: dict[str, Any], contrast: jax.Array, positives: jax.Array) -> jax.Array:
        return loss(arrays, contrast, positives_B=positives)["loss"]

    got_gradients = jax.grad(total)(a, masked, POSITIVES)
    gradients_without = jax.grad(total)(smaller, EVERYTHING[:, kept], positives_B)
    for name, gradient in got_gradients.items():
        if "documents" in name:
            assert not gradient[removed].any()
            gradient = gradient[kept]
        np.testing.assert_allclose(gradient, gradients_without[name], rtol=1e-4, atol=1e-6)


def test_every_query_has_its_own_mask() -> None:
    contrast_BC = jax.random.bernoulli(jax.random.key(5), 0.5, (B, C))
    contrast_BC = contrast_BC.at[jnp.arange(B), POSITIVES].set(True)
    scores_BC, teacher_BC = draw(B, C, seed=6), draw(B, C, seed=7)
    nce, kl = [], []
    for b in range(B):
        kept = np.flatnonzero(contrast_BC[b])
        log_p = np_log_softmax(scores_BC[b][kept], 0.2)
        nce.append(-log_p[kept.tolist().index(int(POSITIVES[b]))])
        kl.append(np_kl(np.asarray(teacher_BC[b])[kept], np.asarray(scores_BC[b])[kept], 0.2))
    got = info_nce(scores_BC, POSITIVES, contrast_BC, 0.2)
    np.testing.assert_allclose(got, np.mean(nce), rtol=2e-6)
    got = score_kl(teacher_BC, scores_BC, contrast_BC, 0.2)
    np.testing.assert_allclose(got, kl, rtol=2e-6)


def test_a_query_with_nothing_but_its_positive_has_no_loss_and_finite_gradients() -> None:
    alone = jnp.zeros((B, C), bool).at[jnp.arange(B), POSITIVES].set(True)
    for name, term in loss(inputs(), alone).items():
        assert term == 0, name
    for gradient in gradients("loss", alone).values():
        assert not gradient.any()


# --- who learns ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "learning"),
    [
        ("latent", {"hidden_BKD", "documents_CD"}),
        ("explicit", {"final_BD", "teacher_documents_CD"}),
        ("output", {"hidden_BKD", "documents_CD"}),
        ("trajectory", {"hidden_BKD", "documents_CD"}),
    ],
)
def test_distillation_teaches_the_student_only(term: str, learning: set[str]) -> None:
    with_gradient = {name for name, gradient in gradients(term).items() if gradient.any()}
    assert with_gradient == learning


def test_kl_is_zero_for_equal_scores_and_positive_otherwise() -> None:
    scores_BC = draw(B, C, seed=8)
    # equal up to a constant: softmax does not see it
    np.testing.assert_allclose(score_kl(scores_BC + 3.0, scores_BC, EVERYTHING, 0.3), 0, atol=1e-6)

    def mean_kl(student_BC: jax.Array) -> jax.Array:
        return score_kl(scores_BC, student_BC, EVERYTHING, 0.3).mean()

    np.testing.assert_allclose(jax.grad(mean_kl)(scores_BC), 0, atol=1e-6)
    assert mean_kl(draw(B, C, seed=9)) > 0.1


def test_a_student_equal_to_its_teacher_has_nothing_to_distil() -> None:
    a = inputs()
    hidden_BKD = jnp.broadcast_to(a["final_BD"][:, None], (B, K, D))
    same = {"hidden_BKD": hidden_BKD, "keyframes_BKD": 2.0 * hidden_BKD}
    got = loss(a | same | {"teacher_documents_CD": a["documents_CD"]})
    assert got["output"] == pytest.approx(0, abs=1e-6)
    assert got["trajectory"] == pytest.approx(0, abs=1e-6)
    assert got["latent"] == pytest.approx(float(got["explicit"]), rel=1e-6)


def test_keyframe_i_teaches_step_i() -> None:
    a = inputs() | {"keyframes_BKD": inputs()["hidden_BKD"]}
    a["teacher_documents_CD"] = a["documents_CD"]
    assert loss(a)["trajectory"] == pytest.approx(0, abs=1e-6)
    assert loss(a | {"keyframes_BKD": a["keyframes_BKD"][:, ::-1]})["trajectory"] > 0.1


def test_pooling_normalises_the_mean_of_raw_states() -> None:
    hidden_BKD = draw(B, K, D, seed=10) * jnp.array([1.0, 10.0, 0.1, 3.0])[None, :, None]
    mean_BD = np.asarray(hidden_BKD, np.float64).mean(axis=1)
    np.testing.assert_allclose(pool(hidden_BKD), np_unit(mean_BD), atol=1e-6)


def test_a_zero_vector_stays_zero_and_has_a_finite_gradient() -> None:
    assert not normalize(jnp.zeros((2, D))).any()
    assert jnp.isfinite(jax.grad(lambda x: normalize(x).sum())(jnp.zeros((2, D)))).all()


# --- GIRCSE --------------------------------------------------------------------------------------


def gircse(hidden_BKD: jax.Array, contrast_BC: jax.Array = EVERYTHING) -> dict[str, jax.Array]:
    documents_CKD = draw(C, hidden_BKD.shape[1], D, seed=11)
    return jax.jit(gircse_loss)(hidden_BKD, documents_CKD, POSITIVES, contrast_BC, 0.2)


def test_gircse_averages_the_losses_of_the_first_thoughts() -> None:
    hidden_BKD, documents_CKD = draw(B, K, D, seed=0), draw(C, K, D, seed=11)
    got = gircse(hidden_BKD)
    steps = []
    for k in range(1, K + 1):
        query, docs = (
            np_unit(np.asarray(x, np.float64)[:, :k].mean(axis=1))
            for x in (hidden_BKD, documents_CKD)
        )
        steps.append(-np_log_softmax(query @ docs.T, 0.2)[np.arange(B), POSITIVES].mean())
        np.testing.assert_allclose(got[f"step_{k}"], steps[-1], rtol=2e-6)
    penalty = np.maximum(np.diff(np.log(steps)), 0).mean()
    assert penalty > 0.01
    np.testing.assert_allclose(got["contrastive"], np.mean(steps), rtol=2e-6)
    np.testing.assert_allclose(got["penalty"], penalty, rtol=1e-4)
    np.testing.assert_allclose(got["loss"], np.mean(steps) + penalty, rtol=2e-6)


def test_gircse_does_not_punish_thoughts_that_help() -> None:
    documents_CKD = jnp.repeat(draw(C, 1, D, seed=12), K, axis=1)
    target_BD = documents_CKD[POSITIVES, 0]
    closer = jnp.arange(K, dtype=jnp.float32)[
        None, :, None
    ]  # every thought adds more of the positive
    hidden_BKD = draw(B, 1, D, seed=13) + closer * target_BD[:, None]
    got = jax.jit(gircse_loss)(hidden_BKD, documents_CKD, POSITIVES, EVERYTHING, 0.2)
    steps = [float(got[f"step_{k}"]) for k in range(1, K + 1)]
    assert steps == sorted(steps, reverse=True)
    assert got["penalty"] == 0


def test_gircse_with_one_thought_has_no_penalty() -> None:
    got = gircse(draw(B, 1, D, seed=0))
    assert got["penalty"] == 0
    assert got["loss"] == got["contrastive"] == got["step_1"]


def test_gircse_leaves_masked_documents_out() -> None:
    masked = EVERYTHING.at[:, 1].set(False)
    hidden_BKD = draw(B, K, D, seed=0)
    assert gircse(hidden_BKD, masked)["loss"] != gircse(hidden_BKD)["loss"]

    def total(documents_CKD: jax.Array) -> jax.Array:
        return gircse_loss(hidden_BKD, documents_CKD, POSITIVES, masked, 0.2)["loss"]

    gradient_CKD = jax.grad(jax.jit(total))(draw(C, K, D, seed=11))
    assert not gradient_CKD[1].any()
    assert gradient_CKD[3].any()
