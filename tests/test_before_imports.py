"""A signal while a training imports its libraries."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
AS_COMMAND = "from laser_jax.__main__ import main; main(['train'])"


@pytest.mark.parametrize("start", [("-m", "laser_jax.train"), ("-c", AS_COMMAND)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_imports_ends_the_training_with_0(
    tmp_path: Path, number: signal.Signals, start: tuple[str, str]
) -> None:
    """It comes where jax is imported, of all that takes time the first."""
    (tmp_path / "jax.py").write_text(f"import os\nos.kill(os.getpid(), {number.value})\n")
    done = subprocess.run(
        [sys.executable, *start],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = f"{number.name}: stopped outside the steps; the same command goes on from there\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, "", said)


def test_who_imports_a_program_keeps_its_signals() -> None:
    import laser_jax.train.run  # noqa: F401

    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
