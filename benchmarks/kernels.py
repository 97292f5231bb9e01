"""Where the device's time goes: the kernels of a run, by kind (`--profile` of `encode_latency` and
`train_step`).

Read from a profile with jax's own reader. Kinds are the names that XLA and the libraries give their
kernels, without their numbers; matmuls and attention are put together whatever library they come
from. Times are of one run, the mean of all. What no kernel fills is `idle`: it is of the span from
the first kernel of a run to its last.
"""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from benchmarks.measure import BenchmarkError, Row, Run, alone

KINDS = (
    ("attention", r"fmha|flash|sdpa|cudnn"),
    ("matmul", r"gemm|nvjet|cutlass|xmma|cublas|wgmma|splitK|convolution|\bdot\b"),
    ("copy", r"memcpy|memset"),
)
IDLE = "idle"
RUNS = 3
"""What is profiled."""


@dataclass(frozen=True)
class Kernel:
    """A piece of the device's time, in nanoseconds."""

    name: str
    start: float
    end: float


def kind_of(name: str) -> str:
    """The kind of a kernel of that name: one of KINDS, or the name without its numbers."""
    for kind, pattern in KINDS:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return re.sub(r"([._]\d+)+$", "", re.sub(r"^void |[<(].*", "", name))


def kernels_of(profile: ProfileData) -> list[Kernel]:  # pyright: ignore
    """What ran on the first device, in order of its beginning. On the CPU these are XLA's
    operations, the events that name one."""

    def events() -> Iterator[Any]:
        for plane in profile.planes:
            on_gpu = plane.name == "/device:GPU:0"
            if not on_gpu and plane.name != "/host:CPU":
                continue
            for line in plane.lines:
                if on_gpu and line.name.startswith("Stream"):
                    yield from line.events
                elif not on_gpu and jax.default_backend() == "cpu":
                    yield from (e for e in line.events if "hlo_op" in dict(e.stats))

    found = (Kernel(e.name, e.start_ns, e.start_ns + e.duration_ns) for e in events())
    return sorted(found, key=lambda kernel: kernel.start)


def rows_of(runs: Sequence[Sequence[Kernel]]) -> list[Row]:
    """A row for each kind, the longest first, and one for the time that no kernel fills."""
    seconds: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    span = 0.0
    for kernels in runs:
        reached = kernels[0].start
        span += max(kernel.end for kernel in kernels) - reached
        for kernel in kernels:
            seconds[IDLE] += max(0.0, kernel.start - reached)
            reached = max(reached, kernel.end)
            seconds[kind_of(kernel.name)] += kernel.end - kernel.start
            counts[kind_of(kernel.name)] += 1
    order = sorted(seconds, key=lambda kind: (kind == IDLE, -seconds[kind]))
    return [
        {
            "kind": kind,
            "kernels": counts[kind] / len(runs),
            "seconds": 1e-9 * seconds[kind] / len(runs),
            "share": seconds[kind] / span,
        }
        for kind in order
    ]


def profiled(run: Run) -> list[Row]:
    """The kernels of some runs, which are waited for one by one.

    Raises:
        BenchmarkError: the profile holds no kernels.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # as in laser_jax/train/loop.py
    found = []
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as folder:
            with alone(), jax.profiler.trace(folder, profiler_options=options):
                jax.block_until_ready(run())
            [file] = Path(folder).rglob("*.xplane.pb")
            found.append(kernels_of(ProfileData.from_file(str(file))))
    if not all(found):
        raise BenchmarkError(f"the profiler saw no kernel on {jax.devices()[0].device_kind}")
    return rows_of(found)


def told(row: Row) -> str:
    """A cell: the five kinds that take the most, and what is idle."""
    *kinds, idle = row.get("kernels", [{"kind": ""}])
    shown = [*kinds[:5], idle]
    return ", ".join(f"{k['kind']} {k['share']:.0%}" for k in shown if "share" in k)
