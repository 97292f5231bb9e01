"""Attention over right-padded rows: causal for whole sequences, counted for single positions.

Right padding makes plain causal attention correct: a real token never sees the padding behind it,
and no row is ever fully masked. `causal_attention` is the one place where a kernel is called, and
`choose_kernel` the one place where it is chosen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from laser_jax.config import AttentionKernel, require
from laser_jax.modeling.kernels import blockwise_attention, one_query_attention, splash_attention
from laser_jax.sharding import shard_mapped


@struct.dataclass
class KeyValues:
    """Keys (after RoPE) and values, each [B, T, G, H]; stacked layers add a leading axis."""

    k: jax.Array
    v: jax.Array

    def write(self, new: KeyValues, slot: jax.Array) -> KeyValues:
        """These keys and values with `new` [B, 1, G, H] written at position `slot`."""
        update = jax.lax.dynamic_update_slice
        return jax.tree.map(lambda old, at_slot: update(old, at_slot, (0, slot, 0, 0)), self, new)


@struct.dataclass
class Past:
    """What a thinking step reads: the prompts' keys and values, by group of rows, and those of the
    earlier thoughts of all rows."""

    prefixes: tuple[KeyValues, ...]
    suffix: KeyValues


def accumulation_dtype(dtype: DTypeLike) -> np.dtype:
    """float32 for everything up to it; float64 stays, so that gradients can be checked in it."""
    return np.promote_types(dtype, np.float32)


def exact_matmuls(dtype: DTypeLike) -> contextlib.AbstractContextManager[object]:
    """Within this, float32 matmuls are float32: by default GPUs round their inputs to TF32 and TPUs
    to bfloat16. Other dtypes are left alone."""
    if jnp.dtype(dtype) == jnp.float32:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


def choose_kernel(
    wanted: Literal["auto"] | AttentionKernel, platform: str, dtype: DTypeLike, head_dim: int
) -> tuple[AttentionKernel, str]:
    """The kernel that `causal_attention` is to use, and the reason in words.

    Raises:
        ConfigError: the wanted kernel cannot run there.
    """
    in_eights, in_blocks = head_dim % 8 == 0 and head_dim <= 128, head_dim % 64 == 0
    conditions: dict[AttentionKernel, list[tuple[bool, str]]] = {
        "cudnn": [
            (platform in ("gpu", "cuda"), "cuDNN runs on NVIDIA GPUs"),
            (jnp.dtype(dtype).itemsize == 2, "cuDNN computes in bfloat16 or float16"),
            (in_eights, f"cuDNN wants a head_dim of a multiple of 8 up to 128, not {head_dim}"),
        ],
        "splash": [
            (platform == "tpu", "splash attention runs on TPUs"),
            (in_blocks, f"splash attention wants a head_dim of a multiple of 64, not {head_dim}"),
        ],
        "xla": [],
    }
    natural: AttentionKernel = "splash" if platform == "tpu" else "cudnn"
    kernel = natural if wanted == "auto" else wanted
    checks = conditions.get(kernel, [(False, f"the kernels are {', '.join(conditions)}")])
    refusal = next((reason for holds, reason in checks if not holds), None)
    if refusal is not None and wanted == "auto":
        return "xla", refusal
    require(refusal is None, f"model.attention: {wanted} cannot run here: {refusal}")
    return kernel, "as asked" if kernel == wanted else f"its conditions hold on {platform}"


def causal_attention(q_BTNH: jax.Array, kv: KeyValues, kernel: AttentionKernel) -> jax.Array:
    """Every position attends to itself and everything before it. Returns [B, T, N, H]."""
    if kernel == "splash":
        heads = ("batch", None, "heads", None)
        kv_heads = ("batch", None, "kv_heads", None)
        return shard_mapped(splash_attention, (heads, kv_heads, kv_heads), heads)(
            q_BTNH, kv.k, kv.v
        )
    # a length that `jax.export` leaves open cannot be cut into blocks
    if kernel == "cudnn" or not isinstance(q_BTNH.shape[1], int):
        attend = jax.nn.dot_product_attention
        return attend(q_BTNH, kv.k, kv.v, is_causal=True, implementation=kernel)
    return blockwise_attention(q_BTNH, kv.k, kv.v)


def merge_groups(groups: Sequence[jax.Array]) -> jax.Array:
    """Rows of several groups as one batch: each row of the smallest group is followed by its share
    of the others (a query by its documents), so that rows that live on one device stay there."""
    rows = min(x.shape[0] for x in groups)
    if len(groups) == 1:
        return groups[0]
    parts = [x.reshape(rows, x.shape[0] // rows, *x.shape[1:]) for x in groups]
    merged = jnp.concatenate(parts, axis=1)
    return merged.reshape(-1, *groups[0].shape[1:])


def split_groups(x: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """The groups, of `sizes` rows, that `merge_groups` joined."""
    if len(sizes) == 1:
        return [x]
    rows = min(sizes)
    ends = np.cumsum([size // rows for size in sizes])
    parts = jnp.split(x.reshape(rows, ends[-1], *x.shape[1:]), ends[:-1], axis=1)
    return [part.reshape(-1, *x.shape[1:]) for part in parts]


def thinking_attention(
    q_B1NH: jax.Array, past: Past, lengths_B: jax.Array, slot: jax.Array, kernel: AttentionKernel
) -> jax.Array:
    """One more position behind each prompt and the thoughts up to `slot`. Returns [B, 1, N, H]."""

    def attend(prefix: KeyValues, q: jax.Array, lengths_B: jax.Array, k: Any, v: Any) -> jax.Array:
        if kernel != "cudnn":
            suffix = KeyValues(k, v)
            return counted_attention(q, prefix, lengths_B[:, None], suffix, slot + 1)
        B, _, N, H = q.shape
        q_BGMH = q.reshape(B, -1, N // k.shape[2], H)
        out: Any = one_query_attention(q_BGMH, prefix.k, prefix.v, lengths_B, k, v, slot + 1)
        return out.reshape(q.shape)

    sizes = [prefix.k.shape[0] for prefix in past.prefixes]
    groups = (split_groups(x, sizes) for x in (q_B1NH, lengths_B, past.suffix.k, past.suffix.v))
    return merge_groups([attend(*group) for group in zip(past.prefixes, *groups, strict=True)])


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
    mean = partial(jnp.einsum, "bgmpt,btgh->bpgmh", preferred_element_type=accumulate)
    out = mean(weights[..., :T], prefix.v)
    if suffix is not None:
        out += mean(weights[..., T:], suffix.v)
    return out.astype(q_BPNH.dtype).reshape(B, P, N, H)
