"""From a config to what is compiled: the mesh, the model, the optimizer and the state's shapes. No
array exists yet, so that a dry run can use all of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from laser_jax.config import BackboneConfig, Config, ConfigError, MeshConfig, appended_thoughts
from laser_jax.modeling.attention import choose_kernel
from laser_jax.modeling.backbone import Backbone
from laser_jax.sharding import Device, make_mesh
from laser_jax.step import TrainState, abstract_state, learning_rate_schedule, make_optimizer
from laser_jax.train.throughput import device_bytes


@dataclass(frozen=True)
class Layout:
    """What a step is compiled from."""

    mesh: Mesh
    backbone: Backbone
    attention: str
    """The kernel that was chosen, and why."""
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    abstract: TrainState
    """Shapes, dtypes and shardings."""

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    @property
    def parameters(self) -> tuple[int, int]:
        """How many are trained, and how many there are."""
        trained = sum(a.size for a in jax.tree.leaves(self.abstract.trained))
        return trained, trained + sum(a.size for a in jax.tree.leaves(self.abstract.frozen))

    def state_bytes(self) -> int:
        """Of the state and the gradient, with every array counted once."""
        arrays = jax.tree.leaves((self.abstract, self.abstract.trained))
        return sum(a.size * a.dtype.itemsize for a in arrays)

    def device_state_bytes(self) -> int:
        """Of the parts of the state and the gradient that lie on one device."""
        arrays = jax.tree.leaves((self.abstract, self.abstract.trained))
        return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays)


def lay_out(
    config: Config,
    backbone_config: BackboneConfig,
    steps: int,
    devices: Sequence[Device] | None = None,
) -> Layout:
    """Lays a run of `steps` out over the devices, by default all devices of all processes.

    Raises:
        ConfigError: a batch that the mesh does not divide, lengths beyond the model's positions, an
            attention kernel that cannot run there.
    """
    devices = jax.devices() if devices is None else devices
    _require_positions(config, backbone_config)
    kernel, reason = choose_kernel(
        config.model.attention,
        devices[0].platform,
        config.model.dtype,
        backbone_config.head_dim,
    )
    backbone = Backbone(
        backbone_config,
        lora=config.lora,
        dtype=jnp.dtype(config.model.dtype),
        param_dtype=jnp.dtype(jnp.float32),
        attention=kernel,
        remat=config.model.remat,
        reverse_only=True,
    )
    optimizer = make_optimizer(config.optimizer, steps)

    def layout_on(mesh: Mesh) -> Layout:
        return Layout(
            mesh,
            backbone,
            f"{kernel} ({reason})",
            optimizer,
            learning_rate_schedule(config.optimizer, steps),
            abstract_state(backbone, optimizer, mesh, jnp.dtype(config.model.param_dtype)),
        )

    one = layout_on(make_mesh(MeshConfig(1, 1, 1), devices[:1]))
    mesh = make_mesh(
        config.mesh,
        devices,
        state_bytes=one.state_bytes(),
        device_bytes=_agreed_device_bytes(devices[0]),
    )
    _require_divisible(config, mesh)
    return layout_on(mesh)


def _agreed_device_bytes(device: Device) -> int | None:
    """`device_bytes` as process 0 finds it. The others cannot ask its devices, and their own may
    hold a little more or less: they would lay the run out on another mesh, and wait for ever."""
    found = device_bytes(device)
    if jax.process_count() == 1:
        return found
    # in MiB: bytes are too many for an int32
    agreed = multihost_utils.broadcast_one_to_all(np.int32((found or 0) // 2**20))
    return int(agreed) * 2**20 or None


def describe_mesh(mesh: Mesh) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def number_of_steps(config: Config, rows: int) -> int:
    """Optimizer steps of a run over `rows` rows an epoch."""
    if config.train.steps is not None:
        return config.train.steps
    # as it is written: 1.1 epochs of 100 rows are 110 rows, and a float's product is a little more
    return math.ceil(Fraction(str(config.train.epochs)) * rows / config.train.batch_size)


def _require_divisible(config: Config, mesh: Mesh) -> None:
    rows_in_parallel = mesh.shape["data"] * mesh.shape["fsdp"]
    micro_batch = config.train.batch_size // config.train.num_micro_batches
    if micro_batch % rows_in_parallel:
        raise ConfigError(
            f"train.{'micro_' if config.train.micro_batch_size else ''}batch_size "
            f"{micro_batch} must be a multiple of the {rows_in_parallel} devices that "
            "share the batch"
        )


def _require_positions(config: Config, backbone: BackboneConfig) -> None:
    """Raises a ConfigError where a prompt and its thoughts, or an explicit input, outgrow the
    model's positions."""
    objective, positions = config.objective, backbone.max_position_embeddings
    steps, pooling = objective.num_thinking_steps, objective.pooling
    thoughts = appended_thoughts(steps, pooling)
    for name in ("query_max_length", "document_max_length"):
        longest = getattr(config.prompt, name) + thoughts
        if longest > positions:
            raise ConfigError(
                f"prompt.{name} and {steps} thinking steps take {longest} positions, and the model "
                f"has {positions}; lower prompt.{name}"
            )
    # the evaluation reads explicit inputs too, whatever is trained
    evaluated = config.data.eval is not None and pooling == "prompt_and_thoughts"
    longest = config.prompt.explicit_max_length
    if longest > positions and (objective.need_explicit_view or evaluated):
        raise ConfigError(
            f"prompt.explicit_max_length takes {longest} positions, and the model has {positions}; "
            "lower prompt.explicit_max_length"
        )
