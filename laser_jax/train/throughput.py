"""How fast a run is: a step's cost by formula, what the device could do, rates by the clock.

Letters: D model, F feed-forward, L layers, V vocabulary, NH and GH the widths of queries and keys.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from laser_jax.config import BackboneConfig, Config, appended_thoughts
from laser_jax.losses import Terms
from laser_jax.sharding import Device

GIB = 2**30


@dataclass(frozen=True)
class DataSheet:
    """What a data sheet says."""

    kind: str  # a part of jax's `device_kind`
    tflops: float  # peak of dense bfloat16 matmuls, in 1e12 FLOP/s
    memory: int | None = None  # bytes, of TPUs, which can be compiled for where they are not


DATA_SHEETS = (
    DataSheet("TPU v4", 275, 32 * GIB),
    DataSheet("TPU v5 lite", 197, 16 * GIB),
    DataSheet("TPU v5", 459, 95 * GIB),
    DataSheet("TPU v6 lite", 918, 32 * GIB),
    DataSheet("A100", 312),
    DataSheet("H100 PCIe", 756),
    DataSheet("H100", 989),
    DataSheet("H200", 989),
)


def known_device(device: Device) -> DataSheet | None:
    """The data sheet of a device; None where we have none."""
    return next((known for known in DATA_SHEETS if known.kind in device.device_kind), None)


def device_bytes(device: Device) -> int | None:
    """A device's memory; None where neither the device nor its data sheet tells (CPU)."""
    if device in jax.local_devices():
        return (device.memory_stats() or {}).get("bytes_limit")
    known = known_device(device)
    return known.memory if known else None


def peak_flops(config: Config, device: Device) -> float | None:
    """A device's peak, in FLOP/s; None where it is not known. Data sheets are for 2-byte dtypes."""
    if config.train.peak_tflops is not None:
        return config.train.peak_tflops * 1e12
    known = known_device(device)
    return known.tflops * 1e12 if known and jnp.dtype(config.model.dtype).itemsize == 2 else None


@dataclass(frozen=True)
class Reading:
    """What one step reads, over all devices."""

    rows: float  # queries, documents and explicit inputs
    tokens: float  # without padding
    token_pairs: float  # of a position and one that it attends to, itself included
    selected: float  # positions whose state is used
    thoughts: float  # soft tokens


def forward_flops(backbone: BackboneConfig, reading: Reading) -> float:
    """FLOPs of the matmuls and of attention, two for a multiply-add.

    The last layer computes keys and values everywhere, and the rest where a state is used. A
    thought passes all layers, the LM head and, as a soft token, the embedding table.
    """
    D, F, L = backbone.hidden_size, backbone.intermediate_size, backbone.num_layers
    NH, GH = (heads * backbone.head_dim for heads in (backbone.num_heads, backbone.num_kv_heads))
    keys_values, rest = 2 * D * 2 * GH, 2 * (D * NH + NH * D + 3 * D * F)
    length = reading.tokens / reading.rows
    matmuls = (
        reading.tokens * (L * keys_values + (L - 1) * rest)
        + reading.selected * rest
        + reading.thoughts * (L * (keys_values + rest) + 2 * 2 * backbone.vocab_size * D)
    )
    attention = (4 * NH) * (
        (L - 1) * reading.token_pairs + (reading.selected + L * reading.thoughts) * length
    )
    return matmuls + attention


def reading_of(config: Config, tokens: float, token_pairs: float) -> Reading:
    """What a step of `config` reads, once its tokens are counted."""
    B, objective = config.train.batch_size, config.objective
    C = B * config.data.group_size
    explicit = objective.need_explicit_view
    shared = explicit and config.views == "fast" and objective.teacher is None
    K, pooling = objective.num_thinking_steps, objective.pooling
    document_K = objective.document_thinking_steps or K
    return Reading(
        rows=C + B * (1 if shared else 1 + explicit),
        tokens=tokens,
        token_pairs=token_pairs,
        selected=C + B + explicit * B * (1 + K),
        thoughts=B * appended_thoughts(K, pooling) + C * appended_thoughts(document_K, pooling),
    )


def step_flops(
    config: Config, backbone: BackboneConfig, tokens: float, token_pairs: float
) -> float | None:
    """Forward and backward: the backward pass costs as much as the forward for the gradient of the
    activations, and as much again for that of the weights where they are trained. Adapters and what
    is computed twice to save memory are not counted. None beside a frozen teacher, which reads
    without a backward pass, and where thoughts are drawn and perhaps replayed."""
    if config.objective.teacher is not None or config.objective.method == "latent_rl":
        return None
    forward = forward_flops(backbone, reading_of(config, tokens, token_pairs))
    return forward * (3 if config.lora is None else 2)


class Meter:
    """Rates between two log lines, by the clock. What was said to be `spent` elsewhere (compiling,
    evaluating) does not count."""

    def __init__(self, config: Config, backbone: BackboneConfig, devices: list[Device]):
        self._config, self._backbone = config, backbone
        peak = peak_flops(config, devices[0])
        self._peak = peak and peak * len(devices)
        self._steps: list[Terms] = []
        self._since = time.monotonic()

    def add(self, metrics: Terms) -> None:
        """Counts a step; its numbers may still be under way."""
        self._steps.append(metrics)

    def spent(self, seconds: float) -> None:
        self._since += seconds

    def read(self) -> dict[str, float]:
        """Waits for the steps, and begins anew."""
        names = ("tokens", "token_pairs")
        tokens, pairs = (sum(float(metrics[name]) for metrics in self._steps) for name in names)
        now, steps = time.monotonic(), len(self._steps)
        seconds = now - self._since
        self._steps, self._since = [], now
        rates = {
            "queries_per_second": steps * self._config.train.batch_size / seconds,
            "tokens_per_second": tokens / seconds,
        }
        flops = step_flops(self._config, self._backbone, tokens / steps, pairs / steps)
        if self._peak and flops:
            rates["mfu"] = flops * steps / seconds / self._peak
        return rates
