"""The product that all projections are, and the rotations: values, gradients, and what of them is
computed at all."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import laser_jax.modeling.kernels
from benchmarks.flops import matmul_flops
from laser_jax import encode
from laser_jax.config import RetrieverConfig, RopeScaling, ScratchConfig
from laser_jax.modeling.backbone import Backbone, apply, unstack_layers
from laser_jax.modeling.kernels import matmul
from laser_jax.modeling.rope import rope_at, rope_from_zero

CONFIG = ScratchConfig(
    hidden_size=16, num_layers=2, num_heads=2, head_dim=8, intermediate_size=24
).backbone(vocab_size=31)


def random(shape: tuple[int, ...], dtype: str, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("out", [5, 300])  # the gradient of a wide and of a narrow weight
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("reverse_only", [False, True])
def test_a_product_and_its_gradients_are_rounded_once(
    dtype: str, out: int, reverse_only: bool
) -> None:
    x, w, g = (
        random((2, 7, 64), dtype, 0),
        random((64, out), dtype, 1),
        random((2, 7, out), dtype, 2),
    )
    y, backward = jax.vjp(functools.partial(matmul, reverse_only=reverse_only), x, w)
    dx, dw = backward(g)
    exact = [np.asarray(a, np.float64) for a in (x, w, g)]
    wanted = {
        "y": (y, exact[0] @ exact[1], 64),
        "dx": (dx, exact[2] @ exact[1].T, out),
        "dw": (dw, np.einsum("bti,bto->io", exact[0], exact[2]), 14),
    }
    for name, (got, right, terms) in wanted.items():
        assert got.dtype == dtype, name
        half_a_step = np.abs(right) * float(jnp.finfo(dtype).eps) / 2
        # sums are float32: their own error is that of float32, whatever is summed
        np.testing.assert_array_less(
            np.abs(np.asarray(got, np.float64) - right),
            half_a_step + terms * 8 * np.finfo(np.float32).eps,
            err_msg=name,
        )


def sums_of_bfloat16() -> set[str]:
    """The dtypes that come out of the three products, all of bfloat16, of a training step."""
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((3, 4), (4, 5)))
    gradients = jax.grad(
        lambda x, w: matmul(x, w, reverse_only=True).astype(jnp.float32).sum(), (0, 1)
    )
    equations = jax.make_jaxpr(gradients)(x, w).jaxpr.eqns
    products = [e for e in equations if e.primitive.name == "dot_general"]
    assert len(products) == 3
    assert {str(v.aval.dtype) for e in products for v in e.invars} == {"bfloat16"}
    return {str(e.outvars[0].aval.dtype) for e in products}


def test_sums_of_bfloat16_come_out_as_float32_on_a_cpu_alone() -> None:
    """XLA's CPU compiler reaches the units for bfloat16 only so."""
    assert sums_of_bfloat16() == {"float32"}
    for platform, wanted in (("cpu", "float32"), ("tpu", "bfloat16"), ("cuda", "bfloat16")):
        device = AbstractDevice("a device", None, platform)
        with use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
            assert sums_of_bfloat16() == {wanted}, platform


def test_gradients_of_float32_are_not_rounded_to_less() -> None:
    """GPUs and TPUs would, and the backward pass is traced outside of the caller's precision."""
    x, w = random((3, 4), "float32", 0), random((4, 5), "float32", 1)
    gradients = jax.grad(lambda x, w: matmul(x, w).sum(), (0, 1))
    equations = jax.make_jaxpr(gradients)(x, w).jaxpr.eqns
    found = [e.params["precision"] for e in equations if e.primitive.name == "dot_general"]
    assert found == [(jax.lax.Precision.HIGHEST,) * 2] * 3


@pytest.mark.parametrize(
    ("platform", "dtype"), [("cpu", "float32"), ("cpu", "float64"), ("cuda", "bfloat16")]
)
def test_the_form_that_has_no_forward_mode_is_for_two_bytes_on_a_cpu_alone(
    platform: str, dtype: str
) -> None:
    device = AbstractDevice("a device", None, platform)
    run = functools.partial(matmul, reverse_only=True)
    with (
        jax.enable_x64(True),
        use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)),
    ):
        x, w = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((3, 4), (4, 5)))
        jax.eval_shape(lambda x, w: jax.jvp(run, (x, w), (x, w)), x, w)


