"""Attention over right-padded rows: causal for whole sequences, counted for single positions.

Right padding makes plain causal attention correct: a real token never sees the padding behind it,
and no row is ever fully masked. `causal_attention` is the one place where a kernel is called, and
`choose_kernel` the one place where it is chosen.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, Literal

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
    q_B1NH: jax.Array,
    past: Past,
    lengths_B: jax.Array,
    slot: jax.Array,
    kernel: AttentionKernel,
) -> jax.Array:
    """One more position behind each prompt and the thoughts up to `slot`. Returns [B, 1, N, H]."""
    attend = _thinking_on_gpu if kernel == "cudnn" else _thinking
    sizes = [prefix.k.shape[0] for prefix in past.prefixes]
    groups = (split_groups(x, sizes) for x in (q_B1NH, lengths_B, past.suffix.k, past.suffix.v))
    return merge_groups(
        [
            attend(q, prefix, lengths, KeyValues(k, v), slot + 1)
            for prefix, q, lengths, k, v in zip(past.prefixes, *groups, strict=True)
        ]
    )


def _thinking(
    q_B1NH: jax.Array,
    prefix: KeyValues,
    lengths_B: jax.Array,
    suffix: KeyValues,
    written: jax.Array,
) -> jax.Array:
    return counted_attention(q_B1NH, prefix, lengths_B[:, None], suffix, written)


def _thinking_on_gpu(
    q_B1NH: jax.Array,
    prefix: KeyValues,
    lengths_B: jax.Array,
    suffix: KeyValues,
    written: jax.Array,
) -> jax.Array:
    G = prefix.k.shape[2]
    q_BGMH = q_B1NH.reshape(q_B1NH.shape[0], G, -1, q_B1NH.shape[-1])
    out_BGMH: Any = one_query_attention(q_BGMH, prefix, lengths_B, suffix, written, "cudnn")
    return out_BGMH.reshape(q_B1NH.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def one_query_attention(
    q_BGMH: jax.Array,
    prefix: KeyValues,
    lengths_B: jax.Array,
    suffix: KeyValues,
    written: jax.Array,
    implementation: Literal["cudnn", "xla"],
) -> jax.Array:
    """`counted_attention` of one query in few and large kernels: the prefix goes through that of
    `jax.nn.dot_product_attention`, whose log-sum-exp joins it with the thoughts.

    The backward pass computes the weights again from the log-sum-exp of all keys (FlashAttention,
    arXiv 2205.14135). It never writes the outer products of weights and queries in float32, as the
    transposed matmuls do, which have two or so columns to sum over.

    Args:
        q_BGMH: a query for each of the M heads that share a key-value head.
        lengths_B: how many of the prefix's keys it sees.
        suffix: the thoughts' keys and values, of which the first `written` are seen.

    Returns:
        [B, G, M, H] in the dtype of the queries.
    """
    return _one_query_forward(q_BGMH, prefix, lengths_B, suffix, written, implementation)[0]


def _one_query_forward(
    q_BGMH: jax.Array,
    prefix: KeyValues,
    lengths_B: jax.Array,
    suffix: KeyValues,
    written: jax.Array,
    implementation: Literal["cudnn", "xla"],
) -> tuple[jax.Array, Any]:
    B, G, M, H = q_BGMH.shape
    wide = accumulation_dtype(q_BGMH.dtype)
    read, log_sum = jax.nn.dot_product_attention(
        q_BGMH.reshape(B, 1, G * M, H),
        prefix.k,
        prefix.v,
        key_value_seq_lengths=lengths_B.astype(jnp.int32),
        implementation=implementation,
        return_residual=True,
    )
    log_sum_BGM = log_sum.reshape(B, G, M)
    scores_BSGM = _few_scores(q_BGMH, suffix, written)
    peak_BGM = jnp.maximum(log_sum_BGM, scores_BSGM.max(axis=1))
    read_BGM = jnp.exp(log_sum_BGM - peak_BGM)
    thought_BSGM = jnp.exp(scores_BSGM - peak_BGM[:, None])
    total_BGM = read_BGM + thought_BSGM.sum(axis=1)
    out = read.reshape(B, G, M, H).astype(wide) * read_BGM[..., None]
    out += (thought_BSGM[..., None] * suffix.v.astype(wide)[:, :, :, None]).sum(axis=1)
    out_BGMH = (out / total_BGM[..., None]).astype(q_BGMH.dtype)
    saved = (q_BGMH, prefix, lengths_B, suffix, written, out_BGMH, peak_BGM + jnp.log(total_BGM))
    return out_BGMH, saved


def _one_query_backward(_: str, saved: Any, g_BGMH: jax.Array) -> tuple[Any, ...]:
    q_BGMH, prefix, lengths_B, suffix, written, out_BGMH, log_sum_BGM = saved
    wide, dtype, scale = accumulation_dtype(q_BGMH.dtype), q_BGMH.dtype, q_BGMH.shape[-1] ** -0.5
    q, g = q_BGMH.astype(wide), g_BGMH.astype(wide)
    mean_BGM = (g * out_BGMH.astype(wide)).sum(axis=-1)

    # the prefix: two matmuls for the weights and their gradients, one for the query's
    T = prefix.k.shape[1]
    scores_BGMT = _wide_einsum("bgmh,btgh->bgmt", q_BGMH, prefix.k) * scale
    seen_B11T = (jnp.arange(T)[None] < lengths_B[:, None])[:, None, None]
    weights_BGMT = jnp.where(seen_B11T, jnp.exp(scores_BGMT - log_sum_BGM[..., None]), 0.0)
    d_BGMT = _wide_einsum("bgmh,btgh->bgmt", g_BGMH, prefix.v) - mean_BGM[..., None]
    d_BGMT = weights_BGMT * d_BGMT * scale
    dq_BGMH = _wide_einsum("bgmt,btgh->bgmh", d_BGMT.astype(dtype), prefix.k)
    d_prefix = KeyValues(_outer_sum(d_BGMT, q), _outer_sum(weights_BGMT, g))

    # the thoughts, a few of them
    k_BSG1H, v_BSG1H = (x.astype(wide)[:, :, :, None] for x in (suffix.k, suffix.v))
    weights_BSGM = jnp.exp(_few_scores(q_BGMH, suffix, written) - log_sum_BGM[:, None])
    d_BSGM = weights_BSGM * ((g[:, None] * v_BSG1H).sum(axis=-1) - mean_BGM[:, None]) * scale
    dq_BGMH += (d_BSGM[..., None] * k_BSG1H).sum(axis=1)
    d_suffix = KeyValues(
        (d_BSGM[..., None] * q[:, None]).sum(axis=3), (weights_BSGM[..., None] * g[:, None]).sum(3)
    )
    d_prefix, d_suffix = jax.tree.map(lambda x: x.astype(dtype), (d_prefix, d_suffix))
    return dq_BGMH.astype(dtype), d_prefix, None, d_suffix, None


one_query_attention.defvjp(_one_query_forward, _one_query_backward)


def _few_scores(q_BGMH: jax.Array, suffix: KeyValues, written: jax.Array) -> jax.Array:
    """[B, S, G, M], minus infinity where a thought is not written. Sums of products: as a matmul
    XLA would join it with that of the prefix, and copy all keys behind each other for it."""
    wide = accumulation_dtype(q_BGMH.dtype)
    products = q_BGMH.astype(wide)[:, None] * suffix.k.astype(wide)[:, :, :, None]
    scores_BSGM = products.sum(axis=-1) * q_BGMH.shape[-1] ** -0.5
    seen_1S11 = (jnp.arange(suffix.k.shape[1]) < written)[None, :, None, None]
    return jnp.where(seen_1S11, scores_BSGM, -jnp.inf)


def _wide_einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=accumulation_dtype(x.dtype))


def _outer_sum(x_BGMT: jax.Array, y_BGMH: jax.Array) -> jax.Array:
    """Outer products, summed over the heads of a group: [B, T, G, H]."""
    x_BMTG = jnp.transpose(x_BGMT, (0, 2, 3, 1))
    return (x_BMTG[..., None] * jnp.swapaxes(y_BGMH, 1, 2)[:, :, None]).sum(axis=1)


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
