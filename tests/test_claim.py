"""The claim on an output directory: one program at a time, always of one config, and no traces."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from laser_jax.files.claim import Claim, OutputError, sweep
from laser_jax.settings import Change, ConfigError, changes


def of_seed(seed: int) -> Any:
    def changed(recorded: dict[str, Any]) -> Sequence[Change]:
        return changes(recorded["config"], {"seed": seed}, source="run.json")

    return changed


def claim(directory: Path, seed: int = 1, **how: Any) -> Claim:
    return Claim(directory, "run.json", of_seed(seed), **how)


def record(directory: Path, seed: int = 1, **how: Any) -> None:
    with claim(directory, seed, **how) as held:
        held.record(json.dumps({"config": {"seed": seed}}))


# --- one program -------------------------------------------------------------------------------


def test_a_second_program_is_refused_until_the_first_one_ends(tmp_path: Path) -> None:
    with claim(tmp_path / "out"):
        with pytest.raises(OutputError, match=rf"written by process {os.getpid()} on \S+\. Wait"):
            record(tmp_path / "out")
        assert (tmp_path / "out").is_dir()
    record(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]


HOLDER = """
import sys
from laser_jax.files.claim import Claim
with Claim(sys.argv[1], "run.json", lambda recorded: []):
    print("locked", flush=True)
    sys.stdin.readline()
"""


def test_the_lock_of_a_killed_program_ends_with_it(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(OutputError, match=f"process {holder.pid} on"):
            record(tmp_path)
        holder.send_signal(signal.SIGKILL)
    record(tmp_path, alone=True)  # its lock file lies there


def test_a_lock_file_that_its_holder_has_just_removed_is_not_taken(tmp_path: Path) -> None:
    first = claim(tmp_path / "out")
    with first:
        stale = (tmp_path / "out" / ".lock").open("a+")
    with stale, claim(tmp_path / "out") as second:
        assert os.fstat(stale.fileno()).st_ino != (tmp_path / "out" / ".lock").stat().st_ino
        second.record("{}")


def test_a_lock_in_a_directory_that_was_deleted_and_made_anew_is_left_alone(tmp_path: Path) -> None:
    with ExitStack() as stack:
        with claim(tmp_path / "out"):
            shutil.rmtree(tmp_path / "out")
            stack.enter_context(claim(tmp_path / "out"))
        with pytest.raises(OutputError, match="being written by"):
            record(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_on_a_full_disk_a_claim_is_had_and_leaves_nothing(tmp_path: Path) -> None:
    """The record then fails, whose message names it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*run\.json'"):
            record(tmp_path / "new" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_files_of_one_directory_are_claimed_each_by_itself(tmp_path: Path) -> None:
    def of_file(name: str, seed: int = 1) -> Claim:
        return Claim(tmp_path, f"{name}.json", of_seed(seed), file=name)

    held = rf"^{tmp_path}/a is being written by process"
    with of_file("a"), of_file("b"), pytest.raises(OutputError, match=held):
        of_file("a").__enter__()
    assert list(tmp_path.iterdir()) == []
    with of_file("a") as first:
        first.record('{"config": {"seed": 1}}')
    message = rf"^{tmp_path}/a holds a run .*\n  seed was 1, is 2\n.*, or delete a and a\.json$"
    with pytest.raises(OutputError, match=message):
        of_file("a", seed=2).__enter__()


def test_a_link_that_others_have_put_at_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("untouched")
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match=r"\.lock"):
        record(tmp_path)
    assert (tmp_path / "victim").read_text() == "untouched"


def test_of_processes_that_share_an_output_one_makes_the_record_and_the_others_wait(
    tmp_path: Path,
) -> None:
    found: list[Any] = []

    def other() -> None:
        with claim(tmp_path, shared=True) as held:
            found.append(held.recorded)

    waiting = threading.Thread(target=other)
    with claim(tmp_path, shared=True) as first:
        waiting.start()
        waiting.join(0.2)
        assert found == []
        first.record('{"config": {"seed": 1}}')
    waiting.join()
    assert found == [{"config": {"seed": 1}}]
    (tmp_path / ".lock").touch()  # of one that was killed
    with claim(tmp_path, shared=True), claim(tmp_path, shared=True):  # there is nothing to make
        assert not (tmp_path / ".lock").exists()


