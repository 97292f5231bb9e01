"""Rotary position embeddings, with Llama 3's frequency scaling. Angles are always float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from laser_jax.config import BackboneConfig
from laser_jax.modeling.attention import accumulation_dtype


@struct.dataclass
class Rope:
    """Cosines and sines of the angles at some positions, [B or 1, T, H/2] float32."""

    cos: jax.Array
    sin: jax.Array

    def at(self, select_BP: jax.Array) -> Rope:
        """The angles at the selected positions [B, P, H/2] of a sequence read from position 0."""
        return Rope(self.cos[0][select_BP], self.sin[0][select_BP])


def inverse_frequencies(config: BackboneConfig) -> np.ndarray:
    """[H/2] float32 angular frequencies; long wavelengths are slowed down under `rope_scaling`."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is not None:
        turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        kept = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
        frequencies = frequencies * (kept + (1.0 - kept) / scaling.factor)
    return frequencies.astype(np.float32)


def rope_at(positions_BT: jax.Array | np.ndarray, config: BackboneConfig) -> Rope:
    """Angles for integer positions [B, T]. Those that are known beforehand, a NumPy array, become
    constants: XLA would compute sines anew for every head of every row and layer."""
    angles = positions_BT.astype(np.float32)[:, :, None] * inverse_frequencies(config)[None, None]
    module = np if isinstance(angles, np.ndarray) else jnp
    return Rope(jnp.asarray(module.cos(angles)), jnp.asarray(module.sin(angles)))


def rope_from_zero(length: int, config: BackboneConfig) -> Rope:
    """Angles of a sequence from its start; `length` may be one that `jax.export` leaves open."""
    module = np if isinstance(length, int) else jnp
    return rope_at(module.arange(length)[None, :], config)


def apply_rope(x_BTNH: jax.Array, rope: Rope) -> jax.Array:
    """Rotates the two halves of every head, in at least float32; keeps the dtype of the input."""
    wide = accumulation_dtype(x_BTNH.dtype)
    first, second = jnp.split(x_BTNH.astype(wide), 2, axis=-1)
    cos, sin = (angle[:, :, None, :].astype(wide) for angle in (rope.cos, rope.sin))
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)
