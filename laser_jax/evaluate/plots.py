"""The plots, as SVG. matplotlib is the extra `bench`."""

import functools
import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laser_jax.files.durable import written_whole

_log = logging.getLogger(__name__)


@functools.cache
def can_draw() -> bool:
    """Whether matplotlib is there. Where it is not, says so once and names the extra."""
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        _log.warning("no plot, which wants matplotlib: pip install 'laser-jax[bench]'")
    return found


@contextmanager
def _drawn(stem: Path) -> Iterator[Any]:
    """Gives the axes of a figure, which is written when the block ends."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    yield figure.add_subplot()
    # neither a date nor random ids: the same numbers give the same file
    with (
        matplotlib.rc_context({"svg.hashsalt": "laser_jax"}),
        written_whole(stem.with_name(f"{stem.name}.svg")) as part,
    ):
        figure.savefig(part, format="svg", metadata={"Date": None})


def plot_quality_by_steps(
    curves: Mapping[str, Mapping[int, float]], levels: Mapping[str, float], metric: str, stem: Path
) -> None:
    """Draws a metric against K to `stem`.svg: `curves`, name -> K -> value, and `levels`, name ->
    value, of runs without a K (the explicit view and its control)."""
    with _drawn(stem) as axes:
        for name, by_steps in curves.items():
            steps = sorted(by_steps)
            axes.plot(steps, [by_steps[k] for k in steps], marker="o", label=name)
        for number, (name, value) in enumerate(levels.items(), start=len(curves)):
            axes.axhline(value, color=f"C{number}", linestyle="--", label=name)
        axes.set_xticks(sorted({k for by_steps in curves.values() for k in by_steps}))
        axes.set_xlabel("K, number of thinking steps")
        axes.set_ylabel(metric)
        # outside, as curves may be anywhere
        axes.figure.legend(loc="outside upper center", fontsize=8, ncols=2)


@dataclass(frozen=True)
class LatencyPoint:
    """A run of a model: how long a query takes, and how good it is."""

    milliseconds: float
    quality: float
    label: str
    """Written beside the point."""


def plot_latency_quality(
    series: Mapping[str, Sequence[LatencyPoint]], metric: str, stem: Path
) -> None:
    """Draws a metric against the time of a query to `stem`.svg. The points of a series are joined
    in the order given; a point alone is a square, which the legend names."""
    from matplotlib.ticker import LogFormatter

    with _drawn(stem) as axes:
        for name, points in series.items():
            times, qualities = ([p.milliseconds for p in points], [p.quality for p in points])
            if len(points) == 1:
                axes.plot(times, qualities, marker="s", linestyle="none", label=name)
                continue
            axes.plot(times, qualities, marker="o", label=name)
            for point, *place in zip(points, times, qualities, strict=True):
                offset = {"textcoords": "offset points", "xytext": (4, 4)}
                axes.annotate(point.label, place, fontsize=7, **offset)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(LogFormatter())  # plain numbers, more where they span little
        axes.xaxis.set_minor_formatter(LogFormatter())
        axes.set_xlabel("milliseconds a query")
        axes.set_ylabel(metric)
        axes.legend()
