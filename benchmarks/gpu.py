"""Everything that is worth knowing of a GPU in one run with a time limit.

    python -m benchmarks.gpu --output FOLDER [--minutes 9]

Each part is another of our programs in a process of its own; one that fails, hangs or takes the
device down is recorded with its message, and the others go on. Parts come in groups, the most
important first. Those of a group get ready side by side, as compiling takes a processor and most of
the time; then they measure one after the other, each until it ends. So the compile times that a
part reports are those of a busy machine. A part that is not ready after READY_SECONDS waits no
longer than the others, and compiles while they measure.

What does not begin within `--minutes`, or does not end, is recorded as such. FOLDER holds
`gpu.json`, written again after every group, with the reports of the parts inside.

`--quick` runs every part in its tiny form, on any device. `--parts` chooses some. Where the code is
no git checkout, LASER_COMMIT names its commit.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import (
    TURNS,
    Report,
    command_line,
    environment,
    in_new_process,
    markdown_table,
    ready_file,
    turn_file,
)

LEAST_SECONDS = 15
"""Less is not enough for a process to import and compile anything."""
READY_SECONDS = 150
MESSAGE_CHARACTERS = 4000

SMALLEST = "--backbone qwen3-0.6b --dtype bfloat16"
PAPER_BATCH = "--query_tokens 222 --explicit_tokens 1024 --document_tokens 512"


@dataclass(frozen=True)
class Part:
    """A program with its arguments."""

    group: int
    name: str
    program: str
    arguments: str


PARTS = (
    Part(1, "checks", "gpu_checks", ""),
    Part(
        1,
        "thinking overhead, 0.6B",
        "thinking_overhead",
        f"{SMALLEST} --batch 8x512 --no_torch --steps 1 3 --repeats 20",
    ),
    Part(
        1,
        "encode latency, 0.6B",
        "encode_latency",
        f"{SMALLEST} --batches 8x512 --steps 3 --repeats 9",
    ),
    Part(
        1,
        "encode throughput, 0.6B",
        "encode_throughput",
        f"{SMALLEST} --full 8x512 64x512 --batches 8 --documents 0 --repeats 5 --no_torch",
    ),
    Part(  # four queries, as jax and the published step hold some tens of GiB each
        1,
        "train step beside PyTorch, 0.6B",
        "train_step",
        f"{SMALLEST} {PAPER_BATCH} --queries 4 --only fast --repeats 7",
    ),
    Part(
        1,
        "train step, 0.6B",
        "train_step",
        f"{SMALLEST} {PAPER_BATCH} --queries 8 --only unrolled --unrolled --no_torch --repeats 7",
    ),
    Part(
        1,
        "search",
        "search",
        "--shapes 1384x1146880x1024 --chunk 163840 --no_numpy --no_faiss --repeats 5",
    ),
    Part(
        2,
        "encode variants, 0.6B",
        "encode_variants",
        f"{SMALLEST} --batch 8x512 --steps 3 --repeats 15",
    ),
    Part(
        2,
        "kernels of encode, 0.6B",
        "kernels",
        f"{SMALLEST} --program encode --batch 8x512 --steps 3",
    ),
    Part(
        2,
        "kernels of a train step, 0.6B",
        "kernels",
        f"{SMALLEST} --program train_step {PAPER_BATCH} --queries 8",
    ),
    Part(
        2,
        "thinking overhead, 8B",
        "thinking_overhead",
        "--backbone qwen3-8b --dtype bfloat16 --batch 8x512 --steps 1 3 --no_torch --repeats 7",
    ),
    Part(
        3,
        "train step variants, 0.6B",
        "train_step",
        f"{SMALLEST} {PAPER_BATCH} --queries 8 --gradcache 2 "
        "--only 'gradcache / 2' parity 'remat dots' --no_torch",
    ),
    Part(  # four queries: with eight, XLA's attention wants 65 GiB by the compiler's count
        3,
        "train step by attention, 0.6B",
        "train_step",
        f"{SMALLEST} {PAPER_BATCH} --queries 4 --only 'xla attention' --no_torch",
    ),
    Part(
        3,
        "thinking overhead beside PyTorch, 0.6B",
        "thinking_overhead",
        f"{SMALLEST} --batch 8x512 --repeats 9",
    ),
    Part(
        4,
        "roofline",
        "roofline",
        "--dtype bfloat16 --batch 8x512 --steps 1 3 --repeats 7",
    ),
    Part(
        4,
        "encode throughput of the mix, 0.6B",
        "encode_throughput",
        f"{SMALLEST} --full --documents 1024 --batch_size 64 --our_batch_size 256 "
        "--batch_tokens 32768 --repeats 3",
    ),
    Part(
        5,
        "memory, 0.6B",
        "memory",
        f"{SMALLEST} {PAPER_BATCH} --queries 4 --batch 8x512 --gradcache 2 --remat dots",
    ),
    Part(6, "compile time, 0.6B", "compile_time", "--backbones qwen3-0.6b --dtype bfloat16"),
)
"""Compile times are measured alone, and so is memory."""


class Run:
    """A part's process, from its start to its row. Never raises on what the part does."""

    def __init__(self, part: Part, arguments: Sequence[str], folder: Path, cache: Path):
        self._part, self._folder = part, Path(tempfile.mkdtemp(dir=folder))
        self._command = [sys.executable, "-m", f"benchmarks.{part.program}", *arguments]
        self._turns = folder
        variables = {
            # or jax would take the device's memory and leave the others nothing
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            TURNS: str(folder),
        }
        self._began = time.monotonic()
        with self._said.open("wb") as stream:
            self._child = subprocess.Popen(
                [*self._command, "--output", str(self._output)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=variables | os.environ,
                start_new_session=True,
            )
        self._taken: float | None = None

    @property
    def _said(self) -> Path:
        return self._folder / "said"

    @property
    def _output(self) -> Path:
        return self._folder / "report.json"

    def ended(self) -> bool:
        if self._taken is None and self._child.poll() is not None:
            self._taken = time.monotonic() - self._began
        return self._taken is not None

    def ready(self) -> bool:
        """Whether it waits for its turn, or will ask for none."""
        return self.ended() or ready_file(self._turns, self._child.pid).exists()

    def finish(self) -> dict[str, Any]:
        """Ends it, with the processes that it started, and returns its row."""
        out_of_time = not self.ended()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        status = self._child.wait()
        row: dict[str, Any] = {
            "part": self._part.name,
            "command": shlex.join(["python", *self._command[1:]]),
            "state": "out of time" if out_of_time else "failed" if status else "done",
            "seconds_taken": self._taken or time.monotonic() - self._began,
        }
        if row["state"] != "done":
            row["exit_status"] = status
            row["message"] = self._said.read_text(errors="replace")[-MESSAGE_CHARACTERS:]
        if self._output.is_file():
            row["report"] = json.loads(self._output.read_text())
        return row


def wait_until(ready: Callable[[], bool], deadline: float) -> None:
    """Until it is so, or the deadline of `time.monotonic` has passed."""
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.1)


