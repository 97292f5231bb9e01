"""Writing a file whole or not at all."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import resource
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from laser_jax.files.durable import (
    flush,
    folder_written_whole,
    parts_of,
    read_state,
    read_state_lines,
    write_atomically,
    written_whole,
)
from laser_jax.files.reading import (
    DataError,
    parse_integer,
    parse_number,
    parse_yaml,
    read_json,
    read_yaml,
    text_lines,
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
        raise OSError(errno.ENOSPC, "No space left on device")

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


# --- the order of durable writes -----------------------------------------------------------------


@pytest.fixture
def happened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """("flush" or "move", the name of the file or folder) in their order."""
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def flushed(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        events.append(("flush", re.sub(r"\.[0-9a-f]{16}\.part$", ".part", name)))
        fsync(descriptor)

    def moved(source: Any, target: Any) -> None:
        events.append(("move", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", moved)
    monkeypatch.setattr(os, "rename", moved)
    return events


def test_a_file_is_on_the_disk_before_it_has_its_name_and_so_is_the_name_at_the_end(
    tmp_path: Path, happened: list[tuple[str, str]]
) -> None:
    (tmp_path / "run").mkdir()
    write_atomically(tmp_path / "run" / "results.json", "{}")
    assert happened == [
        ("flush", ".results.json.part"),
        ("move", "results.json"),
        ("flush", "run"),
    ]


def test_the_files_of_a_folder_are_all_on_the_disk_before_the_first_moves(
    tmp_path: Path, happened: list[tuple[str, str]]
) -> None:
    with folder_written_whole(tmp_path / "model") as folder:
        (folder / "b").write_text("second")
        (folder / "a").write_text("first")
    assert happened == [
        ("flush", "a"),
        ("flush", "b"),
        ("move", "a"),
        ("move", "b"),
        ("flush", "model"),
    ]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["a", "b"]


def test_files_of_inner_folders_move_too_and_the_one_that_tells_of_all_comes_last(
    tmp_path: Path, happened: list[tuple[str, str]]
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "old").touch()
    with folder_written_whole(tmp_path, last="a") as folder:
        (folder / "runs").mkdir()
        for name in ("a", "b", "runs/c"):
            (folder / name).touch()
    assert [name for what, name in happened if what == "move"] == ["b", "c", "a"]
    assert {("flush", "runs"), ("flush", tmp_path.name)} == {*happened[-2:]}
    found = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")]
    assert sorted(found) == ["a", "b", "runs", "runs/c", "runs/old"]


def test_a_folder_that_fails_leaves_what_was_there_and_a_killed_ones_rest_goes(
    tmp_path: Path,
) -> None:
    (tmp_path / ".partial-killed").mkdir()
    (tmp_path / ".partial-killed" / "a").write_text("half")
    (tmp_path / "a").write_text("old")

    def interrupted() -> None:
        with folder_written_whole(tmp_path) as folder:
            (folder / "a").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_file_system_that_cannot_flush_folders_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "fsync", refused)
    flush(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        flush(tmp_path / "file")


# --- state ---------------------------------------------------------------------------------------


def step_of(values: Any) -> int:
    return int(values["step"])


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 20, b'{"step": 3', b"\xff\xfe", b"[]", b"{}", b'{"step": null}', b"[" * 9999],
)
def test_a_damaged_state_file_counts_as_absent_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    path = tmp_path / "state.json"
    assert read_state(path, step_of) is None
    assert caplog.text == ""
    path.write_bytes(content)
    assert read_state(path, step_of) is None
    assert f"{path} is damaged and counts as absent: " in caplog.text
    path.write_text(json.dumps({"step": 7}))
    assert read_state(path, step_of) == 7


def test_of_damaged_lines_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert read_state_lines(path, step_of) == []
    path.write_bytes(b'{"step": 1}\n\0\0\0\n{"step": 2}\n{"ste')
    assert read_state_lines(path, step_of) == [1, 2]
    assert (tmp_path / "log.jsonl.damaged").read_bytes() == path.read_bytes()


# --- what others have left ---------------------------------------------------------------------


def test_a_link_that_others_have_put_there_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    for name in (".plan.json.part", ".plan.json.guessed.part"):
        (tmp_path / name).symlink_to(victim)
    write_atomically(tmp_path / "plan.json", "new")
    with monkeypatch.context() as patch:
        patch.setattr(secrets, "token_hex", lambda size: "guessed")
        with pytest.raises(FileExistsError, match=r"plan\.json\.guessed\.part"):
            write_atomically(tmp_path / "plan.json", "newer")
    assert (tmp_path / "plan.json").read_text() == "new"
    assert victim.read_text() == "untouched"


def test_the_part_of_a_killed_process_goes_when_the_file_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    abandoned, other = tmp_path / ".plan.json.0.part", tmp_path / ".report.json.0.part"
    abandoned.touch()
    other.touch()  # of another file, whose writer may come back to it
    write_atomically(path, "text")
    assert parts_of(tmp_path) == [other]


# --- reading ---------------------------------------------------------------------------------


def test_a_line_without_an_end_is_refused_by_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("laser_jax.files.reading.LONGEST_LINE", 1000)
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
