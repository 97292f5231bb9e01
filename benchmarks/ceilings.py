"""What the device can do at best, measured beside the contenders: a large matmul, a large copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from benchmarks.measure import Run, Spread
from laser_jax.config import Dtype
from laser_jax.modeling.attention import exact_matmuls
from laser_jax.training.throughput import known_device

MATMUL, COPY = "large matmul", "large copy"


@dataclass(frozen=True)
class Sizes:
    """Side of the square matrices, and bytes that are copied."""

    side: int
    copied: int


def sizes(*, quick: bool) -> Sizes:
    """Large enough to fill the device, small enough to be short beside the contenders."""
    if quick:
        return Sizes(128, 2**20)
    if jax.default_backend() == "cpu":
        return Sizes(2048, 2**28)
    return Sizes(8192, 2**31)


def ceiling_runs(dtype: Dtype, of: Sizes) -> dict[str, Run]:
    """Two contenders for `time_alternating`. The copy adds 1 in place: that reads and writes every
    number, cannot be left out, and takes no new pages from the system."""
    key = jax.random.key(0)
    shape = (of.side, of.side)
    a, b = (jax.random.normal(k, shape, jnp.dtype(dtype)) for k in jax.random.split(key))
    add = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    numbers = jnp.zeros(of.copied // 4, jnp.float32)

    def copy() -> jax.Array:
        nonlocal numbers
        numbers = add(numbers)
        return numbers

    @jax.jit
    def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
        with exact_matmuls(dtype):
            return a @ b

    return {MATMUL: lambda: multiply(a, b), COPY: copy}


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s and bytes/s of the repeats."""

    flops: Spread
    bytes: Spread
    data_sheet_flops: float | None
    """Of dense bfloat16 matmuls; None in another dtype or where the device is not known."""

    def seconds(self, flops: float, moved: float) -> float:
        """The least time for work that can overlap its own traffic, of the medians: the
        roofline."""
        return max(flops / self.flops.median, moved / self.bytes.median)


def ceilings(times: Mapping[str, Sequence[float]], dtype: Dtype, of: Sizes) -> Ceilings:
    """From the times of `ceiling_runs`."""
    known = known_device(jax.devices()[0]) if jnp.dtype(dtype).itemsize == 2 else None
    return Ceilings(
        flops=Spread.of([2 * of.side**3 / seconds for seconds in times[MATMUL]]),
        bytes=Spread.of([2 * of.copied / seconds for seconds in times[COPY]]),
        data_sheet_flops=known.tflops * 1e12 if known else None,
    )
