"""The measuring core: several contenders timed in turn on one machine, and the report of a run.

Speeds of a machine drift by more than the differences that are looked for. So every repeat times
all contenders one after the other, each repeat begins with another one, and a ratio is taken within
a repeat before its median and spread are.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from laser_jax.files import lock, write_atomically
from laser_jax.training.output import code_version

PACKAGES = (
    *("laser-jax", "jax", "jaxlib", "flax", "optax", "numpy", "grain", "tokenizers"),
    *("torch", "transformers", "peft", "faiss-cpu"),
)
REST_SECONDS = 0.05
"""Pause before each timing: the threads of PyTorch's OpenMP spin for some milliseconds after their
work, on the cores of whoever comes next."""

LOCK = "LASER_BENCHMARK_LOCK"
"""Names a file by which programs that run at once are timed one after the other."""

Columns = Mapping[str, Callable[[dict[str, Any]], str]]
"""From a heading to the text of a row's cell."""

Run = Callable[[], Any]
"""One whole piece of work. What it returns is waited for; PyTorch contenders wait by themselves."""


Name = TypeVar("Name", str, tuple[str, int])
"""Of a contender."""

T = TypeVar("T")


class BenchmarkError(RuntimeError):
    """A measurement that would not mean what its name says."""


# --- timing ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and extremes of some repeats."""

    median: float
    q1: float
    q3: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(*(float(np.quantile(values, q)) for q in (0.5, 0.25, 0.75, 0.0, 1.0)))


def time_alternating(
    contenders: Mapping[Name, Run], *, repeats: int, warmup: int = 1
) -> dict[Name, list[float]]:
    """Seconds of every repeat of every contender.

    Args:
        repeats: timed rounds through all contenders; round i begins with contender i.
        warmup: rounds before them that are not timed.

    Raises:
        ValueError: when there is nothing to time or no repeat.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in contenders}
    with alone():
        for name, counts in in_turn(list(contenders), repeats=repeats, warmup=warmup):
            began = time.perf_counter()
            jax.block_until_ready(contenders[name]())
            taken = time.perf_counter() - began
            if counts:
                seconds[name].append(taken)
    return seconds


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within this no other program is timed that shares the file which LASER_BENCHMARK_LOCK names;
    they may load and compile. Without such a file nothing is waited for."""
    with contextlib.ExitStack() as held:
        if LOCK in os.environ:
            lock(held.enter_context(open(os.environ[LOCK], "w")), wait=True)
        yield


def in_turn(names: Sequence[Name], *, repeats: int, warmup: int) -> Iterator[tuple[Name, bool]]:
    """Whose turn it is, after a rest, and whether the round counts: `time_alternating`'s order.

    Raises:
        ValueError: as `time_alternating`.
    """
    if not names or repeats < 1 or warmup < 0:
        raise ValueError(
            f"at least one contender and one repeat are wanted, got {list(names)}, "
            f"{repeats} repeats and {warmup} warm-up rounds"
        )
    for round_ in range(warmup + repeats):
        first = round_ % len(names)
        for name in [*names[first:], *names[:first]]:
            time.sleep(REST_SECONDS)
            yield name, round_ >= warmup


