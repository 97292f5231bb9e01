"""Everything that is worth knowing of a machine in one run with a time limit.

    python -m benchmarks.all cpu|gpu --output FILE [--minutes N] [--at_once N]

Each part (benchmarks/runs.yaml) is another of our programs in a process of its own, the most
important first: a part that fails, hangs or takes the device down is recorded with its message, and
the next one goes on. Some load and compile at once, which is most of a part's time and keeps one
core busy; they are timed one after the other, though a part's first run, which checks it, may fall
into another's timing. A part has its own limit, times the number at once, and what is left of
`--minutes`; what does not begin is recorded as such. FILE is written again after every part, and
holds the reports of the parts. A CPU is to be idle; its parts run one by one.

`--quick` runs every part in its tiny form, on any device. `--parts` chooses some. LASER_COMMIT
names the commit where the code is no git checkout of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks import measure
from benchmarks.measure import BenchmarkError, Report, Row

LEAST_SECONDS = 15
"""Less is not enough for a process to import and compile anything."""
MESSAGE_CHARACTERS = 4000
NOT_BEGUN = "not begun"
POLL_SECONDS = 0.2

LARGE = "--backbone qwen3-0.6b --dtype bfloat16"
PAPER = "--query_tokens 222 --explicit_tokens 1024 --document_tokens 512"


@dataclass(frozen=True)
class Part:
    """A program with its arguments."""

    name: str
    most: int
    """Seconds."""
    command: str


def parts_of(machine: str) -> tuple[Part, ...]:
    """A list of benchmarks/runs.yaml, its placeholders filled in."""
    text = Path(__file__).with_name("runs.yaml").read_text()
    given = yaml.safe_load(text.replace("{large}", LARGE).replace("{paper}", PAPER))[machine]
    return tuple(Part(name, *part) for name, part in given.items())


PARTS = {machine: parts_of(machine) for machine in ("cpu", "gpu")}
LIMITS = {"cpu": (120.0, 1), "gpu": (9.0, 3)}
"""Minutes of all parts, and how many run at once, where the command line says nothing."""


def run_part(
    part: Part, *, quick: bool, seconds: float, cache: Path, stopped: threading.Event
) -> Row:
    """Runs a part to its end, to its limit or until `stopped`. Never raises on what it does."""
    with tempfile.TemporaryDirectory() as folder:
        output, said = Path(folder, "report.json"), Path(folder, "said")
        program, *given = shlex.split(part.command)
        given = ["--quick"] if quick else given
        command = [sys.executable, "-m", f"benchmarks.{program}", *given]
        variables = {
            # or jax would take the device's memory and leave PyTorch the rest
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            measure.LOCK: str(cache / "timed"),
        }
        began = time.monotonic()
        with said.open("wb") as stream:
            child = subprocess.Popen(
                [*command, "--output", str(output)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=variables | os.environ,
                start_new_session=True,
            )
            while child.poll() is None and time.monotonic() - began < seconds:
                if stopped.wait(POLL_SECONDS):
                    break
            status = child.poll()
            state = "out of time" if status is None else "failed" if status else "done"
            with contextlib.suppress(ProcessLookupError):  # with the processes that it started
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        row: Row = {"part": part.name, "command": shlex.join(["python", *command[1:]])}
        row |= {"state": state, "seconds_taken": time.monotonic() - began}
        if state != "done":
            row["exit_status"] = child.returncode
            row["message"] = said.read_text(errors="replace")[-MESSAGE_CHARACTERS:]
        if output.is_file():
            row["report"] = json.loads(output.read_text())
        return row


def fill(options: argparse.Namespace, report: Report) -> None:
    """Runs the parts, and writes what is known after each.

    Raises:
        BenchmarkError: there is no file to write it to, or no part.
    """
    minutes, at_once = LIMITS[options.machine]
    ends, at_once = time.monotonic() + 60 * (options.minutes or minutes), options.at_once or at_once
    parts = [p for p in PARTS[options.machine] if p.name in (options.parts or [p.name])]
    if options.output is None or not parts:
        raise BenchmarkError(f"wanted: --output FILE, and --parts of {options.machine} if of any")
    report.rows = [{"part": part.name, "state": NOT_BEGUN} for part in parts]
    report.write(options.output)
    writing, stopped = threading.Lock(), threading.Event()

    def run(part: Part, cache: Path) -> None:
        left = ends - time.monotonic()
        if left < LEAST_SECONDS or stopped.is_set():
            return
        most = min(part.most * at_once, left)
        row = run_part(part, quick=options.quick, seconds=most, cache=cache, stopped=stopped)
        with writing:
            report.rows[parts.index(part)] = row
            print(f"{part.name}: {row['state']}, {row['seconds_taken']:.0f} s", flush=True)
            report.write(options.output)

    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(at_once) as pool:
        try:
            list(pool.map(lambda part: run(part, Path(cache)), parts))
        except BaseException:
            stopped.set()
            raise


def main(arguments: Sequence[str]) -> None:
    """The command line; exit status 1 where a part is not done."""
    report = PROGRAM.main(arguments)
    sys.exit(0 if all(row["state"] == "done" for row in report.rows) else 1)


COLUMNS = {
    "part": measure.value("part"),
    "state": measure.value("state"),
    "seconds": measure.value("seconds_taken", ".0f"),
    "message": lambda row: row.get("message", "").strip().rpartition("\n")[2][:120],
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("machine", choices=PARTS, help="whose parts")
    parser.add_argument("--minutes", type=float, help="for all; default 120, of a GPU 9")
    names = [part.name for parts in PARTS.values() for part in parts]
    parser.add_argument("--parts", nargs="+", choices=names, metavar="PART", help="some of them")
    parser.add_argument("--at_once", type=measure.positive, help="parts; default 1, of a GPU 3")


PROGRAM = measure.Program("all", __doc__, fill, COLUMNS, add_flags, repeats=None, apart=True)

if __name__ == "__main__":
    main(sys.argv[1:])
