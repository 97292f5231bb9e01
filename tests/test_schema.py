"""Reading training rows, and what is said of files that are not training rows."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from laser_jax.data.schema import DataError, TrainingRow, read_training_rows

ROW: dict[str, Any] = {
    "query": "q",
    "reasoning_query": "a\n\nb",
    "prompt": "find",
    "positive_passages": ["p1", "p2"],
    "negative_passages": [],
}
EXPECTED = TrainingRow("q", "a\n\nb", "find", ("p1", "p2"), ())
DATA = Path(__file__).parents[1].parent / "shared" / "data"


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_jsonl_rows_come_in_order_without_blank_lines(tmp_path) -> None:
    second = {**ROW, "query": "zweite Frage ü", "docid": "ignored"}
    path = write(tmp_path / "t.jsonl", json.dumps(ROW), "", "  ", json.dumps(second))
    rows = read_training_rows(path)
    assert rows[0] == EXPECTED
    assert [row.query for row in rows] == ["q", "zweite Frage ü"]


def test_gzip_holds_the_same_rows(tmp_path) -> None:
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(ROW).encode()))
    assert read_training_rows(path) == [EXPECTED]


def test_parquet_holds_the_same_rows(tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [ROW, {**ROW, "negative_passages": ["n"]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    read = read_training_rows(tmp_path / "t.parquet")
    assert read[0] == EXPECTED
    assert read[1].negative_passages == ("n",)


def test_parquet_error_names_the_row(tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [ROW, {**ROW, "prompt": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet: row 2: 'prompt' must be a string.*NoneType"):
        read_training_rows(tmp_path / "t.parquet")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install laser-jax\[parquet\]"):
        read_training_rows(write(tmp_path / "t.parquet", "x"))


def test_a_file_that_is_no_parquet_is_refused(tmp_path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match="not a Parquet file"):
        read_training_rows(write(tmp_path / "t.parquet", "not parquet at all"))


def test_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
        read_training_rows(tmp_path / "absent.jsonl")


def test_empty_file_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        read_training_rows(write(tmp_path / "t.jsonl", "", " "))


def test_unknown_suffix_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match=r"\.jsonl, \.jsonl\.gz or \.parquet"):
        read_training_rows(write(tmp_path / "t.csv", "x"))


def test_truncated_gzip_is_refused(tmp_path) -> None:
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(ROW).encode())[:-12])
    with pytest.raises(DataError, match="not a whole gzip file"):
        read_training_rows(path)


def test_malformed_json_names_file_and_line(tmp_path) -> None:
    path = write(tmp_path / "t.jsonl", json.dumps(ROW), "", '{"query": ')
    with pytest.raises(DataError, match=r"t\.jsonl:3: malformed JSON"):
        read_training_rows(path)


def test_bytes_that_are_not_utf8_name_the_line(tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b'\n{"query": "\xff\xfe"}\n')
    with pytest.raises(DataError, match=r"t\.jsonl:2: not UTF-8"):
        read_training_rows(path)


@pytest.mark.parametrize("field", ROW)
def test_missing_field_is_named(tmp_path, field) -> None:
    row = {key: value for key, value in ROW.items() if key != field}
    with pytest.raises(DataError, match=rf"t\.jsonl:1: field '{field}' is missing"):
        read_training_rows(write(tmp_path / "t.jsonl", json.dumps(row)))


@pytest.mark.parametrize("field", ["prompt", "reasoning_query"])
def test_a_field_that_may_be_empty_says_so_when_missing(tmp_path, field) -> None:
    row = {key: value for key, value in ROW.items() if key != field}
    with pytest.raises(DataError, match="has an empty string there"):
        read_training_rows(write(tmp_path / "t.jsonl", json.dumps(row)))
    path = write(tmp_path / "t.jsonl", json.dumps({**ROW, field: ""}))
    assert len(read_training_rows(path)) == 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("query", 3, "'query' must be a string, got int"),
        ("query", "", "'query' is empty"),
        ("query", " \n", "'query' is empty"),
        ("reasoning_query", None, "'reasoning_query' must be a string, got NoneType"),
        ("prompt", ["x"], "'prompt' must be a string, got list"),
        ("positive_passages", "p", "'positive_passages' must be a list of strings, got str"),
        ("positive_passages", ["p", 2], "a list whose item 1 is int"),
        ("positive_passages", [], "'positive_passages' is empty"),
        ("negative_passages", None, "'negative_passages' must be a list of strings"),
    ],
)
def test_wrong_value_is_named(tmp_path, field, value, message) -> None:
    path = write(tmp_path / "t.jsonl", json.dumps({**ROW, field: value}))
    with pytest.raises(DataError, match=message):
        read_training_rows(path)


def test_a_line_that_is_no_object_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match=r"t\.jsonl:1: an object is wanted, got list"):
        read_training_rows(write(tmp_path / "t.jsonl", "[1]"))


def test_shared_training_files_are_read() -> None:
    files = sorted(DATA.glob("*/train.jsonl"))
    if not files:
        pytest.skip(f"no training files under {DATA}")
    assert all(read_training_rows(path) for path in files)
