"""The choice of the attention kernel, the TPU kernel against XLA's, and groups of rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser_jax.config import AttentionKernel, ConfigError
from laser_jax.modeling import attention
from laser_jax.modeling.attention import (
    KeyValues,
    Past,
    causal_attention,
    choose_kernel,
    merge_groups,
    split_groups,
    thinking_attention,
)
from laser_jax.modeling.kernels import blockwise_attention, one_query_attention, splash_attention


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "kernel", "reason"),
    [
        ("cuda", jnp.bfloat16, 128, "cudnn", "conditions hold"),
        ("cuda", jnp.float32, 128, "xla", "bfloat16 or float16"),
        ("cuda", jnp.bfloat16, 132, "xla", "not 132"),
        ("tpu", jnp.bfloat16, 128, "splash", "conditions hold"),
        ("tpu", jnp.bfloat16, 32, "xla", "not 32"),
        ("cpu", jnp.bfloat16, 128, "xla", "NVIDIA"),
    ],
)
def test_auto_takes_the_kernel_of_the_platform_and_says_why(
    platform, dtype, head_dim, kernel, reason
) -> None:
    chosen, why = choose_kernel("auto", platform, dtype, head_dim)
    assert chosen == kernel
    assert reason in why


def test_a_named_kernel_that_cannot_run_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"model\.attention: cudnn cannot run here: .*NVIDIA"):
        choose_kernel("cudnn", "cpu", jnp.bfloat16, 128)
    assert choose_kernel("xla", "tpu", jnp.bfloat16, 128)[0] == "xla"
    misspelt: Any = "flash_attention_2"
    with pytest.raises(ConfigError, match="cannot run here: the kernels are cudnn, splash, xla"):
        choose_kernel(misspelt, "cpu", jnp.float32, 128)


@pytest.mark.parametrize("T", [1, 64, 65, 200, 1030])  # one block, two, many, longer ones
def test_attention_in_blocks_is_attention_with_its_gradients(T: int) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (2, T, heads, 8), jnp.float32)
        for key, heads in zip(keys, (4, 2, 2), strict=True)
    )

    @jax.jit
    def blocks(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return blockwise_attention(q, k, v)

    @jax.jit
    def whole(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    def gradients(f: Callable[..., jax.Array]) -> tuple[jax.Array, ...]:
        return jax.jit(jax.grad(lambda *a: jnp.square(f(*a)).sum(), argnums=(0, 1, 2)))(q, k, v)

    np.testing.assert_allclose(blocks(q, k, v), whole(q, k, v), atol=2e-6)
    for ours, theirs in zip(gradients(blocks), gradients(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    half = (x.astype(jnp.bfloat16) for x in (q, k, v))
    in_half = blocks(*half)
    assert in_half.dtype == jnp.bfloat16
    np.testing.assert_allclose(in_half.astype(jnp.float32), whole(q, k, v), atol=0.05)


def test_splash_attention_gives_what_xla_gives_with_its_gradients() -> None:
    B, T, N, G, H = 1, 136, 2, 1, 128  # T is no multiple of the kernel's blocks
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (B, T, heads, H), jnp.float32)
        for key, heads in zip(keys, (N, G, G), strict=True)
    )

    @functools.partial(jax.jit, static_argnums=0)
    def out(kernel: str, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if kernel == "splash":
            return splash_attention(q, k, v, interpret=True)
        return causal_attention(q, KeyValues(k, v), "xla")

    def gradients(kernel: str) -> tuple[jax.Array, ...]:
        square = jax.grad(lambda *a: jnp.square(out(kernel, *a)).mean(), argnums=(0, 1, 2))
        return jax.jit(square)(q, k, v)

    np.testing.assert_allclose(out("splash", q, k, v), out("xla", q, k, v), atol=2e-5)
    for ours, xla in zip(gradients("splash"), gradients("xla"), strict=True):
        np.testing.assert_allclose(ours, xla, atol=1e-6)


@pytest.fixture
def _no_cudnn(monkeypatch) -> None:
    """What cuDNN would compute comes from XLA."""
    monkeypatch.setattr(
        attention, "one_query_attention", lambda *arrays: one_query_attention(*arrays, "xla")
    )


@pytest.mark.usefixtures("_no_cudnn")
@pytest.mark.parametrize("slot", [0, 1, 2])  # the last thought of three is the third's own
def test_thinking_on_a_gpu_is_thinking_with_its_gradients(slot: int) -> None:
    N, G, H, S = 6, 2, 8, 3
    lengths_B = jnp.asarray([7, 5, 1, 3, 9, 4])  # two queries of 7 tokens, four documents of 9
    shapes = [(6, 1, N, H), (2, 7, G, H), (2, 7, G, H), (4, 9, G, H), (4, 9, G, H)]
    shapes += [(6, S, G, H), (6, S, G, H), (6, 1, N, H)]
    keys = jax.random.split(jax.random.key(slot), len(shapes))
    *inputs, weights = (
        jax.random.normal(key, shape, jnp.float32) for key, shape in zip(keys, shapes, strict=True)
    )

    @functools.partial(jax.jit, static_argnums=0)
    def out(kernel: AttentionKernel, q: jax.Array, *kv: jax.Array) -> jax.Array:
        prefixes = (KeyValues(kv[0], kv[1]), KeyValues(kv[2], kv[3]))
        past = Past(prefixes, KeyValues(kv[4], kv[5]))
        return thinking_attention(q, past, lengths_B, jnp.asarray(slot), kernel)

    def gradients(kernel: AttentionKernel) -> tuple[jax.Array, ...]:
        return jax.jit(
            jax.grad(
                lambda *a: (out(kernel, *a) * weights).sum(), argnums=tuple(range(len(inputs)))
            )
        )(*inputs)

    np.testing.assert_allclose(out("cudnn", *inputs), out("xla", *inputs), atol=1e-6)
    for ours, xla in zip(gradients("cudnn"), gradients("xla"), strict=True):
        np.testing.assert_allclose(ours, xla, atol=1e-6)
    if slot < S - 1:  # thoughts that are not written count for nothing
        np.testing.assert_array_equal(gradients("cudnn")[-1][:, slot + 1 :], 0.0)

    with jax.numpy_dtype_promotion("standard"):  # jax's own attention, in XLA, promotes
        in_half = out("cudnn", *(x.astype(jnp.bfloat16) for x in inputs))
    assert in_half.dtype == jnp.bfloat16
    np.testing.assert_allclose(in_half.astype(jnp.float32), out("xla", *inputs), atol=0.05)


def test_groups_are_split_as_they_were_merged_and_a_query_stands_before_its_documents() -> None:
    queries, documents = jnp.arange(3), 10 + jnp.arange(6)
    merged = merge_groups([queries, documents])
    np.testing.assert_array_equal(merged, [0, 10, 11, 1, 12, 13, 2, 14, 15])
    for got, given in zip(split_groups(merged, [3, 6]), (queries, documents), strict=True):
        np.testing.assert_array_equal(got, given)