def in_new_process(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, computed by a process that ends with it."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def paired_ratio(seconds: Sequence[float], base: Sequence[float]) -> Spread:
    """Spread of the ratios `seconds` / `base`, each of one repeat."""
    return Spread.of([ours / other for ours, other in zip(seconds, base, strict=True)])


def timing_fields(times: Mapping[Name, Sequence[float]], name: Name, base: Name) -> dict[str, Any]:
    """The fields of a row that say how long contender `name` took, also against `base`."""
    return {
        "seconds": vars(Spread.of(times[name])) | {"repeats": list(times[name])},
        "ratio": vars(paired_ratio(times[name], times[base])),
    }


# --- where and when --------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Machine, versions, date and commit of this run, and how busy the machine is as it begins."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("LASER_COMMIT") or code_version().get("commit"),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average_at_start": os.getloadavg(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def torch_threads() -> int | None:
    """The threads on which PyTorch computes; None where it cannot be measured."""
    if torch_unusable() is not None:
        return None
    import torch

    return torch.get_num_threads()


def version_of(package: str) -> str | None:
    """The installed version, None where the package is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_missing() -> str | None:
    """Which packages the PyTorch contenders lack, in words; None where they can run."""
    missing = [name for name in ("torch", "peft") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} absent: pip install laser-jax[parity]" if missing else None


def torch_device() -> str | None:
    """The PyTorch device that is JAX's default one; None where PyTorch cannot use it."""
    import torch

    if jax.default_backend() == "cpu":
        return "cpu"
    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else None


def torch_unusable() -> str | None:
    """Why PyTorch cannot be measured beside JAX, in words; None where it can."""
    if reason := torch_missing():
        return reason
    if torch_device() is None:
        return f"PyTorch here has no device of JAX's backend {jax.default_backend()}"
    return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# --- the report ------------------------------------------------------------------------------


@dataclass
class Report:
    """What a program measured: one JSON file, and one table to paste into a document."""

    benchmark: str
    arguments: Sequence[str]
    settings: dict[str, Any]
    environment: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What a reader must know of this run, such as why contenders are absent."""

    @property
    def command(self) -> str:
        return shlex.join(["python", "-m", f"benchmarks.{self.benchmark}", *self.arguments])

    def as_dict(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "command": self.command,
            "settings": self.settings,
            "environment": self.environment,
            "notes": self.notes,
            "rows": self.rows,
        }

    def finish(self, columns: Columns, output: Path | None) -> None:
        """Prints the table and, with `output`, writes the JSON file."""
        print(as_markdown(self.as_dict(), columns))
        if output is not None:
            self.write(output)
            print(f"\n{output}", file=sys.stderr)

    def write(self, output: Path) -> None:
        """Writes the JSON file."""
        write_atomically(output, json.dumps(self.as_dict(), indent=1) + "\n")


def as_markdown(report: Mapping[str, Any], columns: Columns) -> str:
    """Command, machine, table and notes of what `Report.as_dict` gave."""
    e = report["environment"]
    load = ", ".join(f"{value:.2f}" for value in e["load_average_at_start"])
    versions = ", ".join(f"{name} {v}" for name, v in e["versions"].items() if v is not None)
    where = (
        f"{e['date']}, commit {e['commit'] or 'unknown'}. {e['processor']}, {e['cores']} cores,"
        f" load average at start {load}; {e['device_count']} × {e['device']} ({e['backend']}). "
        f"Python {e['python']}, {versions}."
    )
    rows = [[cell(row) for cell in columns.values()] for row in report["rows"]]
    table = markdown_table(list(columns), rows)
    return "\n\n".join([f"    {report['command']}", where, table, *report["notes"]])


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table: the first column to the left, the others to the right."""
    widths = [max(3, *map(len, column)) for column in zip(headings, *rows, strict=True)]
    alignment = [str.ljust] + [str.rjust] * (len(headings) - 1)

    def line(cells: Sequence[str]) -> str:
        padded = (pad(c, w) for pad, c, w in zip(alignment, cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = [f":{'-' * (widths[0] - 1)}"] + [f"{'-' * (width - 1)}:" for width in widths[1:]]
    return "\n".join(map(line, [headings, rule, *rows]))


def seconds_cell(spread: Mapping[str, Any] | None) -> str:
    """`median (q1 to q3)` in seconds, or in milliseconds below a tenth of one."""
    if spread is None:
        return ""
    factor, unit = (1, "s") if spread["median"] >= 0.1 else (1000, "ms")
    median, q1, q3 = (factor * spread[key] for key in ("median", "q1", "q3"))
    return f"{median:.3g} {unit} ({q1:.3g} to {q3:.3g})"


def ratio_cell(spread: Mapping[str, Any] | None) -> str:
    """`median (q1 to q3)` of a ratio."""
    if spread is None:
        return ""
    return f"{spread['median']:.2f} ({spread['q1']:.2f} to {spread['q3']:.2f})"


# --- the command line ------------------------------------------------------------------------


def command_line(
    benchmark: str, description: str | None, *, repeats: int | None = 7
) -> argparse.ArgumentParser:
    """A parser with the flags that all programs share.

    Args:
        repeats: the default of `--repeats`; None for a program that repeats nothing.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run?")
    parser.add_argument("--output", type=new_file, help="write the numbers to this JSON file")
    if repeats is not None:
        parser.add_argument(
            "--repeats", type=positive, default=repeats, help=f"timed rounds; default {repeats}"
        )
    return parser


def new_file(text: str) -> Path:
    """An argparse type: a path in a folder that exists, so that no result is lost at the end."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {path.parent} does not exist; make it first")
    return path


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
