"""The measuring core: contenders timed in turn on one machine, and the program around them.

Speeds of a machine drift by more than the differences that are looked for. So every repeat times
all contenders one after the other, each repeat begins with another one, and a ratio is taken within
a repeat before its median and spread are.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gzip
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from filelock import lock_descriptor

from laser_jax.evaluate.results import markdown_table
from laser_jax.files.durable import written_whole
from laser_jax.train.output import code_version

PACKAGES = (
    *("laser-jax", "jax", "jaxlib", "flax", "optax", "numpy", "grain", "tokenizers"),
    *("torch", "transformers", "peft", "faiss-cpu"),
)
REST_SECONDS = 0.05
"""Pause before each timing: the threads of PyTorch's OpenMP spin for some milliseconds after their
work, on the cores of whoever comes next."""

LOCK = "LASER_BENCHMARK_LOCK"
"""Names a file by which programs that run at once are timed one after the other."""

Row = dict[str, Any]
Cell = Callable[[Row], str]
Columns = Mapping[str, Cell]
"""From a heading to the text of a row's cell."""

Run = Callable[[], Any]
"""One whole piece of work. What it returns is waited for; PyTorch contenders wait by themselves."""

Name = TypeVar("Name", bound=Hashable)
"""The name of a contender."""

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


def time_alternating(contenders: Mapping[Name, Run], *, repeats: int) -> dict[Name, list[float]]:
    """Seconds of every repeat of every contender.

    Args:
        repeats: timed rounds through all contenders, after one that is not timed. Each round begins
            with another contender.

    Raises:
        ValueError: when there is nothing to time or no repeat.
    """
    names = list(contenders)
    if not names or repeats < 1:
        raise ValueError(
            f"at least one contender and one repeat are wanted, got {names} and {repeats} repeats"
        )
    seconds: dict[Name, list[float]] = {name: [] for name in names}
    with alone():
        for round_ in range(1 + repeats):
            first = round_ % len(names)
            for name in [*names[first:], *names[:first]]:
                time.sleep(REST_SECONDS)
                began = time.perf_counter()
                jax.block_until_ready(contenders[name]())
                taken = time.perf_counter() - began
                if round_ > 0:
                    seconds[name].append(taken)
    return seconds


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Holds the lock of a file; another process that wants it waits."""
    with open(path, "w") as file:
        lock_descriptor(file.fileno())
        yield


def alone() -> contextlib.AbstractContextManager[None]:
    """Within this no other program is timed that shares the file which LASER_BENCHMARK_LOCK names;
    they may load and compile. Without such a file nothing is waited for."""
    return locked(os.environ[LOCK]) if LOCK in os.environ else contextlib.nullcontext()


def in_new_process(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, computed by a process that ends with it."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def paired_ratio(seconds: Sequence[float], base: Sequence[float]) -> Spread:
    """Spread of the ratios `seconds` / `base`, each of one repeat."""
    return Spread.of([ours / other for ours, other in zip(seconds, base, strict=True)])


def timing_fields(times: Mapping[Name, Sequence[float]], name: Name, base: Name) -> Row:
    """The fields of a row that say how long contender `name` took, also against `base`; with the
    repeats in order, so that others can be paired later."""
    taken = vars(Spread.of(times[name])) | {"repeats": list(times[name])}
    return {"seconds": taken, "ratio": vars(paired_ratio(times[name], times[base]))}


# --- where and when --------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Machine, versions, date and commit of this run, and how busy the machine is as it begins."""
    torch_threads = None
    if torch_unusable() is None:
        import torch

        torch_threads = torch.get_num_threads()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("LASER_COMMIT") or code_version().get("commit"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average_at_start": os.getloadavg(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "torch_threads": torch_threads,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    named = re.search(r"^model name\s*: (.*)", text, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def torch_device() -> str | None:
    """The PyTorch device that is JAX's default one; None where PyTorch cannot use it."""
    import torch

    if jax.default_backend() == "cpu":
        return "cpu"
    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else None


def torch_unusable() -> str | None:
    """Why PyTorch cannot be measured beside JAX, in words; None where it can."""
    missing = [name for name in ("torch", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} absent: pip install laser-jax[parity]"
    if torch_device() is None:
        return f"PyTorch here has no device of JAX's backend {jax.default_backend()}"
    return None


# --- tables ----------------------------------------------------------------------------------


def table_of(rows: Sequence[Row], columns: Columns) -> str:
    """The Markdown table of some rows; columns that are empty in all of them are left out."""
    shown = {heading: [cell(row) for row in rows] for heading, cell in columns.items()}
    shown = {heading: cells for heading, cells in shown.items() if any(cells)}
    return markdown_table(list(shown), list(zip(*shown.values(), strict=True)))


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


def seconds(key: str = "seconds") -> Cell:
    """A column of times."""
    return lambda row: seconds_cell(row.get(key))


def ratio(key: str = "ratio") -> Cell:
    """A column of ratios."""
    return lambda row: ratio_cell(row.get(key))


def value(key: str, form: str = "", unit: float | None = None) -> Cell:
    """A column of texts or numbers, or of spreads, of which the median is shown.

    Args:
        form: as `format` takes it.
        unit: what the number is divided by.
    """

    def cell(row: Row) -> str:
        found = row.get(key)
        if isinstance(found, Mapping):
            found = found["median"]
        return "" if found is None else format(found if unit is None else found / unit, form)

    return cell


def batch_cell(row: Row) -> str:
    """`8×512`: rows of tokens."""
    return f"{row['rows']}×{row['tokens']}"


# --- the report ------------------------------------------------------------------------------


@dataclass
class Report:
    """What a program measured: one JSON file, and one table to paste into a document."""

    benchmark: str
    command: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    """What a reader must know of this run, such as why contenders are absent."""
    rows: list[Row] = field(default_factory=list)

    def write(self, output: Path) -> None:
        """Writes JSON on one line, compressed where the name ends in .gz: the same content gives
        the same bytes."""
        data = (json.dumps(vars(self), ensure_ascii=False) + "\n").encode()
        with written_whole(output) as part:
            part.write_bytes(gzip.compress(data, mtime=0) if output.suffix == ".gz" else data)


def as_markdown(report: Mapping[str, Any], columns: Columns) -> str:
    """Command, machine, table and notes of what `Report.write` wrote."""
    e = report["environment"]
    load = ", ".join(f"{value:.2f}" for value in e["load_average_at_start"])
    versions = ", ".join(f"{name} {v}" for name, v in e["versions"].items() if v is not None)
    where = (
        f"{e['date']}, commit {e['commit'] or 'unknown'}. {e['processor']}, {e['cores']} cores,"
        f" load average at start {load}; {e['device_count']} × {e['device']} ({e['backend']}). "
        f"Python {e['python']}, {versions}."
    )
    table = table_of(report["rows"], columns)
    return "\n\n".join([f"    {report['command']}", where, table, *report["notes"]])


# --- the program around a measurement --------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A benchmark: its command line, how it fills a report, and how a row is shown."""

    name: str
    description: str | None
    fill: Callable[[argparse.Namespace, Report], None]
    """Adds rows and notes; the settings are the options."""
    columns: Columns
    flags: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    quick: Mapping[str, Any] = field(default_factory=dict)
    """What --quick sets over the options: tiny shapes, which show only that the program runs."""
    repeats: int | None = 7
    """The default of --repeats; None for a program that repeats nothing."""
    apart: bool = False
    """Leaves the device to the processes that it starts."""

    def parser(self) -> argparse.ArgumentParser:
        parser = empty_parser(self.name, self.description)
        parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run?")
        parser.add_argument("--output", type=new_file, help="write the numbers to this file")
        if self.repeats is not None:
            text = f"timed rounds; default {self.repeats}"
            parser.add_argument("--repeats", type=positive, default=self.repeats, help=text)
        self.flags(parser)
        return parser

    def options(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The parsed command line, with the shapes of --quick where it is given."""
        options = self.parser().parse_args(arguments)
        if options.quick:
            vars(options).update(self.quick)
        return options

    def main(self, arguments: Sequence[str]) -> Report:
        """The command line: measures, prints the table and, with --output, writes the file. A
        measurement that means nothing ends the program with its message."""
        options = self.options(arguments)
        given = {k: v for k, v in vars(options).items() if k not in ("output", "quick")}
        settings = json.loads(json.dumps(given, default=str))  # paths, in lists too
        where = in_new_process(environment) if self.apart else environment()
        command = shlex.join(["python", "-m", f"benchmarks.{self.name}", *arguments])
        report = Report(self.name, command, settings, where)
        try:
            self.fill(options, report)
        except BenchmarkError as error:
            sys.exit(f"error: {error}")
        print(as_markdown(vars(report), self.columns))
        if options.output is not None:
            report.write(options.output)
            print(f"\n{options.output}", file=sys.stderr)
        return report


def empty_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of a program here, without any flag."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{program}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_numbers(parser: argparse.ArgumentParser, numbers: Mapping[str, tuple[int, str]]) -> None:
    """Flags of positive integers: name -> (default, help)."""
    for name, (default, text) in numbers.items():
        text = f"{text}; default {default}"
        parser.add_argument(f"--{name}", type=positive, default=default, help=text)


def new_file(text: str) -> Path:
    """An argparse type: a path in a folder that exists, so that no result is lost at the end."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {path.parent} does not exist; make it first")
    return path


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def add_shapes(
    parser: argparse.ArgumentParser,
    flag: str,
    sizes: Sequence[str],
    default: Sequence[tuple[int, ...]],
) -> None:
    """A flag of shapes: where the sizes are rows and tokens, `8x128` is 8 rows of 128 tokens."""

    def shape(text: str) -> tuple[int, ...]:
        parts = text.split("x")
        if len(parts) != len(sizes):
            wanted = "x".join(sizes).upper()
            raise argparse.ArgumentTypeError(f"{wanted} is wanted, such as 8x128, got {text}")
        return tuple(map(positive, parts))

    text = f"default {' '.join('x'.join(map(str, shape)) for shape in default)}"
    parser.add_argument(f"--{flag}", type=shape, nargs="*", default=default, help=text)
