"""The optimizer, and a training state on a mesh: its layout, its first values, the jitted step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from laser_jax.config import OptimizerConfig
from laser_jax.losses import Terms
from laser_jax.modeling.backbone import Backbone
from laser_jax.sharding import batch_sharding, shardings
from laser_jax.step import TrainState

GPU_OPTIONS = {"xla_gpu_dot_merger_threshold_mb": "0", "xla_gpu_enable_triton_gemm": False}
"""Options of the compiler for GPUs. Without them it joins a projection with those of adapters on
the same input and writes the whole product in float32, and it searches for the fastest of Triton's
matmuls by trial; the vendor's need no search (docs/benchmarks.md)."""


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 over `warmup_ratio` of the steps, then linear decay or constant."""
    warmup, peak = round(config.warmup_ratio * steps), config.learning_rate
    end = 0.0 if config.schedule == "linear" else peak
    rising = optax.linear_schedule(0.0, peak, max(warmup, 1))
    falling = optax.linear_schedule(peak, end, max(steps - warmup, 1))
    return optax.join_schedules([rising, falling], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW, after clipping by global norm where `clip_norm` is set."""
    rate = learning_rate_schedule(config, steps)
    adamw = optax.adamw(rate, *config.betas, weight_decay=config.weight_decay)
    if config.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def abstract_variables(backbone: Backbone, mesh: Mesh, collection: str, dtype: jnp.dtype) -> Any:
    """Shapes of one collection with their shardings, all in one dtype; nothing is computed."""
    boxed = jax.eval_shape(backbone.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, dtype, sharding=sharding),
        nn.meta.unbox(boxed[collection]),
        shardings(boxed[collection], mesh),
    )


def abstract_state(
    backbone: Backbone, optimizer: optax.GradientTransformation, mesh: Mesh, base_dtype: jnp.dtype
) -> TrainState:
    """The state's shapes and dtypes with their shardings; nothing is computed. A frozen base is
    stored in `base_dtype`; whatever is trained is float32."""
    replicated = NamedSharding(mesh, PartitionSpec())

    def whole(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)

    with_adapters = backbone.lora is not None
    collection = "lora" if with_adapters else "params"
    trained = abstract_variables(backbone, mesh, collection, jnp.dtype(jnp.float32))
    opt_state = optax.tree.map_params(
        optimizer,
        lambda a, like: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=like.sharding),
        jax.eval_shape(optimizer.init, trained),
        trained,
        transform_non_params=lambda a: whole(a.dtype, *a.shape),
    )
    return TrainState(
        step=whole(jnp.int32),
        skipped=whole(jnp.int32),
        trained=trained,
        frozen=abstract_variables(backbone, mesh, "params", base_dtype) if with_adapters else None,
        opt_state=opt_state,
    )


def init_state(
    backbone: Backbone,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    seed: int,
    load_base: Callable[[Any], Any] | None,
) -> TrainState:
    """A new state, laid out as `abstract`. `load_base` makes arrays of the abstract leaves of the
    collection `params`, laid out like them; None draws random weights from `seed`."""
    key, ids = jax.random.key(seed), jnp.zeros((1, 8), jnp.int32)

    def draw(module: Backbone, collection: str, like: Any) -> Any:
        def init() -> Any:
            tree = nn.meta.unbox(module.init(key, ids))[collection]
            return jax.tree.map(lambda a, leaf: a.astype(leaf.dtype), tree, like)

        return jax.jit(init, out_shardings=_layout(like))()

    params_like = abstract.trained if abstract.frozen is None else abstract.frozen
    if load_base is None:
        # without adapters, which would shift the random stream: the same seed, the same base
        params = draw(backbone.clone(lora=None), "params", params_like)
    else:
        params = load_base(params_like)
    with_adapters = abstract.frozen is not None
    trained = draw(backbone, "lora", abstract.trained) if with_adapters else params

    # not device_put, which copies to the devices of this process alone
    count = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=abstract.step.sharding)
    return TrainState(
        step=count(),
        skipped=count(),
        trained=trained,
        frozen=params if with_adapters else None,
        opt_state=jax.jit(optimizer.init, out_shardings=_layout(abstract.opt_state))(trained),
    )


def _layout(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def jit_train_step(
    train_step: Callable[..., tuple[TrainState, Terms]], abstract: TrainState, mesh: Mesh
) -> Any:
    """The jitted step: the state keeps its layout and is donated, batches are split by rows."""
    layout = _layout(abstract)
    on_gpu = mesh.devices.flat[0].platform in ("gpu", "cuda")
    return jax.jit(
        train_step,
        in_shardings=(layout, batch_sharding(mesh), None),
        out_shardings=(layout, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
        compiler_options=GPU_OPTIONS if on_gpu else None,
    )
