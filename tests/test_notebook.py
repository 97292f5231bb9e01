"""The notebook runs from top to bottom, with fewer steps."""

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
    assert cells[0].startswith("%pip install")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = "\n".join(cells[1:])
    changes = {
        "steps 500": "steps 2",
        "steps 300": "steps 2",
        "8123": port,
        "runs/notebook": str(tmp_path),
    }
    for old, new in changes.items():
        assert old in program
        program = program.replace(old, new)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env=one_device,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 7" in done.stdout
    assert done.stdout.rstrip().endswith("ended with 0")
