"""The training state and one optimizer step, as pure functions of arrays.

What is trained is the collection `lora` where adapters exist and `params` otherwise; the rest of
the variables is frozen and passes through untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from laser_jax.batch import Batch
from laser_jax.config import Config, ObjectiveConfig, TrainConfig
from laser_jax.losses import Terms, Views, gircse_loss, laser_loss, pool
from laser_jax.modeling.backbone import Backbone, Variables
from laser_jax.sharding import constrain
from laser_jax.thinking import think
from laser_jax.views import explicit_view, latent_view, read_both_views, read_prompts


@struct.dataclass
class TrainState:
    """Everything a step reads and writes."""

    step: jax.Array
    """int32, optimizer steps taken, skipped ones included."""
    skipped: jax.Array
    """int32, steps without an update, because the loss or a gradient was not finite."""
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
    """The K of its own documents' embeddings."""


def read_views(
    backbone: Backbone,
    variables: Variables,
    batch: Batch,
    objective: ObjectiveConfig,
    teacher: FrozenTeacher | None = None,
    teacher_variables: Variables | None = None,
) -> Views:
    """Runs the views that the objective needs. Queries and documents that think equally long do so
    as one batch, unless the views are `parity`.

    Args:
        objective: its `views` is `fast` or `parity`; `auto` counts as `fast`.
    """
    K, pooling = objective.num_thinking_steps, objective.pooling
    Ks, fast = (K, objective.document_thinking_steps or K), objective.views != "parity"
    keyframes_BK: Any = batch.keyframes_BK
    explicit = batch.explicit if objective.need_explicit_view else None
    view = teacher_document_hidden_CKD = None
    model = taught_by = (backbone, variables)
    if explicit is not None and teacher is not None:
        taught_by, own_K = (teacher.backbone, teacher_variables), teacher.num_thinking_steps
        teacher_document_hidden_CKD = latent_view(*taught_by, batch.documents, own_K, pooling)
    if explicit is not None and teacher is None and fast:
        lengths_B = batch.query.lengths_B
        prefix, view = read_both_views(*model, explicit, lengths_B, keyframes_BK)
    else:
        prefix = read_prompts(*model, batch.query)
        if explicit is not None:
            view = explicit_view(*taught_by, explicit, keyframes_BK)
    prefixes = (prefix, read_prompts(*model, batch.documents))
    if fast and Ks == (K, K):
        hidden_BKD, document_hidden_CKD = think(*model, prefixes, K, pooling)
    else:
        alone = [think(*model, [rows], k, pooling) for rows, k in zip(prefixes, Ks, strict=True)]
        [hidden_BKD], [document_hidden_CKD] = alone
    hidden = (hidden_BKD, document_hidden_CKD, view, teacher_document_hidden_CKD)
    return Views(*hidden, batch.teacher_scores_BG)


def loss_terms(
    views: Views, contrast_BC: jax.Array, objective: ObjectiveConfig, scale: jax.Array
) -> Terms:
    """The loss over the views of a whole batch, and its terms by name. Under `dimensions` it is the
    weighted sum of the losses at every size, and `latent_64` is the term `latent` of the first 64
    dimensions. `scale` is that of the distillation (`laser_loss`)."""
    terms = _loss_terms(views, contrast_BC, objective, scale)
    weights = objective.dimension_weights or (1.0,) * len(objective.dimensions)
    for size, weight in zip(objective.dimensions, weights, strict=True):
        at_size = _loss_terms(_shortened(views, size), contrast_BC, objective, scale)
        terms |= {"loss": terms["loss"] + weight * at_size.pop("loss")}
        terms |= {f"{name}_{size}": term for name, term in at_size.items()}
    return terms


def _shortened(views: Views, size: int) -> Views:
    """The first dimensions of all states but a frozen teacher's, which was not trained for them."""
    own: dict[str, Any] = {"hidden_BKD": views.hidden_BKD}
    own |= {"document_hidden_CKD": views.document_hidden_CKD}
    if views.teacher_document_hidden_CKD is None:
        own |= {"explicit": views.explicit}
    return replace(views, **jax.tree.map(lambda x: x[..., :size], own))


