"""Contrastive and distillation losses. Arrays in, named scalars out; everything float32.

B queries, K thinking steps, D model, C documents of the whole global pool. `contrast_BC` says which
documents count for which query: False takes a false negative out of every softmax.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from laser_jax.config import ObjectiveConfig

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
    """As in `Batch`."""


def normalize(x: jax.Array) -> jax.Array:
    """x / ||x|| over the last axis; a zero vector stays zero, also in the gradient."""
    # x comes second for the reason given in `modeling.backbone._rms_normed`
    return jax.lax.rsqrt(jnp.maximum((x * x).sum(axis=-1, keepdims=True), 1e-24)) * x


def pool(hidden_BKD: jax.Array) -> jax.Array:
    """normalize(mean over the steps), [B, D] unit rows (LaSER equation 6)."""
    return normalize(jnp.mean(hidden_BKD, axis=1))


def inner_products(states: jax.Array, documents_CD: jax.Array) -> jax.Array:
    """[..., C] inner products. A temperature of 0.02 turns TF32's error into 5 % of a logit."""
    return jnp.einsum("...d,cd->...c", states, documents_CD, precision="highest")


def log_softmax(scores: jax.Array, contrast: jax.Array, temperature: float) -> jax.Array:
    return jax.nn.log_softmax(jnp.where(contrast, scores / temperature, -jnp.inf), axis=-1)


def info_nce(
    scores_BC: jax.Array, positives_B: jax.Array, contrast_BC: jax.Array, temperature: float
) -> jax.Array:
    """-log softmax(scores / temperature) at each query's positive, mean over queries
    (LaSER equation 7). Masked documents are left out of the softmax."""
    log_p_BC = log_softmax(scores_BC, contrast_BC, temperature)
    return -jnp.take_along_axis(log_p_BC, positives_B[:, None], axis=1).mean()


def score_kl(
    teacher: jax.Array, student: jax.Array, contrast: jax.Array, temperature: float
) -> jax.Array:
    """KL(softmax(teacher / t) || softmax(student / t)) over the last axis, [...], to be averaged
    (LaSER equations 9 and 12). No gradient flows into the teacher's scores."""
    log_p = log_softmax(jax.lax.stop_gradient(teacher), contrast, temperature)
    log_q = log_softmax(student, contrast, temperature)
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
    scores_BC = inner_products(pool(views.hidden_BKD), documents_CD)
    terms = {"latent": info_nce(scores_BC, positives_B, contrast_BC, objective.temperature)}
    if (explicit := views.explicit) is not None:
        teacher_BC = inner_products(normalize(explicit.final_BD), teacher_documents_CD)
        terms["explicit"] = info_nce(teacher_BC, positives_B, contrast_BC, objective.temperature)
        output_B = score_kl(teacher_BC, scores_BC, contrast_BC, objective.output_temperature)
        trajectory_BK = score_kl(
            inner_products(normalize(explicit.keyframes_BKD), teacher_documents_CD),
            inner_products(normalize(views.hidden_BKD), documents_CD),
            contrast_BC[:, None, :],
            objective.trajectory_temperature,
        )
        terms["output"] = output_B.mean()
        terms["trajectory"] = trajectory_BK.mean()
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
        scores_BC = inner_products(pool(query_hidden_BKD[:, :k]), pool(document_hidden_CKD[:, :k]))
        steps.append(info_nce(scores_BC, positives_B, contrast_BC, temperature))
    losses_K = jnp.stack(steps)
    growth = jnp.diff(jnp.log(losses_K + 1e-8))
    penalty = jax.nn.relu(growth).mean() if K > 1 else jnp.zeros(())
    terms = {f"step_{k}": loss for k, loss in enumerate(steps, start=1)}
    contrastive = losses_K.mean()
    return {"loss": contrastive + penalty, "contrastive": contrastive, "penalty": penalty} | terms
