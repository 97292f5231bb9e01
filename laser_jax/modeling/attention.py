"""Attention over right-padded rows: causal for whole sequences, counted for single positions.

Right padding makes plain causal attention correct: a real token never sees the padding behind it,
and no row is ever fully masked.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike


@struct.dataclass
class KeyValues:
    """Keys (after RoPE) and values, each [B, T, G, H]; stacked layers add a leading axis."""

    k: jax.Array
    v: jax.Array

    def write(self, new: KeyValues, slot: jax.Array) -> KeyValues:
        """These keys and values with `new` [B, 1, G, H] written at position `slot`."""
        start = (0, slot, 0, 0)
        return KeyValues(
            jax.lax.dynamic_update_slice(self.k, new.k, start),
            jax.lax.dynamic_update_slice(self.v, new.v, start),
        )


@struct.dataclass
class Past:
    """What a thinking step reads: the prompt's keys and values and those of earlier thoughts."""

    prefix: KeyValues
    suffix: KeyValues


def accumulation_dtype(dtype: DTypeLike) -> np.dtype:
    """float32 for everything up to it; float64 stays, so that gradients can be checked in it."""
    return np.promote_types(dtype, np.float32)


def causal_attention(q_BTNH: jax.Array, kv: KeyValues) -> jax.Array:
    """Every position attends to itself and everything before it. Returns [B, T, N, H]."""
    return jax.nn.dot_product_attention(q_BTNH, kv.k, kv.v, is_causal=True)


def counted_attention(
    q_BPNH: jax.Array,
    prefix: KeyValues,
    visible_BP: jax.Array,
    suffix: KeyValues | None = None,
    suffix_visible: jax.Array | None = None,
) -> jax.Array:
    """A few queries against the first `visible` prefix keys and the first `suffix_visible` others.

    The logits of both parts are joined under one softmax; keys and values are never concatenated.

    Args:
        q_BPNH: queries at P positions.
        prefix: keys and values [B, T, G, H].
        visible_BP: how many prefix keys each query sees, at least 1.
        suffix: keys and values [B, S, G, H] of the thinking steps.
        suffix_visible: scalar, how many of them are written.

    Returns:
        [B, P, N, H] in the dtype of the queries.
    """
    B, P, N, H = q_BPNH.shape
    G = prefix.k.shape[2]
    q_BPGMH = q_BPNH.reshape(B, P, G, N // G, H)
    accumulate = accumulation_dtype(q_BPNH.dtype)

    def logits(kv: KeyValues, mask_BPT: jax.Array) -> jax.Array:
        scores = jnp.einsum(
            "bpgmh,btgh->bgmpt", q_BPGMH, kv.k, preferred_element_type=accumulate
        ) * (H**-0.5)
        return jnp.where(mask_BPT[:, None, None], scores, jnp.finfo(accumulate).min)

    T = prefix.k.shape[1]
    parts = [(prefix, jnp.arange(T)[None, None, :] < visible_BP[:, :, None])]
    if suffix is not None and suffix_visible is not None:
        written = jnp.arange(suffix.k.shape[1]) < suffix_visible
        parts.append((suffix, written[None, None, :]))

    weights = jax.nn.softmax(
        jnp.concatenate([logits(kv, mask) for kv, mask in parts], axis=-1), axis=-1
    ).astype(q_BPNH.dtype)
    # [:T] belongs to the prefix; float32 accumulation, one sum over both parts
    out = jnp.einsum(
        "bgmpt,btgh->bpgmh", weights[..., :T], prefix.v, preferred_element_type=accumulate
    )
    if suffix is not None:
        out += jnp.einsum(
            "bgmpt,btgh->bpgmh", weights[..., T:], suffix.v, preferred_element_type=accumulate
        )
    return out.astype(q_BPNH.dtype).reshape(B, P, N, H)
