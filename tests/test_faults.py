"""Real runs that are hurt: stopped, killed, robbed of their files or of their disk. What follows is
the same run, to the last bit, as the one that nothing happened to. It is cut into micro-batches
(GradCache), and it is hurt in the middle of epochs of two and a half steps."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

STEPS = 12
PLACES = ("Ulm", "Bonn", "Jena", "Kiel", "Trier", "Worms", "Essen", "Halle", "Mainz", "Fulda")
SETTINGS = {
    "model.scratch.vocab_size": 270,
    "model.scratch.hidden_size": 16,
    "model.scratch.num_layers": 1,
    "model.scratch.num_heads": 2,
    "model.scratch.num_kv_heads": 1,
    "model.scratch.head_dim": 8,
    "model.scratch.intermediate_size": 16,
    "data.length_multiple": 64,
    "data.selection": "random",
    "prompt.query_max_length": 64,
    "prompt.document_max_length": 64,
    "prompt.explicit_max_length": 128,
    "prompt.chat_template": "false",
    "objective.num_thinking_steps": 2,
    "lora.rank": 2,
    "mesh.fsdp": 1,
    "train.batch_size": 4,
    "train.micro_batch_size": 2,  # GradCache
    "train.steps": STEPS,
    "train.log_every": 1,
    "train.checkpoint_every": 3,
    "train.keep_checkpoints": 3,
    "train.eval_every": 5,
    "train.eval_thinking_steps": "[2]",
}
# Says when the evaluation is reached, and runs the program as `python -m` does. A process starts in
# half the time without torch, which transformers would load and nobody here uses, and where Python
# does not look for garbage among the modules.
PROGRAM = """
import gc
import runpy
import sys
gc.set_threshold(100_000, 20, 50)
sys.modules["torch"] = None
import laser_jax.evaluate.retrieval as retrieval
def announced(*args, evaluate=retrieval.retrieval_runs, **kwargs):
    print("in evaluation", flush=True)
    return evaluate(*args, **kwargs)
retrieval.retrieval_runs = announced
runpy.run_module("laser_jax.train", run_name="__main__", alter_sys=True)
"""


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl and a BEIR directory, in one folder."""
    folder = tmp_path_factory.mktemp("data")
    passages = [f"River number {n} rises near {place}." for n, place in enumerate(PLACES)]
    queries = [f"Which river flows through {place}?" for place in PLACES]
    write_jsonl(
        folder / "train.jsonl",
        [
            {
                "query": queries[n],
                "reasoning_query": f"{place} lies in a valley.\n\nIts river is number {n}.",
                "prompt": "Find the river",
                "positive_passages": [passages[n]],
                "negative_passages": [passages[n - 1], passages[n - 2]],
            }
            for n, place in enumerate(PLACES)
        ],
    )
    write_jsonl(
        folder / "corpus.jsonl",
        [{"_id": f"d{n}", "title": "", "text": text} for n, text in enumerate(passages)],
    )
    write_jsonl(
        folder / "queries.jsonl",
        [
            {"_id": f"q{n}", "text": queries[n], "instruction": "Find", "reasoning": ""}
            for n in range(3)
        ],
    )
    (folder / "qrels").mkdir()
    lines = ["query-id\tcorpus-id\tscore", *(f"q{n}\td{n}\t1" for n in range(3))]
    for split in ("dev", "test"):
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


