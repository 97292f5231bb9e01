"""The two views of a query: latent (thinks silently) and explicit (reads a written reasoning).

Both use the same weights. Rows are right-padded int ids with their real lengths; those that are
`packed` are read without their padding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from laser_jax.batch import Tokens
from laser_jax.config import Pooling
from laser_jax.losses import ExplicitView
from laser_jax.modeling.attention import accumulation_dtype
from laser_jax.modeling.backbone import Backbone, Cache, Variables, apply
from laser_jax.modeling.packing import Packing
from laser_jax.thinking import Prefix, think


def _read(
    backbone: Backbone, variables: Variables, rows: Tokens, select_BP: jax.Array
) -> tuple[jax.Array, Cache]:
    packing = rows.packed and Packing.of(rows.lengths_B, rows.ids_BT.shape[1], rows.packed)
    return apply(Backbone.read, backbone, variables, rows.ids_BT, select_BP, packing)


def read_prompts(backbone: Backbone, variables: Variables, rows: Tokens) -> Prefix:
    """Reads the prompts of queries or documents once."""
    h_B1D, cache = _read(backbone, variables, rows, (rows.lengths_B - 1)[:, None])
    return Prefix(h_B1D[:, 0], cache, rows.lengths_B)


def latent_view(
    backbone: Backbone,
    variables: Variables,
    rows: Tokens,
    num_thinking_steps: int,
    pooling: Pooling,
) -> jax.Array:
    """Reads the prompts and thinks K steps. Returns [B, K, D] float32 un-normalised states."""
    prefix = read_prompts(backbone, variables, rows)
    return think(backbone, variables, [prefix], num_thinking_steps, pooling)[0]


def explicit_view(
    backbone: Backbone, variables: Variables, rows: Tokens, keyframes_BK: jax.Array
) -> ExplicitView:
    """Reads [query prompt; chain of thought; EOS] once.

    Args:
        keyframes_BK: int token positions of the chosen segment ends (see `alignment`).
    """
    select = jnp.concatenate([(rows.lengths_B - 1)[:, None], keyframes_BK], axis=1)
    h_BPD, _ = _read(backbone, variables, rows, select)
    h_BPD = h_BPD.astype(accumulation_dtype(h_BPD.dtype))
    return ExplicitView(h_BPD[:, 0], h_BPD[:, 1:])


def read_both_views(
    backbone: Backbone,
    variables: Variables,
    rows: Tokens,
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
    ends = jnp.stack([query_lengths_B - 1, rows.lengths_B - 1], axis=1)
    select = jnp.concatenate([ends, keyframes_BK], axis=1)
    h_BPD, cache = _read(backbone, variables, rows, select)
    prefix = Prefix(h_BPD[:, 0], cache, query_lengths_B)
    h_BPD = h_BPD.astype(accumulation_dtype(h_BPD.dtype))
    return prefix, ExplicitView(h_BPD[:, 1], h_BPD[:, 2:])
