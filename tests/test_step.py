"""One optimizer step: layouts, what moves, warm-up, the frozen teacher and the collectives."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

from laser_jax.batch import Batch, PackShape, Tokens
from laser_jax.config import (
    Config,
    DataConfig,
    LoraConfig,
    LossWeights,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScratchConfig,
    TrainConfig,
)
from laser_jax.losses import ExplicitView
from laser_jax.modeling.backbone import Backbone, Variables
from laser_jax.sharding import MESH_AXES, batch_sharding
from laser_jax.step import (
    FrozenTeacher,
    TrainState,
    Views,
    gradcache,
    loss_terms,
    make_train_step,
    plain,
    read_views,
    whole_batch,
)
from laser_jax.train.state import (
    abstract_state,
    init_state,
    jit_train_step,
    learning_rate_schedule,
    make_optimizer,
)
from laser_jax.views import explicit_view, latent_view

B, G, K, V, D = 8, 2, 2, 30, 16
SCRATCH = ScratchConfig(
    hidden_size=D,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=24,
)
LORA = LoraConfig(rank=2, alpha=4.0)
# Gentler than 0.02: random embeddings a temperature apart would make rounding visible.
OBJECTIVE = ObjectiveConfig(
    num_thinking_steps=K,
    temperature=0.5,
    output_temperature=0.5,
    trajectory_temperature=0.5,
)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.0)
STEPS = 10
WARM_UP = 2  # so that it is over where a step is skipped below
FLOAT32 = jnp.dtype(jnp.float32)
Shape = tuple[int, int, int]
"""Of a mesh."""
ALONE, DATA = (1, 1, 1), (8, 1, 1)


@pytest.fixture(autouse=True)
def _optax_promotes() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):  # optax takes a float to an integer power
        yield


def config(lora: LoraConfig | None, **train: Any) -> Config:
    """Of a step of the full loss, with warm-up."""
    return Config(
        ModelConfig(scratch=SCRATCH),
        DataConfig(),
        lora=lora,
        objective=dataclasses.replace(OBJECTIVE, distillation_warmup_steps=WARM_UP),
        optimizer=OPTIMIZER,
        train=TrainConfig(batch_size=B, **train),
    )


def mesh_of(*sizes: int) -> Mesh:
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch(seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)

    def tokens(rows: int, width: int) -> Tokens:
        lengths = rng.integers(2, width + 1, rows).astype(np.int32)
        return Tokens(rng.integers(0, V, (rows, width)).astype(np.int32), lengths)

    query, documents, explicit = tokens(B, 5), tokens(B * G, 6), tokens(B, 9)
    starts, reasoning = query.lengths_B, rng.integers(2, 5, B)
    for b, start in enumerate(starts):
        explicit.ids_BT[b, :start] = query.ids_BT[b, :start]
    lengths_B = (starts + reasoning).astype(np.int32)
    keyframes_BK = np.stack([starts + reasoning // 2 - 1, lengths_B - 2], axis=1).astype(np.int32)
    contrast_BC = np.ones((B, B * G), bool)
    contrast_BC[0, 3] = False
    return Batch(query, documents, Tokens(explicit.ids_BT, lengths_B), keyframes_BK, contrast_BC)


def packed(batch: Batch, shape: Shape, parts: int = 1) -> Batch:
    """The batch, to be read without its padding: packs for every device, and a place to spare."""
    shards = shape[0] * shape[1]

    def of(tokens: Tokens) -> Tokens:
        lengths = tokens.lengths_B.reshape(shards, B // (shards * parts), parts, -1)
        places = int(lengths.sum(axis=(1, 3)).max()) + 1
        return tokens.replace(packed=PackShape(shards, places, parts))

    assert batch.explicit is not None
    return batch.replace(documents=of(batch.documents), explicit=of(batch.explicit))


def optimizer() -> optax.GradientTransformation:
    return make_optimizer(OPTIMIZER, STEPS)


@functools.cache
def drawn(seed: int, layers: int = 1) -> tuple[Backbone, Variables]:
    """A backbone without adapters and random variables of its own. One layer is compiled in half
    the time of two, the first of which stands in the stack."""
    backbone = Backbone(dataclasses.replace(SCRATCH, num_layers=layers).backbone(V))
    abstract = abstract_state(backbone, optimizer(), mesh_of(1, 1, 1), FLOAT32)
    return backbone, host(init_state(backbone, optimizer(), abstract, seed, None).variables)


def given(base: Any) -> Callable[[Any], Any]:
    """What gives `init_state` the parameters of a base."""

    def load(like: Any) -> Any:
        return jax.tree.map(
            lambda a, leaf: jax.device_put(a.astype(leaf.dtype), leaf.sharding), base, like
        )

    return load


class Run(NamedTuple):
    """Some steps of a run on one mesh."""

    start: TrainState
    end: TrainState
    metrics: list[dict[str, float]]


def spoilt(batch: Batch) -> Batch:
    """The batch with a loss that is not finite: its first query is contrasted with nothing, its
    positive included."""
    contrast_BC = batch.contrast_BC.copy()
    contrast_BC[0] = False
    return dataclasses.replace(batch, contrast_BC=contrast_BC)


class Program(NamedTuple):
    """A compiled step, and the state before the first one, on the host and as it lies on a mesh."""

    step: jax.stages.Compiled
    start: TrainState
    layout: TrainState


@functools.cache
def program(
    shape: Shape, lora: LoraConfig | None, remat: str = "none", pack: bool = False, **train: Any
) -> Program:
    backbone, mesh = Backbone(SCRATCH.backbone(V), lora=lora, remat=remat), mesh_of(*shape)
    abstract = abstract_state(backbone, optimizer(), mesh, FLOAT32)
    start = init_state(backbone, optimizer(), abstract, 3, given(drawn(0, 2)[1]["params"]))
    schedule = learning_rate_schedule(OPTIMIZER, STEPS)
    step = make_train_step(backbone, config(lora, **train), optimizer(), schedule)
    first = batch(0)
    if pack:
        first = packed(first, shape, config(lora, **train).train.num_micro_batches)
    with jax.set_mesh(mesh):
        step = jit_train_step(step, abstract, mesh).lower(start, first, None).compile()
    return Program(step, host(start), jax.tree.map(lambda a: a.sharding, abstract))


def run_steps(
    shape: Shape, lora: LoraConfig | None, batches: Sequence[Batch], **settings: Any
) -> Run:
    """A step on each batch, on a mesh of a shape."""
    step, start, layout = program(shape, lora, **settings)
    mesh, metrics = mesh_of(*shape), []
    if settings.pop("pack", False):
        settings.pop("remat", None)
        parts = config(lora, **settings).train.num_micro_batches
        batches = [packed(rows, shape, parts) for rows in batches]
    state = jax.device_put(host(start), layout)
    with jax.set_mesh(mesh):
        for rows in batches:
            state, arrays = step(state, jax.device_put(rows, batch_sharding(mesh)), None)
            metrics.append({name: float(value) for name, value in arrays.items()})
    return Run(start, host(state), metrics)


def host(tree: Any) -> Any:
    """A copy that outlives the donation of its arrays."""
    return jax.tree.map(np.array, tree)


# --- layouts and collectives -------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    """Four steps under adapters, by mesh."""
    with jax.numpy_dtype_promotion("standard"):
        batches = [batch(seed) for seed in range(4)]
        return {
            name: run_steps(shape, LORA, batches)
            for name, shape in {"alone": ALONE, "data": DATA}.items()
        }


def test_eight_devices_give_the_losses_of_one(runs) -> None:
    alone, together = runs["alone"].metrics, runs["data"].metrics
    assert set(alone[0]) == {
        *("loss", "latent", "explicit", "output", "trajectory", "grad_norm", "learning_rate"),
        *("documents", "masked_negatives", "tokens", "token_pairs", "padding_share", "finite"),
        "skipped_steps",
    }
    for one, many in zip(alone, together, strict=True):
        for name, value in one.items():
            np.testing.assert_allclose(many[name], value, rtol=1e-5, err_msg=name)


def assert_same_step(packed: Run, padded: Run, within: float = 1e-5) -> None:
    for ours, theirs in zip(packed.metrics, padded.metrics, strict=True):
        assert_same_terms(ours, theirs)
        assert ours["tokens"] == theirs["tokens"]
    assert_same_gradients(packed.end, padded.end, within)


def test_without_padding_it_is_the_same_step_on_eight_devices() -> None:
    """Two steps, as before the first an adapter has no gradient in `lora_a`."""
    rows = [batch(0)] * 2
    found, wanted = (run_steps(DATA, LORA, rows, pack=pack) for pack in (True, False))
    assert_same_step(found, wanted, within=1e-4)


def test_without_padding_it_is_the_same_step_in_micro_batches() -> None:
    settings: dict[str, Any] = {"micro_batch_size": 4, "remat": "full"}
    found, wanted = full_step((2, 1, 1), pack=True, **settings), full_step()
    assert_same_step(found, wanted)
    assert found.metrics[0]["padding_share"] < 0.6 * wanted.metrics[0]["padding_share"]


def test_without_padding_no_more_is_sent_between_devices() -> None:
    text = program(DATA, LORA, pack=True).step.as_text()
    gathered = collectives(text, "all-gather")
    assert [shape.split("{")[0] for shape in gathered] == [f"f32[{B * G},{D}]"]
    for kind in ("all-to-all", "collective-permute", "reduce-scatter"):
        assert collectives(text, kind) == [], kind


def collectives(program: str, kind: str) -> list[str]:
    """The shapes that the collectives of a kind give, in the order of the program."""
    return re.findall(rf" = (\S+) {kind}(?:-start)?\(", program)


def test_documents_are_gathered_once_and_nothing_else_is() -> None:
    text = program(DATA, LORA).step.as_text()
    gathered = collectives(text, "all-gather")
    assert [shape.split("{")[0] for shape in gathered] == [f"f32[{B * G},{D}]"]
    for kind in ("all-to-all", "collective-permute", "reduce-scatter"):
        assert collectives(text, kind) == [], kind


# --- what moves --------------------------------------------------------------------------------


def moved(before: Any, after: Any) -> dict[str, bool]:
    pairs = zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return {jax.tree_util.keystr(path): not np.array_equal(a, b) for (path, a), b in pairs}


def test_under_lora_every_adapter_moves_and_the_base_does_not(runs) -> None:
    begin, end, _ = runs["alone"]
    assert int(end.step) == 4
    assert set(end.variables) == {"params", "lora"}
    adapters = moved(begin.trained, end.trained)
    assert all("lora_" in path for path in adapters)
    assert all(adapters.values()), adapters
    assert not any(moved(begin.frozen, end.frozen).values())


def assert_same_gradients(got: TrainState, wanted: TrainState, within: float = 1e-5) -> None:
    """Adam's first moment, leaf by leaf: after one step a multiple of the gradient, later an
    average of them. `within` is relative to the largest of a leaf."""
    ours, theirs = (optax.tree.get(end.opt_state, "mu") for end in (got, wanted))
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        scale, name = np.abs(b).max(), jax.tree_util.keystr(path)
        assert scale > 0, name
        np.testing.assert_allclose(a, b, rtol=0, atol=within * scale, err_msg=name)


@functools.cache
def full_step(shape: Shape = ALONE, **settings: Any) -> Run:
    """One step of full fine-tuning, where no gradient is zero."""
    return run_steps(shape, None, [batch(0)], **settings)


def test_adapters_have_the_gradients_of_one_device_on_eight(runs) -> None:
    # Fresh adapters have no gradient in `lora_a` before `lora_b` has moved, and Adam's first steps
    # make much of rounding where a gradient is small: 1.3e-5 was seen after four of them.
    assert_same_gradients(runs["data"].end, runs["alone"].end, within=1e-4)


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 2, 2)])
def test_every_mesh_gives_the_loss_and_the_gradients_of_one_device(shape) -> None:
    alone, run = full_step(), full_step(shape)
    for name, value in alone.metrics[0].items():
        np.testing.assert_allclose(run.metrics[0][name], value, rtol=1e-5, err_msg=name)
    assert_same_gradients(run.end, alone.end)
    text = program(shape, None).step.as_text()
    assert f"f32[{B},{V}]" not in " ".join(collectives(text, "all-gather"))


def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    clean = run_steps(ALONE, LORA, [batch(0), batch(1)])
    hurt = run_steps(ALONE, LORA, [batch(0), spoilt(batch(2)), batch(1)])
    assert [metrics["finite"] for metrics in hurt.metrics] == [1, 0, 1]
    assert [metrics["skipped_steps"] for metrics in hurt.metrics] == [0, 1, 1]
    assert not np.isfinite(hurt.metrics[1]["loss"])
    rates = [metrics["learning_rate"] for metrics in hurt.metrics]
    assert rates[1] == rates[2] == clean.metrics[1]["learning_rate"]
    assert int(hurt.end.step) == 3
    for kept in ("trained", "opt_state"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(hurt.end, kept), getattr(clean.end, kept)
        )


def test_full_fine_tuning_over_all_mesh_axes_moves_every_parameter(runs) -> None:
    begin, end, metrics = full_step((2, 2, 2))
    for name in ("latent", "explicit", "output", "trajectory"):  # fresh adapters change nothing
        np.testing.assert_allclose(metrics[0][name], runs["alone"].metrics[0][name], rtol=1e-5)
    assert begin.frozen is None
    assert set(end.variables) == {"params"}
    parameters = moved(begin.trained, end.trained)
    assert all(parameters.values()), parameters


def test_a_given_base_is_kept_in_its_dtype_under_adapters_and_trained_in_float32() -> None:
    bfloat16 = jnp.dtype(jnp.bfloat16)
    base = jax.tree.map(lambda a: a.astype(bfloat16), drawn(0, 2)[1])
    for lora, wanted in ((LORA, bfloat16), (None, FLOAT32)):
        backbone = Backbone(SCRATCH.backbone(V), lora=lora)
        abstract = abstract_state(backbone, optimizer(), mesh_of(*DATA), bfloat16)
        state = init_state(backbone, optimizer(), abstract, 0, given(base["params"]))
        params = state.variables["params"]
        assert {a.dtype for a in jax.tree.leaves(params)} == {wanted}
        assert {a.dtype for a in jax.tree.leaves(state.trained)} == {FLOAT32}
        for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(base), strict=True):
            np.testing.assert_array_equal(np.asarray(ours, np.float32), theirs.astype(np.float32))


# --- micro-batches ------------------------------------------------------------------------------


def assert_same_terms(got: dict[str, float], wanted: dict[str, float]) -> None:
    for name in ("loss", "latent", "explicit", "output", "trajectory", "grad_norm"):
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-5, err_msg=name)


def test_gradcache_is_the_loss_and_the_gradient_of_the_whole_batch() -> None:
    """Though the layers keep nothing for the backward pass. (With `dots` test_gradients has it.)"""
    at_once, in_parts = full_step(), full_step(micro_batch_size=2, remat="full")
    [whole], [cut] = at_once.metrics, in_parts.metrics
    assert_same_terms(cut, whole)
    assert_same_gradients(in_parts.end, at_once.end)
    assert cut["documents"] == whole["documents"] == B * G


def test_plain_accumulation_contrasts_only_within_a_micro_batch() -> None:
    [whole] = full_step().metrics
    [cut] = full_step(micro_batch_size=B // 4, accumulation="plain").metrics
    assert cut["documents"] == B * G // 4
    assert cut["latent"] < whole["latent"]


def scored(rows: Batch) -> Batch:
    """The batch with scores of another teacher, of which one row has none."""
    scores_BG = np.random.default_rng(8).normal(size=(B, G)).astype(np.float32)
    scores_BG[3] = np.nan
    return dataclasses.replace(rows, teacher_scores_BG=scores_BG)


def test_scores_of_another_teacher_are_distilled_alike_in_every_way() -> None:
    """Also by plain accumulation, as each query's own passages alone count."""
    weights = LossWeights(latent=0.0, explicit=0.0, output=0.0, trajectory=0.0, teacher=2.0)
    objective = dataclasses.replace(OBJECTIVE, weights=weights, views="fast")
    gradient, terms = found(objective, scored(batch()))
    assert set(terms) == {"loss", "latent", "teacher"}
    assert terms["teacher"] > 1e-3
    np.testing.assert_allclose(terms["loss"], 2 * terms["teacher"], rtol=1e-6)
    cases: list[tuple[Any, Any]] = [("fast", gradcache), ("parity", plain)]
    for views, way in cases:
        other = dataclasses.replace(objective, views=views)
        got, cut = found(other, scored(batch()), functools.partial(way, parts=4))
        np.testing.assert_allclose(cut["teacher"], terms["teacher"], rtol=1e-5)
        for ours, whole in zip(*map(jax.tree.leaves, (got, gradient)), strict=True):
            assert np.abs(whole).max() > 0
            np.testing.assert_allclose(ours, whole, rtol=0, atol=1e-5 * np.abs(whole).max())


