"""Logical axes on every parameter, the table that maps them, and `constrain`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from laser_jax.config import BackboneConfig, ConfigError, LoraConfig, MeshConfig, ScratchConfig
from laser_jax.modeling.backbone import Backbone
from laser_jax.sharding import (
    AXIS_RULES,
    MESH_AXES,
    batch_sharding,
    constrain,
    make_mesh,
    partition_spec,
    shardings,
)

IDS = jnp.zeros((1, 2), jnp.int32)


def tiny(family: str, *, tied: bool = True) -> BackboneConfig:
    scratch = ScratchConfig(
        hidden_size=16,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=24,
    )
    return dataclasses.replace(scratch.backbone(30), family=family, tie_word_embeddings=tied)


def boxed(backbone: BackboneConfig):
    module = Backbone(backbone, lora=LoraConfig(rank=3))
    return jax.eval_shape(module.init, jax.random.key(0), IDS)


def is_boxed(value) -> bool:
    return isinstance(value, nn.LogicallyPartitioned)


@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("llama", False)])
def test_every_parameter_names_a_known_logical_axis_for_each_dimension(family, tied) -> None:
    leaves = jax.tree.leaves_with_path(boxed(tiny(family, tied=tied)), is_leaf=is_boxed)
    assert leaves
    for path, leaf in leaves:
        where = jax.tree_util.keystr(path)
        assert is_boxed(leaf), f"{where} has no logical axes"
        assert len(leaf.names) == leaf.value.ndim, where
        assert set(leaf.names) <= set(AXIS_RULES), where
        assert (leaf.names[0] == "layers") == ("['layers']" in where), where


@pytest.mark.parametrize(
    ("sizes", "path", "spec"),
    [
        ((2, 2, 2), "params/embed_tokens/embedding", ("tensor", "fsdp")),
        ((2, 2, 2), "params/layers/self_attn/q_proj/kernel", (None, "fsdp", "tensor")),
        ((2, 2, 2), "params/layers/self_attn/o_proj/kernel", (None, "tensor", "fsdp")),
        ((2, 2, 2), "params/last_layer/mlp/down_proj/kernel", ("tensor", "fsdp")),
        ((2, 2, 2), "params/last_layer/self_attn/q_norm/scale", (None,)),
        ((2, 2, 2), "lora/layers/mlp/up_proj/lora_a", (None, "fsdp", None)),
        ((2, 2, 2), "lora/layers/mlp/up_proj/lora_b", (None, None, "tensor")),
        # 30 tokens do not split into 4 parts
        ((1, 2, 4), "params/embed_tokens/embedding", (None, "fsdp")),
    ],
)
def test_parameters_lie_on_the_mesh_as_the_table_says(sizes, path, spec) -> None:
    mesh = make_mesh(MeshConfig(*sizes))
    layout = shardings(boxed(tiny("qwen3")), mesh)
    for key in path.split("/"):
        layout = layout[key]
    assert layout == NamedSharding(mesh, PartitionSpec(*spec))


def test_specs_name_only_the_axes_that_the_mesh_has() -> None:
    axes = ("batch", None, "heads")
    assert partition_spec(axes, MESH_AXES) == PartitionSpec(("data", "fsdp"), None, "tensor")
    assert partition_spec(axes, ("data",)) == PartitionSpec("data", None, None)
    assert partition_spec(axes, ("model",)) == PartitionSpec(None, None, None)


def test_the_batch_is_split_over_data_and_fsdp() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = jax.device_put(np.arange(8), batch_sharding(mesh))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2,)}


def test_minus_one_takes_the_devices_that_are_left() -> None:
    assert dict(make_mesh(MeshConfig(tensor=2)).shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    assert make_mesh(MeshConfig()).axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize(
    ("config", "state", "room", "sizes"),
    [
        (MeshConfig(), 100, None, (8, 1, 1)),  # memory that is not known
        (MeshConfig(), 50, 100, (8, 1, 1)),  # half of a device
        (MeshConfig(), 51, 100, (4, 2, 1)),
        (MeshConfig(), 101, 100, (2, 4, 1)),
        (MeshConfig(), 10**9, 100, (1, 8, 1)),  # all there are
        (MeshConfig(tensor=2), 100, 100, (4, 1, 2)),  # split by tensor already
        (MeshConfig(tensor=2), 101, 100, (2, 2, 2)),
        (MeshConfig(tensor=8), 10**9, 100, (1, 1, 8)),
        (MeshConfig(data=2), 1, 100, (2, 4, 1)),  # what a given axis leaves
        (MeshConfig(data=8), 10**9, 100, (8, 1, 1)),
        (MeshConfig(fsdp=2), 10**9, 100, (4, 2, 1)),  # not auto
    ],
)
def test_auto_takes_as_few_devices_as_hold_the_state_in_half(config, state, room, sizes) -> None:
    mesh = make_mesh(config, state_bytes=state, device_bytes=room)
    assert tuple(mesh.shape.values()) == sizes


def test_auto_splits_only_into_parts_that_divide_the_devices() -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:6], state_bytes=10**9, device_bytes=100)
    assert tuple(mesh.shape.values()) == (3, 2, 1)


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(fsdp=3), MeshConfig(fsdp=16)])
def test_axes_that_do_not_multiply_to_the_devices_are_refused(config) -> None:
    with pytest.raises(ConfigError, match="does not multiply to the 8 devices"):
        make_mesh(config)


# --- constrain ---------------------------------------------------------------------------------


def foreign_meshes() -> list[Mesh]:
    return [
        jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,)),
        jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2),
        jax.make_mesh((8, 1, 1), MESH_AXES, axis_types=(AxisType.Explicit,) * 3),
    ]


def test_constrain_pins_the_layout_inside_our_mesh() -> None:
    mesh = make_mesh(MeshConfig())
    rows = jax.device_put(jnp.ones((8, 2)), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        assert jax.jit(lambda x: constrain(x + 1, None, None))(rows).sharding.is_fully_replicated
        split = jax.jit(lambda x: constrain(x + 1, "batch", None))(jnp.ones((8, 2)))
    assert split.sharding.is_equivalent_to(batch_sharding(mesh), 2)


def test_constrain_does_nothing_without_a_mesh_or_inside_a_foreign_one() -> None:
    def traced() -> str:
        return str(jax.make_jaxpr(lambda x: constrain(x, "batch", None))(jnp.ones((8, 2))))

    x = jnp.ones((8, 2))
    assert constrain(x, "batch", None) is x
    assert "sharding_constraint" not in traced()
    for mesh in foreign_meshes():
        with jax.set_mesh(mesh):
            assert "sharding_constraint" not in traced(), mesh
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert "sharding_constraint" in traced()


def test_constrain_does_nothing_where_axes_are_manual() -> None:
    mesh = make_mesh(MeshConfig())
    double = jax.shard_map(
        lambda x: constrain(2 * x, "batch", None),
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
    )
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(jax.jit(double)(jnp.ones((8, 2))), np.full((8, 2), 2.0))
