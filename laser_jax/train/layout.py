"""From a config to what is compiled: the mesh, the model, the optimizer and the state's shapes. No
array exists yet, so that a dry run can use all of it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from laser_jax.batch import Batch
from laser_jax.config import (
    BackboneConfig,
    Config,
    MeshConfig,
    RetrieverConfig,
    load_retriever_config,
    pools_prompt,
)
from laser_jax.inference.options import require_positions
from laser_jax.losses import Terms
from laser_jax.modeling.backbone import Backbone, Variables
from laser_jax.reinforcement.step import make_reinforced_step
from laser_jax.settings import require
from laser_jax.sharding import Device, make_mesh
from laser_jax.step import FrozenTeacher, TrainState, make_train_step
from laser_jax.train.model import build_backbone
from laser_jax.train.state import (
    abstract_state,
    abstract_variables,
    jit_train_step,
    learning_rate_schedule,
    make_optimizer,
)
from laser_jax.train.throughput import device_bytes


@dataclass(frozen=True)
class Layout:
    """What a step is compiled from."""

    mesh: Mesh
    backbone: Backbone
    attention: str  # the kernel that was chosen, and why
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    abstract: TrainState  # shapes, dtypes and shardings
    retriever: RetrieverConfig  # of the exported model, whose adapters are merged
    teacher: FrozenTeacher | None = None
    abstract_teacher: Variables | None = None

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    @property
    def parameters(self) -> tuple[int, int]:
        """How many are trained, and how many there are."""
        trained = sum(a.size for a in jax.tree.leaves(self.abstract.trained))
        return trained, trained + sum(a.size for a in jax.tree.leaves(self.abstract.frozen))


def device_state_bytes(state: TrainState) -> int:
    """The size of the parts of the state and the gradient that lie on one device."""
    arrays = jax.tree.leaves((state, state.trained))
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays)


def lay_out(
    config: Config,
    backbone_config: BackboneConfig,
    steps: int,
    devices: Sequence[Device] | None = None,
    prompt_checksum: str | None = None,
) -> Layout:
    """Lays a run of `steps` out over the devices, by default all devices of all processes. Where
    its tokenizer is there, `prompt_checksum` is of its prompts, those of a frozen teacher too.

    Raises:
        ConfigError: a batch that the mesh does not divide, lengths beyond the model's positions, an
            attention kernel that cannot run there, a teacher that cannot teach this model.
        FileNotFoundError: there is no teacher.
    """
    devices = jax.devices() if devices is None else devices
    retriever = RetrieverConfig(
        backbone_config,
        num_thinking_steps=config.objective.num_thinking_steps,
        document_thinking_steps=config.objective.document_thinking_steps,
        pooling=config.objective.pooling,
        prompt=config.prompt,
        dtype=config.model.dtype,
        dimensions=config.objective.dimensions,
        prompt_checksum=prompt_checksum,
    )
    _require_lengths(config, retriever)
    platform = devices[0].platform
    backbone, attention = build_backbone(config.model, backbone_config, platform, config.lora)
    updates = steps * config.objective.policy.updates  # which the optimizer counts
    optimizer = make_optimizer(config.optimizer, updates)

    def state_on(mesh: Mesh) -> TrainState:
        return abstract_state(backbone, optimizer, mesh, jnp.dtype(config.model.param_dtype))

    one = make_mesh(MeshConfig(1, 1, 1), devices[:1])
    mesh = make_mesh(
        config.mesh,
        devices,
        state_bytes=device_state_bytes(state_on(one)),
        device_bytes=_agreed_device_bytes(devices[0]),
    )
    _require_divisible(config, mesh)
    teacher = _lay_out_teacher(config.objective.teacher, backbone_config, prompt_checksum, mesh)
    schedule = learning_rate_schedule(config.optimizer, updates)
    state = state_on(mesh)
    return Layout(mesh, backbone, attention, optimizer, schedule, state, retriever, *teacher)


def _lay_out_teacher(
    directory: str | None, student: BackboneConfig, prompt_checksum: str | None, mesh: Mesh
) -> tuple[FrozenTeacher | None, Variables | None]:
    """The teacher of `objective.teacher` and the shapes of its variables."""
    if directory is None:
        return None, None
    retriever = load_retriever_config(directory)
    require(
        retriever.backbone.vocab_size == student.vocab_size,
        f"objective.teacher {directory} has {retriever.backbone.vocab_size} tokens and the model "
        f"{student.vocab_size}; both must read the same tokens",
    )
    require(
        not prompt_checksum or retriever.prompt_checksum in (None, prompt_checksum),
        f"objective.teacher {directory} was trained with another tokenizer or other templates: its "
        f"prompt_checksum is {retriever.prompt_checksum}, and the model's {prompt_checksum}. Train "
        "the teacher from the same model.path with the same prompt settings",
    )
    require(
        pools_prompt(retriever.pooling),
        f"objective.teacher {directory} pools its {retriever.pooling} alone (GIRCSE), and the "
        "explicit view of a teacher has none; name a model of objective.method: laser, such as "
        "configs/ablation/teacher.yaml trains",
    )
    dtype = jnp.dtype(retriever.dtype)
    backbone = Backbone(retriever.backbone, dtype=dtype, param_dtype=dtype)
    abstract = {"params": abstract_variables(backbone, mesh, "params", dtype)}
    return FrozenTeacher(backbone, retriever.documents_at), abstract


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
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    micro_batch = config.train.batch_size // config.train.num_micro_batches
    require(
        micro_batch % devices == 0,
        f"train.{'micro_' if config.train.micro_batch_size else ''}batch_size {micro_batch} must "
        f"be a multiple of the {devices} devices that share the batch",
    )


def _require_lengths(config: Config, retriever: RetrieverConfig) -> None:
    """Raises a ConfigError where a vector is to be shortened to more than its width, or a prompt
    and its thoughts, or an explicit input, outgrow the model's positions."""
    dimensions, width = list(retriever.dimensions), retriever.backbone.hidden_size
    require(
        dimensions == sorted({*dimensions}) and max(dimensions, default=0) < width,
        f"objective.dimensions {dimensions} must ascend and stay below the model's width of "
        f"{width}, which is always trained",
    )
    require_positions(retriever, "query_max_length", retriever.num_thinking_steps)
    require_positions(retriever, "document_max_length", retriever.documents_at)
    # the evaluation reads explicit inputs too, whatever is trained
    evaluated = config.data.eval is not None and pools_prompt(retriever.pooling)
    if config.objective.need_explicit_view or evaluated:
        retriever.backbone.require_positions(
            config.prompt.explicit_max_length,
            "prompt.explicit_max_length takes",
            "lower prompt.explicit_max_length",
        )


