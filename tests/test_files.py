"""Writing a file whole or not at all."""

from __future__ import annotations

import gzip
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from laser_jax.files import (
    DataError,
    parse_integer,
    parse_number,
    parse_yaml,
    parts_of,
    read_json,
    read_yaml,
    text_lines,
    write_atomically,
    written_whole,
)


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


# --- reading ---------------------------------------------------------------------------------


def test_a_line_without_an_end_is_refused_by_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("laser_jax.files.LONGEST_LINE", 1000)
    bomb = tmp_path / "t.jsonl.gz"
    bomb.write_bytes(gzip.compress(b"x" * 1000 + b"\n"))  # of 1,001 bytes
    with pytest.raises(DataError, match=r"t\.jsonl\.gz:1: longer than 1,000 bytes"):
        list(text_lines(bomb))
    bomb.write_bytes(gzip.compress(b"x" * 999 + b"\n" + b"y" * 1000))
    assert [len(line) for _, line in text_lines(bomb)] == [1000, 1000]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1", 1.0),
        ("-.5", -0.5),
        ("+1.e-2", 0.01),
        ("INF", float("inf")),
        ("-infinity", -float("inf")),
    ],
)
def test_a_number_is_read(text: str, number: float) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize("text", ["", " 1", "1_0", "٣", "１", "0x1", "1e", ".", "1\n", "+-1"])
def test_no_number_is_none(text: str) -> None:
    assert parse_number(text) is None
    assert parse_integer(text) is None


def test_numbers_and_keys_of_yaml_are_those_of_json(tmp_path: Path) -> None:
    text = "{a: 010, b: 1_0, c: 1:30, d: 1e-3, e: -.5, f: .inf, g: yes, h: 0x1}"
    assert parse_yaml(text) == {
        "a": 10,
        "b": "1_0",
        "c": "1:30",
        "d": 1e-3,
        "e": -0.5,
        "f": float("inf"),
        "g": True,
        "h": "0x1",
    }
    file = tmp_path / "a.yaml"
    for content in ("a: 1\nb: {c: 1, d: 2, c: 3}\n", "- {c: 1, 'c': 2}\n"):
        file.write_text(content)
        with pytest.raises(DataError, match=r"(?s)a\.yaml: .*the key 'c' stands twice.*line"):
            read_yaml(file)
    file.write_text("base: &b {x: 1}\nown: {<<: *b, x: 2}\n", encoding="utf-8-sig")
    assert read_yaml(file) == {"base": {"x": 1}, "own": {"x": 2}}


def test_a_settings_file_of_json_says_everything_once(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"a": [{"b": 1, "b": 2}]}')
    with pytest.raises(DataError, match=r"a\.json: .*the key 'b' stands twice"):
        read_json(file)
    file.write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(file) == {"a": 1}
    file.write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"a\.json: not valid JSON"):
        read_json(file)