def test_eight_devices_distil_the_scores_of_one() -> None:
    weights = dataclasses.replace(OBJECTIVE.weights, teacher=2.0)
    objective = dataclasses.replace(OBJECTIVE, weights=weights)
    backbone, variables = drawn(0)

    def terms(variables: Variables, rows: Batch) -> Any:
        views = read_views(backbone, variables, rows, objective)
        return loss_terms(views, rows.contrast_BC, objective, jnp.ones(()))

    one = jax.jit(terms)(variables, scored(batch()))
    mesh = mesh_of(*DATA)
    with jax.set_mesh(mesh):
        rows = jax.device_put(scored(batch()), batch_sharding(mesh))
        many = jax.jit(terms)(variables, rows)
    for name, value in one.items():
        np.testing.assert_allclose(many[name], value, rtol=1e-5, err_msg=name)


# --- the objective ------------------------------------------------------------------------------


@functools.cache
def gradient_of(objective: ObjectiveConfig, way: Any) -> Any:
    """(state, batch) -> gradient and terms."""
    read = functools.partial(read_views, drawn(0)[0], objective=objective)
    score = functools.partial(loss_terms, objective=objective, scale=np.float32(1))
    return jax.jit(functools.partial(way, read, score))


def found(objective: ObjectiveConfig, rows: Batch, way: Any = whole_batch) -> tuple[Any, Any]:
    """The gradient of a full fine-tuning, and the terms."""
    count = np.zeros((), np.int32)
    state = TrainState(count, count, drawn(0)[1]["params"], None, ())
    return host(gradient_of(objective, way)(state, rows))