def same(got: jax.Array, wanted: jax.Array) -> None:
    """But for a rounding of bfloat16: other shapes may sum in another order."""
    got, wanted = got.astype(jnp.float32), wanted.astype(jnp.float32)
    np.testing.assert_allclose(got, wanted, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 64), (1, 1, 64)])
@pytest.mark.parametrize("reverse_only", [False, True])
def test_a_single_row_is_what_it_is_among_others(
    shape: tuple[int, ...], reverse_only: bool
) -> None:
    """Of bfloat16 it is doubled on a CPU, where XLA is slow with one."""
    matmul = functools.partial(laser_jax.modeling.kernels.matmul, reverse_only=reverse_only)
    x, w = random(shape, "bfloat16", 0), random((64, 5), "bfloat16", 1)
    g = random((*shape[:-1], 5), "bfloat16", 2)
    y, backward = jax.vjp(matmul, x, w)
    many, among = jax.vjp(matmul, jnp.concatenate([x, 2 * x, x]), w)
    rest = jnp.zeros_like(g)
    same(y, many[:1])
    same(backward(g)[0], among(jnp.concatenate([g, rest, rest]))[0][:1])
    same(backward(g)[1], among(jnp.concatenate([g, rest, rest]))[1])
    assert "concatenate" in str(jax.make_jaxpr(matmul)(x, w))
    assert "concatenate" not in str(
        jax.make_jaxpr(matmul)(x.astype("float32"), w.astype("float32"))
    )


def test_the_soft_token_of_a_single_row_is_what_it_is_among_others() -> None:
    backbone = Backbone(CONFIG, dtype=jnp.bfloat16)
    variables = jax.jit(backbone.init)(jax.random.key(0), jnp.ones((1, 2), jnp.int32))
    h_BD = random((3, CONFIG.hidden_size), "bfloat16", 0)
    for method in (Backbone.logits, Backbone.soft_token):
        run = jax.jit(functools.partial(apply, method, backbone))
        alone, among = run(variables, h_BD[:1]), run(variables, h_BD)[:1]
        assert alone.shape == among.shape
        same(alone, among)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_a_frozen_weight_is_not_computed(dtype: str) -> None:
    x, w = random((3, 4), dtype, 0), random((2, 4, 4), dtype, 1)

    def stacked(x: jax.Array, w: jax.Array) -> jax.Array:
        times = functools.partial(matmul, reverse_only=True)
        return jax.lax.scan(lambda x, w: (times(x, w), None), x, w)[0].sum()

    forms = stacked, jax.grad(stacked, 0), jax.grad(stacked, (0, 1))
    products = [matmul_flops(jax.make_jaxpr(form)(x, w).jaxpr) / (2 * 3 * 4 * 4) for form in forms]
    assert products == [2, 2 * 2, 2 * 3]


@pytest.mark.parametrize("scaling", [None, RopeScaling(8.0, 1.0, 4.0, 8192)])
def test_rotations_known_beforehand_are_those_computed(scaling: RopeScaling | None) -> None:
    config = ScratchConfig(head_dim=64).backbone(vocab_size=31)
    config = replace(config, rope_theta=1e6, rope_scaling=scaling)
    known = rope_from_zero(512, config)
    computed = jax.jit(lambda p: rope_at(p, config))(jnp.arange(512)[None, :])
    for got, wanted in zip(jax.tree.leaves(known), jax.tree.leaves(computed), strict=True):
        assert got.dtype == jnp.float32
        assert got.shape == (1, 512, 32)
        # sines of the same float32 angles
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


def test_reading_computes_no_sines() -> None:
    backbone = Backbone(CONFIG)
    ids_BT = jnp.ones((1, 2), jnp.int32)
    variables = unstack_layers(jax.jit(backbone.init)(jax.random.key(0), ids_BT))
    ids = jnp.ones((2, 12), jnp.int32)
    run = functools.partial(encode, config=RetrieverConfig(CONFIG), num_thinking_steps=1)
    program = str(jax.jit(run).lower(variables, ids, jnp.ones_like(ids)).compile().as_text())
    assert "dot(" in program
    assert "cosine(" not in program
    assert "sine(" not in program
