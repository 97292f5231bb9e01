"""What the project set out to reach, and where in the reports the measured value stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.workload import TRAIN_SHAPE, TrainShape

DTYPES = {"cpu": "float32", "gpu": "bfloat16"}
"""What is computed in, where a target is meant for it."""
SMALL, LARGE, H200 = "small-42m", "qwen3-0.6b", "H200"
PUBLISHED, TUNED = "published PyTorch", "tuned PyTorch"
COMPILED = f"{TUNED}, compiled"
PYTORCH = (PUBLISHED, TUNED, COMPILED)

Values = Mapping[str, Any]
"""The settings of a report and, over them, the values of a row."""


@dataclass(frozen=True)
class Target:
    """A goal."""

    what: str
    benchmark: str
    wanted: Mapping[str, Any]
    """Values that a row or its settings must have; a tuple holds those that will do."""
    goal: float
    key: str = "ratio"
    """Where a row has the value: a spread of repeats, or a number. Seconds are told in `unit`."""
    unit: str = " ×"
    at_most: bool = False
    device: str = ""
    """What the name of a GPU must hold; a CPU's target where it is empty."""

    @property
    def goal_told(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.goal:,g}{self.unit}"

    def met(self, value: float) -> bool:
        return value <= self.goal if self.at_most else value >= self.goal


def _embedding(backbone: str, tokens: int, contender: str) -> dict[str, Any]:
    batch = {"rows": 8, "tokens": tokens, "thinking_steps": 3}
    return {"backbone": backbone, "contender": contender} | batch


def _beside_encoder(backbone: str, tokens: int, contender: str, goal: float) -> Target:
    what = f"embed 8×{tokens}, {backbone}: {contender} / ours"
    return Target(what, "encode_latency", _embedding(backbone, tokens, contender), goal)


def _thinking(backbone: str, goal: float, device: str = "") -> Target:
    what, wanted = f"embed 8×512, {backbone}: K = 3 / K = 1", _embedding(backbone, 512, "ours")
    key = "over_one_step"
    return Target(what, "encode_latency", wanted, goal, key, at_most=True, device=device)


def _beside_step(
    backbone: str, shape: TrainShape, contender: str, goal: float, *, full=False, device=""
) -> Target:
    kind = "all weights" if full else "adapters"
    what = f"train {kind}, {shape.queries} queries a step, {backbone}: {contender} / ours"
    wanted = {"backbone": backbone, "full": full, "contender": contender} | vars(shape)
    return Target(what, "train_step", wanted, goal, device=device)


def gpu_shape(queries: int) -> TrainShape:
    """Inputs as long as in the paper."""
    return TrainShape(queries, 222, 1024, 2, 512, 3)


# On a CPU in float32, on an H200 in bfloat16; K = 3.
TARGETS: Sequence[Target] = (
    *(_beside_encoder(SMALL, tokens, COMPILED, 1.0) for tokens in (128, 512)),
    *(_beside_encoder(SMALL, tokens, PUBLISHED, 1.7) for tokens in (128, 512)),
    _beside_encoder(LARGE, 128, TUNED, 1.0),
    _beside_step(SMALL, TRAIN_SHAPE, COMPILED, 1.0),
    _beside_step(SMALL, TRAIN_SHAPE, PUBLISHED, 1.7),
    _beside_step(SMALL, TRAIN_SHAPE, COMPILED, 1.0, full=True),
    _beside_step(SMALL, TRAIN_SHAPE, PUBLISHED, 1.7, full=True),
    _thinking(SMALL, 1.2),
    Target(
        f"train adapters, 64 queries a step, {LARGE} (stretch: 100)",
        "train_step",
        {"backbone": LARGE, "full": False, "contender": ("fast", "remat full", "gradcache / 2")}
        | vars(gpu_shape(64)),
        60,
        "queries_per_second",
        " queries/s",
        device=H200,
    ),
    _beside_step(LARGE, gpu_shape(4), PUBLISHED, 4, device=H200),
    _beside_step(LARGE, gpu_shape(4), TUNED, 1, device=H200),
    Target(
        f"embed 8×512, {LARGE}",
        "encode_latency",
        _embedding(LARGE, 512, "ours"),
        10,
        "seconds",
        " ms",
        at_most=True,
        device=H200,
    ),
    _thinking(LARGE, 1.25, H200),
    Target(
        f"embed rows of 512 tokens, 64 at a time, {LARGE}",
        "encode_throughput",
        {"backbone": LARGE, "workload": "64×512", "thinking_steps": 3, "contender": "ours"},
        1150,
        "documents_per_second",
        " documents/s",
        device=H200,
    ),
    Target(
        "exact top 100 of 1,146,880 × 1,024 for 1,384 queries",
        "search",
        {"queries": 1384, "documents": 1_146_880, "width": 1024, "k": 100}
        | {"contender": "ours, on the device"},
        100,
        "seconds",
        " ms",
        at_most=True,
        device=H200,
    ),
)


@dataclass(frozen=True)
class Reached:
    """What was measured for a target."""

    value: float
    quartiles: tuple[float, float] | None
    device: str
    date: str


def values_of(report: Mapping[str, Any]) -> Iterator[Values]:
    """For every row the settings of its report and, over them, its values."""
    return (report["settings"] | row for row in report["rows"])


def _fits(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, tuple) else value == wanted


def reached(target: Target, reports: Sequence[Mapping[str, Any]]) -> Reached | None:
    """The newest measurement; None where there is none."""
    newest: Reached | None = None
    backend = "gpu" if target.device else "cpu"
    for report in reports:
        e = report["environment"]
        if (report["benchmark"], e["backend"]) != (target.benchmark, backend):
            continue
        if target.device not in e["device"]:
            continue
        if report["settings"].get("dtype") not in (None, DTYPES[backend]):
            continue
        for values in values_of(report):
            if not all(_fits(values.get(key), wanted) for key, wanted in target.wanted.items()):
                continue
            found = values.get(target.key)
            if found is None or (newest is not None and newest.date >= e["date"]):
                continue
            scale = 1000 if target.unit == " ms" else 1
            value, quartiles = found, None
            if isinstance(found, Mapping):
                value, quartiles = found["median"], (scale * found["q1"], scale * found["q3"])
            on = e["device"] if target.device else e["processor"]
            newest = Reached(scale * value, quartiles, on, e["date"])
    return newest
