"""The two views of a query: latent (thinks silently) and explicit (reads a written reasoning).

Both use the same weights. Rows are right-padded int ids [B, T] with their real lengths [B].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from laser_jax.config import Pooling
from laser_jax.losses import ExplicitView
from laser_jax.modeling.attention import accumulation_dtype
from laser_jax.modeling.backbone import Backbone, Variables, apply
from laser_jax.thinking import Prefix, think


def read_prompts(
    backbone: Backbone, variables: Variables, ids_BT: jax.Array, lengths_B: jax.Array
) -> Prefix:
    """Reads the prompts of queries or documents once."""
    last_B1 = (lengths_B - 1)[:, None]
    h_B1D, cache = apply(Backbone.read, backbone, variables, ids_BT, last_B1)
    return Prefix(h_B1D[:, 0], cache, lengths_B)


def latent_view(
    backbone: Backbone,
    variables: Variables,
    ids_BT: jax.Array,
    lengths_B: jax.Array,
    num_thinking_steps: int,
    pooling: Pooling,
) -> jax.Array:
    """Reads the prompts and thinks K steps. Returns [B, K, D] float32 un-normalised states."""
    prefix = read_prompts(backbone, variables, ids_BT, lengths_B)
    return think(backbone, variables, [prefix], num_thinking_steps, pooling)[0]


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
    h_BPD, _ = apply(Backbone.read, backbone, variables, ids_BT, select)
    h_BPD = h_BPD.astype(accumulation_dtype(h_BPD.dtype))
    return ExplicitView(h_BPD[:, 0], h_BPD[:, 1:])


def read_both_views(
    backbone: Backbone,
    variables: Variables,
    ids_BT: jax.Array,
    lengths_B: jax.Array,
    query_lengths_B: jax.Array,
    keyframes_BK: jax.Array,
) -> tuple[Prefix, ExplicitView]:
    """Both views of [query prompt; chain of thought; EOS] from one reading.

    Attention is causal, so the states of the query's tokens are those of the query alone: the
    student starts from the state at the query's last token and sees only the keys before it.
    Valid only where the query's tokens are a prefix of the explicit input's.

    Returns:
        The query's prefix, for `think`, and the explicit view.
    """
    ends = jnp.stack([query_lengths_B - 1, lengths_B - 1], axis=1)
    select = jnp.concatenate([ends, keyframes_BK], axis=1)
    h_BPD, cache = apply(Backbone.read, backbone, variables, ids_BT, select)
    prefix = Prefix(h_BPD[:, 0], cache, query_lengths_B)
    h_BPD = h_BPD.astype(accumulation_dtype(h_BPD.dtype))
    return prefix, ExplicitView(h_BPD[:, 1], h_BPD[:, 2:])
