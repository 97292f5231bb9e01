"""What drawn thoughts earn, and the loss that reinforces them, against plain numpy."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import EVERYTHING, POSITIVES, B, C, D, K, draw, inputs, np_log_softmax, np_unit

from laser_jax.config import LossWeights, ObjectiveConfig, PolicyConfig
from laser_jax.losses import info_nce
from laser_jax.reinforcement.rewards import (
    Draws,
    Rollouts,
    advantages,
    clipped_objective,
    judge,
    policy_loss,
    positive_log_p,
    positive_rank,
)


def reinforced(reward: Any) -> ObjectiveConfig:
    weights = LossWeights(explicit=0.0, output=0.0, trajectory=0.0)
    policy = PolicyConfig(reward=reward)
    return ObjectiveConfig(method="latent_rl", weights=weights, temperature=0.2, policy=policy)


def test_rank_and_loss_of_a_rollout_equal_the_formulas() -> None:
    scores_BRC = draw(B, 2, C, seed=20)
    contrast_BC = EVERYTHING.at[1, 4].set(False).at[2, 0].set(False)
    rank_BR = positive_rank(scores_BRC, POSITIVES, contrast_BC)
    log_p_BR = positive_log_p(scores_BRC, POSITIVES, contrast_BC, 0.2)
    for b, positive in enumerate(np.asarray(POSITIVES)):
        for r in range(2):
            seen = np.asarray(scores_BRC)[b, r][np.asarray(contrast_BC)[b]]
            own = np.asarray(scores_BRC)[b, r, positive]
            assert float(rank_BR[b, r]) == 1 + (seen > own).sum()
            wanted = np.log(np.exp(own / 0.2) / np.exp(seen / 0.2).sum())
            np.testing.assert_allclose(log_p_BR[b, r], wanted, rtol=1e-4)
    losses = [info_nce(scores_BRC[:, r], POSITIVES, contrast_BC, 0.2) for r in range(2)]
    np.testing.assert_allclose(-log_p_BR.mean(axis=0), losses, rtol=1e-5)


def test_of_equal_scores_the_positive_comes_last() -> None:
    ranks = positive_rank(jnp.zeros((B, 1, C)), POSITIVES, EVERYTHING.at[0, 5].set(False))
    assert ranks[:, 0].tolist() == [C - 1, C, C]


@pytest.mark.parametrize(
    ("reward", "formula"),
    [
        ("reciprocal_rank", lambda rank, _: 1 / rank),
        ("ndcg", lambda rank, _: 1 / np.log2(1 + rank)),
        ("info_nce", lambda _, log_p: log_p),
    ],
)
def test_a_rollout_is_judged_by_its_pooled_states(reward: Any, formula: Any) -> None:
    hidden, documents_CD = draw(B, 4, K, D, seed=21), inputs()["documents_CD"]
    none = jnp.zeros((B, 4, K - 1))
    rollouts = Rollouts(hidden, none[..., None].astype(int), none, none, None, None, None)
    objective = reinforced(reward)
    judged_by = jax.jit(judge, static_argnums=4)
    draws, terms = judged_by(rollouts, documents_CD, POSITIVES, EVERYTHING, objective)
    scores = np_unit(np.asarray(hidden, np.float64).mean(axis=2)) @ np.asarray(documents_CD).T
    own = np.take_along_axis(scores, np.asarray(POSITIVES)[:, None, None], axis=2)
    log_p = np.take_along_axis(
        np_log_softmax(scores, 0.2), np.asarray(POSITIVES)[:, None, None], axis=2
    )
    rewards = formula((scores >= own).sum(axis=2), log_p[..., 0])
    np.testing.assert_allclose(terms["reward"], rewards.mean(), rtol=1e-5)
    np.testing.assert_allclose(terms["latent"], -log_p.mean(), rtol=1e-5)
    wanted, spread_B = advantages(jnp.asarray(rewards, jnp.float32))
    np.testing.assert_allclose(draws.advantage_BR, wanted, atol=1e-3)
    np.testing.assert_allclose(terms["groups_without_spread"], 1 - spread_B.mean(), atol=1e-6)

    def advantage(hidden: jax.Array) -> jax.Array:
        own = dataclasses.replace(rollouts, hidden_BRKD=hidden)
        judged, _ = judged_by(own, documents_CD, POSITIVES, EVERYTHING, objective)
        return (judged.advantage_BR**2).sum()

    assert not np.any(jax.grad(advantage)(hidden))


def test_advantages_are_of_a_group_and_none_without_a_spread() -> None:
    reward_BR = jnp.asarray([[1.0, 0.5, 0.25], [0.1, 0.1, 0.1], [0.0, 0.0, 1.0]])
    advantage_BR, spread_B = advantages(reward_BR)
    r = np.asarray(reward_BR, np.float64)
    wanted = (r - r.mean(axis=1, keepdims=True)) / (r.std(axis=1, keepdims=True) + 1e-6)
    wanted[1] = 0
    np.testing.assert_allclose(advantage_BR, wanted, rtol=1e-5)
    assert spread_B.tolist() == [True, False, True]
    assert advantage_BR[1].tolist() == [0, 0, 0]


def test_a_ratio_beyond_the_clip_pays_no_more_and_has_no_gradient() -> None:
    ratio = jnp.asarray([0.5, 1.0, 1.1, 1.5])

    def objective(log_p: jax.Array, advantage: float) -> tuple[jax.Array, jax.Array]:
        draws = Draws(
            jnp.zeros((1, 1, 4, 1), int), jnp.zeros((1, 1, 4)), jnp.full((1, 1), advantage)
        )
        gain, clipped = clipped_objective(log_p[None, None], draws, 0.2)
        return gain.sum(), (gain[0, 0], clipped[0, 0])  # pyright: ignore[reportReturnType]

    for advantage, gain, clipped in (
        (2.0, [1.0, 2.0, 2.2, 2.4], [False, False, False, True]),
        (-2.0, [-1.6, -2.0, -2.2, -3.0], [True, False, False, False]),
    ):
        slope, found = jax.grad(objective, has_aux=True)(jnp.log(ratio), advantage)
        np.testing.assert_allclose(found[0], gain, rtol=1e-6)
        assert found[1].tolist() == clipped
        free = np.where(clipped, 0.0, advantage * np.asarray(ratio))
        np.testing.assert_allclose(slope, free, rtol=1e-6)


def test_without_its_weight_the_reward_has_no_part_in_the_loss() -> None:
    log_p = draw(B, 4, K - 1, seed=22)
    draws = Draws(jnp.zeros((B, 4, K - 1, 1), int), log_p - 0.1, draw(B, 4, seed=23))
    rollouts = Rollouts(
        draw(B, 4, K, D, seed=21), draws.tokens_BRSn, log_p, log_p, jnp.abs(log_p), None, draws
    )
    whole, half, none = (
        policy_loss(rollouts, draws, PolicyConfig(weight=weight, kl=0.5)) for weight in (1, 0.5, 0)
    )
    np.testing.assert_allclose(none["loss"], 0.5 * none["kl"], rtol=1e-6)
    assert abs(float(whole["loss"] - none["loss"])) > 1e-3
    np.testing.assert_allclose(half["loss"], (whole["loss"] + none["loss"]) / 2, rtol=1e-5)
