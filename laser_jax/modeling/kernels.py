"""Faster forms of what is plainly said elsewhere: attention, and the product of a projection.

Tests hold each against the plain one, gradients included.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Axes = Sequence[int]

WIDE = jnp.float32
"""What sums are taken in, at least; on a GPU queries, keys and values are never wider."""


def blockwise_attention(q_BTNH: jax.Array, k_BTGH: jax.Array, v_BTGH: jax.Array) -> jax.Array:
    """Causal attention of whole sequences in plain XLA, [B, T, N, H].

    Blocks of queries meet only the keys up to their own end, so that nearly half of the scores are
    never computed, and the heads of a group are rows of one matmul.
    """
    B, T, N, H = q_BTNH.shape
    G, wide = k_BTGH.shape[2], np.promote_types(q_BTNH.dtype, np.float32)
    block = max(64, -(-T // 16))  # each is laid out in the program: no more than 16
    q_BGMTH = jnp.transpose(q_BTNH.reshape(B, T, G, N // G, H), (0, 2, 3, 1, 4))
    k_BGHT = jnp.transpose(k_BTGH, (0, 2, 3, 1))
    v_BGTH = jnp.swapaxes(v_BTGH, 1, 2)
    blocks = []
    for start in range(0, T, block):
        end = min(start + block, T)
        seen = np.arange(end) <= np.tile(np.arange(start, end), N // G)[:, None]
        rows_BGRH = jax.lax.collapse(q_BGMTH[:, :, :, start:end], 2, 4)
        scores = jnp.matmul(rows_BGRH, k_BGHT[..., :end], preferred_element_type=wide) * H**-0.5
        scores = jnp.where(seen[None, None], scores, jnp.finfo(wide).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(q_BTNH.dtype)
        out = jnp.matmul(weights, v_BGTH[:, :, :end], preferred_element_type=wide)
        blocks.append(out.astype(q_BTNH.dtype).reshape(B, G, N // G, end - start, H))
    out_BGMTH = jnp.concatenate(blocks, axis=3)
    return jnp.transpose(out_BGMTH, (0, 3, 1, 2, 4)).reshape(B, T, N, H)


def splash_attention(
    q_BTNH: jax.Array, k_BTGH: jax.Array, v_BTGH: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Causal attention of whole sequences on a TPU, [B, T, N, H]. T is padded to the kernel's
    blocks of 128, which causality keeps out of sight.

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


# --- one query on a GPU ------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def one_query_attention(
    q_BGMH: jax.Array,
    k_BTGH: jax.Array,
    v_BTGH: jax.Array,
    lengths_B: jax.Array,
    k_BSGH: jax.Array,
    v_BSGH: jax.Array,
    written: jax.Array,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """`counted_attention` of a single position, in few and large kernels.

    The prompt's keys go through the kernel of `jax.nn.dot_product_attention`, whose log-sum-exp
    joins them with those of the thoughts. The backward pass computes the weights again from the
    log-sum-exp of all keys (FlashAttention, arXiv 2205.14135). The gradients of keys and values are
    outer products; as transposed matmuls, with two or so columns to sum over, they would be written
    in float32 first.

    Args:
        q_BGMH: a query for each of the M heads that share a key-value head.
        k_BTGH, v_BTGH: keys and values of the prompt, of which a row sees the first `lengths_B`.
        k_BSGH, v_BSGH: those of the thoughts, of which the first `written` are seen.
        implementation: `cudnn` wants 2-byte dtypes; `xla` runs anywhere.

    Returns:
        [B, G, M, H] in the dtype of the queries.
    """
    arrays = (q_BGMH, k_BTGH, v_BTGH, lengths_B, k_BSGH, v_BSGH, written)
    return _one_query_forward(*arrays, implementation)[0]


def _one_query_forward(
    q_BGMH: jax.Array,
    k_BTGH: jax.Array,
    v_BTGH: jax.Array,
    lengths_B: jax.Array,
    k_BSGH: jax.Array,
    v_BSGH: jax.Array,
    written: jax.Array,
    implementation: Literal["cudnn", "xla"],
) -> tuple[jax.Array, Any]:
    B, G, M, H = q_BGMH.shape
    read, log_sum = jax.nn.dot_product_attention(
        q_BGMH.reshape(B, 1, G * M, H),
        k_BTGH,
        v_BTGH,
        key_value_seq_lengths=lengths_B.astype(jnp.int32),
        implementation=implementation,
        return_residual=True,
    )
    log_sum_BGM = log_sum.reshape(B, G, M)
    scores_BSGM = _few_scores(q_BGMH, k_BSGH, written)
    peak_BGM = jnp.maximum(log_sum_BGM, scores_BSGM.max(axis=1))
    read_BGM = jnp.exp(log_sum_BGM - peak_BGM)
    thought_BSGM = jnp.exp(scores_BSGM - peak_BGM[:, None])
    total_BGM = read_BGM + thought_BSGM.sum(axis=1)
    out = read.reshape(B, G, M, H).astype(WIDE) * read_BGM[..., None]
    out += (thought_BSGM[..., None] * v_BSGH.astype(WIDE)[:, :, :, None]).sum(axis=1)
    out_BGMH = (out / total_BGM[..., None]).astype(q_BGMH.dtype)
    inputs = (q_BGMH, k_BTGH, v_BTGH, lengths_B, k_BSGH, v_BSGH, written)
    return out_BGMH, (*inputs, out_BGMH, peak_BGM + jnp.log(total_BGM))


def _one_query_backward(_: str, saved: Any, g_BGMH: jax.Array) -> tuple[jax.Array | None, ...]:
    q_BGMH, k_BTGH, v_BTGH, lengths_B, k_BSGH, v_BSGH, written, out_BGMH, log_sum_BGM = saved
    dtype, scale = q_BGMH.dtype, q_BGMH.shape[-1] ** -0.5
    q, g = q_BGMH.astype(WIDE), g_BGMH.astype(WIDE)
    mean_BGM = (g * out_BGMH.astype(WIDE)).sum(axis=-1)

    # the prompt: matmuls for the weights, their gradients and the query's
    scores_BGMT = _einsum("bgmh,btgh->bgmt", q_BGMH, k_BTGH) * scale
    seen_BT = jnp.arange(k_BTGH.shape[1])[None] < lengths_B[:, None]
    weights_BGMT = jnp.exp(scores_BGMT - log_sum_BGM[..., None])
    weights_BGMT = jnp.where(seen_BT[:, None, None], weights_BGMT, 0.0)
    d_BGMT = _einsum("bgmh,btgh->bgmt", g_BGMH, v_BTGH) - mean_BGM[..., None]
    d_BGMT = weights_BGMT * d_BGMT * scale
    dq_BGMH = _einsum("bgmt,btgh->bgmh", d_BGMT.astype(dtype), k_BTGH)
    dk_BTGH, dv_BTGH = _outer_sum(d_BGMT, q), _outer_sum(weights_BGMT, g)

    # the thoughts, a few of them
    k_BSG1H, v_BSG1H = (x.astype(WIDE)[:, :, :, None] for x in (k_BSGH, v_BSGH))
    weights_BSGM = jnp.exp(_few_scores(q_BGMH, k_BSGH, written) - log_sum_BGM[:, None])
    d_BSGM = weights_BSGM * ((g[:, None] * v_BSG1H).sum(axis=-1) - mean_BGM[:, None]) * scale
    dq_BGMH += (d_BSGM[..., None] * k_BSG1H).sum(axis=1)
    dk_BSGH = (d_BSGM[..., None] * q[:, None]).sum(axis=3)
    dv_BSGH = (weights_BSGM[..., None] * g[:, None]).sum(axis=3)

    gradients = (dq_BGMH, dk_BTGH, dv_BTGH, None, dk_BSGH, dv_BSGH, None)
    return tuple(None if d is None else d.astype(dtype) for d in gradients)


one_query_attention.defvjp(_one_query_forward, _one_query_backward)


def _few_scores(q_BGMH: jax.Array, k_BSGH: jax.Array, written: jax.Array) -> jax.Array:
    """[B, S, G, M], minus infinity where a thought is not written. Sums of products: as a matmul
    XLA would join it with that of the prompt, and copy all keys behind each other for it."""
    products = q_BGMH.astype(WIDE)[:, None] * k_BSGH.astype(WIDE)[:, :, :, None]
    scores_BSGM = products.sum(axis=-1) * q_BGMH.shape[-1] ** -0.5
    seen_1S11 = (jnp.arange(k_BSGH.shape[1]) < written)[None, :, None, None]
    return jnp.where(seen_1S11, scores_BSGM, -jnp.inf)


def _outer_sum(x_BGMT: jax.Array, y_BGMH: jax.Array) -> jax.Array:
    """Outer products, summed over the heads of a group: [B, T, G, H]."""
    x_BMTG = jnp.transpose(x_BGMT, (0, 2, 3, 1))
    return (x_BMTG[..., None] * jnp.swapaxes(y_BGMH, 1, 2)[:, :, None]).sum(axis=1)


def _einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=WIDE)


# --- projections ---------------------------------------------------------------------------------


def _platform() -> str:
    """What a program is being traced for: the devices of the mesh in use, which this machine need
    not have, or else jax's default ones."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def laid_out(x: jax.Array) -> jax.Array:
    """x. On a TPU it is this that XLA brings into another layout; else it would be what a norm
    makes of it, float32, at twice the bytes."""
    return jax.lax.optimization_barrier(x) if _platform() == "tpu" else x


