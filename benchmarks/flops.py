"""What a program computes and moves, counted, and what the device can do at best, measured.

`compiled.cost_analysis()` counts the body of a loop once, however often it runs, and our layers and
thinking steps are loops. So the matmuls are counted in the traced program instead, where a scan
knows its length; both agree on programs without loops (tests/test_roofline.py). What encoding costs
by formula, whatever the program, is `laser_jax.train.throughput.forward_flops` of
`encode_reading`; the least bytes that it moves are below, and so are the two ceilings that are
timed beside the contenders: a large matmul and a large copy.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.measure import Name, Run, Spread, time_alternating
from benchmarks.workload import make_backbone, random_variables
from laser_jax.config import BackboneConfig, Dtype
from laser_jax.modeling.attention import exact_matmuls
from laser_jax.train.throughput import Reading, forward_flops, known_device

# --- counted in a traced program -----------------------------------------------------------------


def matmul_flops(jaxpr: Any) -> int:
    """Operations of all matmuls of a traced program, two for each multiply-add. Raises a ValueError
    where matmuls stand in a `while_loop`, whose length nobody knows."""
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
            continue
        # of a cond's branches one runs; other primitives hold one program
        inner = max(map(matmul_flops, _inner(equation.params)), default=0)
        if name == "while" and inner:
            raise ValueError("the matmuls of a while loop cannot be counted; use lax.scan")
        total += inner * (equation.params["length"] if name == "scan" else 1)
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The programs that an equation holds."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)  # a closed one holds the program
            if hasattr(item, "eqns"):
                yield item


# --- by formula --------------------------------------------------------------------------------


def encode_reading(lengths: Sequence[int], thinking_steps: int) -> Reading:
    """What embedding rows of these lengths reads."""
    return Reading(
        rows=len(lengths),
        tokens=sum(lengths),
        token_pairs=sum(n * (n + 1) / 2 for n in lengths),
        selected=len(lengths),
        thoughts=len(lengths) * (thinking_steps - 1),
    )


@functools.cache
def parameters(config: BackboneConfig) -> int:
    """The numbers that a backbone holds."""
    backbone = make_backbone(config, "float32", lora=None)
    shapes = jax.eval_shape(lambda: random_variables(backbone))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def moved_bytes(
    config: BackboneConfig, lengths: Sequence[int], itemsize: int
) -> tuple[float, float]:
    """The least traffic of reading prompts, and of one thinking step of all rows. Activations are
    taken to stay on the chip.

    Reading: the weights of all layers and the tokens' embeddings in, keys and values out, once
    each. A thought: the weights of all layers, the LM head and the embedding table, which the
    softmax between them makes two readings of V D numbers even where they are one table, and the
    prompts' keys and values.
    """
    D, V, tokens = config.hidden_size, config.vocab_size, sum(lengths)
    layers = parameters(config) - V * D * (1 if config.tie_word_embeddings else 2)
    key_values = config.num_layers * 2 * config.num_kv_heads * config.head_dim
    reading = layers + tokens * D + tokens * key_values
    return itemsize * reading, itemsize * (layers + 2 * V * D + tokens * key_values)


def roofline(
    lengths: Sequence[int],
    thinking_steps: int,
    config: BackboneConfig,
    dtype: Dtype,
    best: Ceilings,
) -> float:
    """The least seconds in which rows of these lengths can be embedded."""
    read, one = (forward_flops(config, encode_reading(lengths, K)) for K in (1, 2))
    bytes_read, bytes_thought = moved_bytes(config, lengths, jnp.dtype(dtype).itemsize)
    thought = best.seconds(one - read, bytes_thought)
    return best.seconds(read, bytes_read) + (thinking_steps - 1) * thought


# --- the device at its best ----------------------------------------------------------------------

MATMUL, COPY = "large matmul", "large copy"


def time_beside_ceilings(
    contenders: Mapping[Name, Run], options: argparse.Namespace
) -> tuple[dict[Any, list[float]], Ceilings]:
    """Times contenders in turn with each other, and with a large matmul and a large copy: large
    enough to fill the device, small enough to be short beside the contenders."""
    side, copied = (2048, 2**28) if jax.default_backend() == "cpu" else (8192, 2**31)
    if options.quick:
        side, copied = 128, 2**20
    both: dict[Any, Run] = {**contenders, **ceiling_runs(options.dtype, side, copied)}
    times = time_alternating(both, repeats=options.repeats)
    return times, ceilings(times, options.dtype, side, copied)


def ceiling_runs(dtype: Dtype, side: int, copied: int) -> dict[str, Run]:
    """A product of two square matrices, and a copy of so many bytes. The copy adds 1 in place: that
    reads and writes every number, cannot be left out, and takes no new pages from the system."""
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (side, side), jnp.dtype(dtype)) for key in keys)
    add = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    numbers = jnp.zeros(copied // 4, jnp.float32)

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

    def shares(self, flops: float, seconds: float) -> dict[str, float]:
        """What work that took so long reached of a large matmul and, where it is known, of the
        data sheet (MFU)."""
        found = {
            "of_matmul": flops / seconds / self.flops.median,
            "matmul_flops_per_second": self.flops.median,
        }
        if self.data_sheet_flops is not None:
            found["mfu"] = flops / seconds / self.data_sheet_flops
        return found


def ceilings(
    times: Mapping[Any, Sequence[float]], dtype: Dtype, side: int, copied: int
) -> Ceilings:
    """From the times of `ceiling_runs`."""
    known = known_device(jax.devices()[0]) if jnp.dtype(dtype).itemsize == 2 else None
    return Ceilings(
        flops=Spread.of([2 * side**3 / seconds for seconds in times[MATMUL]]),
        bytes=Spread.of([2 * copied / seconds for seconds in times[COPY]]),
        data_sheet_flops=known.tflops * 1e12 if known else None,
    )
