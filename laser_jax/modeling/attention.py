"""Attention over right-padded rows: causal for whole sequences, counted for single positions.

Right padding makes plain causal attention correct: a real token never sees the padding behind it,
and no row is ever fully masked. `causal_attention` is the one place where a kernel is called, and
`choose_kernel` the one place where it is chosen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from laser_jax.config import AttentionKernel, ConfigError
from laser_jax.sharding import shard_mapped


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
    half = jnp.dtype(dtype).itemsize == 2
    refusals: dict[AttentionKernel, str | None] = {
        "cudnn": (
            "cuDNN runs on NVIDIA GPUs"
            if platform not in ("gpu", "cuda")
            else "cuDNN computes in bfloat16 or float16"
            if not half
            else f"cuDNN wants a head_dim of a multiple of 8 up to 128, not {head_dim}"
            if head_dim % 8 or head_dim > 128
            else None
        ),
        "splash": (
            "splash attention runs on TPUs"
            if platform != "tpu"
            else f"splash attention wants a head_dim of a multiple of 64, not {head_dim}"
            if head_dim % 64
            else None
        ),
        "xla": None,
    }
    if wanted != "auto":
        if refusals[wanted] is not None:
            raise ConfigError(f"model.attention: {wanted} cannot run here: {refusals[wanted]}")
        return wanted, "as asked"
    natural: AttentionKernel = "splash" if platform == "tpu" else "cudnn"
    if refusals[natural] is not None:
        return "xla", str(refusals[natural])
    return natural, f"its conditions hold on {platform}"


def causal_attention(q_BTNH: jax.Array, kv: KeyValues, kernel: AttentionKernel) -> jax.Array:
    """Every position attends to itself and everything before it. Returns [B, T, N, H]."""
    if kernel == "splash":
        heads = ("batch", None, "heads", None)
        kv_heads = ("batch", None, "kv_heads", None)
        return shard_mapped(_splash_attention, (heads, kv_heads, kv_heads), heads)(
            q_BTNH, kv.k, kv.v
        )
    # a length that `jax.export` leaves open cannot be cut into blocks
    if kernel == "cudnn" or not isinstance(q_BTNH.shape[1], int):
        attend = jax.nn.dot_product_attention
        return attend(q_BTNH, kv.k, kv.v, is_causal=True, implementation=kernel)
    return _blockwise_attention(q_BTNH, kv)


def _blockwise_attention(q_BTNH: jax.Array, kv: KeyValues) -> jax.Array:
    """Plain XLA. Blocks of queries meet only the keys up to their own end, so that nearly half of
    the scores are never computed, and the heads of a group are rows of one matmul."""
    B, T, N, H = q_BTNH.shape
    G, wide = kv.k.shape[2], accumulation_dtype(q_BTNH.dtype)
    block = max(64, -(-T // 16))  # each is laid out in the program: no more than 16
    q_BGMTH = jnp.transpose(q_BTNH.reshape(B, T, G, N // G, H), (0, 2, 3, 1, 4))
    k_BGHT = jnp.transpose(kv.k, (0, 2, 3, 1))
    v_BGTH = jnp.swapaxes(kv.v, 1, 2)
    blocks = []
    for start in range(0, T, block):
        end = min(start + block, T)
        seen = np.arange(end) <= np.tile(np.arange(start, end), N // G)[:, None]
        rows_BGRH = q_BGMTH[:, :, :, start:end].reshape(B, G, -1, H)
        scores = jnp.matmul(rows_BGRH, k_BGHT[..., :end], preferred_element_type=wide) * H**-0.5
        scores = jnp.where(seen[None, None], scores, jnp.finfo(wide).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(q_BTNH.dtype)
        out = jnp.matmul(weights, v_BGTH[:, :, :end], preferred_element_type=wide)
        blocks.append(out.astype(q_BTNH.dtype).reshape(B, G, N // G, -1, H))
    out_BGMTH = jnp.concatenate(blocks, axis=3)
    return jnp.transpose(out_BGMTH, (0, 3, 1, 2, 4)).reshape(B, T, N, H)


def _splash_attention(
    q_BTNH: jax.Array, k_BTGH: jax.Array, v_BTGH: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """The TPU kernel; T is padded to its blocks of 128, which causality keeps out of sight.

    Args:
        interpret: runs it anywhere, slowly: for tests without a TPU.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        MultiHeadMask,
        make_splash_mha_single_device,
    )

    T, N, H = q_BTNH.shape[1:]
    padded = -(-T // 128) * 128
    block = next(size for size in (512, 384, 256, 128) if padded % size == 0)
    q, k, v = (
        jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, padded - T), (0, 0)))
        for x in (q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype), k_BTGH, v_BTGH)
    )
    kernel = make_splash_mha_single_device(
        MultiHeadMask([CausalMask((padded, padded))] * N),
        block_sizes=BlockSizes(*(block,) * 3, *(block,) * 3, block_q_dq=block, block_kv_dq=block),
        interpret=interpret,
    )
    out: jax.Array = jnp.asarray(jax.vmap(kernel)(q, k, v))
    return jnp.swapaxes(out[:, :, :T], 1, 2)


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
    q_B1NH: jax.Array, past: Past, lengths_B: jax.Array, slot: jax.Array
) -> jax.Array:
    """One more position behind each prompt and the thoughts up to `slot`. Returns [B, 1, N, H]."""
    sizes = [prefix.k.shape[0] for prefix in past.prefixes]
    groups = (split_groups(x, sizes) for x in (q_B1NH, lengths_B, past.suffix.k, past.suffix.v))
    return merge_groups(
        [
            counted_attention(q, prefix, lengths[:, None], KeyValues(k, v), slot + 1)
            for prefix, q, lengths, k, v in zip(past.prefixes, *groups, strict=True)
        ]
    )


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
