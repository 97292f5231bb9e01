"""Thoughts that are drawn: the gradient of REINFORCE, the same draws wherever and however they are
made, and the updates of a step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_step import (
    ALONE,
    FLOAT32,
    LORA,
    OPTIMIZER,
    SCRATCH,
    B,
    G,
    Shape,
    V,
    assert_same_gradients,
    batch,
    drawn,
    given,
    host,
    mesh_of,
    spoilt,
)

from laser_jax.batch import Batch, Tokens
from laser_jax.config import (
    Config,
    DataConfig,
    LoraConfig,
    LossWeights,
    ModelConfig,
    ObjectiveConfig,
    PolicyConfig,
    TrainConfig,
)
from laser_jax.modeling.backbone import Backbone, Variables, apply
from laser_jax.reinforcement.policy import PolicyBatch, query_keys, read_rollouts, rollout_terms
from laser_jax.reinforcement.rewards import Draws, advantages
from laser_jax.reinforcement.step import make_reinforced_step
from laser_jax.sharding import batch_sharding
from laser_jax.step import TrainState, gradcache, whole_batch
from laser_jax.train.state import (
    abstract_state,
    init_state,
    jit_train_step,
    learning_rate_schedule,
    make_optimizer,
)
from laser_jax.views import latent_view

K, R = 3, 4
POLICY = PolicyConfig(rollouts=R, reward="info_nce", temperature=0.7)
OBJECTIVE = ObjectiveConfig(
    method="latent_rl",
    num_thinking_steps=K,
    temperature=0.5,
    weights=LossWeights(latent=0.0, explicit=0.0, output=0.0, trajectory=0.0),
    policy=POLICY,
)
STEPS, SEED = 10, 5


@pytest.fixture(autouse=True)
def _optax_promotes() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):  # optax takes a float to an integer power
        yield


def with_policy(latent: float = 0.0, **changes: Any) -> ObjectiveConfig:
    weights = dataclasses.replace(OBJECTIVE.weights, latent=latent)
    policy = dataclasses.replace(POLICY, **changes)
    return dataclasses.replace(OBJECTIVE, weights=weights, policy=policy)


def keyed(rows: Batch) -> PolicyBatch:
    """Without a written reasoning, with keys to draw by."""
    keys_B = query_keys(SEED, jnp.zeros((), jnp.int32), B)
    rows = dataclasses.replace(rows, explicit=None, keyframes_BK=None)
    return PolicyBatch(**vars(rows), keys_B=keys_B)


@functools.cache
def adapted() -> tuple[Backbone, Variables]:
    """A backbone whose adapters have moved."""
    backbone, base = drawn(0)
    backbone = backbone.clone(lora=LORA)
    abstract = abstract_state(backbone, make_optimizer(OPTIMIZER, STEPS), mesh_of(*ALONE), FLOAT32)
    rng = np.random.default_rng(2)
    lora = jax.tree.map(lambda a: rng.normal(0, 0.3, a.shape).astype(a.dtype), abstract.trained)
    return backbone, {"params": base["params"], "lora": lora}


def gradient_of(
    objective: ObjectiveConfig, rows: PolicyBatch, model: tuple[Backbone, Variables], way: Any
) -> tuple[Any, dict[str, Any]]:
    backbone, variables = model
    count: Any = np.zeros((), np.int32)
    frozen = variables["params"] if "lora" in variables else None
    trained = variables["lora" if "lora" in variables else "params"]
    read = functools.partial(read_rollouts, backbone, objective=objective)
    score = functools.partial(rollout_terms, objective=objective)
    state = TrainState(count, count, trained, frozen, ())
    return host(jax.jit(functools.partial(way, read, score))(state, rows))


rollouts = jax.jit(read_rollouts, static_argnums=(0, 3))


@jax.jit
def latent(variables: Variables, prompts: Tokens) -> jax.Array:
    return latent_view(drawn(0)[0], variables, prompts, K, "prompt_and_thoughts")


def assert_close_trees(got: Any, wanted: Any, within: float = 1e-5) -> None:
    for one, other in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(one, other, rtol=0, atol=within * np.abs(other).max())


# --- what is drawn -------------------------------------------------------------------------------


def reread(
    backbone: Backbone, variables: Variables, rows: Batch, tokens_BRS: np.ndarray
) -> jax.Array:
    """log pi of every next token, [B, R, S, V], of prompts with the drawn tokens behind them, which
    are read as any text is."""
    width = rows.query.ids_BT.shape[1]
    S = tokens_BRS.shape[2]
    ids_BRT = np.zeros((B, R, width + S), np.int32)
    ids_BRT[:, :, :width] = rows.query.ids_BT[:, None]
    for b, length in enumerate(rows.query.lengths_B):
        ids_BRT[b, :, length : length + S] = tokens_BRS[b]
    logits: Any = jax.jit(backbone.apply)(variables, ids_BRT.reshape(B * R, -1))
    logits = logits.reshape(B, R, width + S, V)
    at = (rows.query.lengths_B[:, None] - 1 + np.arange(S))[:, None, :, None]
    return jax.nn.log_softmax(jnp.take_along_axis(logits, at, axis=2) / POLICY.temperature)


def test_the_gradient_is_that_of_reinforce() -> None:
    """-mean(advantage * grad log pi), of discrete tokens that are read as a text."""
    backbone, variables = drawn(0)
    rows = keyed(batch())
    got, terms = gradient_of(OBJECTIVE, rows, (backbone, variables), whole_batch)
    tokens_BRS = terms["tokens_BRSn"][..., 0]
    assert len(np.unique(tokens_BRS)) > V / 2

    @jax.jit
    def by_hand(params: Any) -> jax.Array:
        log_p_BRSV = reread(backbone, {"params": params}, rows, tokens_BRS)
        own_BRS = jnp.take_along_axis(log_p_BRSV, tokens_BRS[..., None], axis=3)[..., 0]
        return -(terms["advantage_BR"][..., None] * own_BRS).mean()

    assert_close_trees(got, host(jax.grad(by_hand)(variables["params"])))
    assert terms["clipped"] == 0
    np.testing.assert_allclose(terms["loss"], -terms["advantage_BR"].mean(), atol=1e-6)


def test_a_reward_is_that_of_the_rollouts_own_text() -> None:
    """Prompt and drawn tokens are read as a text, and the states from the prompt's last on are
    pooled."""
    backbone, variables = drawn(0)
    rows = keyed(batch())
    _, terms = gradient_of(OBJECTIVE, rows, (backbone, variables), whole_batch)
    tokens_BRS, S = terms["tokens_BRSn"][..., 0], K - 1
    width = rows.query.ids_BT.shape[1]
    ids_BRT = np.zeros((B, R, width + S), np.int32)
    ids_BRT[:, :, :width] = rows.query.ids_BT[:, None]
    for b, length in enumerate(rows.query.lengths_B):
        ids_BRT[b, :, length : length + S] = tokens_BRS[b]
    select = np.repeat(rows.query.lengths_B[:, None] - 1 + np.arange(K), R, axis=0)
    read = jax.jit(functools.partial(apply, Backbone.read, backbone))
    h_QKD, _ = read(variables, ids_BRT.reshape(B * R, -1), select)
    documents = latent(variables, rows.documents)

    def unit(x: Any) -> np.ndarray:
        return np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)

    scores = unit(np.asarray(h_QKD).mean(1)) @ unit(np.asarray(documents).mean(1)).T
    scores = np.where(np.repeat(rows.contrast_BC, R, axis=0), scores / 0.5, -np.inf)
    log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    reward_BR = log_p[np.arange(B * R), np.repeat(np.arange(B) * G, R)].reshape(B, R)
    np.testing.assert_allclose(terms["reward"], reward_BR.mean(), rtol=1e-5)
    np.testing.assert_allclose(terms["latent"], -reward_BR.mean(), rtol=1e-5)
    np.testing.assert_allclose(terms["advantage_BR"], advantages(reward_BR)[0], atol=1e-3)


def test_with_very_many_draws_a_thought_is_the_soft_token_of_inference() -> None:
    backbone, variables = drawn(0)
    rows = keyed(batch())
    soft = latent(variables, rows.query)
    away = []
    for draws in (1, 5000):
        objective = with_policy(rollouts=2, temperature=1.0, draws=draws)
        found = rollouts(backbone, variables, rows, objective)
        away.append(float(np.square(found.hidden_BRKD - soft[:, None])[:, :, 1:].mean() ** 0.5))
    assert away[1] < 0.1 * away[0]  # the root of 5000 is 71


def test_a_thoughts_probability_is_that_of_all_of_its_tokens() -> None:
    backbone, variables = drawn(0)
    found = rollouts(backbone, variables, keyed(batch()), with_policy(draws=3))
    logits = jax.jit(functools.partial(apply, Backbone.logits, backbone))(
        variables, found.hidden_BRKD[:, :, :-1]
    )
    log_p_BRSV = jax.nn.log_softmax(logits / POLICY.temperature)
    own = np.take_along_axis(np.asarray(log_p_BRSV), np.asarray(found.tokens_BRSn), axis=3)
    np.testing.assert_allclose(found.log_p_BRS, own.sum(axis=3), rtol=1e-5)
    entropy = -(np.exp(log_p_BRSV) * log_p_BRSV).sum(axis=3)
    np.testing.assert_allclose(found.entropy_BRS, entropy, rtol=1e-5)


def test_the_kl_is_exact_and_to_the_backbone_without_adapters() -> None:
    backbone, variables = adapted()
    rows, objective = keyed(batch()), with_policy(kl=0.5)
    found = rollouts(backbone, variables, rows, objective)
    tokens_BRS = np.asarray(found.tokens_BRSn[..., 0])
    log_p = reread(backbone, variables, rows, tokens_BRS)
    log_q = reread(drawn(0)[0], {"params": variables["params"]}, rows, tokens_BRS)
    wanted = (np.exp(log_p) * (log_p - log_q)).sum(axis=3)
    assert wanted.min() > 1e-4
    np.testing.assert_allclose(np.asarray(found.kl_BRS), wanted, rtol=1e-3, atol=1e-5)
    terms = rollout_terms(found, rows.contrast_BC, objective)
    free = rollout_terms(dataclasses.replace(found, kl_BRS=None), rows.contrast_BC, objective)
    np.testing.assert_allclose(terms["loss"] - free["loss"], 0.5 * terms["kl"], atol=1e-6)


# --- the same in every way -----------------------------------------------------------------------


def test_gradcache_draws_the_same_and_has_the_gradient_of_the_whole_batch() -> None:
    objective = with_policy(latent=0.5, kl=0.1, draws=3)
    whole, terms = gradient_of(objective, keyed(batch()), adapted(), whole_batch)
    in_parts = functools.partial(gradcache, parts=4)
    cut, same = gradient_of(objective, keyed(batch()), adapted(), in_parts)
    np.testing.assert_array_equal(same["tokens_BRSn"], terms["tokens_BRSn"])
    assert_close_trees(cut, whole)
    for name in ("loss", "latent", "reward", "entropy", "kl", "groups_without_spread"):
        np.testing.assert_allclose(same[name], terms[name], rtol=1e-5, err_msg=name)


def run(
    objective: ObjectiveConfig,
    batches: list[Batch],
    shape: Shape = ALONE,
    lora: LoraConfig | None = None,
    start: TrainState | None = None,
    **train: Any,
) -> tuple[list[TrainState], list[dict[str, float]]]:
    """The state after each step on a mesh of a shape, and the metrics."""
    config = Config(
        ModelConfig(scratch=SCRATCH),
        DataConfig(),
        lora=lora,
        objective=objective,
        optimizer=OPTIMIZER,
        train=TrainConfig(batch_size=B, seed=SEED, **train),
    )
    backbone, mesh = drawn(0)[0].clone(lora=lora), mesh_of(*shape)
    updates = STEPS * objective.policy.updates
    optimizer = make_optimizer(OPTIMIZER, updates)
    abstract = abstract_state(backbone, optimizer, mesh, FLOAT32)
    state = init_state(backbone, optimizer, abstract, 3, given(drawn(0)[1]["params"]))
    if start is not None:
        state = jax.device_put(start, jax.tree.map(lambda a: a.sharding, abstract))
    schedule = learning_rate_schedule(OPTIMIZER, updates)
    step = jit_train_step(
        make_reinforced_step(backbone, config, optimizer, schedule), abstract, mesh
    )
    states, metrics = [], []
    with jax.set_mesh(mesh):
        for rows in batches:
            rows = dataclasses.replace(rows, explicit=None, keyframes_BK=None)
            state, terms = step(state, jax.device_put(rows, batch_sharding(mesh)), None)
            states.append(host(state))
            metrics.append({name: float(value) for name, value in terms.items()})
    return states, metrics


TWICE = with_policy(latent=0.5, updates=2, clip=0.01)


@functools.cache
def updated_twice() -> tuple[list[TrainState], list[dict[str, float]]]:
    """Steps of two updates, the last of which has a loss that is not finite."""
    return run(TWICE, [batch(), batch(1), spoilt(batch(2))])


def test_a_mesh_draws_the_same() -> None:
    [alone, *_], [metrics, *_] = updated_twice()
    assert {"reward", "entropy", "clipped", "groups_without_spread", "latent"} < metrics.keys()
    [state], [same] = run(TWICE, [batch()], (2, 2, 2))
    for name, value in metrics.items():
        np.testing.assert_allclose(same[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert_same_gradients(state, alone, within=1e-4)


def test_a_resumed_run_draws_the_same_and_another_step_draws_anew() -> None:
    objective = with_policy(kl=0.1)
    batches = [batch(seed) for seed in range(3)]
    states, metrics = run(objective, batches, lora=LORA)
    resumed, again = run(objective, batches[1:], lora=LORA, start=states[0])
    assert again == metrics[1:]
    jax.tree.map(np.testing.assert_array_equal, resumed[-1], states[-1])
    keys = [query_keys(SEED, jnp.asarray(step), 2) for step in (0, 1)]
    data = np.stack([jax.random.key_data(key) for key in keys]).reshape(4, -1)
    assert len(np.unique(data, axis=0)) == 4


# --- updates -------------------------------------------------------------------------------------


def test_further_updates_replay_the_draws_with_the_policy_alone() -> None:
    [state, *_], [metrics, *_] = updated_twice()
    backbone, variables = drawn(0)
    rows = keyed(batch())
    optimizer = make_optimizer(OPTIMIZER, 2 * STEPS)

    @jax.jit
    def updated(gradient: Any, moments: Any, params: Any) -> tuple[Any, Any]:
        changes, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, changes), moments

    params, moments = variables["params"], optimizer.init(variables["params"])
    first, terms = gradient_of(TWICE, rows, drawn(0), whole_batch)
    params, moments = updated(first, moments, params)
    names = ("tokens_BRSn", "log_p_BRS", "advantage_BR")
    draws = Draws(*(terms[name] for name in names))

    @jax.jit
    def clipped(params: Any) -> tuple[jax.Array, jax.Array]:
        log_p_BRSV = reread(backbone, {"params": params}, rows, draws.tokens_BRSn[..., 0])
        own = jnp.take_along_axis(log_p_BRSV, draws.tokens_BRSn, axis=3)[..., 0]
        ratio, advantage = jnp.exp(own - draws.log_p_BRS), draws.advantage_BR[..., None]
        held = jnp.clip(ratio, 0.99, 1.01) * advantage
        return -jnp.minimum(ratio * advantage, held).mean(), (held < ratio * advantage).mean()

    second, share = jax.jit(jax.grad(clipped, has_aux=True))(params)
    assert 0 < share < 1
    np.testing.assert_allclose(metrics["clipped"], share, atol=1e-6)
    _, moments = updated(second, moments, params)
    wanted = TrainState(state.step, state.skipped, params, None, host(moments))
    assert_same_gradients(state, wanted, within=1e-4)
    np.testing.assert_allclose(metrics["loss"], terms["loss"], atol=1e-6)


def test_a_step_is_counted_once_and_the_schedule_goes_on_with_every_update() -> None:
    states, metrics = updated_twice()
    assert [int(state.step) for state in states] == [1, 2, 3]
    counts = [leaf for leaf in jax.tree.leaves(states[1].opt_state) if leaf.dtype == np.int32]
    assert {int(count) for count in counts} == {4}
    schedule: Any = learning_rate_schedule(OPTIMIZER, 2 * STEPS)
    rates = [metric["learning_rate"] for metric in metrics]
    np.testing.assert_allclose(rates, [schedule(0), schedule(2), schedule(4)], rtol=1e-6)


def test_a_step_of_which_an_update_is_not_finite_changes_nothing() -> None:
    states, metrics = updated_twice()
    assert [metric["finite"] for metric in metrics] == [1, 1, 0]
    assert [int(state.skipped) for state in states] == [0, 0, 1]
    kept = [(state.trained, state.opt_state) for state in states[1:]]
    jax.tree.map(np.testing.assert_array_equal, *kept)


def test_rewards_rise_without_a_contrastive_loss() -> None:
    _, metrics = run(with_policy(rollouts=8, updates=2), [batch()] * STEPS)
    rewards = [metric["reward"] for metric in metrics]
    assert min(rewards[-3:]) > max(rewards[:3])
