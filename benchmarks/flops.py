"""Floating-point operations of a program, counted by formula.

`compiled.cost_analysis()` counts the body of a loop once, however often it runs, and our layers and
thinking steps are loops. So the matmuls are counted in the traced program instead, where a scan
knows its length; both agree on programs without loops (tests/test_benchmarks.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


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
