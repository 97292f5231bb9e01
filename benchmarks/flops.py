"""What a program computes and moves, counted by formula.

`compiled.cost_analysis()` counts the body of a loop once, however often it runs, and our layers and
thinking steps are loops. So the matmuls are counted in the traced program instead, where a scan
knows its length; both agree on programs without loops (tests/test_benchmarks.py). What encoding
costs by formula, whatever the program, is `laser_jax.training.throughput.forward_flops` of
`encode_reading`; the least bytes that it moves are below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from laser_jax.config import BackboneConfig
from laser_jax.training.throughput import Reading


def matmul_flops(function: Callable[..., Any], *args: Any) -> int:
    """Operations of all matmuls of `function(*args)`: two for each multiply-add.

    Args:
        args: arrays or abstract values.

    Raises:
        ValueError: matmuls stand in a `while_loop`, whose length nobody knows.
    """
    return _flops(jax.make_jaxpr(function)(*args).jaxpr)


def _flops(jaxpr: Any) -> int:
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
        inner = max(map(_flops, _inner(equation.params)), default=0)
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


def encode_reading(lengths: Sequence[int], thinking_steps: int, *, causal: bool = True) -> Reading:
    """What embedding rows of these lengths reads.

    Args:
        causal: False counts all pairs of positions, as a kernel computes them that masks half.
    """
    return Reading(
        rows=len(lengths),
        tokens=sum(lengths),
        token_pairs=sum(n * (n + 1) / 2 if causal else n * n for n in lengths),
        selected=len(lengths),
        thoughts=len(lengths) * (thinking_steps - 1),
    )


def parameters(config: BackboneConfig) -> int:
    """The numbers that a backbone holds."""
    D, V, H = config.hidden_size, config.vocab_size, config.head_dim
    NH, GH = config.num_heads * H, config.num_kv_heads * H
    norms = 2 * D + (2 * H if config.qk_norm else 0)
    layer = 2 * D * NH + 2 * D * GH + 3 * D * config.intermediate_size + norms
    return config.num_layers * layer + D + V * D * (1 if config.tie_word_embeddings else 2)


def reading_bytes(config: BackboneConfig, lengths: Sequence[int], itemsize: int) -> float:
    """The least traffic of reading prompts: the weights of all layers and the tokens' embeddings
    in, keys and values out, once each. Activations are taken to stay on the chip."""
    D, V = config.hidden_size, config.vocab_size
    layers = parameters(config) - V * D * (1 if config.tie_word_embeddings else 2)
    tokens = sum(lengths)
    return itemsize * (layers + tokens * D + tokens * _key_values(config))


def thought_bytes(config: BackboneConfig, lengths: Sequence[int], itemsize: int) -> float:
    """The least traffic of one thinking step of all rows: the weights of all layers, the LM head
    and the embedding table, which the softmax between them makes two readings of V D numbers even
    where they are one table, and the prompts' keys and values."""
    D, V = config.hidden_size, config.vocab_size
    layers = parameters(config) - V * D * (1 if config.tie_word_embeddings else 2)
    return itemsize * (layers + 2 * V * D + sum(lengths) * _key_values(config))


def _key_values(config: BackboneConfig) -> int:
    """Numbers that all layers keep of a token."""
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim
