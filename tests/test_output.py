"""A run's directory: one process, one config, and no half-written file."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import laser_jax.train.output as module
from laser_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    MixtureSource,
    ModelConfig,
    ScratchConfig,
    TrainConfig,
    as_dict,
)
from laser_jax.train.output import (
    OutputDirectory,
    OutputError,
    StepLog,
    code_version,
    logged_lines,
)


def config(output: Path | str, **train: Any) -> Config:
    return Config(
        model=ModelConfig(scratch=ScratchConfig()),
        data=DataConfig(train="rows.jsonl"),
        output=str(output),
        train=TrainConfig(**train),
    )


def claim(config: Config) -> None:
    with OutputDirectory(config) as output:
        output.claim()


# --- one process -------------------------------------------------------------------------------


def test_the_second_run_on_a_directory_is_refused(tmp_path: Path) -> None:
    with OutputDirectory(config(tmp_path)) as output:
        with pytest.raises(OutputError, match=rf"written by process {os.getpid()} on \S+\."):
            OutputDirectory(config(tmp_path))
        output.claim()
    claim(config(tmp_path))


HOLDER = """
import sys
from laser_jax.config import *
from laser_jax.train.output import OutputDirectory
output = OutputDirectory(
    Config(ModelConfig(scratch=ScratchConfig()), DataConfig("rows.jsonl"), output=sys.argv[1])
)
print("locked", flush=True)
sys.stdin.readline()
"""


def test_a_killed_run_leaves_no_lock_behind(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(OutputError, match=f"process {holder.pid} on"):
        OutputDirectory(config(tmp_path))
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    claim(config(tmp_path))


def test_the_lock_of_a_run_that_has_just_ended_is_not_taken_for_held(tmp_path: Path) -> None:
    """Whoever opened the file before its holder removed it must look again."""
    first = OutputDirectory(config(tmp_path / "run"))
    stale = (tmp_path / "run" / ".lock").open("a+")
    first.close()
    with OutputDirectory(config(tmp_path / "run")) as second:
        assert os.fstat(stale.fileno()).st_ino != (tmp_path / "run" / ".lock").stat().st_ino
        second.claim()
    stale.close()


def test_a_file_system_without_locks_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    message = r"this file system has no locks, .* Choose a place on .*'.*/run/\.lock'"
    with pytest.raises(OSError, match=message):
        OutputDirectory(config(tmp_path / "run"))


# --- nothing is left behind --------------------------------------------------------------------


def test_a_run_that_fails_before_it_claims_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), OutputDirectory(config(tmp_path / "a" / "b")):
        raise RuntimeError("bad input")
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_before_stays(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with OutputDirectory(config(tmp_path)):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_refused_run_changes_nothing_in_the_directory(tmp_path: Path) -> None:
    claim(config(tmp_path, seed=1))
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(OutputError, match="another config"):
        OutputDirectory(config(tmp_path, seed=2))
    assert before["config.json"] == (tmp_path / "config.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(before)


def test_a_bucket_is_refused_with_the_way_out() -> None:
    with pytest.raises(OutputError, match=r"gs://bucket/run: .*gcsfuse"):
        OutputDirectory(config("gs://bucket/run"))
    assert not Path("gs:").exists()


# --- one config --------------------------------------------------------------------------------


def test_another_config_is_refused_with_keys_and_values(tmp_path: Path) -> None:
    claim(config(tmp_path, seed=1, steps=10))
    with pytest.raises(OutputError) as caught:
        OutputDirectory(config(tmp_path, seed=2, steps=10, epochs=3.0, log_every=3))
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path} holds a run with another config:"
    assert [line.strip() for line in lines[1:-1]] == [
        "train.epochs was 1.0, is 3.0",
        "train.seed was 1, is 2",
    ]
    assert "choose another --output" in lines[-1].lower()


def test_a_resumed_run_may_change_what_is_not_trained(tmp_path: Path) -> None:
    first = config(tmp_path, seed=1)
    claim(first)
    changed = replace(
        config(f"{tmp_path}/.", seed=1, log_every=3, keep_checkpoints=7),
        mesh=MeshConfig(1, 2, 4),
        data=replace(first.data, threads=9),
        model=replace(first.model, attention="xla"),
    )
    claim(changed)
    assert json.loads((tmp_path / "config.json").read_text())["mesh"]["tensor"] == 4


def test_the_same_rows_may_lie_elsewhere(tmp_path: Path) -> None:
    first = config(tmp_path)
    claim(first)
    claim(replace(first, data=DataConfig(train="moved/train")))
    mixture = (MixtureSource("a"), MixtureSource("b", 2.0))
    mixed = replace(config(tmp_path / "mixed"), data=DataConfig(mixture=mixture))
    claim(mixed)
    claim(replace(mixed, data=DataConfig(mixture=(MixtureSource("/x/a"), mixture[1]))))
    for other, change in (
        ((mixture[0], MixtureSource("b", 3.0)), r"data\.mixture\.1\.weight was 2.0, is 3.0"),
        (mixture[:1], r"data\.mixture was "),
    ):
        with pytest.raises(OutputError, match=change):
            OutputDirectory(replace(mixed, data=DataConfig(mixture=other)))


def test_a_setting_that_an_older_release_did_not_have_counts_as_its_default(tmp_path: Path) -> None:
    claim(config(tmp_path))
    file = tmp_path / "config.json"
    older = json.loads(file.read_text())
    del older["objective"]["distillation_warmup_steps"]
    file.write_text(json.dumps(older))
    claim(config(tmp_path))
    file.write_text(json.dumps(older | {"colour": "red"}))
    with pytest.raises(OutputError, match=r"config.json is no run's config: .*colour"):
        OutputDirectory(config(tmp_path))


@pytest.mark.parametrize(("accumulation", "allowed"), [("gradcache", True), ("plain", False)])
def test_micro_batches_may_change_where_they_are_no_other_loss(
    tmp_path: Path, accumulation, allowed: bool
) -> None:
    claim(config(tmp_path, accumulation=accumulation, micro_batch_size=8))
    smaller = config(tmp_path, accumulation=accumulation, micro_batch_size=4)
    if allowed:
        claim(smaller)
    else:
        with pytest.raises(OutputError, match="micro_batch_size was 8, is 4"):
            OutputDirectory(smaller)


@pytest.mark.parametrize("content", [b'{"model": ', bytes(100), b"\xff", b"[" * 5000, b"3"])
def test_a_damaged_config_counts_as_absent_and_is_written_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    claim(config(tmp_path, seed=3))
    assert "config.json is damaged and counts as absent" in capsys.readouterr().err
    assert json.loads((tmp_path / "config.json").read_text())["train"]["seed"] == 3


def test_a_file_of_another_program_is_no_damaged_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(OutputError, match=r"config\.json is no run's config: .*another --output"):
        OutputDirectory(config(tmp_path))


def test_a_checkpoints_config_is_compared_as_that_of_the_file(tmp_path: Path) -> None:
    with OutputDirectory(config(tmp_path, seed=1)) as output:
        output.require_same_config(as_dict(config(tmp_path, seed=1, log_every=3)), "checkpoint 4")
        with pytest.raises(OutputError, match=r"train\.seed was 2, is 1"):
            output.require_same_config(as_dict(config(tmp_path, seed=2)), "checkpoint 4")


# --- the version of the code -------------------------------------------------------------------


def git(directory: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    command = ["git", "-C", str(directory), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_is_named_where_the_package_is_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "laser_jax" / "training" / "output.py"
    own.parent.mkdir(parents=True)
    own.write_text("first")
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    page.write_text("first")
    monkeypatch.setattr(module, "__file__", str(own))
    package = {"version": version("laser-jax")}
    assert code_version() == package  # no checkout
    git(tmp_path, "init")
    assert code_version() == package  # a checkout of something else, as around site-packages
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert code_version() == package | {"commit": commit}
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "log").write_text("what git does not follow changes no code")
    page.write_text("second")  # nor do documents, which a benchmark's report rewrites
    assert code_version() == package | {"commit": commit}
    own.write_text("second")
    assert code_version() == package | {"commit": f"{commit}+changes"}


def test_without_git_the_version_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert code_version() == {"version": version("laser-jax")}


# --- the log -----------------------------------------------------------------------------------


def written(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resumed_log_drops_what_comes_after_its_start_and_what_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = StepLog(path, [])
    assert log.last == {}
    for step in (1, 2, 3, 4):
        log.write({"step": step, "loss": 1.5 / step})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    resumed = StepLog(path, logged_lines(path, 2))
    assert resumed.last == {"step": 2, "loss": 0.75}
    assert resumed.lines == [{"step": 1, "loss": 1.5}, {"step": 2, "loss": 0.75}]
    resumed.write({"step": 3, "loss": 0.5})
    resumed.close()
    assert written(path) == [1, 2, 3]


@pytest.mark.parametrize("damaged", [bytes(30), b'{"step": 3, "lo', b'{"loss": 1}', b"\xff", b"3"])
def test_damaged_lines_of_a_log_are_named_and_kept_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damaged: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    before = b'{"step": 1}\n' + damaged + b'\n{"step": 4}\n' + damaged
    path.write_bytes(before)
    log = StepLog(path, logged_lines(path, 4))
    log.close()
    assert log.lines == [{"step": 1}, {"step": 4}]
    assert f"{path}:2 is damaged and left out" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before
    assert written(path) == [1, 4]
