"""What a step costs by formula, what it reads, and the rates of a run by the clock."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import laser_jax.thinking
import laser_jax.train.throughput as throughput
import laser_jax.views
from laser_jax.batch import Batch, Tokens
from laser_jax.config import (
    BackboneConfig,
    Config,
    DataConfig,
    LoraConfig,
    LossWeights,
    ModelConfig,
    ObjectiveConfig,
    ScratchConfig,
    TrainConfig,
)
from laser_jax.modeling.backbone import Backbone, apply, empty_suffix
from laser_jax.step import FrozenTeacher, read_views, reading
from laser_jax.train.throughput import (
    Meter,
    Reading,
    device_bytes,
    forward_flops,
    peak_flops,
    reading_of,
    step_flops,
)

# --- the formula against XLA's own count -------------------------------------------------------

# XLA counts the body of a loop once, so layers lie side by side and one thought is thought. It also
# counts norms, RoPE and softmax, which the formula leaves out: they grow with the widths, matmuls
# with their products, and at these sizes they are below a hundredth of the whole.
B, T, P = 2, 32, 3
ABOVE_THE_FORMULA = 0.01
QWEN3 = ScratchConfig(
    hidden_size=512,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    intermediate_size=1024,
).backbone(vocab_size=2000)
LLAMA = dataclasses.replace(QWEN3, family="llama", tie_word_embeddings=False)
BACKBONES = pytest.mark.parametrize("config", [QWEN3, LLAMA], ids=["qwen3", "llama"])


class Shapes(NamedTuple):
    """Arguments of the functions below, without values."""

    backbone: Backbone
    variables: Any
    ids_BT: Any
    select_BP: Any


def shapes(config: BackboneConfig, lora: LoraConfig | None = None) -> Shapes:
    ids_BT = jax.ShapeDtypeStruct((B, T), jnp.int32)
    backbone = Backbone(config, lora=lora, scan_layers=False)
    drawn = jax.eval_shape(backbone.init, jax.random.key(0), ids_BT)
    select_BP = jax.ShapeDtypeStruct((B, P), jnp.int32)
    return Shapes(backbone, nn.meta.unbox(drawn), ids_BT, select_BP)


def counted(function: Any, *arguments: Any) -> float:
    """FLOPs of the compiled program."""
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def read(backbone: Backbone) -> Any:
    return lambda variables, ids_BT, select_BP: apply(
        Backbone.read, backbone, variables, ids_BT, select_BP
    )


# The reference kernel computes every pair of positions and masks half of them.
PROMPTS = Reading(rows=B, tokens=B * T, token_pairs=B * T * T, selected=B * P, thoughts=0)


def assert_close(xla: float, formula: float) -> None:
    assert formula < xla < (1 + ABOVE_THE_FORMULA) * formula


@BACKBONES
def test_reading_costs_what_xla_counts(config: BackboneConfig) -> None:
    backbone, *arguments = shapes(config)
    assert_close(counted(read(backbone), *arguments), forward_flops(config, PROMPTS))


@BACKBONES
def test_a_thought_costs_what_xla_counts(config: BackboneConfig) -> None:
    backbone, variables, *prompts = shapes(config)
    _, cache = jax.eval_shape(read(backbone), variables, *prompts)

    def think(variables: Any, h_BD: jax.Array, cache: Any, lengths_B: jax.Array) -> Any:
        token_BD = apply(Backbone.soft_token, backbone, variables, h_BD)
        suffix = empty_suffix([cache], 1)
        slot = jnp.zeros((), jnp.int32)
        return apply(
            Backbone.think, backbone, variables, token_BD, (cache,), suffix, lengths_B, slot
        )

    h_BD = jax.ShapeDtypeStruct((B, config.hidden_size), jnp.float32)
    lengths_B = jax.ShapeDtypeStruct((B,), jnp.int32)
    xla = counted(think, variables, h_BD, cache, lengths_B)
    thoughtful = dataclasses.replace(PROMPTS, thoughts=B)
    assert_close(xla, forward_flops(config, thoughtful) - forward_flops(config, PROMPTS))


@pytest.mark.parametrize(("lora", "factor"), [(None, 3), (LoraConfig(rank=1), 2)])
def test_the_backward_pass_costs_about_what_the_factor_says(lora, factor: int) -> None:
    """About: the first layer's inputs are embeddings, which adapters need no gradient of."""
    backbone, variables, *prompts = shapes(QWEN3, lora)
    trained = "lora" if lora else "params"

    def loss(part: Any, variables: Any, *prompts: Any) -> jax.Array:
        h_BPD, _ = read(backbone)(variables | {trained: part}, *prompts)
        return h_BPD.sum()

    xla = counted(jax.value_and_grad(loss), variables[trained], variables, *prompts)
    formula = factor * forward_flops(QWEN3, PROMPTS)
    assert 0.95 < xla / formula < 1.02


