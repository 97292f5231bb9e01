"""What is a training row, and what is said of records that are none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from laser_jax.data.schema import DataError, TrainingRow, facts_of, parse_row
from laser_jax.inference.retriever import LatentRetriever

ROW: dict[str, Any] = {
    "query": "q",
    "reasoning_query": "a\n\nb",
    "prompt": "find",
    "positive_passages": ["p1", "p2"],
    "negative_passages": [],
}
EXPECTED = TrainingRow("q", "a\n\nb", "find", ("p1", "p2"), ())


def test_the_page_s_program_gives_rows_the_scores_of_a_retriever(
    thinking_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text()
    program = page.split("```python\n# score.py")[1].partition("\n")[2].split("```")[0]
    program = program.replace("runs/large/model", str(thinking_model))
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    files = [str(tmp_path / name) for name in ("rows.jsonl", "scored.jsonl")]
    monkeypatch.setattr("sys.argv", ["score.py", *files])
    exec(program, {})
    row = parse_row(json.loads((tmp_path / "scored.jsonl").read_text()), "scored.jsonl:1")
    retriever = LatentRetriever.from_pretrained(thinking_model)
    query = retriever.encode_query("q", instruction="find")
    assert row.teacher_scores == pytest.approx(retriever.encode_document(["p1", "p2"]) @ query)


def test_a_record_becomes_a_row_and_further_fields_are_ignored() -> None:
    assert parse_row({**ROW, "docid": 3}, "t.jsonl:1") == EXPECTED


@pytest.mark.parametrize("field", ROW)
def test_missing_field_is_named_with_its_place(field) -> None:
    row = {key: value for key, value in ROW.items() if key != field}
    with pytest.raises(DataError, match=rf"t\.jsonl:2: field '{field}' is missing"):
        parse_row(row, "t.jsonl:2")


@pytest.mark.parametrize("field", ["prompt", "reasoning_query"])
def test_a_field_that_may_be_empty_says_so_when_missing(field) -> None:
    row = {key: value for key, value in ROW.items() if key != field}
    with pytest.raises(DataError, match="has an empty string there"):
        parse_row(row, "x")
    assert parse_row({**ROW, field: ""}, "x") == parse_row({**row, field: ""}, "x")


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
        ("positive_passages", ["p", " \t"], "item 1 of 'positive_passages' is empty"),
        ("negative_passages", None, "'negative_passages' must be a list of strings"),
        ("negative_passages", [""], "item 0 of 'negative_passages' is empty"),
    ],
)
def test_wrong_value_is_named(field, value, message) -> None:
    with pytest.raises(DataError, match=rf"t\.jsonl:1: .*{message}"):
        parse_row({**ROW, field: value}, "t.jsonl:1")


@pytest.mark.parametrize("field", ["query", "positive_passages"])
def test_half_a_character_is_refused(field) -> None:
    half = json.loads(r'"\ud83d"')
    value = half if field == "query" else [half]
    with pytest.raises(DataError, match=f"'{field}' is no Unicode text"):
        parse_row({**ROW, field: value}, "x")


def test_scores_of_another_teacher_are_kept_one_a_passage() -> None:
    row = {**ROW, "negative_passages": ["n"]}
    assert parse_row({**row, "teacher_scores": [1, -2.5, 0.5]}, "x").teacher_scores == (
        1,
        -2.5,
        0.5,
    )
    assert parse_row({**row, "teacher_scores": None}, "x").teacher_scores is None


NO_SCORES = ([1.0], [1.0, 2.0, 3.0], "12", *([1.0, n] for n in (True, math.nan, 1e39, 10**400)))


@pytest.mark.parametrize("value", NO_SCORES)
def test_scores_that_are_not_one_a_passage_are_refused(value) -> None:
    with pytest.raises(DataError, match=r"t\.jsonl:1: 'teacher_scores' must be 2 finite numbers"):
        parse_row({**ROW, "teacher_scores": value}, "t.jsonl:1")


def test_scores_are_part_of_the_rows_fingerprint() -> None:
    plain = parse_row(ROW, "x")
    scored = [parse_row({**ROW, "teacher_scores": [1, last]}, "x") for last in (2, 3)]
    facts = [facts_of([row]) for row in (plain, *scored)]
    assert len({found.fingerprint for found in facts}) == 3
    assert [found.scored_rows for found in facts] == [0, 1, 1]


def test_a_record_that_is_no_object_is_refused() -> None:
    with pytest.raises(DataError, match=r"t\.jsonl:1: wanted a JSON object, got list"):
        parse_row([1], "t.jsonl:1")
