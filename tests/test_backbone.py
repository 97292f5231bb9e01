"""What the backbone keeps for the backward pass, and its soft token on a GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from laser_jax.config import ScratchConfig
from laser_jax.modeling.backbone import VOCABULARY_PARTS, Backbone, _rms_normed, _swiglu, apply

CONFIG = ScratchConfig(hidden_size=16, num_layers=2, num_heads=2, head_dim=8, intermediate_size=24)


def kept(function, *inputs: jax.Array) -> list[tuple[tuple[int, ...], str]]:
    """Shape and dtype of every array that the backward pass holds on to."""
    _, backward = jax.vjp(function, *inputs)
    return [(x.shape, str(x.dtype)) for x in jax.tree.leaves(backward)]


def test_norms_and_gates_keep_their_inputs_alone() -> None:
    x, scale = jnp.ones((3, 16), jnp.bfloat16), jnp.ones(16, jnp.bfloat16)
    normed = kept(lambda x, scale: _rms_normed(x, scale, 1e-6), x, scale)
    assert sorted(normed) == [((3, 16), "bfloat16"), ((16,), "bfloat16")]
    assert kept(_swiglu, x, x) == [((3, 16), "bfloat16")] * 2


def test_the_soft_token_is_the_same_in_the_parts_that_a_gpu_sums() -> None:
    for vocabulary in (2 * VOCABULARY_PARTS, 2 * VOCABULARY_PARTS + 1):  # cut, and not to be cut
        config = CONFIG.backbone(vocab_size=vocabulary)
        backbone = Backbone(config)
        variables = backbone.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
        h_BD = jax.random.normal(jax.random.key(1), (3, config.hidden_size), jnp.float32)
        whole, parts = (
            apply(Backbone.soft_token, backbone.clone(attention=kernel), variables, h_BD)
            for kernel in ("xla", "cudnn")
        )
        np.testing.assert_allclose(parts, whole, atol=1e-6)


def test_unrolled_layers_leave_no_loop() -> None:
    config = ScratchConfig(
        hidden_size=16, num_layers=4, num_heads=2, head_dim=8, intermediate_size=24
    ).backbone(vocab_size=64)
    ids_BT = jnp.zeros((1, 2), jnp.int32)
    looped = Backbone(config)
    variables = jax.eval_shape(looped.init, jax.random.key(0), ids_BT)
    for backbone, loops in ((looped, True), (looped.clone(unroll_layers=True), False)):
        program = jax.jit(backbone.apply).lower(variables, ids_BT).as_text()
        assert ("stablehlo.while" in program) == loops