def test_a_whole_layer_more_costs_a_whole_layer_more() -> None:
    """The last layer, of which little is computed, is there once."""
    deeper = dataclasses.replace(QWEN3, num_layers=QWEN3.num_layers + 1)
    D, F = QWEN3.hidden_size, QWEN3.intermediate_size
    NH, GH = 8 * 64, 4 * 64
    matmuls = 2 * B * T * (D * NH + 2 * D * GH + NH * D + 3 * D * F)
    attention = 4 * NH * B * T * T
    more = forward_flops(deeper, PROMPTS) - forward_flops(QWEN3, PROMPTS)
    assert more == matmuls + attention


# --- what a step reads -------------------------------------------------------------------------

QUERIES, G, K = 4, 3, 3
SMALL = ScratchConfig(
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=24,
).backbone(vocab_size=30)
WIDTHS = {"query": 5, "documents": 6, "explicit": 9}


def batch(*, explicit: bool) -> Batch:
    rng = np.random.default_rng(0)

    def tokens(name: str, rows: int) -> Tokens:
        width = WIDTHS[name]
        lengths_B = rng.integers(2, width + 1, rows).astype(np.int32)
        return Tokens(np.zeros((rows, width), np.int32), lengths_B)

    return Batch(
        query=tokens("query", QUERIES),
        documents=tokens("documents", QUERIES * G),
        explicit=tokens("explicit", QUERIES) if explicit else None,
        keyframes_BK=np.ones((QUERIES, K), np.int32) if explicit else None,
        contrast_BC=np.ones((QUERIES, QUERIES * G), np.bool_),
    )


def run_of(teacher: str | None = None, **objective: Any) -> Config:
    return Config(
        ModelConfig(scratch=ScratchConfig()),
        DataConfig(group_size=G),
        objective=ObjectiveConfig(num_thinking_steps=K, teacher=teacher, **objective),
        train=TrainConfig(batch_size=QUERIES),
    )


@dataclasses.dataclass
class Read:
    """What the backbone is called with while the views of a batch are traced."""

    parts: list[str] = dataclasses.field(default_factory=list)
    rows: int = 0
    selected: int = 0
    thoughts: int = 0

    def apply(self, method: Any, backbone: Backbone, variables: Any, *arguments: Any, **kw: Any):
        theirs = backbone.config.rope_theta == TEACHER.config.rope_theta
        if method is Backbone.read:
            rows, width = arguments[0].shape
            part = next(name for name, size in WIDTHS.items() if size == width)
            if not theirs or part == "explicit":
                self.parts.append(part)
                self.rows += rows
                self.selected += arguments[1].size
        if method is Backbone.think and not theirs:
            slots = arguments[2][1].k.shape[1]  # the loop's body is traced once
            self.thoughts += arguments[0].shape[0] * slots
        return apply(method, backbone, variables, *arguments, **kw)


TEACHER = Backbone(dataclasses.replace(SMALL, rope_theta=77.0))


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (run_of(), ["explicit", "documents"]),
        (run_of(views="parity"), ["query", "documents", "explicit"]),
        (run_of(weights=LossWeights(1.0, 0.0, 0.0, 0.0)), ["query", "documents"]),
        (run_of(method="gircse"), ["query", "documents"]),
        (run_of(document_thinking_steps=1), ["explicit", "documents"]),
        (run_of(document_thinking_steps=K + 1, views="parity"), ["query", "documents", "explicit"]),
        # its own pass over the documents is left out, as the docstring of `Meter` says
        (run_of(teacher="there"), ["query", "documents", "explicit"]),
    ],
    ids=[
        *("fast", "parity", "without_explicit_view", "gircse"),
        *("documents_at_1", "documents_beyond_K", "frozen_teacher"),
    ],
)
def test_a_step_reads_what_is_counted(config: Config, parts: list[str], monkeypatch) -> None:
    found, example = Read(), batch(explicit=config.objective.need_explicit_view)
    for module in (laser_jax.views, laser_jax.thinking):
        monkeypatch.setattr(module, "apply", found.apply)
    backbone, ids = Backbone(SMALL), jnp.zeros((1, 2), jnp.int32)
    variables = nn.meta.unbox(jax.eval_shape(backbone.init, jax.random.key(0), ids))
    objective = dataclasses.replace(config.objective, views=config.views)
    teacher = FrozenTeacher(TEACHER, 2) if config.objective.teacher else None
    jax.eval_shape(lambda v: read_views(backbone, v, example, objective, teacher, v), variables)
    assert sorted(found.parts) == sorted(parts)

    lengths = np.concatenate([getattr(example, part).lengths_B for part in parts])
    metrics = reading(jax.tree.map(jnp.asarray, example), config)
    tokens, pairs = float(metrics["tokens"]), float(metrics["token_pairs"])
    assert tokens == lengths.sum()
    assert pairs == sum(n * (n + 1) / 2 for n in lengths)
    size = sum(getattr(example, part).ids_BT.size for part in parts)
    np.testing.assert_allclose(metrics["padding_share"], 1 - tokens / size, rtol=1e-6)
    read = reading_of(config, tokens, pairs)
    assert read == Reading(found.rows, tokens, pairs, found.selected, found.thoughts)


