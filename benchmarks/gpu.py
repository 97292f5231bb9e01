"""Everything that is worth knowing of a GPU in one run with a time limit.

    python -m benchmarks.gpu --output FOLDER [--minutes 9] [--at_once 3]

Each part is another of our programs in a process of its own, the most important first: a part that
fails, hangs or takes the device down is recorded with its message, and the next one goes on. Some
load and compile at once, which is most of a part's time and keeps one core busy; they are timed one
after the other, though a part's first run, which checks it, may fall into another's timing. A part
has its own limit, times the number at once, and what is left of `--minutes`; what does not begin is
recorded as such. FOLDER holds `gpu.json`, written again after every part, with the reports of the
parts inside.

`--quick` runs every part in its tiny form, on any device. `--parts` chooses some. LASER_COMMIT
names the commit where the code is no git checkout of it.
"""

from __future__ import annotations

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
from typing import Any

from benchmarks.measure import (
    LOCK,
    Report,
    command_line,
    environment,
    in_new_process,
    markdown_table,
    positive,
)

LEAST_SECONDS = 15
"""Less is not enough for a process to import and compile anything."""
MESSAGE_CHARACTERS = 4000
NOT_BEGUN = "not begun"
POLL_SECONDS = 0.2

SMALLEST = "--backbone qwen3-0.6b --dtype bfloat16"
PAPER_BATCH = "--query_tokens 222 --explicit_tokens 1024 --document_tokens 512"


@dataclass(frozen=True)
class Part:
    """A program with its arguments."""

    name: str
    program: str
    arguments: str
    most: int
    """Seconds."""
    times_compiling: bool = False
    """Nothing may compile beside it."""


PARTS = (
    Part("checks", "gpu_checks", "--threads 16", 120),
    Part(
        "thinking overhead, 0.6B",
        "thinking_overhead",
        f"{SMALLEST} --batch 8x512 --no_torch --steps 1 3 --repeats 20",
        80,
    ),
    Part(
        "train step, 0.6B",
        "train_step",
        f"{SMALLEST} {PAPER_BATCH} --queries 8 --only fast --no_torch --repeats 7",
        120,
    ),
    Part(  # four queries, as XLA's attention and the published step hold some tens of GiB each
        "train step beside PyTorch, 0.6B",
        "train_step",
        f"{SMALLEST} {PAPER_BATCH} --queries 4 --only fast 'xla attention' --repeats 5",
        180,
    ),
    Part(
        "encode latency, 0.6B",
        "encode_latency",
        f"{SMALLEST} --batches 8x512 --steps 3 --repeats 9",
        90,
    ),
    Part(
        "encode variants, 0.6B",
        "encode_variants",
        f"{SMALLEST} --batch 8x512 --steps 3 --repeats 15",
        120,
    ),
    Part(
        "encode throughput, 0.6B",
        "encode_throughput",
        f"{SMALLEST} --full 8x512 64x512 --batches 8 --documents 0 --repeats 5 --no_torch",
        90,
    ),
    Part(
        "search",
        "search",
        "--shapes 1384x1146880x1024 --chunk 163840 --no_numpy --no_faiss --repeats 5",
        80,
    ),
    Part(
        "thinking overhead, 8B",
        "thinking_overhead",
        "--backbone qwen3-8b --dtype bfloat16 --batch 8x512 --steps 1 3 --no_torch --repeats 7",
        120,
    ),
    Part(
        "rewrite latency, 0.6B",
        "rewrite_latency",
        f"{SMALLEST} --batches 1 8 --repeats 3",
        200,
    ),
    Part(
        "kernels of a train step, 0.6B",
        "kernels",
        f"{SMALLEST} --program train_step {PAPER_BATCH} --queries 8",
        100,
    ),
    Part(
        "kernels of encode, 0.6B",
        "kernels",
        f"{SMALLEST} --program encode --batch 8x512 --steps 3",
        60,
    ),
    Part(
        "train step variants, 0.6B",
        "train_step",
        f"{SMALLEST} {PAPER_BATCH} --queries 8 --gradcache 2 "
        "--only 'gradcache / 2' parity 'remat dots' --no_torch",
        240,
    ),
    Part(
        "encode latency of short rows, 0.6B",
        "encode_latency",
        f"{SMALLEST} --batches 1x128 8x128 --steps 1 3 --repeats 9",
        180,
    ),
    Part(
        "thinking overhead beside PyTorch, 0.6B",
        "thinking_overhead",
        f"{SMALLEST} --batch 8x512 --repeats 9",
        200,
    ),
    Part(
        "roofline",
        "roofline",
        "--dtype bfloat16 --batch 8x512 --steps 1 3 --repeats 7",
        200,
    ),
    Part(
        "encode throughput of the mix, 0.6B",
        "encode_throughput",
        f"{SMALLEST} --full --documents 1024 --batch_size 64 --our_batch_size 256 "
        "--batch_tokens 32768 --repeats 3",
        150,
    ),
    Part(
        "memory, 0.6B",
        "memory",
        f"{SMALLEST} {PAPER_BATCH} --queries 4 --batch 8x512 --gradcache 2 --remat dots",
        200,
    ),
    Part(
        "train step unrolled, 0.6B",
        "train_step",
        f"{SMALLEST} {PAPER_BATCH} --queries 8 --only unrolled --unrolled --no_torch --repeats 7",
        400,
    ),
    Part(
        "compile time, 0.6B",
        "compile_time",
        "--backbones qwen3-0.6b --dtype bfloat16",
        300,
        times_compiling=True,
    ),
)


