"""The timings of a CPU that docs/results.md is made of, one after the other.

    python -m benchmarks.all [--output benchmarks/results] [--only NAME ...]

Each is a program of its own in a new process, in a file cpu-NAME.json.gz. One that fails is told at
the end, and the others go on. Wants an idle machine, and an hour or two on two cores. What is no
timing (`ablation`) or is meant for a GPU (`gpu`, `kernels`) is not among them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import measure
from benchmarks.gpu import runs

OUTPUT = Path("benchmarks/results")
RUNS: dict[str, str] = runs("cpu")
"""Command lines by the file that they write."""


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = measure.empty_parser("all", __doc__)
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
        given = ["--quick", "--repeats", "1"] if options.quick else given
        file = output / f"cpu-{name}.json.gz"
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
