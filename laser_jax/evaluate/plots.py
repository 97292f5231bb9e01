"""The plots, as SVG. matplotlib is the extra `bench`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laser_jax.files.durable import written_whole


def require_matplotlib() -> Any:
    """The module, or an ImportError that names the extra; to be called before long work."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib: pip install laser-jax[bench], or go without by --plot false"
        ) from error
    return matplotlib


@contextmanager
def _drawn(stem: Path, height: float = 4.0) -> Iterator[Any]:
    """Gives the axes of a figure, which is written when the block ends."""
    matplotlib = require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height), layout="constrained")
    yield figure.add_subplot()
    # neither a date nor random ids: the same numbers give the same file
    with (
        matplotlib.rc_context({"svg.hashsalt": "laser_jax"}),
        written_whole(stem.with_name(f"{stem.name}.svg")) as part,
    ):
        figure.savefig(part, format="svg", metadata={"Date": None})


def _log_axis(axes: Any, values: Sequence[float]) -> None:
    """Makes the horizontal axis logarithmic, with plain numbers: more of them within a decade
    where the values span few."""
    from matplotlib.ticker import LogLocator, NullFormatter

    span = max(values) / min(values)
    numbered = (1,) if span > 300 else (1, 2, 5) if span > 10 else range(1, 10)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=numbered))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def plot_quality_by_steps(
    curves: Mapping[str, Mapping[int, float]],
    levels: Mapping[str, float],
    metric: str,
    stem: Path,
) -> None:
    """Draws a metric against K, with other runs as level lines.

    Args:
        curves: name -> K -> value.
        levels: name -> value, of runs without a K (the explicit view and its control).
        stem: the file is this with .svg.
    """
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
    """Draws a metric against the time of a query.

    Args:
        series: name -> its points, joined in the order given. A point alone is a square, which the
            legend names.
        stem: the file is this with .svg.
    """
    with _drawn(stem) as axes:
        for name, points in series.items():
            alone = len(points) == 1
            axes.plot(
                [point.milliseconds for point in points],
                [point.quality for point in points],
                marker="s" if alone else "o",
                linestyle="none" if alone else "-",
                label=name,
            )
            for point in () if alone else points:
                axes.annotate(
                    point.label,
                    (point.milliseconds, point.quality),
                    textcoords="offset points",
                    xytext=(4, 4),
                    fontsize=7,
                )
        _log_axis(axes, [point.milliseconds for points in series.values() for point in points])
        axes.set_xlabel("milliseconds a query")
        axes.set_ylabel(metric)
        axes.legend()


@dataclass(frozen=True)
class Interval:
    """A measured value with its quartiles."""

    label: str
    kind: str
    """Values of one kind have one colour, and the legend names it."""
    q1: float
    median: float
    q3: float
    bound: float | None = None
    """What the value could be at best."""


def plot_intervals(
    intervals: Sequence[Interval], quantity: str, stem: Path, bound: str = "bound"
) -> None:
    """Draws a line of quartiles with a point at the median for each value, the first on top, and a
    black stroke at its bound. The axis begins at 0, or is logarithmic where the medians are more
    than tenfold apart.

    Args:
        quantity: what the axis shows.
        bound: what the legend calls the bounds.
        stem: the file is this with .svg.
    """
    with _drawn(stem, 1.0 + 0.24 * len(intervals)) as axes:
        kinds = list(dict.fromkeys(value.kind for value in intervals))
        told_apart = 1 < len(kinds) < len(intervals)  # else the labels say it all
        for place, value in enumerate(intervals):
            color = f"C{kinds.index(value.kind)}" if told_apart else "C0"
            first = [other.kind for other in intervals].index(value.kind) == place
            axes.hlines(place, value.q1, value.q3, color=color, linewidth=3, alpha=0.5)
            axes.plot(
                value.median,
                place,
                marker="o",
                linestyle="none",
                color=color,
                label=value.kind if first and told_apart else None,
            )
        bounds = [(v.bound, place) for place, v in enumerate(intervals) if v.bound is not None]
        if bounds:
            axes.plot(
                *zip(*bounds, strict=True),
                marker="|",
                markersize=10,
                markeredgewidth=1.5,
                linestyle="none",
                color="black",
                label=bound,
            )
        axes.set_yticks(range(len(intervals)), [value.label for value in intervals], fontsize=8)
        axes.invert_yaxis()
        medians = [value.median for value in intervals]
        if medians and max(medians) > 10 * min(medians):
            _log_axis(axes, medians)
        else:
            axes.set_xlim(left=0)
        axes.grid(axis="x", which="both", alpha=0.3)
        axes.set_xlabel(quantity, loc="right")  # has the room below the labels too
        if told_apart or bounds:
            axes.figure.legend(loc="outside upper right", fontsize=8, ncols=min(len(kinds) + 1, 4))