def run_part(
    part: Part, arguments: Sequence[str], seconds: float, cache: Path, stopped: threading.Event
) -> dict[str, Any]:
    """Runs a part to its end, to its limit or until `stopped`. Never raises on what it does."""
    with tempfile.TemporaryDirectory() as folder:
        output, said = Path(folder, "report.json"), Path(folder, "said")
        command = [sys.executable, "-m", f"benchmarks.{part.program}", *arguments]
        variables = {
            # or jax would take the device's memory and leave PyTorch the rest
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            LOCK: str(cache / "timed"),
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
            # with the processes that it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        row: dict[str, Any] = {
            "part": part.name,
            "command": shlex.join(["python", *command[1:]]),
            "state": state,
            "seconds_taken": time.monotonic() - began,
        }
        if state != "done":
            row["exit_status"] = child.returncode
            row["message"] = said.read_text(errors="replace")[-MESSAGE_CHARACTERS:]
        if output.is_file():
            row["report"] = json.loads(output.read_text())
        return row


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = command_line("gpu", __doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all; default 9")
    names = [part.name for part in PARTS]
    parser.add_argument("--at_once", type=positive, default=3, help="parts at once; default 3")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART")
    options = parser.parse_args(arguments)
    if options.output is None:
        parser.error("--output FOLDER is wanted: the file there is written after every part")
    ends = time.monotonic() + 60 * options.minutes
    options.output.mkdir(exist_ok=True)
    settings = {"minutes": options.minutes, "at_once": options.at_once}
    # on a GPU this process must not take memory from the parts
    report = Report("gpu", arguments, settings, in_new_process(environment))
    parts = [part for part in PARTS if part.name in options.parts]
    report.rows = [{"part": part.name, "state": NOT_BEGUN} for part in parts]
    report.write(options.output / "gpu.json")
    writing, stopped = threading.Lock(), threading.Event()

    def run(part: Part, at_once: int, cache: Path) -> None:
        left = ends - time.monotonic()
        if left < LEAST_SECONDS or stopped.is_set():
            return
        given = ["--quick", "--repeats", "1"] if options.quick else shlex.split(part.arguments)
        row = run_part(part, given, min(part.most * at_once, left), cache, stopped)
        with writing:
            report.rows[parts.index(part)] = row
            print(f"{part.name}: {row['state']}, {row['seconds_taken']:.0f} s", flush=True)
            report.write(options.output / "gpu.json")

    with tempfile.TemporaryDirectory() as cache:
        for quiet, at_once in ((False, options.at_once), (True, 1)):
            with ThreadPoolExecutor(at_once) as pool:
                chosen = [part for part in parts if part.times_compiling is quiet]
                try:
                    list(pool.map(lambda p, n=at_once: run(p, n, Path(cache)), chosen))
                except BaseException:
                    stopped.set()
                    raise
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