def _loss_terms(
    views: Views, contrast_BC: jax.Array, objective: ObjectiveConfig, scale: jax.Array
) -> Terms:
    """The loss at one size. Documents' embeddings of the whole batch are replicated once, so that
    every query is contrasted with all of them wherever it lives."""
    B, C = contrast_BC.shape
    positives_B = jnp.arange(B) * (C // B)
    if objective.method == "gircse":
        hidden = (views.hidden_BKD, constrain(views.document_hidden_CKD, None, None, None))
        return gircse_loss(*hidden, positives_B, contrast_BC, objective.temperature)
    documents_CD = constrain(pool(views.document_hidden_CKD), None, None)
    teacher_documents_CD = documents_CD
    if views.teacher_document_hidden_CKD is not None:
        teacher_documents_CD = constrain(pool(views.teacher_document_hidden_CKD), None, None)
    return laser_loss(
        views, documents_CD, teacher_documents_CD, positives_B, contrast_BC, objective, scale
    )


# --- micro-batches ---------------------------------------------------------------------------


def _split(x: jax.Array, queries: int, parts: int) -> jax.Array:
    """Rows [queries * g, ...] as [parts, queries / parts * g, ...]. Part i takes queries i,
    i + parts, ...: every device cuts its own rows, and none moves."""
    rows = x.reshape(queries // parts, parts, x.shape[0] // queries, *x.shape[1:])
    return jnp.swapaxes(rows, 0, 1).reshape(parts, x.shape[0] // parts, *x.shape[1:])


def _join(x: jax.Array, queries: int) -> jax.Array:
    """The inverse of `_split`."""
    parts, rows = x.shape[:2]
    cut = x.reshape(parts, queries // parts, rows * parts // queries, *x.shape[2:])
    return jnp.swapaxes(cut, 0, 1).reshape(parts * rows, *x.shape[2:])


def _micro_batches(batch: Batch, parts: int) -> Batch:
    """The batch cut into `parts` along a new first axis, each query contrasted with the documents
    of its own part."""
    B, C = batch.contrast_BC.shape
    blocks = batch.contrast_BC.reshape(B // parts, parts, B // parts, parts, C // B)
    own = jnp.moveaxis(jnp.diagonal(blocks, axis1=1, axis2=3), -1, 0)
    rows = jax.tree.map(lambda a: _split(a, B, parts), replace(batch, contrast_BC=None))
    return replace(rows, contrast_BC=own.reshape(parts, B // parts, C // parts))


def reading(batch: Batch, config: Config) -> Terms:
    """How many tokens are read, with how many (position, position before it) pairs, and which share
    of the arrays is padding."""
    read = [batch.documents]
    if config.views == "parity" or batch.explicit is None or config.objective.teacher:
        read.append(batch.query)
    if batch.explicit is not None:
        read.append(batch.explicit)
    lengths = [part.lengths_B.astype(jnp.float32) for part in read]
    # summed part by part: joined, the rows of all devices would be gathered
    tokens = jnp.stack([each.sum() for each in lengths]).sum()
    pairs = jnp.stack([(each * (each + 1) / 2).sum() for each in lengths]).sum()
    size = sum(part.size for part in read)
    return {"tokens": tokens, "token_pairs": pairs, "padding_share": 1 - tokens / size}


# --- the gradient, one function a way --------------------------------------------------------

Read = Callable[[Variables, Batch], Any]
"""From a batch to all that its loss reads, such as `Views`."""
Score = Callable[[Any, jax.Array], Terms]
"""From that and the batch's `contrast_BC` to the loss and its terms."""


def gradient_of(config: TrainConfig) -> Callable[..., tuple[Any, Terms]]:
    """The way that a run's settings ask for: whole, or in micro-batches."""
    parts = config.num_micro_batches
    in_parts = plain if config.accumulation == "plain" else gradcache
    return whole_batch if parts == 1 else partial(in_parts, parts=parts)


def _gradient(terms_of: Callable[[Variables], Terms], state: TrainState) -> tuple[Any, Terms]:
    def loss(trained: Any) -> tuple[jax.Array, Terms]:
        terms = terms_of(replace(state, trained=trained).variables)
        return terms["loss"], terms

    return jax.grad(loss, has_aux=True)(state.trained)


def whole_batch(read: Read, score: Score, state: TrainState, batch: Batch) -> tuple[Any, Terms]:
    """The gradient and the terms of a batch whose activations are held at once."""
    return _gradient(lambda variables: score(read(variables, batch), batch.contrast_BC), state)


def gradcache(
    read: Read, score: Score, state: TrainState, batch: Batch, parts: int
) -> tuple[Any, Terms]:
    """The same gradient, read in `parts` (Gao et al. 2021, arXiv 2101.06983).

    The views of one micro-batch after the other are computed and dropped but for the states that
    the loss reads. The loss is taken over the whole batch, and the backward pass reads each
    micro-batch again.
    """

    def terms_of(variables: Variables) -> Terms:
        chunks = replace(_micro_batches(batch, parts), contrast_BC=None)
        views = jax.lax.map(jax.checkpoint(lambda rows: read(variables, rows)), chunks)
        views = jax.tree.map(lambda a: _join(a, len(batch.contrast_BC)), views)
        return score(views, batch.contrast_BC)

    return _gradient(terms_of, state)


def plain(
    read: Read, score: Score, state: TrainState, batch: Batch, parts: int
) -> tuple[Any, Terms]:
    """The mean gradient and the mean terms of `parts`, each contrasted only within itself."""

    def add(total: Any, part: Batch) -> tuple[Any, Terms]:
        grads, terms = whole_batch(read, score, state, part)
        return jax.tree.map(jnp.add, total, grads), terms

    zeros = jax.tree.map(jnp.zeros_like, state.trained)
    total, terms = jax.lax.scan(add, zeros, _micro_batches(batch, parts))
    return jax.tree.map(lambda a: a / parts, total), jax.tree.map(lambda a: a.mean(axis=0), terms)


# --- the step --------------------------------------------------------------------------------

Outcome = tuple[TrainState, Terms]
"""The state after a step, and its terms or metrics."""
TrainStep = Callable[[TrainState, Batch, Variables | None], Outcome]
"""The third are a frozen teacher's."""


def make_train_step(
    backbone: Backbone,
    config: Config,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    teacher: FrozenTeacher | None = None,
) -> TrainStep:
    """The step of LaSER and GIRCSE. Jit it, donating the state. Its metrics are the loss terms and
    those of `finish_step`."""
    warmup = config.objective.distillation_warmup_steps
    objective = replace(config.objective, views=config.views)
    gradient = gradient_of(config.train)

    def learn(state: TrainState, batch: Batch, teacher_variables: Variables | None) -> Outcome:
        step = state.step.astype(jnp.float32)
        scale = jnp.minimum(1.0, (step + 1.0) / warmup) if warmup else jnp.ones(())
        taught_by = {"teacher": teacher, "teacher_variables": teacher_variables}
        read = partial(read_views, backbone, objective=objective, **taught_by)
        score = partial(loss_terms, objective=objective, scale=scale)
        return update(optimizer, partial(gradient, read, score), state, batch)

    return finish_step(learn, config, schedule)


def update(
    optimizer: optax.GradientTransformation,
    gradient: Callable[[TrainState, Batch], tuple[Any, Terms]],
    state: TrainState,
    batch: Batch,
) -> Outcome:
    """The state with new parameters, whatever the gradient is, and the terms, with its norm and
    whether it and the loss are finite. The counters stay."""
    grads, terms = gradient(state, batch)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(terms["loss"]) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    new = replace(state, trained=trained, opt_state=opt_state)
    return new, terms | {"grad_norm": grad_norm, "finite": finite}


def finish_step(
    learn: TrainStep, config: Config, schedule: optax.Schedule, updates: int = 1
) -> TrainStep:
    """The step around `learn`, which updates the parameters so often. Where its term `finite` is 0,
    nothing but the step counters changes.

    Metrics are float32 scalars: its terms, `learning_rate`, `documents` (the pool that a query is
    contrasted with), `masked_negatives` in the whole batch, `tokens`, `token_pairs`,
    `padding_share` and `skipped_steps`.
    """
    pools = config.train.num_micro_batches if config.train.accumulation == "plain" else 1

    def train_step(state: TrainState, batch: Batch, teacher_variables: Variables | None) -> Outcome:
        batch = replace(batch, rows_B=None)
        learnt, terms = learn(state, batch, teacher_variables)
        kept = jax.tree.map(partial(jnp.where, terms["finite"]), learnt, state)
        skipped = state.skipped + ~terms["finite"]
        metrics = terms | reading(batch, config)
        metrics |= {
            "skipped_steps": skipped,
            "learning_rate": schedule((state.step - state.skipped) * updates),
            "documents": batch.contrast_BC.shape[1] // pools,
            "masked_negatives": (~batch.contrast_BC).sum(),
        }
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        return replace(kept, step=state.step + 1, skipped=skipped), metrics

    return train_step