def run_group(
    parts: Sequence[Part], ends: float, cache: Path, *, quick: bool
) -> list[dict[str, Any]]:
    """Runs parts to their ends or to that of the time."""
    if ends - time.monotonic() < LEAST_SECONDS:
        return [{"part": part.name, "state": "not begun"} for part in parts]
    tiny = ["--quick", "--repeats", "1"]
    with tempfile.TemporaryDirectory() as folder:
        with turn_file(Path(folder)).open("w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            runs = [
                Run(part, tiny if quick else shlex.split(part.arguments), Path(folder), cache)
                for part in parts
            ]
            deadline = min(ends, time.monotonic() + READY_SECONDS)
            wait_until(lambda: all(run.ready() for run in runs), deadline)
        wait_until(lambda: all(run.ended() for run in runs), ends)
        return [run.finish() for run in runs]


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = command_line("gpu", __doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all; default 9")
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART")
    options = parser.parse_args(arguments)
    if options.output is None:
        parser.error("--output FOLDER is wanted: the file there is written after every group")
    ends = time.monotonic() + 60 * options.minutes
    options.output.mkdir(exist_ok=True)
    # on a GPU this process must not take memory from the parts
    report = Report("gpu", arguments, {"minutes": options.minutes}, in_new_process(environment))
    chosen = [part for part in PARTS if part.name in options.parts]
    with tempfile.TemporaryDirectory() as cache:
        for _, group in itertools.groupby(chosen, key=lambda part: part.group):
            rows = run_group(list(group), ends, Path(cache), quick=options.quick)
            for row in rows:
                seconds = f", {row['seconds_taken']:.0f} s" if "seconds_taken" in row else ""
                print(f"{row['part']}: {row['state']}{seconds}", flush=True)
            report.rows += rows
            report.write(options.output / "gpu.json")
    rows = [[cell(row) for cell in COLUMNS.values()] for row in report.rows]
    print(markdown_table(list(COLUMNS), rows))
    sys.exit(0 if all(row["state"] == "done" for row in report.rows) else 1)


COLUMNS = {
    "part": lambda row: row["part"],
    "state": lambda row: row["state"],
    "seconds": lambda row: f"{row['seconds_taken']:.0f}" if "seconds_taken" in row else "",
    "message": lambda row: row.get("message", "").strip().rpartition("\n")[2][:120],
}


if __name__ == "__main__":
    main(sys.argv[1:])