def paired(x: jax.Array) -> jax.Array:
    """A single row [1, ..., I] twice, anything else as it is. XLA's CPU compiler multiplies one row
    of bfloat16 up to fifteen times slower than two; the caller drops the second result."""
    alone = x.ndim > 1 and x.size == x.shape[-1]
    slow = x.dtype.itemsize == 2 and _platform() == "cpu"
    return jnp.concatenate([x, x]) if alone and slow else x


def _product(x: jax.Array, y: jax.Array, x_axes: Axes, y_axes: Axes) -> jax.Array:
    """Sums over these axes of x and y, in their dtype. On a CPU with units for bfloat16 (AMX) XLA
    takes them only where float32 comes out; else it computes in float32, five times slower.

    float32 is multiplied as such, also outside of `modeling.attention.exact_matmuls`.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    wide = np.promote_types(x.dtype, WIDE) if _platform() == "cpu" else None
    dimensions = ((x_axes, y_axes), ((), ()))
    return jax.lax.dot_general(
        x, y, dimensions, precision=precision, preferred_element_type=wide
    ).astype(x.dtype)


def _rows_times(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    return _product(paired(x), w, (x.ndim - 1,), (axis,))[: x.shape[0]]


def matmul(x: jax.Array, w: jax.Array, *, reverse_only: bool = False) -> jax.Array:
    """x @ w for x [..., I] and w [I, O], in their dtype; the gradient of a frozen weight is not
    computed.

    Args:
        reverse_only: no forward mode is wanted, only `jax.grad`. Gradients of 2-byte arrays on a
            CPU then have a form of their own; nothing else changes.
    """
    narrow = x.dtype.itemsize == 2 and _platform() == "cpu"
    return _narrow_matmul(x, w) if reverse_only and narrow else _rows_times(x, w, 0)


@jax.custom_vjp
def _narrow_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """`matmul`, whose gradients are products of 2-byte arrays as well: jax's own would take the
    float32 that comes out of the product, and the weights would be widened to meet it."""
    return _rows_times(x, w, 0)


def _narrow_forward(x: Any, w: Any) -> tuple[jax.Array, Any]:
    return _rows_times(x.value, w.value, 0), (x.value if w.perturbed else None, w.value)


def _narrow_backward(
    saved: tuple[jax.Array | None, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    x, w = saved
    dx = _rows_times(g, w, 1)
    if x is None:
        return dx, None
    rows = range(x.ndim - 1)
    # XLA's CPU compiler copies the first operand into its transpose: the narrower one
    wide = w.shape[0] > w.shape[1]
    return dx, _product(g, x, rows, rows).T if wide else _product(x, g, rows, rows)


_narrow_matmul.defvjp(_narrow_forward, _narrow_backward, symbolic_zeros=True)
