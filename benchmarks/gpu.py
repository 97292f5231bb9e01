"""Everything that is worth knowing of a GPU in one run with a time limit.

    python -m benchmarks.gpu --output FOLDER [--minutes 9]

Each part is another of our programs in a process of its own, the most important first: a part that
fails, hangs or takes the device down is recorded with its message, and the next one goes on. A part
has its own limit and what is left of `--minutes`; what does not begin is recorded as such. FOLDER
holds `gpu.json`, written again after every part, with the reports of the parts inside. The limits
are those of an H200's host with 16 cores, where a part takes 30 to 70 seconds before it measures:
compiling several at once was tried there and was no faster.

`--quick` runs every part in its tiny form, on any device. `--parts` chooses some. Where the code is
no git checkout, LASER_COMMIT names its commit.
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
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Report, command_line, environment, in_new_process, markdown_table

LEAST_SECONDS = 15
"""Less is not enough for a process to import and compile anything."""
MESSAGE_CHARACTERS = 4000

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
    Part("compile time, 0.6B", "compile_time", "--backbones qwen3-0.6b --dtype bfloat16", 300),
)


def run_part(part: Part, arguments: Sequence[str], seconds: float, cache: Path) -> dict[str, Any]:
    """Runs a part to its end or to its limit. Never raises on what the part does."""
    with tempfile.TemporaryDirectory() as folder:
        output, said = Path(folder, "report.json"), Path(folder, "said")
        command = [sys.executable, "-m", f"benchmarks.{part.program}", *arguments]
        variables = {
            # or jax would take the device's memory and leave PyTorch the rest
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
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
            try:
                state = "done" if child.wait(seconds) == 0 else "failed"
            except subprocess.TimeoutExpired:
                state = "out of time"
            finally:
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
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART")
    options = parser.parse_args(arguments)
    if options.output is None:
        parser.error("--output FOLDER is wanted: the file there is written after every part")
    ends = time.monotonic() + 60 * options.minutes
    options.output.mkdir(exist_ok=True)
    # on a GPU this process must not take memory from the parts
    report = Report("gpu", arguments, {"minutes": options.minutes}, in_new_process(environment))
    with tempfile.TemporaryDirectory() as cache:
        for part in PARTS:
            if part.name not in options.parts:
                continue
            left = ends - time.monotonic()
            given = ["--quick", "--repeats", "1"] if options.quick else shlex.split(part.arguments)
            if left < LEAST_SECONDS:
                report.rows.append({"part": part.name, "state": "not begun"})
            else:
                row = run_part(part, given, min(part.most, left), Path(cache))
                report.rows.append(row)
                print(f"{row['part']}: {row['state']}, {row['seconds_taken']:.0f} s", flush=True)
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
