"""The latent loop: K hidden states, each but the first fed by the expected next embedding.

LaSER section 3.1; GIRCSE pools the generated states alone. The prompt's keys and values are read
only; each step writes one slot of a K-sized suffix cache, inside one `lax.scan`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from laser_jax.config import Pooling, appended_thoughts, pools_prompt
from laser_jax.modeling.attention import accumulation_dtype, merge_groups, split_groups
from laser_jax.modeling.backbone import Backbone, Cache, Variables, apply, empty_suffix


@struct.dataclass
class Prefix:
    """A prompt that has been read: the state of its last token and its keys and values."""

    h_BD: jax.Array
    cache: Cache
    lengths_B: jax.Array


@struct.dataclass
class TopTokens:
    """The next-token distribution at each thinking step, for looking inside."""

    ids_BKn: jax.Array
    probabilities_BKn: jax.Array
    entropy_BK: jax.Array
    """In nats."""


NextInput = Callable[[jax.Array, Any], tuple[jax.Array, Any]]
"""From a state [B, D] and what is given for its thought to the embedding that is fed on, and what
is kept of it."""


def generate(
    backbone: Backbone,
    variables: Variables,
    prefixes: Sequence[Prefix],
    next_input: NextInput,
    given: jax.Array,
) -> tuple[jax.Array, Any]:
    """The states behind thoughts, [thoughts, B, D] in the compute dtype, of the groups as one
    batch, and what `next_input` kept. `given` has a row for each thought."""
    caches = tuple(prefix.cache for prefix in prefixes)
    lengths_B = merge_groups([prefix.lengths_B for prefix in prefixes])

    def step(carry: tuple[jax.Array, Cache], at: tuple[jax.Array, Any]) -> tuple[Any, Any]:
        (h_BD, suffix), (slot, own) = carry, at
        token_BD, kept = next_input(h_BD, own)
        past = (caches, suffix, lengths_B, slot)
        h_BD, suffix = apply(Backbone.think, backbone, variables, token_BD, *past)
        return (h_BD, suffix), (h_BD, kept)

    carry = (merge_groups([prefix.h_BD for prefix in prefixes]), empty_suffix(caches, len(given)))
    # The paper's two thoughts stand one behind the other: a loop would add the gradients of all
    # prompts' keys and values up in its carry, from zeros on.
    along = (jnp.arange(len(given)), given)
    return jax.lax.scan(step, carry, along, unroll=len(given) <= 2)[1]


def think(
    backbone: Backbone,
    variables: Variables,
    prefixes: Sequence[Prefix],
    num_thinking_steps: int,
    pooling: Pooling,
) -> list[jax.Array]:
    """The K states that are pooled, [B, K, D] float32, un-normalised, of every group of prompts.

    The groups (queries and their documents) think as one batch: the weights are read once a step,
    and only attention looks at each group's own prefix. The size of each group is a multiple of the
    smallest one's.

    With pooling `prompt_and_thoughts` (LaSER as released) the first is the prompt's own state and
    K - 1 soft tokens are generated; with `thoughts` (GIRCSE) K are generated and the prompt's state
    is left out.

    Raises:
        ValueError: when `num_thinking_steps` is below 1.
    """
    if num_thinking_steps < 1:
        raise ValueError(f"num_thinking_steps must be at least 1, got {num_thinking_steps}")
    generated = appended_thoughts(num_thinking_steps, pooling)
    wide = accumulation_dtype(prefixes[0].h_BD.dtype)
    firsts = [prefix.h_BD[:, None].astype(wide) for prefix in prefixes]
    if generated == 0:
        return firsts

    def soft_token(h_BD: jax.Array, _: jax.Array) -> tuple[jax.Array, None]:
        return apply(Backbone.soft_token, backbone, variables, h_BD), None

    h_KBD, _ = generate(backbone, variables, prefixes, soft_token, jnp.arange(generated))
    sizes = [prefix.lengths_B.shape[0] for prefix in prefixes]
    thoughts = split_groups(jnp.swapaxes(h_KBD, 0, 1).astype(wide), sizes)
    if not pools_prompt(pooling):
        return thoughts
    return [jnp.concatenate(states, axis=1) for states in zip(firsts, thoughts, strict=True)]


def top_tokens(
    backbone: Backbone, variables: Variables, hidden_BKD: jax.Array, n: int
) -> TopTokens:
    """What each state would say next: its n likeliest tokens and the entropy of all of them."""

    def one_step(h_BD: jax.Array) -> TopTokens:
        logits_BV = apply(Backbone.logits, backbone, variables, h_BD.astype(backbone.dtype))
        log_p_BV = jax.nn.log_softmax(logits_BV, axis=-1)
        top, ids = jax.lax.top_k(log_p_BV, n)
        return TopTokens(ids, jnp.exp(top), -(jnp.exp(log_p_BV) * log_p_BV).sum(axis=-1))

    by_step = jax.lax.map(one_step, jnp.swapaxes(hidden_BKD, 0, 1))
    return jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), by_step)