WAYS: dict[str, tuple[Any, bool, Any]] = {
    "fast": ("fast", False, whole_batch),
    "parity, gradcache": ("parity", False, functools.partial(gradcache, parts=2)),
    "fast, packed": ("fast", True, whole_batch),
}


def assert_alike_in_every_way(
    objective: ObjectiveConfig, rows: Batch, wanted: dict[str, float], ways: Sequence[str]
) -> None:
    """These terms, and one gradient, whichever way they are computed."""
    gradients = {}
    for name in ("fast", *ways):
        views, pack, way = WAYS[name]
        read = packed(rows, ALONE) if pack else rows
        asked = dataclasses.replace(objective, views=views)
        gradients[name], terms = found(asked, read, way)
        for term, value in wanted.items():
            wrong = f"{name}: {term}"
            np.testing.assert_allclose(terms[term], value, rtol=1e-4, atol=1e-6, err_msg=wrong)
    for name, gradient in gradients.items():
        for ours, first in zip(*map(jax.tree.leaves, (gradient, gradients["fast"])), strict=True):
            within = 1e-5 * np.abs(first).max()
            np.testing.assert_allclose(ours, first, rtol=0, atol=within, err_msg=name)


def terms_at(rows: Batch, query_K: int, document_K: int) -> dict[str, float]:
    """The four terms in numpy, of states that are read one part after the other."""
    backbone, variables = drawn(0)

    @jax.jit
    def read(variables: Variables) -> dict[str, jax.Array]:
        model, pooling = (backbone, variables), "prompt_and_thoughts"
        assert rows.explicit is not None
        explicit = explicit_view(*model, rows.explicit, rows.keyframes_BK[:, :query_K])
        return {
            "hidden": latent_view(*model, rows.query, query_K, pooling),
            "documents": latent_view(*model, rows.documents, document_K, pooling),
            "final": explicit.final_BD,
            "keyframes": explicit.keyframes_BKD,
        }

    return _terms_of(host(read(variables)), rows.contrast_BC)


