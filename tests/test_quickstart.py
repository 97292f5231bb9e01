"""The quickstart: which commands it runs and what its table takes from their results."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from laser_jax.command_line import parse_command_line
from laser_jax.config import Config, ConfigError, as_dict
from laser_jax.files.claim import OutputError
from laser_jax.pretrain.run import PretrainConfig
from laser_jax.quickstart import run as module
from laser_jax.quickstart.run import QuickstartOptions, quickstart


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Config | PretrainConfig]]:
    """Parses the commands instead of running them, and leaves of each what is read later; each
    training scores by its K."""
    ran: list[tuple[str, Config | PretrainConfig]] = []

    def run(program: str, *arguments: str) -> None:
        if program == "laser_jax.pretrain":
            pretraining = parse_command_line(PretrainConfig, program, arguments)
            ran.append((program, pretraining))
            backbone = Path(pretraining.output)
            backbone.mkdir(parents=True, exist_ok=True)
            (backbone / "pretrain.json").write_text(json.dumps({"config": as_dict(pretraining)}))
            return
        config = parse_command_line(Config, program, arguments)
        ran.append((program, config))
        output = Path(config.output)
        output.mkdir(parents=True, exist_ok=True)
        method = config.objective.method
        scores = {
            f"latent K={k}": {"nDCG@10": k / 10, "Recall@100": 1.0, "Hit@1": len(method) / 10}
            for k in range(1, 9)
        }
        scores["explicit"] = {"nDCG@10": 0.99, "Recall@100": 1.0, "Hit@1": 0.98}
        (output / "results.json").write_text(json.dumps({"scores": scores}))
        (output / "config.json").write_text(json.dumps(as_dict(config)))

    monkeypatch.setattr(module, "_run", run)
    return ran


def test_the_three_methods_differ_in_the_objective_alone(
    commands: list[tuple[str, Config | PretrainConfig]], tmp_path: Path
) -> None:
    quickstart(QuickstartOptions(str(tmp_path / "world"), seed=3))
    (first, pretraining), *trainings = commands
    assert first == "laser_jax.pretrain"
    assert isinstance(pretraining, PretrainConfig)
    configs = [config for _, config in trainings if isinstance(config, Config)]
    assert [c.objective.method for c in configs] == ["laser", "gircse", "laser"]
    assert configs[0].objective.num_thinking_steps == 1
    assert not configs[0].objective.need_explicit_view
    assert configs[1].objective.num_thinking_steps == configs[2].objective.num_thinking_steps
    assert configs[2].objective.need_explicit_view
    for part in ("model", "data", "lora", "prompt", "optimizer", "train"):
        assert len({getattr(c, part) for c in configs}) == 1, part
    assert configs[0].model.path == pretraining.output
    assert {c.train.seed for c in configs} == {pretraining.seed} == {3}
    assert pretraining.prompt.query_template == configs[0].prompt.query_template


def test_the_table_takes_each_method_at_its_own_k(
    commands: list[tuple[str, Config | PretrainConfig]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "world"
    table = quickstart(QuickstartOptions(str(output)))
    assert commands
    assert [row["nDCG@10"] for row in table.values()] == [0.1, 0.7, 0.7, 0.99]
    assert list(table)[-1].startswith("explicit view")
    assert json.loads((output / "table.json").read_text()) == table
    assert "chance: Hit@1 0.0500" in capsys.readouterr().out


def test_another_seed_is_refused_before_the_world_is_replaced(
    commands: list[tuple[str, Config | PretrainConfig]], tmp_path: Path
) -> None:
    output = tmp_path / "world"
    quickstart(QuickstartOptions(str(output)))
    world = (output / "data" / "train.jsonl").read_bytes()
    with pytest.raises(OutputError, match=r"another config:\n  seed was 0, is 1\nChoose another"):
        quickstart(QuickstartOptions(str(output), seed=1))
    assert (output / "data" / "train.jsonl").read_bytes() == world
    moved = output.rename(tmp_path / "moved")
    quickstart(QuickstartOptions(str(moved)))
    assert len(commands) == 2 * 4


def test_a_second_one_is_refused_while_stages_run(
    commands: list[tuple[str, Config | PretrainConfig]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = module._run

    def second(program: str, *arguments: str) -> None:
        with pytest.raises(OutputError, match="world is being written by process"):
            quickstart(QuickstartOptions(str(tmp_path / "world")))
        run(program, *arguments)

    monkeypatch.setattr(module, "_run", second)
    quickstart(QuickstartOptions(str(tmp_path / "world")))
    assert len(commands) == 4


@pytest.mark.parametrize("text", ["", "\0", "[", "3"])
def test_without_a_whole_record_nothing_in_the_directory_is_replaced(
    commands: list[tuple[str, Config | PretrainConfig]], tmp_path: Path, text: str
) -> None:
    quickstart(QuickstartOptions(str(tmp_path)))
    world = (tmp_path / "data" / "train.jsonl").read_bytes()
    (tmp_path / "quickstart.json").write_text(text)
    with pytest.raises(OutputError, match=r"no whole quickstart\.json: .* from a copy"):
        quickstart(QuickstartOptions(str(tmp_path), seed=1))
    assert (tmp_path / "data" / "train.jsonl").read_bytes() == world


@pytest.mark.parametrize("seed", [-1, 1 << 32])
def test_a_seed_that_a_stage_would_refuse_leaves_no_trace(
    commands: list[tuple[str, Config | PretrainConfig]], tmp_path: Path, seed: int
) -> None:
    with pytest.raises(ConfigError, match=r"seed must lie in \[0, 4294967296\), got"):
        quickstart(QuickstartOptions(str(tmp_path / "world"), seed))
    assert not (tmp_path / "world").exists()
    quickstart(QuickstartOptions(str(tmp_path / "world"), (1 << 32) - 1))
    assert len(commands) == 4


def test_the_command_that_shows_a_thought_holds_for_any_output(
    commands: list[tuple[str, Config | PretrainConfig]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    quickstart(QuickstartOptions(str(tmp_path / "my world")))
    _, _, shown = capsys.readouterr().out.rpartition("$ python -m laser_jax.think ")
    assert shlex.split(shown)[:2] == ["--model", str(tmp_path / "my world" / "laser" / "model")]


def test_outside_a_clone_it_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "CONFIGS", tmp_path)
    with pytest.raises(SystemExit, match=r"no quickstart\.yaml: run this from a clone"):
        module.main(["--output", str(tmp_path / "world")])


STAGE = """
import signal, sys, time
def save(*_):
    time.sleep(1)
    open("saved", "w").close()
    sys.exit(0)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open("begun", "w").close()
time.sleep(60)
"""


def test_an_interrupt_lets_the_stage_save(tmp_path: Path) -> None:
    """The terminal tells both processes of it."""
    (tmp_path / "stage.py").write_text(STAGE)
    # what a shell starts in the background ignores SIGINT, and so would these two
    heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    run = f"{heeding}; from laser_jax.quickstart.run import _run; _run('stage')"
    command = [sys.executable, "-c", run]
    with subprocess.Popen(
        command, cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL
    ) as process:
        while not (tmp_path / "begun").exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) == -signal.SIGINT
    assert (tmp_path / "saved").exists()
