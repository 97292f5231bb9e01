"""What the backbone keeps for the backward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp

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