@pytest.mark.parametrize(
    ("document_K", "ways"),
    [(1, ("parity, gradcache", "fast, packed")), (3, ())],
)
def test_documents_think_as_long_as_they_are_told(document_K: int, ways: Sequence[str]) -> None:
    objective = dataclasses.replace(OBJECTIVE, document_thinking_steps=document_K)
    wanted = terms_at(batch(), K, document_K)
    assert_alike_in_every_way(objective, batch(), wanted, ways)


def test_documents_at_one_step_do_not_think() -> None:
    """No loop but the queries' is in the program, and that one has a row a query."""
    backbone, variables = drawn(0)
    rows, sizes = batch(), []
    for document_K in (None, 1):
        objective = dataclasses.replace(OBJECTIVE, document_thinking_steps=document_K)
        read = functools.partial(read_views, backbone, batch=rows, objective=objective)
        text = jax.jit(read).lower(variables).as_text()
        sizes.append({int(n) for n in re.findall(rf"tensor<(\d+)x{V}xf32>", text)} - {V})
    assert sizes == [{B + B * G}, {B}]


def test_distillation_grows_over_the_warm_up_and_the_rest_does_not(runs) -> None:
    w = OBJECTIVE.weights
    for step, m in enumerate(runs["alone"].metrics):
        distilled = w.output * m["output"] + w.trajectory * m["trajectory"]
        scale = min(1.0, (step + 1) / WARM_UP)
        expected = w.latent * m["latent"] + w.explicit * m["explicit"] + scale * distilled
        np.testing.assert_allclose(m["loss"], expected, rtol=1e-6)


