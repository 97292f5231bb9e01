"""What the project set out to reach, and where in the reports the measured value stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.workload import TRAIN_SHAPE, TrainShape

DTYPES = {"cpu": "float32", "gpu": "bfloat16"}
"""What is computed in, where a target is meant for it."""
SMALL, LARGE, H200 = "small-42m", "qwen3-0.6b", "H200"
PUBLISHED, TUNED = "published PyTorch", "tuned PyTorch"
COMPILED = f"{TUNED}, compiled"

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
    value: Callable[[Values], Any] = lambda values: values["ratio"]
    """A spread of repeats, or a number."""
    at_most: bool = False
    unit: str = " ×"
    device: str = ""
    """What the name of a GPU must hold; a CPU's target where it is empty."""

    @property
    def goal_told(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.goal:,g}{self.unit}"

    def met(self, value: float) -> bool:
        return value <= self.goal if self.at_most else value >= self.goal


def _milliseconds(values: Values) -> Any:
    return {key: 1000 * values["seconds"][key] for key in ("median", "q1", "q3")}


def _encode(backbone: str, tokens: int, contender: str, goal: float) -> Target:
    wanted = {"backbone": backbone, "rows": 8, "tokens": tokens, "thinking_steps": 3}
    what = f"embed 8×{tokens}, {backbone}: {contender} / ours"
    return Target(what, "encode_latency", wanted | {"contender": contender}, goal)


def _thinking(backbone: str, goal: float, device: str = "") -> Target:
    wanted = {"backbone": backbone, "rows": 8, "tokens": 512, "thinking_steps": 3}
    return Target(
        f"embed 8×512, {backbone}: K = 3 / K = 1",
        "encode_latency",
        wanted | {"contender": "ours"},
        goal,
        lambda values: values.get("over_one_step"),
        at_most=True,
        device=device,
    )


def _step(
    backbone: str, shape: TrainShape, contender: str, goal: float, *, full=False, device=""
) -> Target:
    kind = "all weights" if full else "adapters"
    what = f"train {kind}, {shape.queries} queries a step, {backbone}: {contender} / ours"
    wanted = {"backbone": backbone, "full": full, "contender": contender} | vars(shape)
    return Target(what, "train_step", wanted, goal, device=device)


def gpu_shape(queries: int) -> TrainShape:
    """Inputs as long as in the paper."""
    return TrainShape(queries, 222, 1024, 2, 512, 3)


CPU_TARGETS = (
    *(_encode(SMALL, tokens, COMPILED, 1.0) for tokens in (128, 512)),
    *(_encode(SMALL, tokens, PUBLISHED, 1.7) for tokens in (128, 512)),
    _encode(LARGE, 128, TUNED, 1.0),
    _step(SMALL, TRAIN_SHAPE, COMPILED, 1.0),
    _step(SMALL, TRAIN_SHAPE, PUBLISHED, 1.7),
    _step(SMALL, TRAIN_SHAPE, COMPILED, 1.0, full=True),
    _step(SMALL, TRAIN_SHAPE, PUBLISHED, 1.7, full=True),
    _thinking(SMALL, 1.2),
)
"""In float32, K = 3."""

H200_TARGETS = (
    Target(
        f"train adapters, 64 queries a step, {LARGE} (stretch: 100)",
        "train_step",
        {"backbone": LARGE, "full": False, "contender": ("fast", "gradcache / 8", "gradcache / 4")}
        | vars(gpu_shape(64)),
        60,
        lambda values: values["queries_per_second"],
        unit=" queries/s",
        device=H200,
    ),
    _step(LARGE, gpu_shape(4), PUBLISHED, 4, device=H200),
    _step(LARGE, gpu_shape(4), TUNED, 1, device=H200),
    Target(
        f"embed 8×512, {LARGE}",
        "encode_latency",
        {"backbone": LARGE, "rows": 8, "tokens": 512, "thinking_steps": 3, "contender": "ours"},
        10,
        _milliseconds,
        at_most=True,
        unit=" ms",
        device=H200,
    ),
    _thinking(LARGE, 1.25, H200),
    Target(
        f"embed rows of 512 tokens, 64 at a time, {LARGE}",
        "encode_throughput",
        {"backbone": LARGE, "workload": "64×512", "thinking_steps": 3, "contender": "ours"},
        1150,
        lambda values: values["documents_per_second"],
        unit=" documents/s",
        device=H200,
    ),
    Target(
        "exact top 100 of 1,146,880 × 1,024 for 1,384 queries",
        "search",
        {"queries": 1384, "documents": 1_146_880, "width": 1024, "k": 100}
        | {"contender": "ours, on the device"},
        100,
        _milliseconds,
        at_most=True,
        unit=" ms",
        device=H200,
    ),
)
"""In bfloat16, K = 3."""

TARGETS: Sequence[Target] = (*CPU_TARGETS, *H200_TARGETS)

DROPPED = {
    "embedding and training on a CPU 3 × the published PyTorch, 1.5 × the tuned one": (
        "they were set on a CPU where XLA's float32 matmuls reached 370 to 490 GFLOP/s and "
        "PyTorch's 200; on the Xeon measured here both reach about 300, `encode` is at 73 to 96 % "
        "of its roofline, and 1.5 × a tuned PyTorch would take 470 GFLOP/s"
    ),
    "K = 3 / K = 1 ≤ 1.2 for 8×128 on a CPU (1.36)": (
        "a thought multiplies eight rows with all weights, so memory decides, and XLA's matmuls of "
        "eight rows move 2 to 8 GB/s where a copy moves 39"
    ),
    "a mix of lengths 2.5 × the tuned PyTorch padded as published (2.27)": (
        "sorting into buckets brings it, which PyTorch can do too: with our batches it is as fast"
    ),
    "55 queries/s at 8 queries a step on an H200 (36)": (
        "a step of 8 queries is bound by copies and small kernels; 64 queries are what is trained"
    ),
    "780 documents/s 8 at a time on an H200 (666)": "it is the same goal as 8×512 in 10 ms",
}
"""Goals that were given up -> why. In brackets what was reached."""


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
            found = target.value(values)
            if found is None or (newest is not None and newest.date >= e["date"]):
                continue
            spread = isinstance(found, Mapping)
            newest = Reached(
                float(found["median"] if spread else found),
                (float(found["q1"]), float(found["q3"])) if spread else None,
                e["device"] if target.device else e["processor"],
                e["date"],
            )
    return newest
