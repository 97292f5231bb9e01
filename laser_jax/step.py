"""The training state and one optimizer step, as pure functions of arrays.

What is trained is the collection `lora` where adapters exist and `params` otherwise; the rest of
the variables is frozen and passes through untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from laser_jax.config import Config, ObjectiveConfig, OptimizerConfig
from laser_jax.data.pipeline import Batch
from laser_jax.losses import Terms, gircse_loss, laser_loss, pool
from laser_jax.modeling.backbone import Backbone, Variables
from laser_jax.sharding import batch_sharding, constrain, shardings
from laser_jax.views import dual_view, explicit_view, latent_view


@struct.dataclass
class TrainState:
    """Everything a step reads and writes."""

    step: jax.Array
    """int32, optimizer steps taken."""
    trained: Any
    """The collection that is optimised, float32."""
    frozen: Any
    """The base weights under adapters; None in full fine-tuning."""
    opt_state: optax.OptState

    @property
    def variables(self) -> Variables:
        if self.frozen is None:
            return {"params": self.trained}
        return {"params": self.frozen, "lora": self.trained}


@dataclass(frozen=True)
class FrozenTeacher:
    """A model trained beforehand that teaches without learning (no co-learning)."""

    backbone: Backbone
    num_thinking_steps: int
    """Of its own documents' embeddings."""


