"""Rotary position embeddings, with the scaling of Llama 3 or YaRN. Angles are always float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from laser_jax.config import BackboneConfig, RopeScaling
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
    if (scaling := config.rope_scaling) is not None:
        kept = _kept(frequencies, config, scaling)
        frequencies = frequencies * (kept + (1.0 - kept) / scaling.factor)
    return frequencies.astype(np.float32)


def _kept(frequencies: np.ndarray, config: BackboneConfig, scaling: RopeScaling) -> np.ndarray:
    """The share of each frequency that is not slowed down: it falls from 1, where there are many
    turns over the original positions, to 0. Llama 3 falls with the turns, YaRN with the place."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    if scaling.rope_type == "llama3":
        return np.clip((turns - low) / (high - low), 0.0, 1.0)
    per_place = 2 * np.log(config.rope_theta) / config.head_dim  # turns fall by exp(this)
    first = max(np.floor(np.log(turns[0] / high) / per_place), 0)
    last = min(np.ceil(np.log(turns[0] / low) / per_place), config.head_dim - 1)
    return 1.0 - np.clip((np.arange(len(turns)) - first) / max(last - first, 1e-3), 0.0, 1.0)


def rope_at(positions_BT: jax.Array | np.ndarray, config: BackboneConfig) -> Rope:
    """Angles for integer positions [B, T]. Those that are known beforehand, a NumPy array, become
    constants: XLA would compute sines anew for every head of every row and layer."""
    angles = positions_BT.astype(np.float32)[:, :, None] * inverse_frequencies(config)[None, None]
    module = np if isinstance(angles, np.ndarray) else jnp
    factor = config.rope_scaling.attention_factor if config.rope_scaling else 1.0
    return Rope(*(jnp.asarray(factor * of(angles)) for of in (module.cos, module.sin)))


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
