"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import resource
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from laser_jax.files import no_link, parts_of, write_atomically, written_whole


@pytest.fixture
def small_files() -> Iterator[None]:
    """Writing beyond 64 KiB of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_old_file_and_no_part(tmp_path: Path, small_files) -> None:
    path = tmp_path / "results.json"
    write_atomically(path, "old")
    with pytest.raises(OSError, match=r"File too large: '.*results\.json'"):
        write_atomically(path, "x" * 100_000)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    write_atomically(path, "new")
    assert path.read_text() == "new"


def test_a_disk_that_is_full_at_the_last_moment_is_no_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "results.json"
    write_atomically(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*results\.json'"):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_block_that_fails_leaves_no_part(tmp_path: Path) -> None:
    def interrupted() -> None:
        with written_whole(tmp_path / "run.trec") as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with written_whole(path) as first, written_whole(path) as second:
        first.write_text("first")
        second.write_text("second")
        assert parts_of(tmp_path) == sorted([first, second])
    assert path.read_text() == "first"  # the last to end
    assert parts_of(tmp_path) == []


def test_a_link_that_others_have_put_there_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    for name in (".plan.json.part", ".plan.json.guessed.part", "lock"):
        (tmp_path / name).symlink_to(victim)
    write_atomically(tmp_path / "plan.json", "new")
    with monkeypatch.context() as patch:
        patch.setattr(secrets, "token_hex", lambda size: "guessed")
        with pytest.raises(FileExistsError, match=r"plan\.json\.guessed\.part"):
            write_atomically(tmp_path / "plan.json", "newer")
    with pytest.raises(OSError, match="lock"):
        no_link(str(tmp_path / "lock"), os.O_WRONLY)
    assert (tmp_path / "plan.json").read_text() == "new"
    assert victim.read_text() == "untouched"


def test_the_part_of_a_killed_process_goes_when_the_file_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    abandoned, other = tmp_path / ".plan.json.0.part", tmp_path / ".report.json.0.part"
    abandoned.touch()
    other.touch()  # of another file, whose writer may come back to it
    write_atomically(path, "text")
    assert parts_of(tmp_path) == [other]