def objective_terms(
    backbone: Backbone,
    variables: Variables,
    batch: Batch,
    objective: ObjectiveConfig,
    distillation_scale: jax.Array,
    teacher: FrozenTeacher | None = None,
    teacher_variables: Variables | None = None,
) -> Terms:
    """Runs the views that the objective needs and returns its loss terms by name.

    Documents are embedded over the whole global batch and replicated once, so that every query is
    contrasted with all of them wherever it lives.
    """
    K, pooling = objective.num_thinking_steps, objective.pooling
    documents, queries = batch.documents, batch.query
    B, C = queries.lengths_B.shape[0], documents.lengths_B.shape[0]
    positives_B = jnp.arange(B) * (C // B)

    document_hidden_CKD = latent_view(
        backbone, variables, documents.ids_BT, documents.lengths_B, K, pooling
    )
    if objective.method == "gircse":
        hidden_BKD = latent_view(backbone, variables, queries.ids_BT, queries.lengths_B, K, pooling)
        document_hidden_CKD = constrain(document_hidden_CKD, None, None, None)
        return gircse_loss(
            hidden_BKD, document_hidden_CKD, positives_B, batch.contrast_BC, objective.temperature
        )

    documents_CD = teacher_documents_CD = constrain(pool(document_hidden_CKD), None, None)
    explicit, keyframes_BK, view = batch.explicit, batch.keyframes_BK, None
    if not objective.need_explicit_view or explicit is None or keyframes_BK is None:
        hidden_BKD = latent_view(backbone, variables, queries.ids_BT, queries.lengths_B, K, pooling)
    elif teacher is not None:
        hidden_BKD = latent_view(backbone, variables, queries.ids_BT, queries.lengths_B, K, pooling)
        view = explicit_view(
            teacher.backbone,
            teacher_variables,
            explicit.ids_BT,
            explicit.lengths_B,
            keyframes_BK,
        )
        teacher_hidden_CKD = latent_view(
            teacher.backbone,
            teacher_variables,
            documents.ids_BT,
            documents.lengths_B,
            teacher.num_thinking_steps,
            pooling,
        )
        teacher_documents_CD = constrain(pool(teacher_hidden_CKD), None, None)
    elif objective.views == "fast":
        hidden_BKD, view = dual_view(
            backbone,
            variables,
            explicit.ids_BT,
            explicit.lengths_B,
            queries.lengths_B,
            keyframes_BK,
            K,
            pooling,
        )
    else:
        hidden_BKD = latent_view(backbone, variables, queries.ids_BT, queries.lengths_B, K, pooling)
        view = explicit_view(backbone, variables, explicit.ids_BT, explicit.lengths_B, keyframes_BK)
    return laser_loss(
        hidden_BKD,
        view.final_BD if view else None,
        view.keyframes_BKD if view else None,
        documents_CD,
        teacher_documents_CD,
        positives_B,
        batch.contrast_BC,
        objective,
        distillation_scale,
    )


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 over `warmup_ratio` of the steps, then linear decay or constant."""
    warmup = round(config.warmup_ratio * steps)
    peak = config.learning_rate
    end = 0.0 if config.schedule == "linear" else peak
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, max(warmup, 1)),
            optax.linear_schedule(peak, end, max(steps - warmup, 1)),
        ],
        [warmup],
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW, after clipping by global norm where `clip_norm` is set."""
    adamw = optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    if config.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def make_train_step(
    backbone: Backbone,
    config: Config,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    teacher: FrozenTeacher | None = None,
) -> Callable[[TrainState, Batch, Variables | None], tuple[TrainState, Terms]]:
    """The function (state, batch, frozen teacher's variables) -> (state, metrics). Jit it, donating
    the state. Metrics are float32 scalars: the loss terms, `grad_norm` and `learning_rate`."""
    warmup = config.objective.distillation_warmup_steps

    def train_step(
        state: TrainState, batch: Batch, teacher_variables: Variables | None
    ) -> tuple[TrainState, Terms]:
        step = state.step.astype(jnp.float32)
        scale = jnp.minimum(1.0, (step + 1.0) / warmup) if warmup else jnp.ones(())

        def loss(trained: Any) -> tuple[jax.Array, Terms]:
            terms = objective_terms(
                backbone,
                replace(state, trained=trained).variables,
                batch,
                config.objective,
                scale,
                teacher,
                teacher_variables,
            )
            return terms["loss"], terms

        grads, terms = jax.grad(loss, has_aux=True)(state.trained)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        metrics = terms | {
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        new = replace(
            state,
            step=state.step + 1,
            trained=optax.apply_updates(state.trained, updates),
            opt_state=opt_state,
        )
        return new, metrics

    return train_step


def init_state(
    backbone: Backbone,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    base: Variables | None,
    base_dtype: jnp.dtype,
) -> tuple[TrainState, TrainState]:
    """A new state, laid out over the mesh, and its shardings.

    Args:
        base: host arrays of the collection `params`; None draws random weights from `seed`.
        base_dtype: storage dtype of a frozen base; whatever is trained is float32.
    """
    key = jax.random.key(seed)
    ids = jnp.zeros((1, 8), jnp.int32)
    boxed = jax.eval_shape(backbone.init, key, ids)
    layout = shardings(boxed, mesh)
    with_adapters = backbone.lora is not None

    def draw(collection: str, dtype: jnp.dtype) -> Any:
        def init() -> Any:
            tree = nn.meta.unbox(backbone.init(key, ids))[collection]
            return jax.tree.map(lambda a: a.astype(dtype), tree)

        return jax.jit(init, out_shardings=layout[collection])()

    params_dtype = base_dtype if with_adapters else jnp.dtype(jnp.float32)
    if base is None:
        params = draw("params", params_dtype)
    else:
        params = jax.tree.map(
            lambda a, s: jax.device_put(a.astype(params_dtype), s), base["params"], layout["params"]
        )
    trained = draw("lora", jnp.dtype(jnp.float32)) if with_adapters else params
    trained_layout = layout["lora" if with_adapters else "params"]

    replicated = NamedSharding(mesh, PartitionSpec())
    opt_layout = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, trained),
        trained_layout,
        transform_non_params=lambda _: replicated,
    )
    state = TrainState(
        step=jax.device_put(jnp.zeros((), jnp.int32), replicated),
        trained=trained,
        frozen=params if with_adapters else None,
        opt_state=jax.jit(optimizer.init, out_shardings=opt_layout)(trained),
    )
    layouts = replace(
        state,
        step=replicated,
        trained=trained_layout,
        frozen=layout["params"] if with_adapters else None,
        opt_state=opt_layout,
    )
    return state, layouts


def compile_train_step(
    train_step: Callable[..., tuple[TrainState, Terms]], layouts: TrainState, mesh: Mesh
) -> Callable[..., tuple[TrainState, Terms]]:
    """The jitted step: the state keeps its layout and is donated, batches are split by rows."""
    return jax.jit(
        train_step,
        in_shardings=(layouts, batch_sharding(mesh), None),
        out_shardings=(layouts, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
