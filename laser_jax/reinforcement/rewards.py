"""What drawn thoughts earn, and the loss that reinforces them (docs/latent_rl.md). Float32.

B queries, R rollouts of each, K states and S = K - 1 thoughts in each, n tokens a thought, C
documents of the pool. `contrast_BC` is that of `laser_jax.losses`.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from laser_jax.config import ObjectiveConfig, PolicyConfig
from laser_jax.losses import Terms, inner_products, log_softmax, normalize


@flax.struct.dataclass
class Draws:
    """The thoughts that were drawn, and what came of them."""

    tokens_BRSn: jax.Array
    """int32."""
    log_p_BRS: jax.Array
    """Of the policy that drew them."""
    advantage_BR: jax.Array
    """Of a rollout over those beside it."""


@flax.struct.dataclass
class Rollouts:
    """All that the loss reads of a batch."""

    hidden_BRKD: jax.Array
    """Un-normalised states."""
    tokens_BRSn: jax.Array
    log_p_BRS: jax.Array
    """Of each thought, its n tokens together."""
    entropy_BRS: jax.Array
    """In nats, of a token."""
    kl_BRS: jax.Array | None
    """From the policy to the reference; None where its weight is 0."""
    document_hidden_CKD: jax.Array | None
    """None where the thoughts are replayed."""
    replayed: Draws | None


def positive_log_p(
    scores_BRC: jax.Array, positives_B: jax.Array, contrast_BC: jax.Array, temperature: float
) -> jax.Array:
    """log softmax(scores / temperature) at the positive, [B, R]: minus the loss of each rollout."""
    log_p_BRC = log_softmax(scores_BRC, contrast_BC[:, None], temperature)
    return jnp.take_along_axis(log_p_BRC, positives_B[:, None, None], axis=2)[..., 0]


def positive_rank(
    scores_BRC: jax.Array, positives_B: jax.Array, contrast_BC: jax.Array
) -> jax.Array:
    """The positive's rank from 1 among the contrasted documents, [B, R]; the last of its equals."""
    own_BR1 = jnp.take_along_axis(scores_BRC, positives_B[:, None, None], axis=2)
    return (contrast_BC[:, None] & (scores_BRC >= own_BR1)).sum(axis=2).astype(jnp.float32)


def advantages(reward_BR: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(reward - mean) / (std + 1e-6) over a query's rollouts, [B, R], and which queries have a
    spread of them, [B]: without one all are 0."""
    spread_B = reward_BR.max(axis=1) > reward_BR.min(axis=1)
    mean_B1, std_B1 = (f(reward_BR, axis=1, keepdims=True) for f in (jnp.mean, jnp.std))
    return jnp.where(spread_B[:, None], (reward_BR - mean_B1) / (std_B1 + 1e-6), 0.0), spread_B


def clipped_objective(
    log_p_BRS: jax.Array, draws: Draws, clip: float
) -> tuple[jax.Array, jax.Array]:
    """PPO's min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), and where the second is less, so that
    no gradient is left: [B, R, S] both. The ratio is of a thought, all of its tokens together."""
    ratio_BRS = jnp.exp(log_p_BRS - draws.log_p_BRS)
    advantage_BR1 = draws.advantage_BR[:, :, None]
    free = ratio_BRS * advantage_BR1
    held = jnp.clip(ratio_BRS, 1 - clip, 1 + clip) * advantage_BR1
    return jnp.minimum(free, held), held < free


def judge(
    rollouts: Rollouts,
    documents_CD: jax.Array,
    positives_B: jax.Array,
    contrast_BC: jax.Array,
    objective: ObjectiveConfig,
) -> tuple[Draws, Terms]:
    """What came of the rollouts, without a gradient, and the terms "latent" (the contrastive loss
    through the drawn thoughts, with one), "reward" and "groups_without_spread"."""
    embeddings_BRD = normalize(rollouts.hidden_BRKD.mean(axis=2))
    scores_BRC = inner_products(embeddings_BRD, documents_CD)
    log_p_BR = positive_log_p(scores_BRC, positives_B, contrast_BC, objective.temperature)
    rank_BR = positive_rank(scores_BRC, positives_B, contrast_BC)
    reward_BR = {
        "reciprocal_rank": 1.0 / rank_BR,
        "ndcg": 1.0 / jnp.log2(1.0 + rank_BR),
        "info_nce": log_p_BR,
    }[objective.policy.reward]
    advantage_BR, spread_B = advantages(reward_BR)
    found = (rollouts.tokens_BRSn, rollouts.log_p_BRS, advantage_BR)
    terms = {"latent": -log_p_BR.mean(), "reward": reward_BR.mean()}
    terms["groups_without_spread"] = 1.0 - spread_B.mean()
    return Draws(*map(jax.lax.stop_gradient, found)), terms


def policy_loss(rollouts: Rollouts, draws: Draws, policy: PolicyConfig) -> Terms:
    """Minus the clipped objective and the KL, by their weights: means over thoughts, rollouts and
    queries.

    Returns:
        "loss", "entropy", "clipped" (the share of thoughts) and "kl" where it has a weight.
    """
    gain_BRS, clipped_BRS = clipped_objective(rollouts.log_p_BRS, draws, policy.clip)
    terms = {"loss": -policy.weight * gain_BRS.mean(), "entropy": rollouts.entropy_BRS.mean()}
    terms["clipped"] = clipped_BRS.mean()
    if rollouts.kl_BRS is not None:
        terms["kl"] = rollouts.kl_BRS.mean()
        terms["loss"] += policy.kl * terms["kl"]
    return terms