def shape_of(batch: Batch) -> str:
    """The shapes that a step is compiled for, in words."""
    parts = {"queries": batch.query, "documents": batch.documents, "explicit": batch.explicit}
    return ", ".join(
        f"{name} {tokens.ids_BT.shape[0]} x {tokens.ids_BT.shape[1]}"
        + (f" packed in {tokens.packed.packs} x {tokens.packed.places}" if tokens.packed else "")
        for name, tokens in parts.items()
        if tokens is not None
    )


class StepPrograms:
    """Runs the step, and compiles it where a batch has a new shape."""

    def __init__(self, jitted: Any):
        self._jitted = jitted
        self._programs: dict[str, Any] = {}
        self.compiled: dict[str, float] = {}  # seconds by shape, in the order of the first batch

    def __call__(
        self, state: TrainState, batch: Batch, teacher: Variables | None
    ) -> tuple[TrainState, Terms]:
        program = self._programs.get(shape_of(batch)) or self.compile(state, batch, teacher)
        return program(state, batch, teacher)

    def compile(self, state: TrainState, batch: Batch, teacher: Variables | None) -> Any:
        """Compiles the step; arrays or `jax.ShapeDtypeStruct`s."""
        began, shape = time.monotonic(), shape_of(batch)
        program = self._jitted.lower(state, batch, teacher).compile()
        self._programs[shape], self.compiled[shape] = program, time.monotonic() - began
        return program


def step_programs(config: Config, layout: Layout) -> StepPrograms:
    """The step of a run, to be compiled for every shape of a batch."""
    model = (layout.backbone, config, layout.optimizer, layout.schedule)
    reinforced = config.objective.method == "latent_rl"
    step = make_reinforced_step(*model) if reinforced else make_train_step(*model, layout.teacher)
    return StepPrograms(jit_train_step(step, layout.abstract, layout.mesh))
