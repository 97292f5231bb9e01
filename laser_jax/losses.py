"""Contrastive and distillation losses. Arrays in, named scalars out; everything float32.

B queries, K thinking steps, D model, C documents of the whole global pool. `contrast_BC` says which
documents count for which query: False takes a false negative out of every softmax.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from laser_jax.batch import Draws
from laser_jax.config import ObjectiveConfig, PolicyConfig

Terms = dict[str, jax.Array]


@struct.dataclass
class ExplicitView:
    """The teacher's un-normalised float32 states."""

    final_BD: jax.Array
    """At the last token (EOS)."""
    keyframes_BKD: jax.Array
    """At the K chosen segment ends, one for each thinking step."""


@struct.dataclass
class Views:
    """All that the loss reads of a batch: un-normalised float32 states, and `teacher_scores_BG`."""

    hidden_BKD: jax.Array
    document_hidden_CKD: jax.Array
    explicit: ExplicitView | None
    teacher_document_hidden_CKD: jax.Array | None
    """A frozen teacher's own."""
    teacher_scores_BG: jax.Array | None = None
    counted_BK: jax.Array | None = None
    """Both as in `Batch`."""


@struct.dataclass
class Rollouts:
    """All that the loss reads of R rollouts of each query, S thoughts in each: float32."""

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


def normalize(x: jax.Array) -> jax.Array:
    """x / ||x|| over the last axis; a zero vector stays zero, also in the gradient."""
    # x comes second for the reason given in `modeling.backbone._rms_normed`
    return jax.lax.rsqrt(jnp.maximum((x * x).sum(axis=-1, keepdims=True), 1e-24)) * x


def pool(hidden_BKD: jax.Array, counted_BK: jax.Array | None = None) -> jax.Array:
    """normalize(mean over the steps, or over those that are counted), [B, D] unit rows (LaSER
    equation 6)."""
    where = None if counted_BK is None else counted_BK[:, :, None]
    return normalize(jnp.mean(hidden_BKD, axis=1, where=where))


def _scores(states: jax.Array, documents_CD: jax.Array) -> jax.Array:
    """[..., C] inner products. A temperature of 0.02 turns TF32's error into 5 % of a logit."""
    return jnp.einsum("...d,cd->...c", states, documents_CD, precision="highest")


def _log_softmax(scores: jax.Array, contrast: jax.Array, temperature: float) -> jax.Array:
    return jax.nn.log_softmax(jnp.where(contrast, scores / temperature, -jnp.inf), axis=-1)


def info_nce(
    scores_BC: jax.Array, positives_B: jax.Array, contrast_BC: jax.Array, temperature: float
) -> jax.Array:
    """-log softmax(scores / temperature) at each query's positive, mean over queries
    (LaSER equation 7). Masked documents are left out of the softmax."""
    log_p_BC = _log_softmax(scores_BC, contrast_BC, temperature)
    return -jnp.take_along_axis(log_p_BC, positives_B[:, None], axis=1).mean()


def score_kl(
    teacher: jax.Array, student: jax.Array, contrast: jax.Array, temperature: float
) -> jax.Array:
    """KL(softmax(teacher / t) || softmax(student / t)) over the last axis, [...], to be averaged
    (LaSER equations 9 and 12). No gradient flows into the teacher's scores."""
    log_p = _log_softmax(jax.lax.stop_gradient(teacher), contrast, temperature)
    log_q = _log_softmax(student, contrast, temperature)
    # masked documents have p = 0 and log p = log q = -inf: keep the difference out of the sum
    difference = jnp.where(contrast, log_p, 0.0) - jnp.where(contrast, log_q, 0.0)
    return (jnp.exp(log_p) * difference).sum(axis=-1)


def teacher_kl(
    teacher_BG: jax.Array, scores_BC: jax.Array, positives_B: jax.Array, objective: ObjectiveConfig
) -> jax.Array:
    """KL(softmax(teacher / teacher_temperature) || softmax(student / temperature)) over each
    query's own G passages, mean over queries; 0 for a query whose scores are NaN."""
    passages_1G = jnp.arange(teacher_BG.shape[1])[None, :]
    own_BG = jnp.take_along_axis(scores_BC, positives_B[:, None] + passages_1G, axis=1)
    known_BG = jnp.isfinite(teacher_BG) | (passages_1G == 0)
    teacher_BG *= objective.temperature / objective.teacher_temperature
    return score_kl(jnp.nan_to_num(teacher_BG), own_BG, known_BG, objective.temperature).mean()


