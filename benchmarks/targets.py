"""What the project set out to reach, and where in the reports the measured value stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.workload import SHAPES, TRAIN_SHAPE, TrainShape
from laser_jax.config import as_dict

DTYPES = {"cpu": "float32", "gpu": "bfloat16"}
"""What is computed in, where a target is meant for it."""

Values = Mapping[str, Any]
"""The settings of a report and, over them, the values of a row; `backbone` is a name."""


@dataclass(frozen=True)
class Target:
    """A goal."""

    what: str
    benchmark: str
    backend: str
    wanted: Mapping[str, Any]
    """Values that a row or its settings must have."""
    value: Callable[[Values], Any]
    """A spread of repeats, or a number."""
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""
    device: str = ""
    """What the name of the device must hold; of any device where it is empty."""

    @property
    def goal(self) -> str:
        bound, sign = (self.at_most, "≤") if self.at_least is None else (self.at_least, "≥")
        return f"{sign} {bound:g}{self.unit}"

    def met(self, value: float) -> bool:
        if self.at_least is not None:
            return value >= self.at_least
        assert self.at_most is not None
        return value <= self.at_most


def _ratio(values: Values) -> Any:
    return values["ratio"]


def _milliseconds(values: Values) -> Any:
    spread = values["seconds"]
    return {key: 1000 * spread[key] for key in ("median", "q1", "q3")}


def _encode(backbone: str, batch: str, contender: str, at_least: float) -> Target:
    rows, tokens = map(int, batch.split("×"))
    return Target(
        f"encode {batch}, K = 3, {backbone}: {contender} / ours",
        "encode_latency",
        "cpu",
        {
            "backbone": backbone,
            "rows": rows,
            "tokens": tokens,
            "thinking_steps": 3,
            "contender": contender,
        },
        _ratio,
        at_least=at_least,
        unit=" ×",
    )


def _thinking(tokens: int, backbone: str, backend: str, at_most: float) -> Target:
    return Target(
        f"encode 8×{tokens}, {backbone}: K = 3 / K = 1, ours",
        "thinking_overhead",
        backend,
        {
            "backbone": backbone,
            "rows": 8,
            "tokens": tokens,
            "thinking_steps": 3,
            "contender": "ours",
        },
        _ratio,
        at_most=at_most,
        unit=" ×",
    )


def _step(
    what: str,
    backbone: str,
    backend: str,
    shape: TrainShape,
    contender: str,
    at_least: float,
    *,
    full: bool = False,
) -> Target:
    return Target(
        f"{what}, {shape.queries} queries, {backbone}: {contender} / fast",
        "train_step",
        backend,
        {"backbone": backbone, "full": full, "contender": contender} | vars(shape),
        _ratio,
        at_least=at_least,
        unit=" ×",
    )


PUBLISHED, TUNED = "published PyTorch", "tuned PyTorch"
COMPILED = f"{TUNED}, compiled"
"""Where `torch.compile` helps: encoding on a CPU."""
LORA_STEP, FULL_STEP = "LoRA training step", "training step of all weights"
GPU_BACKBONE, GPU_DEVICE = "qwen3-0.6b", "H200"


def gpu_shape(queries: int) -> TrainShape:
    """Inputs as long as in the paper."""
    return TrainShape(queries, 222, 1024, 2, 512, 3)


TARGETS: Sequence[Target] = (
    *(
        _encode(backbone, batch, contender, at_least)
        for backbone, batches in (("small-42m", ("8×128", "8×512")), ("qwen3-0.6b", ("8×128",)))
        for batch in batches
        for contender, at_least in ((PUBLISHED, 3), (COMPILED, 1.5))
    ),
    _thinking(128, "small-42m", "cpu", 1.2),
    _thinking(512, "small-42m", "cpu", 1.2),
    Target(
        "encode a mix of lengths, K = 3, small-42m: tuned PyTorch padded as published / ours",
        "encode_throughput",
        "cpu",
        {
            "backbone": "small-42m",
            "workload": "mix",
            "thinking_steps": 3,
            "contender": "tuned, as published",
        },
        _ratio,
        at_least=2.5,
        unit=" ×",
    ),
    _step(LORA_STEP, "small-42m", "cpu", TRAIN_SHAPE, PUBLISHED, 3),
    _step(FULL_STEP, "small-42m", "cpu", TRAIN_SHAPE, PUBLISHED, 3, full=True),
    Target(
        "encode 8×512, K = 3, qwen3-0.6b in bfloat16 on an H200",
        "thinking_overhead",
        "gpu",
        {
            "backbone": GPU_BACKBONE,
            "rows": 8,
            "tokens": 512,
            "thinking_steps": 3,
            "contender": "ours",
        },
        _milliseconds,
        at_most=10,
        unit=" ms",
        device=GPU_DEVICE,
    ),
    _thinking(512, GPU_BACKBONE, "gpu", 1.35),
    *(
        Target(
            f"encode rows of 512 tokens, K = 3, {rows} at a time, qwen3-0.6b in bfloat16 on an "
            "H200, a second",
            "encode_throughput",
            "gpu",
            {
                "backbone": GPU_BACKBONE,
                "workload": f"{rows}×512",
                "thinking_steps": 3,
                "contender": "ours",
            },
            lambda values: values["documents_per_second"],
            at_least=780,
            device=GPU_DEVICE,
        )
        for rows in (8, 64)
    ),
    Target(
        "LoRA training, qwen3-0.6b in bfloat16 on an H200, queries a second",
        "train_step",
        "gpu",
        {"backbone": GPU_BACKBONE, "full": False, "contender": "fast"} | vars(gpu_shape(8)),
        lambda values: values["queries_per_second"],
        at_least=55,
        device=GPU_DEVICE,
    ),
    _step(LORA_STEP, GPU_BACKBONE, "gpu", gpu_shape(4), PUBLISHED, 4),
    _step(LORA_STEP, GPU_BACKBONE, "gpu", gpu_shape(4), TUNED, 1),
    Target(
        "exact top 100 of 1.145 M × 1,024 for 1,384 queries on an H200",
        "search",
        "gpu",
        {
            "queries": 1384,
            "documents": 1_146_880,
            "width": 1024,
            "k": 100,
            "contender": "ours, on the device",
        },
        _milliseconds,
        at_most=100,
        unit=" ms",
        device=GPU_DEVICE,
    ),
)


@dataclass(frozen=True)
class Reached:
    """What was measured for a target."""

    value: float
    quartiles: tuple[float, float] | None
    device: str
    date: str


def values_of(report: Mapping[str, Any], row: Mapping[str, Any]) -> Values:
    """The settings of a report and, over them, those of a row."""
    settings = dict(report["settings"])
    named = [n for n, config in SHAPES.items() if as_dict(config) == settings.get("backbone")]
    settings["backbone"] = named[0] if named else None
    settings["full"] = settings.get("lora") is None
    return settings | settings.get("shape", {}) | dict(row)


def reached(target: Target, reports: Sequence[Mapping[str, Any]]) -> Reached | None:
    """The newest measurement; None where there is none."""
    newest: Reached | None = None
    for report in reports:
        environment = report["environment"]
        if (report["benchmark"], environment["backend"]) != (target.benchmark, target.backend):
            continue
        if target.device not in environment["device"]:
            continue
        if report["settings"].get("dtype") not in (None, DTYPES[target.backend]):
            continue
        for row in report["rows"]:
            values = values_of(report, row)
            if any(values.get(key) != value for key, value in target.wanted.items()):
                continue
            if newest is not None and newest.date >= environment["date"]:
                continue
            found = target.value(values)
            spread = isinstance(found, Mapping)
            newest = Reached(
                float(found["median"] if spread else found),
                (float(found["q1"]), float(found["q3"])) if spread else None,
                environment["device"] if target.backend == "gpu" else environment["processor"],
                environment["date"],
            )
    return newest
