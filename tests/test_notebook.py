"""The notebook runs from top to bottom, with fewer steps and without installing anything."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def test_the_notebook_runs(tmp_path: Path, one_device: dict[str, str]) -> None:
    notebook = json.loads((REPOSITORY / "examples" / "laser_jax.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    lines = "\n".join(cells).split("\n")
    program = "\n".join(line for line in lines if not line.startswith("%pip install"))
    changes = {
        "num_places=20": "num_places=8, num_dev_queries=8, num_test_queries=8",
        "steps 500": "steps 2 --model.scratch.num_layers 2",
        "steps 300": "steps 2 --train.eval_thinking_steps [7]",
        "8123": port,
        "runs/notebook": str(tmp_path),
    }
    for old, new in changes.items():
        assert old in program
        program = program.replace(old, new)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY / "examples",
        env=one_device,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 7" in done.stdout
    assert done.stdout.rstrip().endswith("ended with 0")
