"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from laser_jax.files import parts_of, write_atomically, written_whole


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


def test_two_writers_with_tags_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with written_whole(path, "a") as first, written_whole(path, "b") as second:
        first.write_text("first")
        second.write_text("second")
        assert parts_of(tmp_path) == [first, second]
    assert path.read_text() == "first"  # the last to end
    assert parts_of(tmp_path) == []