def test_without_locks_an_output_is_had_only_where_it_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    message = r"this file system has no locks, .*Choose a place on a local disk.*'.*out/\.lock'"
    with pytest.raises(OSError, match=message):
        record(tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    record(tmp_path / "out", shared=True)


# --- one config --------------------------------------------------------------------------------


def test_another_config_is_refused_by_key_and_nothing_is_touched(tmp_path: Path) -> None:
    record(tmp_path)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    for shared in (False, True):
        with pytest.raises(OutputError) as refused:
            record(tmp_path, 2, shared=shared)
        assert str(refused.value) == (
            f"{tmp_path} holds a run with another config:\n  seed was 1, is 2\n"
            "Choose another --output, or delete that directory"
        )
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
    record(tmp_path)


def test_a_record_with_unknown_settings_is_refused_and_a_damaged_one_counts_as_absent(
    tmp_path: Path,
) -> None:
    def unknown(recorded: dict[str, Any]) -> Sequence[Change]:
        raise ConfigError("unknown key colour")

    record(tmp_path)
    with pytest.raises(OutputError, match=r"run\.json is no run's config: unknown key colour\. C"):
        Claim(tmp_path, "run.json", unknown).__enter__()
    for content in ("{}", '{"config', "7", "\0"):
        (tmp_path / "run.json").write_text(content)
        with claim(tmp_path) as held:
            assert held.recorded is None


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file is no directory; choose another --output"):
        record(tmp_path / "file")
    with pytest.raises(OutputError, match=r"gs://bucket/run: .*Mount.*gcsfuse"):
        Claim("gs://bucket/run", "run.json", of_seed(1)).__enter__()
    assert not Path("gs:").exists()


def test_a_directory_of_others_is_refused_to_a_program_that_must_be_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / ".work").mkdir()
    with pytest.raises(OutputError, match=r"holds 'thesis\.tex' and no whole run\.json: it is no"):
        record(tmp_path, alone=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".work", "thesis.tex"]
    record(tmp_path)
    (tmp_path / "run.json").write_text('{"config"')
    with pytest.raises(OutputError, match=r"or bring run\.json back from a copy"):
        record(tmp_path, alone=True)


def test_settings_that_were_found_elsewhere_are_compared_as_those_of_the_record(
    tmp_path: Path,
) -> None:
    with claim(tmp_path) as held:
        held.require_same({"config": {"seed": 1}}, tmp_path / "4")
        with pytest.raises(OutputError, match=r"another config:\n  seed was 2, is 1"):
            held.require_same({"config": {"seed": 2}}, tmp_path / "4")


def test_settings_are_compared_but_for_the_keys_that_may_change() -> None:
    old = {"data": {"train": "a", "parts": [{"path": "a", "weight": 1}]}, "seed": 1}
    new = {"data": {"train": "b", "parts": [{"path": "b", "weight": 2}]}, "seed": 1, "top": 3}

    def found(*changeable: str) -> list[str]:
        return [str(c) for c in changes(old, new, source="run.json", changeable=changeable)]

    assert found("data.train", "data.parts.*.path") == [
        "data.parts.0.weight was 1, is 2",
        "top was None, is 3",
    ]
    assert found("data", "top") == []
    assert changes({"seed": "x" * 99}, {"seed": 1}, source="")[0].old == "x" * 99


# --- nothing is left behind --------------------------------------------------------------------


def test_a_program_that_fails_before_its_record_leaves_what_was_there(tmp_path: Path) -> None:
    def fail() -> None:
        with claim(tmp_path / "a" / "b", alone=True) as held:
            (held.directory / ".work").mkdir()
            (held.directory / ".work" / "half").touch()
            raise RuntimeError("bad input")

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "notes.txt").write_text("mine")
    with claim(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_only_unfinished_runs_need_is_swept_up_at_the_end(tmp_path: Path) -> None:
    record(tmp_path)
    (tmp_path / ".work").mkdir()
    for name in (".work/shard", ".report.json.0.part", "report.json"):
        (tmp_path / name).touch()
    record(tmp_path)  # a program that is stopped here finds its work again
    assert (tmp_path / ".work" / "shard").is_file()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "run.json"]