def laser_loss(
    views: Views,
    documents_CD: jax.Array,
    teacher_documents_CD: jax.Array,
    positives_B: jax.Array,
    contrast_BC: jax.Array,
    objective: ObjectiveConfig,
    distillation_scale: jax.Array,
) -> Terms:
    """The four-term loss of LaSER (equation 14), and a fifth where another teacher gives scores.

    Args:
        views: states of the student, and of the teacher where the objective has an explicit view.
        documents_CD: unit embeddings of the pool.
        teacher_documents_CD: the same array where one model teaches and learns; a frozen
            teacher's own embeddings otherwise.
        positives_B: each query's column in the pool.
        contrast_BC: False where a document must not count for a query.
        objective: temperatures and weights.
        distillation_scale: scalar that multiplies the output and trajectory weights (warm-up).

    Returns:
        "loss" and the unweighted terms "latent", "explicit", "output", "trajectory" and "teacher";
        those of the explicit view are absent without one, and the last without scores.
    """
    scores_BC = _scores(pool(views.hidden_BKD, views.counted_BK), documents_CD)
    terms = {"latent": info_nce(scores_BC, positives_B, contrast_BC, objective.temperature)}
    if (explicit := views.explicit) is not None:
        teacher_BC = _scores(normalize(explicit.final_BD), teacher_documents_CD)
        terms["explicit"] = info_nce(teacher_BC, positives_B, contrast_BC, objective.temperature)
        output_B = score_kl(teacher_BC, scores_BC, contrast_BC, objective.output_temperature)
        trajectory_BK = score_kl(
            _scores(normalize(explicit.keyframes_BKD), teacher_documents_CD),
            _scores(normalize(views.hidden_BKD), documents_CD),
            contrast_BC[:, None, :],
            objective.trajectory_temperature,
        )
        terms["output"] = output_B.mean()
        terms["trajectory"] = trajectory_BK.mean(where=views.counted_BK)
    if views.teacher_scores_BG is not None:
        terms["teacher"] = teacher_kl(views.teacher_scores_BG, scores_BC, positives_B, objective)
    weights = dataclasses.asdict(objective.weights)
    for name in ("output", "trajectory"):
        weights[name] *= distillation_scale
    loss = sum(weights[name] * term for name, term in terms.items())
    return {"loss": jnp.asarray(loss)} | terms


def gircse_loss(
    query_hidden_BKD: jax.Array,
    document_hidden_CKD: jax.Array,
    positives_B: jax.Array,
    contrast_BC: jax.Array,
    temperature: float,
) -> Terms:
    """GIRCSE's stepwise loss: InfoNCE of the mean of the first k thoughts, averaged over k, plus
    `mean(relu(log l_{k+1} - log l_k))` so that a further thought never hurts.

    Returns:
        "loss", "contrastive" (the average), "penalty" and "step_1" ... "step_K".
    """
    K = query_hidden_BKD.shape[1]
    steps = []
    for k in range(1, K + 1):
        scores_BC = _scores(pool(query_hidden_BKD[:, :k]), pool(document_hidden_CKD[:, :k]))
        steps.append(info_nce(scores_BC, positives_B, contrast_BC, temperature))
    losses_K = jnp.stack(steps)
    growth = jnp.diff(jnp.log(losses_K + 1e-8))
    penalty = jax.nn.relu(growth).mean() if K > 1 else jnp.zeros(())
    terms = {f"step_{k}": loss for k, loss in enumerate(steps, start=1)}
    contrastive = losses_K.mean()
    return {"loss": contrastive + penalty, "contrastive": contrastive, "penalty": penalty} | terms


# --- reinforcement ---------------------------------------------------------------------------


def positive_log_p(
    scores_BRC: jax.Array, positives_B: jax.Array, contrast_BC: jax.Array, temperature: float
) -> jax.Array:
    """log softmax(scores / temperature) at the positive, [B, R]: minus the loss of each rollout."""
    log_p_BRC = _log_softmax(scores_BRC, contrast_BC[:, None], temperature)
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
    scores_BRC = _scores(embeddings_BRD, documents_CD)
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
    """Minus the clipped objective, and the KL by its weight, mean over thoughts, rollouts, queries.

    Returns:
        "loss", "entropy", "clipped" (the share of thoughts) and "kl" where it has a weight.
    """
    gain_BRS, clipped_BRS = clipped_objective(rollouts.log_p_BRS, draws, policy.clip)
    terms = {"loss": -gain_BRS.mean(), "entropy": rollouts.entropy_BRS.mean()}
    terms["clipped"] = clipped_BRS.mean()
    if rollouts.kl_BRS is not None:
        terms["kl"] = rollouts.kl_BRS.mean()
        terms["loss"] += policy.kl * terms["kl"]
    return terms