class Run:
    """A training process and its output directory."""

    def __init__(self, command: list[str], environment: dict[str, str], output: Path):
        self.output = output
        self.said: list[str] = []
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"

    def saved(self) -> list[int]:
        """The steps whose checkpoints are complete."""
        names = [path.name for path in self.checkpoints.glob("*")]
        return sorted(int(name) for name in names if name.isdigit())

    def hear(self, text: str) -> None:
        """Reads what the process says until a line holds `text`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if text in line:
                return
        self.wait()
        pytest.fail(f"it never said {text!r}: {self.text()}")

    def until(self, reached: Callable[[], bool]) -> None:
        """Waits for a condition on the output directory."""
        while not reached():
            if self.process.poll() is not None:
                pytest.fail(f"it ended first: {self.text()}")
            time.sleep(1e-3)  # the processor is the run's

    def logged(self) -> int:
        """The last step whose metrics are written."""
        path = self.output / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return text.count("\n")

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        assert self.process.stdout is not None
        self.said += self.process.stdout.readlines()
        return self.process.wait()

    def text(self) -> str:
        return "".join(self.said)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


Start = Callable[..., Run]


@pytest.fixture(scope="module")
def start(
    data: Path, tmp_path_factory: pytest.TempPathFactory, one_device: dict[str, str]
) -> Iterator[Start]:
    """Starts a run on an output directory."""
    environment = one_device | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONUNBUFFERED": "1",
    }
    runs: list[Run] = []

    def make(output: Path) -> Run:
        settings = SETTINGS | {
            "data.train": data / "train.jsonl",
            "data.eval": data,
            "output": output,
        }
        flags = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
        runs.append(Run([sys.executable, "-c", PROGRAM, *flags], environment, output))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


@pytest.fixture(scope="module")
def unhurt(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = start(tmp_path_factory.mktemp("unhurt") / "run")
    assert run.wait() == 0, run.text()
    assert run.saved()[-1] == STEPS
    return run.output


def metrics_of(output: Path) -> list[dict[str, Any]]:
    """Without what the clock decides."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    clocked = ("per_second", "seconds", "mfu")
    return [{k: v for k, v in line.items() if not k.endswith(clocked)} for line in lines]


def require_equal(hurt: Path, unhurt: Path) -> None:
    """Parameters, optimizer, position in the data, metrics and scores, bit for bit."""
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (hurt / name).read_bytes() == (unhurt / name).read_bytes(), name
    records = [
        json.loads((output / "checkpoints" / str(STEPS) / "meta" / "metadata").read_text())
        for output in (hurt, unhurt)
    ]
    assert records[0]["arrays"] == records[1]["arrays"]
    assert records[0]["meta"].get("samples") == records[1]["meta"].get("samples")
    assert metrics_of(hurt) == metrics_of(unhurt)
    assert (hurt / "evaluations.jsonl").read_text() == (unhurt / "evaluations.jsonl").read_text()
    results = [json.loads((output / "results.json").read_text()) for output in (hurt, unhurt)]
    assert results[0]["scores"] == results[1]["scores"]


def finish(start: Start, output: Path, unhurt: Path) -> Run:
    """Gives the same command again, and compares where it begins and what comes out."""
    run = start(output)
    saved = run.saved()
    assert run.wait() == 0, run.text()
    if saved:
        assert f"resumed at step {saved[-1]} from {run.checkpoints}" in run.text()
    else:
        assert "resumed" not in run.text()
    require_equal(output, unhurt)
    return run


# --- SIGTERM -----------------------------------------------------------------------------------


def stop(run: Run) -> str:
    """Sends SIGTERM; what the process says at last."""
    run.send(signal.SIGTERM)
    assert run.wait() == 0, run.text()
    assert "Traceback" not in run.text(), run.text()
    assert not (run.output / "results.json").exists()
    last = next(line for line in reversed(run.said) if "SIGTERM: " in line)
    return last[last.index("SIGTERM: ") :]  # without the time and the process


OUTSIDE = "SIGTERM: stopped outside the steps; the same command goes on from there\n"


def saved_at(step: int) -> str:
    return f"SIGTERM: saved at step {step} of {STEPS}; the same command goes on from there\n"


def test_sigterm_at_start_up_in_warm_up_and_in_a_step(
    start: Start, unhurt: Path, tmp_path: Path
) -> None:
    run = start(tmp_path / "run")
    run.until(lambda: (run.output / ".lock").exists())
    assert stop(run) == OUTSIDE
    assert run.saved() == []
    run = start(run.output)
    run.hear("parameters are trained")  # the first step is traced and compiled next
    assert stop(run) == (saved_at(1) if run.saved() else OUTSIDE)
    run = start(run.output)
    run.until(lambda: run.logged() >= 2)
    assert stop(run) == saved_at(run.saved()[-1])
    assert 2 <= run.saved()[-1] < STEPS
    finish(start, run.output, unhurt)


