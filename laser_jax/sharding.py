"""The device mesh and the one table that maps logical axes to it.

Mesh axes: `data` splits the batch, `fsdp` splits the batch and the parameters, `tensor` splits
heads, feed-forward and vocabulary. Axis types are Auto: XLA propagates shardings, `constrain` pins
the few that matter. Without a mesh `constrain` does nothing, so `encode` works in anyone's
pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from laser_jax.config import ConfigError, MeshConfig

Device = Any
"""A `jax.Device`, which type checkers take for a variable."""

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. "layers" is the stacking axis; "embed" is the model dimension D.
AXIS_RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "vocab": "tensor",
    "head_dim": None,
    "lora_rank": None,
}


def make_mesh(
    config: MeshConfig,
    devices: Sequence[Device] | None = None,
    *,
    state_bytes: int = 0,
    device_bytes: int | None = None,
) -> Mesh:
    """A mesh over the devices, by default all devices of all processes.

    Args:
        state_bytes, device_bytes: of the whole training state and of one device's memory, which
            `fsdp: auto` goes by; None where the memory is not known.

    Raises:
        ConfigError: when the axes do not multiply to the number of devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    data, fsdp, tensor = config.data, config.fsdp, config.tensor
    if fsdp == "auto":
        left = count // abs(tensor)
        fsdp = max(left // data, 1) if data != -1 else 1
        room = (device_bytes or 2 * state_bytes) // 2 * abs(tensor)
        while data == -1 and state_bytes > room * fsdp and left % (2 * fsdp) == 0:
            fsdp *= 2
    sizes = [data, fsdp, tensor]
    if -1 in sizes:
        sizes[sizes.index(-1)] = count // -math.prod(sizes)
    if math.prod(sizes) != count:
        raise ConfigError(
            f"mesh (data, fsdp, tensor) = {tuple(sizes)} does not multiply to the {count} "
            "devices; set one axis to -1 to let it take what is left"
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def with_axes(init: Callable[..., jax.Array], axes: tuple[str, ...]) -> Callable[..., jax.Array]:
    """The initializer with logical `axes` on its result. Flax boxes the array for that and unboxes
    it wherever a module reads it, which its types do not say."""
    return cast("Callable[..., jax.Array]", nn.with_logical_partitioning(init, axes))


def partition_spec(axes: tuple[str | None, ...], mesh_axes: tuple[str, ...]) -> PartitionSpec:
    """The logical `axes` of an array as a PartitionSpec over those of `mesh_axes` that exist."""

    def resolve(axis: str | None) -> str | tuple[str, ...] | None:
        target = None if axis is None else AXIS_RULES[axis]
        wanted = (target,) if isinstance(target, str) else target or ()
        present = tuple(a for a in wanted if a in mesh_axes)
        return present[0] if len(present) == 1 else present or None

    return PartitionSpec(*map(resolve, axes))


def _fit(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Replicates dimensions that the mesh axes do not divide (a 1-row batch, an odd vocabulary)."""

    def divides(size: int, axes: str | tuple[str, ...] | None) -> bool:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return size % math.prod(mesh.shape[name] for name in names) == 0

    return PartitionSpec(
        *(axes if divides(size, axes) else None for size, axes in zip(shape, spec, strict=True))
    )


def shardings(boxed: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of abstract values whose parameters carry logical axes.

    Args:
        boxed: `jax.eval_shape` of an init: leaves are `nn.LogicallyPartitioned` or plain
            (replicated) arrays.
    """

    def leaf(value: Any) -> NamedSharding:
        if isinstance(value, nn.LogicallyPartitioned):
            spec = partition_spec(value.names, mesh.axis_names)
            return NamedSharding(mesh, _fit(spec, value.value.shape, mesh))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(leaf, boxed, is_leaf=lambda v: isinstance(v, nn.LogicallyPartitioned))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over the data axes, everything else whole."""
    return NamedSharding(mesh, partition_spec(("batch",), mesh.axis_names))


def _our_mesh() -> AbstractMesh | None:
    """The mesh of the surrounding program if it is one of ours, with automatic axes. Another one
    (explicit or manual axes, or other names) is none of our business."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = not mesh.empty and set(MESH_AXES) <= set(mesh.axis_names)
    return mesh if ours and all(kind == AxisType.Auto for kind in mesh.axis_types) else None


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins the sharding of `x` to its logical `axes`; the identity without our mesh."""
    mesh = _our_mesh()
    if mesh is None:
        return x
    spec = partition_spec(axes, mesh.axis_names)
    return jax.lax.with_sharding_constraint(x, _fit(spec, x.shape, mesh))


def shard_mapped(
    function: Callable[..., jax.Array],
    in_axes: tuple[tuple[str | None, ...], ...],
    out_axes: tuple[str | None, ...],
) -> Callable[..., jax.Array]:
    """`function` run on every device's own part, which a kernel that XLA cannot split wants; the
    function itself without our mesh.

    Args:
        in_axes, out_axes: logical axes of the arguments and of the result. An axis that does not
            divide its dimension in some array is whole in all of them.
    """
    mesh = _our_mesh()
    if mesh is None:
        return function

    def mapped(*arrays: jax.Array) -> jax.Array:
        specs = [partition_spec(axes, mesh.axis_names) for axes in in_axes]
        fitted = [_fit(s, a.shape, mesh) for s, a in zip(specs, arrays, strict=True)]
        whole = {axes for s, f in zip(specs, fitted, strict=True) for axes in {*s} - {*f}}

        def keep(spec: PartitionSpec) -> PartitionSpec:
            return PartitionSpec(*(None if axes in whole else axes for axes in spec))

        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=tuple(map(keep, specs)),
            out_specs=keep(partition_spec(out_axes, mesh.axis_names)),
            check_vma=False,
        )(*arrays)

    return mapped
