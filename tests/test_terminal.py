"""Texts of data on a terminal."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from laser_jax.files.terminal import configure_logging, extra, fail, printable

PROGRAMS = Path(__file__).resolve().parents[1] / "laser_jax"


def test_control_characters_are_shown_and_not_obeyed() -> None:
    text = "a\tb\nc \x1b]52;c;aGk=\x07\x1b[2J\r\x9b1A\x7f\u202e é 東"
    shown = "a\tb\nc \\x1b]52;c;aGk=\\x07\\x1b[2J\\r\\x9b1A\\x7f\\u202e é 東"
    assert printable(text) == shown


def test_an_error_quotes_data_without_obeying_it() -> None:
    with pytest.raises(SystemExit) as ended:
        fail(ValueError("query \x1b[2J has no instruction"))
    assert ended.value.code == "error: query \\x1b[2J has no instruction"


def test_every_program_ends_so() -> None:
    """An error's message may quote an id or a file's name as it is."""
    for path in PROGRAMS.rglob("*.py"):
        assert 'f"error: {error}' not in path.read_text(encoding="utf-8"), path


def test_progress_goes_to_stderr_with_the_time_and_the_process(capsys) -> None:
    logger = logging.getLogger("laser_jax")
    before = logger.handlers, logger.level
    try:
        configure_logging(3)
        logging.getLogger("laser_jax.train.loop").info("step %d of %s", 1, "\x1b[2J")
    finally:
        logger.handlers, level = before
        logger.setLevel(level)
    out, err = capsys.readouterr()
    assert (out, err[:2]) == ("", "20")
    assert err.endswith(r" [3] step 1 of \x1b[2J" + "\n")


def test_an_import_that_fails_within_laser_jax_is_no_missing_extra() -> None:
    ours = pytest.raises(ImportError, match="cannot import name 'absent' from 'laser_jax")
    with ours, extra("serve", "the server"):
        from laser_jax.settings import absent  # noqa: F401  # pyright: ignore
    missing = pytest.raises(ImportError, match="the server needs absent_package: pip install")
    with missing, extra("serve", "the server"):
        import absent_package  # noqa: F401  # pyright: ignore
