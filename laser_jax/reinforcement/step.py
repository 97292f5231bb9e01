"""One optimizer step of `objective.method: latent_rl`: the thoughts are drawn and judged once, and
the parameters updated on them once or several times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import optax

from laser_jax.batch import Batch
from laser_jax.config import Config
from laser_jax.modeling.backbone import Backbone, Variables
from laser_jax.reinforcement.policy import PolicyBatch, query_keys, read_rollouts, rollout_terms
from laser_jax.reinforcement.rewards import Draws
from laser_jax.step import Outcome, TrainState, TrainStep, finish_step, gradient_of, update


def make_reinforced_step(
    backbone: Backbone,
    config: Config,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> TrainStep:
    """As `laser_jax.step.make_train_step`. The schedule counts updates of the parameters."""
    objective, updates = config.objective, config.objective.policy.updates
    read = partial(read_rollouts, backbone, objective=objective)
    score = partial(rollout_terms, objective=objective)
    once = partial(update, optimizer, partial(gradient_of(config.train), read, score))

    def learn(state: TrainState, batch: Batch, _: Variables | None) -> Outcome:
        keys_B = query_keys(config.train.seed, state.step, len(batch.contrast_BC))
        return _reinforce(once, state, PolicyBatch(**vars(batch), keys_B=keys_B), updates)

    return finish_step(learn, config, schedule, updates)


def _reinforce(
    once: Callable[[TrainState, Batch], Outcome],
    state: TrainState,
    batch: PolicyBatch,
    updates: int,
) -> Outcome:
    """Several updates on the draws of the first, whose terms are returned: but `clipped` is of the
    last, and `finite` of all."""
    new, terms = once(state, batch)
    draws = Draws(*(terms.pop(name) for name in Draws.__dataclass_fields__))
    if updates > 1:
        replayed = replace(batch, keys_B=None, draws=draws)
        new, further = jax.lax.scan(lambda s, _: once(s, replayed), new, length=updates - 1)
        terms |= {"clipped": further["clipped"][-1]}
        terms |= {"finite": terms["finite"] & further["finite"].all()}
    return new, terms
