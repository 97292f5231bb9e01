"""The timings of a CPU that docs/results.md is made of, one after the other.

    python -m benchmarks.all [--output benchmarks/results/cpu] [--only NAME ...]

Each is a program of its own in a new process, under the name of its file. One that fails is told at
the end, and the others go on. Wants an idle machine, and an hour or two on two cores. What is no
timing (`ablation`, `search_quality`, `load_memory`) or is meant for a GPU (`gpu`, `kernels`) is not
among them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

OUTPUT = Path("benchmarks/results/cpu")
RUNS = {
    "matmul": "matmul",
    "matmul-0.6b": "matmul --backbone qwen3-0.6b",
    "encode_latency": "encode_latency",
    "encode_latency-0.6b": (
        "encode_latency --backbone qwen3-0.6b --batches 8x128 --steps 3 --repeats 3"
    ),
    "encode_latency-compiled": (
        "encode_latency --batches 8x128 8x512 --steps 3 --repeats 5 --torch_compile"
    ),
    "encode_latency-0.6b-compiled": (
        "encode_latency --backbone qwen3-0.6b --batches 8x128 --steps 3 --repeats 5 --torch_compile"
    ),
    "encode_latency-bf16": "encode_latency --dtype bfloat16",
    "encode_latency-0.6b-bf16": (
        "encode_latency --backbone qwen3-0.6b --dtype bfloat16 --batches 8x128 --steps 3 "
        "--repeats 3"
    ),
    "thinking_overhead-8x128": "thinking_overhead --batch 8x128",
    "thinking_overhead-8x512": "thinking_overhead --batch 8x512 --steps 1 3 --repeats 5",
    "encode_throughput": "encode_throughput --repeats 3",
    "encode_variants": "encode_variants --repeats 5",
    "train_step": "train_step --gradcache 2 4 --repeats 5",
    "train_step-compiled": "train_step --only fast --repeats 5 --torch_compile",
    "train_step-bf16": "train_step --dtype bfloat16 --only fast --repeats 5",
    "train_step-full": "train_step --full --gradcache 4 --plain --remat --repeats 3",
    "rewrite_latency": "rewrite_latency",
    "rewrite_latency-0.6b": (
        "rewrite_latency --backbone qwen3-0.6b --batches 1 --measured_tokens 40 --repeats 3"
    ),
    "rewrite_latency-0.6b-8": (
        "rewrite_latency --backbone qwen3-0.6b --batches 8 --measured_tokens 40 --repeats 3"
    ),
    "corpus_cost": "corpus_cost --documents 128",
    "search": "search",
    "data_pipeline": "data_pipeline",
    "memory": "memory",
    "roofline": "roofline",
    "compile_time": "compile_time --repeats 2",
}
"""Command lines by the file that they write."""


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.all",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run?")
    parser.add_argument("--output", type=Path, help=f"folder; default {OUTPUT}")
    parser.add_argument("--only", choices=RUNS, nargs="+", default=[*RUNS], help="some of them")
    options = parser.parse_args(arguments)
    if options.quick and options.output is None:
        parser.error(f"--quick wants --output FOLDER: its files would take the place of {OUTPUT}'s")
    output: Path = options.output or OUTPUT
    output.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in options.only:
        program, *given = RUNS[name].split()
        if options.quick:
            given = ["--quick", "--repeats", "1"]
        file = output / f"{name}.json"
        command = [sys.executable, "-m", f"benchmarks.{program}", *given, "--output", str(file)]
        began = time.monotonic()
        status = subprocess.run(command).returncode
        print(f"\n{name}: {time.monotonic() - began:.0f} s\n", file=sys.stderr, flush=True)
        if status:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
