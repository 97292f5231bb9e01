"""What the backbone keeps for the backward pass, and how its heads lie."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from laser_jax.modeling import kernels
from laser_jax.modeling.backbone import _rms_normed, _swiglu


def kept(function, *inputs: jax.Array) -> list[tuple[tuple[int, ...], str]]:
    """Shape and dtype of every array that the backward pass holds on to."""
    _, backward = jax.vjp(function, *inputs)
    return [(x.shape, str(x.dtype)) for x in jax.tree.leaves(backward)]


def test_norms_and_gates_keep_their_inputs_alone() -> None:
    x, scale = jnp.ones((3, 16), jnp.bfloat16), jnp.ones(16, jnp.bfloat16)
    normed = kept(lambda x, scale: _rms_normed(x, scale, 1e-6), x, scale)
    assert sorted(normed) == [((3, 16), "bfloat16"), ((16,), "bfloat16")]
    assert kept(_swiglu, x, x) == [((3, 16), "bfloat16")] * 2


def test_heads_laid_out_for_a_tpu_are_the_same_with_their_gradients(monkeypatch) -> None:
    x = jnp.arange(24.0).reshape(2, 3, 4)

    def cubes(x: jax.Array) -> jax.Array:
        return (kernels.laid_out(x) ** 3).sum()

    assert "optimization_barrier" not in str(jax.make_jaxpr(cubes)(x))
    monkeypatch.setattr(kernels, "_platform", lambda: "tpu")
    assert "optimization_barrier" in str(jax.make_jaxpr(lambda x: cubes(x))(x))
    value, gradient = jax.jit(jax.value_and_grad(cubes))(x)
    assert value == (x**3).sum()
    assert (gradient == 3 * x**2).all()
