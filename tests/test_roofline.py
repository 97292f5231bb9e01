"""What encoding computes and moves by formula, and what is counted in a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.flops import (
    COPY,
    MATMUL,
    Ceilings,
    ceilings,
    encode_reading,
    matmul_flops,
    moved_bytes,
    parameters,
    roofline,
)
from benchmarks.measure import Spread
from benchmarks.workload import SHAPES
from laser_jax.config import ScratchConfig
from laser_jax.train.throughput import forward_flops

MIDDLING = ScratchConfig(
    hidden_size=256, num_layers=3, num_heads=4, head_dim=64, intermediate_size=512
).backbone(vocab_size=2000)


def test_the_least_traffic_is_every_weight_once_and_the_keys_and_values() -> None:
    c = MIDDLING
    table = c.vocab_size * c.hidden_size
    key_values = 2 * c.num_layers * c.num_kv_heads * c.head_dim
    weights = parameters(c) - table  # tied
    assert parameters(SHAPES["llama-3.1-8b"]) == 8_030_261_248
    assert moved_bytes(c, [10, 30], 2) == (
        2 * (weights + 40 * c.hidden_size + 40 * key_values),
        2 * (weights + 2 * table + 40 * key_values),
    )


def device(flops: float, moved: float) -> Ceilings:
    return Ceilings(Spread.of([0.9 * flops, flops, 2 * flops]), Spread.of([moved]), None)


def test_thoughts_cost_the_same_each() -> None:
    best = device(1e9, 1e8)
    one, two, five = (roofline([8, 8], K, MIDDLING, "float32", best) for K in (1, 2, 5))
    assert five - one == pytest.approx(4 * (two - one))
    busy = roofline([8, 8], 5, MIDDLING, "float32", device(1.0, 1e30))
    assert busy == pytest.approx(forward_flops(MIDDLING, encode_reading([8, 8], 5)))


def test_a_roofline_is_the_slower_ceiling_of_each_kind_of_work() -> None:
    read, thought = moved_bytes(MIDDLING, [100], 2)
    flops = forward_flops(MIDDLING, encode_reading([100], 1))
    # reading is bound by its matmuls, a thought by what it moves
    best = device(flops / (2 * read), 1.0)
    assert roofline([100], 3, MIDDLING, "bfloat16", best) == pytest.approx(2 * read + 2 * thought)


def test_ceilings_are_those_of_every_repeat() -> None:
    times = {MATMUL: [1.0, 2.0, 9.0], COPY: [3.0, 4.0, 5.0]}
    best = ceilings(times, "float32", side=100, copied=400)
    assert (best.flops.minimum, best.flops.median, best.flops.maximum) == (2e6 / 9, 1e6, 2e6)
    assert (best.bytes.median, best.data_sheet_flops) == (200.0, None)
    assert best.shares(1e6, 4.0) == {"of_matmul": 0.25, "matmul_flops_per_second": 1e6}


def matmuls(function: Callable[..., Any], *args: Any) -> int:
    return matmul_flops(jax.make_jaxpr(function)(*args).jaxpr)


def test_matmuls_are_counted_as_xla_counts_them_and_once_for_every_turn_of_a_loop() -> None:
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))

    def twice(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w @ w

    def looped(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jax.checkpoint(jnp.dot)(x, w), None), x, None, length=5)[
            0
        ]

    cost: Any = jax.jit(twice).lower(x, w).compile().cost_analysis()
    assert matmuls(twice, x, w) == cost["flops"] == 2 * (2 * 4 * 8 * 8)
    assert matmuls(jax.jit(looped), x, w) == 5 * (2 * 4 * 8 * 8)
    # backward: one matmul for x and one for w each turn, and the forward pass again
    assert matmuls(jax.grad(lambda w: looped(x, w).sum()), w) >= 2 * matmuls(looped, x, w)

    def endless(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x)

    with pytest.raises(ValueError, match="while loop"):
        matmuls(endless, x)