def test_a_frozen_teacher_ranks_with_its_own_states_and_does_not_learn() -> None:
    backbone, student = drawn(0)
    _, other = drawn(1)
    teacher, one = FrozenTeacher(backbone, K), jnp.ones(())

    @jax.jit
    def taught(student: Variables, other: Variables) -> Any:
        views = read_views(backbone, student, batch(), OBJECTIVE, teacher, other)
        return loss_terms(views, batch().contrast_BC, OBJECTIVE, one)

    @jax.jit
    def together(variables: Variables) -> Any:
        views = read_views(backbone, variables, batch(), OBJECTIVE)
        return loss_terms(views, batch().contrast_BC, OBJECTIVE, one)

    ours, theirs = together(student), together(other)
    for name, value in taught(student, student).items():
        np.testing.assert_allclose(value, ours[name], rtol=1e-5, err_msg=name)
    swapped = taught(student, other)
    np.testing.assert_allclose(swapped["explicit"], theirs["explicit"], rtol=1e-5)
    np.testing.assert_allclose(swapped["latent"], ours["latent"], rtol=1e-5)
    assert abs(float(swapped["output"]) - float(ours["output"])) > 1e-4

    assert taught(other, other)["explicit"] == swapped["explicit"]  # whoever the student is


def _terms_of(states: dict[str, np.ndarray], contrast_BC: np.ndarray) -> dict[str, float]:
    """The four terms in numpy, of states that are cut already."""

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def log_softmax(x: np.ndarray, seen: np.ndarray) -> np.ndarray:
        x = np.where(seen, x / 0.5, -1e30)
        return (
            x
            - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - x.max(-1, keepdims=True)
        )

    documents_DC = unit(states["documents"].mean(axis=1)).T
    student, teacher = unit(states["hidden"].mean(axis=1)), unit(states["final"])
    q, p = (log_softmax(x @ documents_DC, contrast_BC) for x in (student, teacher))
    steps, targets = (
        log_softmax(unit(states[name]) @ documents_DC, contrast_BC[:, None])
        for name in ("hidden", "keyframes")
    )
    at = np.arange(B), np.arange(B) * G
    return {
        "latent": -q[at].mean(),
        "explicit": -p[at].mean(),
        "output": (np.exp(p) * (p - q)).sum(-1).mean(),
        "trajectory": (np.exp(targets) * (targets - steps)).sum(-1).mean(),
    }