# --- devices -----------------------------------------------------------------------------------


def device(kind: str) -> Any:
    return SimpleNamespace(device_kind=kind)


@pytest.mark.parametrize(
    ("kind", "tflops", "gib"),
    [
        ("TPU v4", 275, 32),
        ("TPU v5 lite", 197, 16),
        ("TPU v5", 459, 95),
        ("TPU v6 lite", 918, 32),
        ("NVIDIA A100-SXM4-80GB", 312, None),
        ("NVIDIA H100 PCIe", 756, None),
        ("NVIDIA H100 80GB HBM3", 989, None),
        ("NVIDIA H200", 989, None),
    ],
)
def test_known_devices_have_their_data_sheet(kind: str, tflops: float, gib: int | None) -> None:
    half = dataclasses.replace(
        run_of(), model=ModelConfig(scratch=ScratchConfig(), dtype="bfloat16")
    )
    assert peak_flops(half, device(kind)) == tflops * 1e12
    assert peak_flops(run_of(), device(kind)) is None  # not in float32
    assert device_bytes(device(kind)) == (gib and gib * 2**30)


def test_an_unknown_device_has_the_peak_that_the_config_gives() -> None:
    assert peak_flops(run_of(), device("abacus")) is None
    assert device_bytes(device("abacus")) is None
    assert device_bytes(jax.devices()[0]) is None  # a CPU does not tell
    given = dataclasses.replace(run_of(), train=TrainConfig(peak_tflops=0.5))
    assert peak_flops(given, device("abacus")) == 5e11
    assert peak_flops(given, device("TPU v4")) == 5e11


# --- the clock ---------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The seconds that the meter sees."""
    fake = SimpleNamespace(now=100.0)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(monotonic=lambda: fake.now))
    return fake


def step(tokens: float) -> dict[str, Any]:
    return {"tokens": jnp.float32(tokens), "token_pairs": jnp.float32(10 * tokens)}


def test_rates_are_those_since_the_last_reading_without_what_was_spent_elsewhere(clock) -> None:
    meter = Meter(run_of(), SMALL, jax.devices())
    meter.add(step(30))
    meter.add(step(50))
    clock.now += 7
    meter.spent(3)
    assert meter.read() == {"queries_per_second": 2 * QUERIES / 4, "tokens_per_second": 80 / 4}
    clock.now += 0.5
    meter.add(step(10))
    assert meter.read() == {"queries_per_second": QUERIES / 0.5, "tokens_per_second": 10 / 0.5}


def test_the_share_of_the_peak_is_of_all_devices(clock) -> None:
    config = dataclasses.replace(
        run_of(), train=TrainConfig(batch_size=QUERIES, peak_tflops=1e-3), lora=LoraConfig()
    )
    meter = Meter(config, SMALL, [device("abacus")] * 2)
    for tokens in (30, 50):
        meter.add(step(tokens))
    clock.now += 4
    one = step_flops(config, SMALL, 40, 400)
    assert one is not None
    assert one == 2 * forward_flops(SMALL, reading_of(config, 40, 400))
    assert meter.read()["mfu"] == pytest.approx(2 * one / 4 / 2e9)
    whole = dataclasses.replace(config, lora=None)
    assert step_flops(whole, SMALL, 40, 400) == 1.5 * one


def test_a_frozen_teacher_has_no_share_of_the_peak(clock) -> None:
    config = dataclasses.replace(run_of(teacher="there"), train=TrainConfig(peak_tflops=1.0))
    meter = Meter(config, SMALL, [device("abacus")])
    meter.add(step(30))
    clock.now += 1
    assert set(meter.read()) == {"queries_per_second", "tokens_per_second"}
