"""The two views of a query: latent (thinks silently) and explicit (reads a written reasoning).

Both use the same weights. Rows are right-padded int ids [B, T] with their real lengths [B].
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from laser_jax.config import Pooling
from laser_jax.modeling.attention import accumulation_dtype
from laser_jax.modeling.backbone import Backbone, Variables
from laser_jax.thinking import Prefix, think


@struct.dataclass
class ExplicitView:
    """Un-normalised float32 states of the teacher."""

    final_BD: jax.Array
    """At the last token (EOS)."""
    keyframes_BKD: jax.Array
    """At the K chosen segment ends."""


def latent_view(
    backbone: Backbone,
    variables: Variables,
    ids_BT: jax.Array,
    lengths_B: jax.Array,
    num_thinking_steps: int,
    pooling: Pooling,
) -> jax.Array:
    """Reads the prompts and thinks K steps. Returns [B, K, D] float32 un-normalised states."""
    last_B1 = (lengths_B - 1)[:, None]
    h_B1D, cache = nn.apply(Backbone.read, backbone)(variables, ids_BT, last_B1)
    prefix = Prefix(h_B1D[:, 0], cache, lengths_B)
    return think(backbone, variables, prefix, num_thinking_steps, pooling)


def explicit_view(
    backbone: Backbone,
    variables: Variables,
    ids_BT: jax.Array,
    lengths_B: jax.Array,
    keyframes_BK: jax.Array,
) -> ExplicitView:
    """Reads [query prompt; chain of thought; EOS] once.

    Args:
        keyframes_BK: int token positions of the chosen segment ends (see `alignment`).
    """
    select = jnp.concatenate([(lengths_B - 1)[:, None], keyframes_BK], axis=1)
    h_BPD, _ = nn.apply(Backbone.read, backbone)(variables, ids_BT, select)
    h_BPD = h_BPD.astype(accumulation_dtype(h_BPD.dtype))
    return ExplicitView(h_BPD[:, 0], h_BPD[:, 1:])


def dual_view(
    backbone: Backbone,
    variables: Variables,
    ids_BT: jax.Array,
    lengths_B: jax.Array,
    query_lengths_B: jax.Array,
    keyframes_BK: jax.Array,
    num_thinking_steps: int,
    pooling: Pooling,
) -> tuple[jax.Array, ExplicitView]:
    """Both views of [query prompt; chain of thought; EOS] from one reading.

    Attention is causal, so the states of the query's tokens are those of the query alone: the
    student starts from the state at the query's last token and sees only the keys before it.
    Valid only where the query's tokens are a prefix of the explicit input's.

    Returns:
        The latent view's [B, K, D] float32 states, and the explicit view.
    """
    ends = jnp.stack([query_lengths_B - 1, lengths_B - 1], axis=1)
    select = jnp.concatenate([ends, keyframes_BK], axis=1)
    h_BPD, cache = nn.apply(Backbone.read, backbone)(variables, ids_BT, select)
    prefix = Prefix(h_BPD[:, 0], cache, query_lengths_B)
    hidden_BKD = think(backbone, variables, prefix, num_thinking_steps, pooling)
    h_BPD = h_BPD.astype(accumulation_dtype(h_BPD.dtype))
    return hidden_BKD, ExplicitView(h_BPD[:, 1], h_BPD[:, 2:])
