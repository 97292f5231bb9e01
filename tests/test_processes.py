"""One run in two real processes: the losses of one process, a stop of both when one is told, a run
that goes on with another number of processes, and a model that all of them wrote together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_faults import PROGRAM, SETTINGS, data  # noqa: F401  (the same small run and rows)

from laser_jax.command_line import Invocation
from laser_jax.config import ConfigError, MeshConfig
from laser_jax.sharding import make_mesh
from laser_jax.train.processes import join_processes, local_rows

STEPS = 6
OPTIONS = {
    "train.steps": STEPS,
    "train.checkpoint_every": 100,
    "train.eval_every": 4,
    "train.micro_batch_size": 2,
    "mesh.fsdp": 2,
    "mesh.data": 1,
}


class Together:
    """Processes of one run."""

    def __init__(self, output: Path, processes: list[subprocess.Popen[str]]):
        self.output = output
        self.processes = processes

    def logged(self) -> list[dict[str, Any]]:
        path = self.output / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def end(self) -> list[str]:
        """What each said; all must have ended well."""
        said = [process.communicate()[0] for process in self.processes]
        assert [process.returncode for process in self.processes] == [0] * len(said), said
        return said

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


Start = Callable[..., Together]


@pytest.fixture(scope="module")
def start(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:  # noqa: F811
    """Starts a run of two devices on an output directory: in one process, or one device in each."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
    }
    runs: list[Together] = []

    def make(output: Path, processes: int) -> Together:
        settings = SETTINGS | OPTIONS | {"data.train": data / "train.jsonl", "data.eval": data}
        command = [sys.executable, "-c", PROGRAM, "--output", str(output)]
        command += [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        devices = f"device_count={2 // processes}"
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", devices)
        runs.append(
            Together(
                output,
                [
                    subprocess.Popen(
                        [*command, "--distributed", f"{i}/{processes}@{address}"]
                        if processes > 1
                        else command,
                        env=environment | {"XLA_FLAGS": flags},
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        text=True,
                    )
                    for i in range(processes)
                ],
            )
        )
        return runs[-1]

    yield make
    for run in runs:
        run.kill()


@pytest.fixture(scope="module")
def alone(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Together:
    run = start(tmp_path_factory.mktemp("alone") / "run", 1)
    run.end()
    return run


@pytest.fixture(scope="module")
def both(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Together:
    run = start(tmp_path_factory.mktemp("both") / "run", 2)
    said = run.end()
    assert f"model: {run.output / 'model'}" in said[0]
    assert "model: " not in said[1]  # the first process speaks for all
    return run


def require_close(run: Together, alone: Together) -> None:
    """The same losses, scores and parameters, up to the order of sums."""
    lines = [each.logged() for each in (run, alone)]
    assert [line["step"] for line in lines[0]] == list(range(1, STEPS + 1))
    for ours, theirs in zip(*lines, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"queries_per_second", "tokens_per_second"}:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=name)
    results = [json.loads((each.output / "results.json").read_text()) for each in (run, alone)]
    assert results[0]["scores"] == results[1]["scores"]
    assert [line["step"] for line in results[0]["dev"]] == [4, STEPS]
    assert results[0]["dev"] == results[1]["dev"]
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = (load_file(each.output / name) for each in (run, alone))
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_allclose(ours[key], theirs[key], atol=1e-6, err_msg=key)


def test_two_processes_give_the_losses_scores_and_model_of_one(
    both: Together, alone: Together
) -> None:
    require_close(both, alone)


def test_a_signal_to_one_process_saves_and_ends_both_and_one_process_goes_on(
    start: Start, alone: Together, tmp_path: Path
) -> None:
    run = start(tmp_path / "run", 2)
    while not run.logged():
        if any(process.poll() is not None for process in run.processes):
            pytest.fail(str(run.end()))
        time.sleep(1e-3)  # the processors are the run's
    run.processes[1].send_signal(signal.SIGTERM)
    said = run.end()
    step = max(int(p.name) for p in (run.output / "checkpoints").iterdir() if p.name.isdigit())
    assert f"SIGTERM: saved at step {step} of {STEPS}" in said[0]
    assert step < STEPS
    resumed = start(run.output, 1)
    assert f"resumed at step {step}" in resumed.end()[0]
    require_close(resumed, alone)


def test_one_process_holds_every_row_of_a_batch() -> None:
    mesh = make_mesh(MeshConfig(2, 2, 2))
    assert local_rows(mesh, 8).tolist() == list(range(8))


def test_without_a_cluster_the_way_out_is_named() -> None:
    with pytest.raises(ConfigError, match="--distributed INDEX/COUNT@HOST:PORT"):
        join_processes(Invocation(distributed=True))


def test_a_single_process_joins_nobody() -> None:
    join_processes(Invocation())
