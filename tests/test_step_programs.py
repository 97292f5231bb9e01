"""The step is compiled once for every shape of a batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from laser_jax.batch import Batch, Tokens
from laser_jax.train.layout import StepPrograms, shape_of


def batch(query: int, document: int, explicit: int | None = None) -> Batch:
    def tokens(rows: int, width: int) -> Tokens:
        return Tokens(jnp.zeros((rows, width), jnp.int32), jnp.ones(rows, jnp.int32))

    return Batch(
        query=tokens(2, query),
        documents=tokens(4, document),
        explicit=None if explicit is None else tokens(2, explicit),
        keyframes_BK=None if explicit is None else jnp.zeros((2, 3), jnp.int32),
        contrast_BC=jnp.ones((2, 4), jnp.bool_),
    )


class Traced:
    """A step that counts how often it is traced."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, state: jax.Array, batch: Batch, teacher: Any) -> tuple[jax.Array, Any]:
        self.times += 1
        read = batch.query.ids_BT.size + (0 if batch.explicit is None else 1000)
        return state + 1, {"read": jnp.int32(read)}


def test_a_shape_is_said_in_words() -> None:
    assert shape_of(batch(8, 16)) == "queries 2 x 8, documents 4 x 16"
    assert shape_of(batch(8, 16, 32)) == "queries 2 x 8, documents 4 x 16, explicit 2 x 32"


def test_every_shape_is_compiled_when_it_first_comes() -> None:
    step = Traced()
    programs = StepPrograms(jax.jit(step))
    state: Any = jnp.int32(0)
    shapes = [(8, 16), (8, 16), (8, 32), (8, 16), (8, 16, 32), (8, 32), (8, 16, 32)]
    read = []
    for shape in shapes:
        state, metrics = programs(state, batch(*shape), None)
        read.append(int(metrics["read"]))
    assert int(state) == len(shapes)
    assert read == [16, 16, 16, 16, 1016, 16, 1016]
    assert step.times == 3
    assert list(programs.compiled) == [
        shape_of(batch(*shape)) for shape in ((8, 16), (8, 32), (8, 16, 32))
    ]
    assert all(seconds > 0 for seconds in programs.compiled.values())


def test_shapes_alone_are_enough_to_compile() -> None:
    programs = StepPrograms(jax.jit(Traced()))
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch(8, 16))
    compiled = programs.compile(jax.ShapeDtypeStruct((), jnp.int32), abstract, None)
    state, metrics = compiled(jnp.int32(4), batch(8, 16), None)
    assert (int(state), int(metrics["read"])) == (5, 16)
    assert list(programs.compiled) == [shape_of(batch(8, 16))]


def test_the_state_may_be_donated() -> None:
    programs = StepPrograms(jax.jit(Traced(), donate_argnums=0))
    first = jnp.zeros(3, jnp.int32)
    second, _ = programs(first, batch(8, 16), None)  # pyright: ignore[reportArgumentType]
    assert first.is_deleted()
    np.testing.assert_array_equal(np.asarray(second), 1)
