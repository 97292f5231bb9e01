"""A query's thoughts as a policy: tokens are drawn, or replayed, and scored (docs/latent_rl.md).

B queries, R rollouts of each, Q = B R rows, S = K - 1 thoughts, n tokens a thought.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from laser_jax.batch import Batch
from laser_jax.config import ObjectiveConfig
from laser_jax.losses import Rollouts, Terms, judge, policy_loss, pool
from laser_jax.modeling.attention import accumulation_dtype
from laser_jax.modeling.backbone import Backbone, Variables, apply
from laser_jax.sharding import constrain
from laser_jax.thinking import Prefix, generate
from laser_jax.views import latent_view, read_prompts

Model = tuple[Backbone, Variables]


def query_keys(seed: int, step: jax.Array, queries: int) -> jax.Array:
    """A random key for each query of a step, [B]: whatever the mesh and the micro-batches."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(queries))


def read_rollouts(
    backbone: Backbone, variables: Variables, batch: Batch, objective: ObjectiveConfig
) -> Rollouts:
    """Thinks R times for each query, by the batch's `keys_B` or as its `draws` were, and once for
    each document, where the draws are new."""
    model, K, policy = (backbone, variables), objective.num_thinking_steps, objective.policy
    prefix = _repeated(read_prompts(*model, batch.query), policy.rollouts)
    B, document_hidden_CKD = len(batch.query.lengths_B), None

    def by_thought(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 2, 0).reshape(K - 1, B * policy.rollouts, *x.shape[3:])

    def by_query(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(len(x), B, policy.rollouts, *x.shape[2:]), 0, 2)

    if batch.draws is None:
        split = partial(jax.random.split, num=(policy.rollouts, K - 1))
        keys_SQ = by_thought(jax.vmap(split)(batch.keys_B))
        tokens_SQn, states_KQD = _draw(model, prefix, keys_SQ, objective)
        document_K = objective.document_thinking_steps or K
        pooled = (batch.documents, document_K, objective.pooling)
        document_hidden_CKD = latent_view(*model, *pooled)
    else:
        tokens_SQn = by_thought(batch.draws.tokens_BRSn)
        states_KQD = _replay(model, prefix, tokens_SQn)
    reference, reference_KQD = None, None
    if policy.kl:
        reference = (backbone.clone(lora=None), {"params": variables["params"]})
        own = _repeated(read_prompts(*reference, batch.query), policy.rollouts)
        reference_KQD = _replay(reference, own, tokens_SQn)
    measured = _measure(model, reference, (states_KQD, reference_KQD, tokens_SQn), objective)
    log_p_BRS, entropy_BRS, kl_BRS = jax.tree.map(by_query, measured)
    return Rollouts(
        hidden_BRKD=by_query(states_KQD.astype(accumulation_dtype(states_KQD.dtype))),
        tokens_BRSn=by_query(tokens_SQn),
        log_p_BRS=log_p_BRS,
        entropy_BRS=entropy_BRS,
        kl_BRS=kl_BRS,
        document_hidden_CKD=document_hidden_CKD,
        replayed=batch.draws,
    )


def rollout_terms(rollouts: Rollouts, contrast_BC: jax.Array, objective: ObjectiveConfig) -> Terms:
    """The loss and its terms. Where the draws are new they are judged against the whole pool, and
    the terms hold the fields of `Draws` too; replayed ones were, and have no contrastive loss."""
    if rollouts.document_hidden_CKD is None:
        return policy_loss(rollouts, rollouts.replayed, objective.policy)
    B, C = contrast_BC.shape
    documents_CD = constrain(pool(rollouts.document_hidden_CKD), None, None)
    positives_B = jnp.arange(B) * (C // B)
    draws, judged = judge(rollouts, documents_CD, positives_B, contrast_BC, objective)
    terms = judged | policy_loss(rollouts, draws, objective.policy)
    if objective.weights.latent:
        terms["loss"] += objective.weights.latent * terms["latent"]
    return terms | vars(draws)


def _repeated(prefix: Prefix, rollouts: int) -> Prefix:
    """Each prompt so many times, one behind the other."""
    again = partial(jnp.repeat, repeats=rollouts)
    cache = jax.tree.map(lambda a: again(a, axis=a.ndim - 4), prefix.cache)
    return Prefix(again(prefix.h_BD, axis=0), cache, again(prefix.lengths_B, axis=0))


def _log_policy(model: Model, h_QD: jax.Array, temperature: float) -> jax.Array:
    """log pi of the next token, [Q, V]."""
    return jax.nn.log_softmax(apply(Backbone.logits, *model, h_QD) / temperature, axis=-1)


def _fed(model: Model, tokens_Qn: jax.Array) -> jax.Array:
    """The mean embedding of a thought's tokens, which is fed on: [Q, D]."""
    return apply(Backbone.embed, *model, tokens_Qn).mean(axis=1)


def _draw(
    model: Model, prefix: Prefix, keys_SQ: jax.Array, objective: ObjectiveConfig
) -> tuple[jax.Array, jax.Array]:
    """The tokens of each thought, drawn from the state before it, and the K states."""
    policy = objective.policy
    categorical = jax.vmap(partial(jax.random.categorical, shape=(policy.draws,)))

    def say(h_QD: jax.Array, keys_Q: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens_Qn = categorical(keys_Q, _log_policy(model, h_QD, policy.temperature))
        return _fed(model, tokens_Qn), tokens_Qn

    states_SQD, tokens_SQn = generate(*model, [prefix], say, keys_SQ, len(keys_SQ))
    return tokens_SQn, jnp.concatenate([prefix.h_BD[None], states_SQD])


def _replay(model: Model, prefix: Prefix, tokens_SQn: jax.Array) -> jax.Array:
    """The K states along given tokens."""

    def say(_: jax.Array, tokens_Qn: jax.Array) -> tuple[jax.Array, None]:
        return _fed(model, tokens_Qn), None

    states_SQD, _ = generate(*model, [prefix], say, tokens_SQn, len(tokens_SQn))
    return jnp.concatenate([prefix.h_BD[None], states_SQD])


def _measure(
    model: Model,
    reference: Model | None,
    path: tuple[jax.Array, jax.Array | None, jax.Array],
    objective: ObjectiveConfig,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Of each thought [S, Q]: log pi of all of its tokens, the entropy of one, and the exact KL to
    the reference at one, which has no gradient.

    Args:
        path: the K states of the model, those of the reference, and the tokens.
    """
    temperature = objective.policy.temperature

    # one step's logits at a time, in the backward pass too
    @jax.checkpoint
    def at_thought(
        at: tuple[jax.Array, jax.Array | None, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        h_QD, reference_QD, tokens_Qn = at
        log_p_QV = _log_policy(model, h_QD, temperature)
        p_QV, kl_Q = jnp.exp(log_p_QV), None
        if reference is not None and reference_QD is not None:
            log_q_QV = _log_policy(reference, reference_QD, temperature)
            kl_Q = (p_QV * (log_p_QV - jax.lax.stop_gradient(log_q_QV))).sum(axis=-1)
        drawn_Q = jnp.take_along_axis(log_p_QV, tokens_Qn, axis=1).sum(axis=1)
        return drawn_Q, -(p_QV * log_p_QV).sum(axis=-1), kl_Q

    states_KQD, reference_KQD, tokens_SQn = path
    before = None if reference_KQD is None else reference_KQD[:-1]
    return jax.lax.map(at_thought, (states_KQD[:-1], before, tokens_SQn))