def test_under_dimensions_every_term_is_taken_at_every_size() -> None:
    rng, sizes, weights = np.random.default_rng(5), (4, 9), (0.5, 2.0)
    shapes = {"hidden": (B, K, D), "documents": (B * G, K, D), "final": (B, D)}
    states = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    states["keyframes"] = rng.normal(size=(B, K, D)).astype(np.float32)
    explicit = ExplicitView(states["final"], states["keyframes"])
    views = Views(states["hidden"], states["documents"], explicit, None)
    objective = dataclasses.replace(OBJECTIVE, dimensions=sizes, dimension_weights=weights)
    contrast_BC = batch().contrast_BC
    found = loss_terms(views, contrast_BC, objective, jnp.asarray(0.25))
    w, total = OBJECTIVE.weights, 0.0
    for size, weight in ((D, 1.0), *zip(sizes, weights, strict=True)):
        terms = _terms_of({n: state[..., :size] for n, state in states.items()}, contrast_BC)
        for name, value in terms.items():
            key = name if size == D else f"{name}_{size}"
            np.testing.assert_allclose(found[key], value, rtol=1e-4, err_msg=key)
        distilled = w.output * terms["output"] + w.trajectory * terms["trajectory"]
        own = w.latent * terms["latent"] + w.explicit * terms["explicit"] + 0.25 * distilled
        total += weight * own
    np.testing.assert_allclose(found["loss"], total, rtol=1e-4)
    equal = dataclasses.replace(objective, dimension_weights=())
    ones = dataclasses.replace(objective, dimension_weights=(1.0, 1.0))
    losses = [loss_terms(views, contrast_BC, o, jnp.ones(()))["loss"] for o in (equal, ones)]
    assert losses[0] == losses[1]