def test_sigterm_in_evaluation_between_steps_and_at_the_end(
    start: Start, unhurt: Path, tmp_path: Path
) -> None:
    run = start(tmp_path / "run")
    run.hear("in evaluation")
    assert stop(run) == OUTSIDE
    assert run.saved()[-1] == 5
    run = start(run.output)
    for _ in ("dev at 5, which was not finished", "dev at 10", "dev at 12", "test"):
        run.hear("in evaluation")
    assert stop(run) == OUTSIDE
    finish(start, run.output, unhurt)


# --- SIGKILL -----------------------------------------------------------------------------------


def kill(run: Run) -> None:
    run.send(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL


def test_sigkill_in_a_step_while_saving_and_in_evaluation(
    start: Start, unhurt: Path, tmp_path: Path
) -> None:
    run = start(tmp_path / "run")
    run.until(lambda: 3 in run.saved() and run.logged() >= 4)
    kill(run)
    saved, run = run.saved(), start(run.output)

    def half_written() -> bool:
        """Holds the process still at the first sight of a half-written checkpoint."""
        if not list(run.checkpoints.glob("*tmp*")):
            return False
        run.send(signal.SIGSTOP)
        os.waitid(os.P_PID, run.process.pid, os.WSTOPPED | os.WNOWAIT)
        if list(run.checkpoints.glob("*tmp*")):
            return True
        run.send(signal.SIGCONT)
        return False

    run.until(half_written)
    kill(run)
    assert f"resumed at step {saved[-1]} from {run.checkpoints}" in run.text()
    run = start(run.output)
    run.hear("in evaluation")
    kill(run)
    finish(start, run.output, unhurt)
    assert not list(run.checkpoints.glob("*tmp*"))


# --- damage and a full disk --------------------------------------------------------------------


def unfinished(finished: Path, output: Path) -> Path:
    """What a run leaves that was killed right after its last step."""
    shutil.copytree(finished, output)
    (output / "results.json").unlink()
    shutil.rmtree(output / "model")
    return output


def truncate(checkpoint: Path) -> None:
    for file in (checkpoint / "state" / "d").iterdir():
        os.truncate(file, file.stat().st_size // 2)


def remove_a_file(checkpoint: Path) -> None:
    (checkpoint / "meta" / "metadata").unlink()


def test_the_newest_checkpoints_are_damaged(start: Start, unhurt: Path, tmp_path: Path) -> None:
    output = unfinished(unhurt, tmp_path / "run")
    whole, *damaged = sorted(int(path.name) for path in (output / "checkpoints").iterdir())[-3:]
    for step, damage in zip(damaged, (truncate, remove_a_file), strict=True):
        damage(output / "checkpoints" / str(step))
    run = start(output)
    assert run.wait() == 0, run.text()
    for step in damaged:
        assert f"{run.checkpoints / str(step)} is damaged" in run.text()
        assert (run.checkpoints / f"{step}.damaged").is_dir()
    assert f"resumed at step {whole} from {run.checkpoints}" in run.text()
    require_equal(output, unhurt)


def test_a_full_disk_and_a_second_run(start: Start, unhurt: Path, tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    run.until(lambda: 3 in run.saved())
    run.send(signal.SIGSTOP)
    second = start(run.output)
    assert second.wait() == 1
    assert f"{run.output} is being written by process {run.process.pid}" in second.text()
    # no file may grow beyond half of what the arrays need, as if there was no room left
    largest = max(file.stat().st_size for file in (run.checkpoints / "3").rglob("*"))
    before = run.saved()
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (largest // 2, largest // 2))
    run.send(signal.SIGCONT)
    assert run.wait() == 1
    assert f"error: a checkpoint in {run.checkpoints} could not be written" in run.text()
    assert set(before) <= set(run.saved())
    finish(start, run.output, unhurt)
