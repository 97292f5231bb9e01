"""Rows without their padding, for all of a layer but attention.

Right-padded rows [B, T] are packed: P packs, one or more a device, hold the real tokens of B / P
rows each, one row behind the other, in N places. Projections and norms run on packs; attention, and
the keys and values that thinking reads, have padded rows as ever. Both ways are gathers, each of
them the transpose of the other: no gradient is a scatter.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from laser_jax.batch import PackShape
from laser_jax.modeling.rope import Rope


@struct.dataclass
class Packing:
    """Where tokens lie, int32. Spare places hold padding, which nobody looks at, and so their
    gradient is 0."""

    place_PbT: jax.Array
    """In its pack, of each token; N of padding."""
    source_PN: jax.Array
    """Among the b T tokens of a pack's rows, of each place."""

    @classmethod
    def of(cls, lengths_B: jax.Array, T: int, shape: PackShape) -> Packing:
        """Packs rows of these lengths. Their sum is at most N in every pack, and N at most b T."""
        lengths_Pb1 = lengths_B.reshape(shape.packs, -1, 1)
        starts_Pb1 = jnp.cumsum(lengths_Pb1, axis=1) - lengths_Pb1
        steps_T = jnp.arange(T)[None, None, :]
        place_PbT = jnp.where(steps_T < lengths_Pb1, starts_Pb1 + steps_T, shape.places)
        order = jnp.argsort(place_PbT.reshape(shape.packs, -1), axis=1, stable=True)
        return cls(place_PbT, order[:, : shape.places])


@jax.custom_vjp
def pack(x_BT: jax.Array, packing: Packing) -> jax.Array:
    """Padded rows [B, T, ...] as packs [P, N, ...]."""
    flat = x_BT.reshape(packing.source_PN.shape[0], -1, *x_BT.shape[2:])
    return jax.vmap(lambda tokens, source_N: tokens[source_N])(flat, packing.source_PN)


@jax.custom_vjp
def pad(x_PN: jax.Array, packing: Packing) -> jax.Array:
    """Packs [P, N, ...] as padded rows [B, T, ...], of 0 where there is padding."""

    def taken(x_N: jax.Array, place_bT: jax.Array) -> jax.Array:
        return x_N.at[place_bT].get(mode="fill", fill_value=0)

    x_PbT = jax.vmap(taken)(x_PN, packing.place_PbT)
    return x_PbT.reshape(-1, *x_PbT.shape[2:])


pack.defvjp(lambda x, packing: (pack(x, packing), packing), lambda p, g: (pad(g, p), None))
pad.defvjp(lambda x, packing: (pad(x, packing), packing), lambda p, g: (pack(g, p), None))


@struct.dataclass
class Rows:
    """How a sequence lies in memory while it is read: padded, or packed."""

    rope_T: Rope
    """The angles of positions from 0 on."""
    rope: Rope
    """The angles of the tokens as they lie."""
    packing: Packing | None

    @classmethod
    def of(cls, rope_T: Rope, packing: Packing | None) -> Rows:
        if packing is None:
            return cls(rope_T, rope_T, None)
        T = packing.place_PbT.shape[2]
        return cls(rope_T, rope_T.at(packing.source_PN % T), packing)

    def pack(self, x_BT: jax.Array) -> jax.Array:
        """Padded rows as they lie."""
        return x_BT if self.packing is None else pack(x_BT, self.packing)

    def pad(self, x: jax.Array) -> jax.Array:
        """The same, from how they lie to padded rows."""
        return x if self.packing is None else pad(x, self.packing)

    def take(self, x: jax.Array, select_BS: jax.Array) -> jax.Array:
        """The states [B, S, D] at the selected positions of each row."""
        if self.packing is not None:
            P, b, _ = self.packing.place_PbT.shape
            select_PbS = select_BS.reshape(P, b, -1)
            places = jnp.take_along_axis(self.packing.place_PbT, select_PbS, axis=2)
            x = jnp.take_along_axis(x, places.reshape(P, -1, 1), axis=1)
            return x.reshape(*select_BS.shape, -1)
        return jnp.take_along_axis(x, select_BS[:, :, None], axis=1)