def test_a_frozen_teacher_is_not_cut() -> None:
    backbone, student = drawn(0)
    _, other = drawn(1)
    teacher = FrozenTeacher(backbone, K)
    views = jax.jit(lambda v, t: read_views(backbone, v, batch(), OBJECTIVE, teacher, t))(
        student, other
    )
    objective = dataclasses.replace(OBJECTIVE, dimensions=(4,))
    found = loss_terms(views, batch().contrast_BC, objective, jnp.ones(()))
    np.testing.assert_allclose(found["explicit_4"], found["explicit"], rtol=1e-6)
    assert abs(float(found["latent_4"]) - float(found["latent"])) > 1e-3


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"weights": LossWeights(1.0, 0.0, 0.0, 0.0)}, {"latent"}),
        (
            {"weights": LossWeights(1.0, 0.0, 0.0, 0.0), "dimensions": (4, 8)},
            {"latent", "latent_4", "latent_8"},
        ),
        (
            {"method": "gircse", "dimensions": (4,)},
            {f"{n}{s}" for n in ("contrastive", "penalty", "step_1", "step_2") for s in ("", "_4")},
        ),
        ({"weights": LossWeights(1.0, 0.0, 0.0, 0.0, teacher=1.0)}, {"latent"}),
        *(
            ({"weights": weights}, {"latent", "explicit", "output", "trajectory"})
            for weights in (LossWeights(1.0, 1.0, 0.0, 0.0), LossWeights(0.0, 1.0, 0.0, 0.0))
        ),
        ({"method": "gircse"}, {"contrastive", "penalty", "step_1", "step_2"}),
    ],
)
def test_an_objective_has_the_terms_that_it_needs(change, names) -> None:
    objective = dataclasses.replace(OBJECTIVE, **change)
    backbone, variables = drawn(0)
    views = jax.eval_shape(lambda v: read_views(backbone, v, batch(), objective), variables)
    found = jax.eval_shape(
        lambda v: loss_terms(v, batch().contrast_BC, objective, jnp.ones(())), views
    )
    assert set(found) == {"loss", *names}


# --- the schedule -------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_from_zero_and_decays_to_zero() -> None:
    linear = learning_rate_schedule(OptimizerConfig(learning_rate=2.0, warmup_ratio=0.2), 10)
    rates = [float(np.asarray(linear(step))) for step in range(11)]
    expected = [0.0, 1.0, *(2.0 * (10 - step) / 8 for step in range(2, 11))]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)

    constant = OptimizerConfig(learning_rate=2.0, warmup_ratio=0.0, schedule="constant")
    assert [float(np.asarray(learning_rate_schedule(constant, 10)(s))) for s in (0, 9)] == [2, 2]
    for steps in (0, 1):  # too short for a warm-up
        learning_rate_schedule(OptimizerConfig(), steps)(0)
