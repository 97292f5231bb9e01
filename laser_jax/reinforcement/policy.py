"""A query's thoughts as a policy: tokens are drawn, or replayed, and scored (docs/latent_rl.md).

B queries, R rollouts of each, Q = B R rows, S = K - 1 thoughts, n tokens a thought.
"""

from __future__ import annotations

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from laser_jax.batch import Batch, Tokens
from laser_jax.config import ObjectiveConfig, PolicyConfig
from laser_jax.losses import Terms, pool
from laser_jax.modeling.attention import accumulation_dtype
from laser_jax.modeling.backbone import Backbone, Variables, apply
from laser_jax.reinforcement.rewards import Draws, Rollouts, judge, policy_loss
from laser_jax.sharding import constrain
from laser_jax.thinking import NextInput, Prefix, generate
from laser_jax.views import latent_view, read_prompts

Model = tuple[Backbone, Variables]


@flax.struct.dataclass
class PolicyBatch(Batch):
    """A batch whose queries think by `keys_B`, or as `draws` did: one of the two is given."""

    keys_B: jax.Array | None = None
    """Random keys."""
    draws: Draws | None = None


def query_keys(seed: int, step: jax.Array, queries: int) -> jax.Array:
    """A random key for each query of a step, [B]: whatever the mesh and the micro-batches."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(queries))


def read_rollouts(
    backbone: Backbone, variables: Variables, batch: PolicyBatch, objective: ObjectiveConfig
) -> Rollouts:
    """Thinks R times for each query, by the batch's `keys_B` or as its `draws` were, and once for
    each document, where the draws are new."""
    model, K, policy = (backbone, variables), objective.num_thinking_steps, objective.policy
    B, R, document_hidden_CKD = len(batch.query.lengths_B), policy.rollouts, None

    def by_thought(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 2, 0).reshape(K - 1, B * R, *x.shape[3:])

    def by_query(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(len(x), B, R, *x.shape[2:]), 0, 2)

    if batch.draws is None:
        assert batch.keys_B is not None
        keys_BRS = jax.vmap(partial(jax.random.split, num=(R, K - 1)))(batch.keys_B)
        next_input, given = _drawing(model, policy), by_thought(keys_BRS)
        document_K = objective.document_thinking_steps or K
        document_hidden_CKD = latent_view(*model, batch.documents, document_K, objective.pooling)
    else:
        next_input, given = _replaying(model), by_thought(batch.draws.tokens_BRSn)
    states_KQD, tokens_SQn = _think(model, batch.query, R, next_input, given)
    reference, reference_KQD = None, None
    if policy.kl:
        reference = (backbone.clone(lora=None), {"params": variables["params"]})
        reference_KQD, _ = _think(reference, batch.query, R, _replaying(reference), tokens_SQn)
    measure = partial(_measure, model, reference, policy.temperature)
    before = jax.tree.map(lambda states: states[:-1], (states_KQD, reference_KQD))
    log_p_BRS, entropy_BRS, kl_BRS = jax.tree.map(
        by_query, jax.lax.map(jax.checkpoint(measure), (*before, tokens_SQn))
    )
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
    if rollouts.replayed is not None:
        return policy_loss(rollouts, rollouts.replayed, objective.policy)
    assert rollouts.document_hidden_CKD is not None
    B, C = contrast_BC.shape
    documents_CD = constrain(pool(rollouts.document_hidden_CKD), None, None)
    positives_B = jnp.arange(B) * (C // B)
    draws, judged = judge(rollouts, documents_CD, positives_B, contrast_BC, objective)
    terms = judged | policy_loss(rollouts, draws, objective.policy)
    if objective.weights.latent:
        terms["loss"] += objective.weights.latent * terms["latent"]
    return terms | vars(draws)


def _think(
    model: Model, query: Tokens, rollouts: int, next_input: NextInput, given: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The K states of each rollout, and the tokens. A prompt is read once."""
    prefix, again = read_prompts(*model, query), partial(jnp.repeat, repeats=rollouts)
    cache = jax.tree.map(lambda a: again(a, axis=a.ndim - 4), prefix.cache)
    prefix = Prefix(again(prefix.h_BD, axis=0), cache, again(prefix.lengths_B, axis=0))
    states_SQD, tokens_SQn = generate(*model, [prefix], next_input, given)
    return jnp.concatenate([prefix.h_BD[None], states_SQD]), tokens_SQn


def _drawing(model: Model, policy: PolicyConfig) -> NextInput:
    """Draws the tokens of a thought from the state before it."""
    categorical = jax.vmap(partial(jax.random.categorical, shape=(policy.draws,)))

    def draw(h_QD: jax.Array, keys_Q: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens_Qn = categorical(keys_Q, _log_policy(model, h_QD, policy.temperature))
        return _fed(model, tokens_Qn), tokens_Qn

    return draw


def _replaying(model: Model) -> NextInput:
    """Feeds tokens that are given."""
    return lambda _, tokens_Qn: (_fed(model, tokens_Qn), tokens_Qn)


def _fed(model: Model, tokens_Qn: jax.Array) -> jax.Array:
    """The mean embedding of a thought's tokens, which is fed on: [Q, D]."""
    return apply(Backbone.embed, *model, tokens_Qn).mean(axis=1)


def _log_policy(model: Model, h_QD: jax.Array, temperature: float) -> jax.Array:
    """log pi of the next token, [Q, V]."""
    return jax.nn.log_softmax(apply(Backbone.logits, *model, h_QD) / temperature, axis=-1)


def _measure(
    model: Model,
    reference: Model | None,
    temperature: float,
    thought: tuple[jax.Array, jax.Array | None, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Of a thought [Q], from the states before it, the model's and the reference's, and its tokens:
    log pi of all tokens, and the entropy and the exact KL to the reference of one."""
    h_QD, reference_QD, tokens_Qn = thought
    log_p_QV = _log_policy(model, h_QD, temperature)
    p_QV, kl_Q = jnp.exp(log_p_QV), None
    if reference is not None and reference_QD is not None:
        log_q_QV = jax.lax.stop_gradient(_log_policy(reference, reference_QD, temperature))
        kl_Q = (p_QV * (log_p_QV - log_q_QV)).sum(axis=-1)
    drawn_Q = jnp.take_along_axis(log_p_QV, tokens_Qn, axis=1).sum(axis=1)
    return drawn_Q, -(p_QV * log_p_QV).sum(axis=-1), kl_Q
