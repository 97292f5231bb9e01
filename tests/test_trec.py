"""TREC runs: reading, writing and what cannot be written."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

from laser_jax.files.reading import DataError
from laser_jax.search.trec import (
    read_excluded,
    read_trec_run,
    trec_order,
    write_trec_run,
)


def test_trec_order_is_descending_by_code_point() -> None:
    ids = ["d1", "d10", "Z", "d2", "\u00e9", "a b"]
    assert [ids[i] for i in trec_order(ids)] == ["\u00e9", "d2", "d10", "d1", "a b", "Z"]


def test_a_run_survives_writing_and_reading(tmp_path: Path) -> None:
    run = {
        "q1": {"plain": 0.1, "with  two blanks.txt": 1 / 3, "no-break\u00a0space": -2.5e-8},
        "q2": {"line\u2028separator": 1e30, "7": 0.0},
    }
    write_trec_run(run, tmp_path / "run.trec", "laser")
    assert read_trec_run(tmp_path / "run.trec") == run


def test_a_run_is_written_in_the_order_of_trec_eval(tmp_path: Path) -> None:
    write_trec_run({"q": {"a": 0.5, "c": 0.25, "b": 0.5}}, tmp_path / "run.trec", "tag")
    assert (tmp_path / "run.trec").read_text() == (
        "q Q0 b 1 0.5 tag\nq Q0 a 2 0.5 tag\nq Q0 c 3 0.25 tag\n"
    )


def test_a_run_is_read_from_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "run.txt.gz"
    with gzip.open(path, "wt") as file:
        file.write("0 Q0 a/file 1 .txt 1 0.5 t\n\n0\tQ0\tb\t2\t0.25\tt\r\n")
    assert read_trec_run(path) == {"0": {"a/file 1 .txt": 0.5, "b": 0.25}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q Q0 d 1 0.5", "wanted 'qid Q0 docid rank score tag'"),
        ("q Q0 d first 0.5 t", "wanted 'qid Q0 docid rank score tag'"),
        ("q Q0 d 1 high t", "the score must be a number, got 'high'"),
        ("q Q0 d 1 1_0 t", "the score must be a number, got '1_0'"),
        ("q Q0 d 1 ٣ t", "the score must be a number, got '٣'"),
        ("q Q0 d ٣ 1 t", "wanted 'qid Q0 docid rank score tag'"),
        ("q Q0 d 1 NaN t", "the score of document 'd' of query 'q' is NaN"),
        ("q Q0 a 2 0.5 t", "query 'q' ranks 'a' a second time"),
    ],
)
def test_a_faulty_run_is_refused_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "run.trec"
    path.write_text("q Q0 a 1 1.0 t\n" + line + "\n")
    with pytest.raises(DataError, match=re.escape(str(path)) + ":2: " + message):
        read_trec_run(path)


@pytest.mark.parametrize(
    ("run", "tag"),
    [
        ({"q 1": {"d": 1.0}}, "t"),
        ({"q": {"d": 1.0}}, "two words"),
        ({"q": {"d": 1.0}}, ""),
        ({"q": {" d": 1.0}}, "t"),
        ({"q": {"d\ne": 1.0}}, "t"),
        ({"q": {"d\te": 1.0}}, "t"),
        ({"q": {"": 1.0}}, "t"),
        ({"q": {"d": float("nan")}}, "t"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(
    tmp_path: Path, run: dict[str, dict[str, float]], tag: str
) -> None:
    with pytest.raises(ValueError, match=r"TREC run|NaN"):
        write_trec_run(run, tmp_path / "run.trec", tag)
    assert not (tmp_path / "run.trec").exists()


def test_an_empty_or_damaged_run_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "run.trec"
    empty.write_text("\n")
    with pytest.raises(DataError, match=r"run\.trec: holds no ranked document"):
        read_trec_run(empty)
    torn = tmp_path / "run.trec.gz"
    torn.write_bytes(gzip.compress(b"q Q0 d 1 0.5 t\n" * 1)[:-6])
    with pytest.raises(DataError, match=r"run\.trec\.gz:.*cannot be read"):
        read_trec_run(torn)


def test_excluded_documents_come_from_queries_or_a_table(tmp_path: Path) -> None:
    queries = tmp_path / "queries.jsonl"
    queries.write_text(
        '{"_id": "q1", "text": "plain"}\n\n{"_id": "q2", "excluded_ids": ["d1", "d3"]}\n'
    )
    assert read_excluded(queries) == {"q2": ("d1", "d3")}
    table = tmp_path / "excluded.tsv"
    table.write_text("q2\td1\nq2\ta b.txt\n")
    assert read_excluded(table) == {"q2": ("d1", "a b.txt")}
    table.write_text("q2 d1\n")
    with pytest.raises(DataError, match=r"excluded\.tsv:1: wanted query-id, a tab and corpus-id"):
        read_excluded(table)
    with pytest.raises(DataError, match=r"from a \.jsonl or a \.tsv file"):
        read_excluded(tmp_path / "excluded.json")


def test_a_byte_order_mark_is_no_part_of_an_id(tmp_path: Path) -> None:
    run = tmp_path / "run.trec"
    # as of two files that were put together
    run.write_bytes(b"\xef\xbb\xbfq1 Q0 a 1 1e-1 t\n\xef\xbb\xbfq1 Q0 b 2 .5 t\n")
    assert read_trec_run(run) == {"q1": {"a": 0.1, "b": 0.5}}
    table, queries = tmp_path / "excluded.tsv", tmp_path / "queries.jsonl"
    table.write_text("q1\td1\nq2\td2\n", encoding="utf-8-sig")
    assert read_excluded(table) == {"q1": ("d1",), "q2": ("d2",)}
    queries.write_text('{"_id": "q1", "excluded_ids": ["d1"]}\n', encoding="utf-8-sig")
    assert read_excluded(queries) == {"q1": ("d1",)}


def test_an_excluded_line_too_deep_for_python_is_named(tmp_path: Path) -> None:
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"_id": ' + "[" * 100_000)
    with pytest.raises(DataError, match=r"queries\.jsonl:1: not valid JSON"):
        read_excluded(queries)
