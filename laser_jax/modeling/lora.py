"""A linear projection that may carry a low-rank adapter in the collection `lora`."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from laser_jax.config import LoraConfig
from laser_jax.sharding import with_axes


class Projection(nn.Module):
    """y = x W + b + scale (x A) B. W is `[in, out]`; A and B are kept in float32.

    A starts uniform in ±1/sqrt(in) as in PEFT, B at zero: a fresh adapter changes nothing.
    `product` is x, W -> x W.
    """

    features: int
    axes: tuple[str, str]
    lora: LoraConfig | None
    dtype: DTypeLike
    param_dtype: DTypeLike
    product: Callable[[jax.Array, jax.Array], jax.Array]
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        in_features = x.shape[-1]
        kernel = self.param(
            "kernel",
            with_axes(nn.initializers.normal(in_features**-0.5), self.axes),
            (in_features, self.features),
            self.param_dtype,
        )
        y = self.product(x, kernel.astype(self.dtype))
        if self.use_bias:
            zero = with_axes(nn.initializers.zeros, self.axes[1:])
            bias = self.param("bias", zero, (self.features,), self.param_dtype)
            y += bias.astype(self.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        if self.lora is None or self.name not in self.lora.targets:
            return y

        def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            bound = in_features**-0.5
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        def adapter(name: str, init, shape: tuple[int, int], axes: tuple[str, str]) -> jax.Array:
            boxed = with_axes(init, axes)
            value = self.variable("lora", name, lambda: boxed(self.make_rng("params"), shape)).value
            return value.astype(self.dtype)

        rank = self.lora.rank
        a = adapter("lora_a", uniform, (in_features, rank), (self.axes[0], "lora_rank"))
        zeros = nn.initializers.constant(0, jnp.float32)
        b = adapter("lora_b", zeros, (rank, self.features), ("lora_rank", self.axes[1]))
        # the scale meets the narrow product
        return y + self.product(self.product(x, a) * jnp.asarray(self.lora.scale, self.dtype), b)
