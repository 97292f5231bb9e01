"""Files of rewrites: what is read, what they cost, and whose they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laser_jax.data.documents import EvalQuery
from laser_jax.evaluate.rewrites import (
    Rewrite,
    WritingCost,
    milliseconds_per_query,
    read_rewrites,
    require_rewrites_of,
)
from laser_jax.files.reading import DataError

COST = WritingCost(prompt_tokens=9, tokens=4, rows=2, prefill_seconds=0.1, decode_seconds=0.3)
FULL = Rewrite("Ulm, then.\n\nOn the Danube.", "Where is Ulm?", True, COST)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    rewrites = {"b": FULL, "a": Rewrite("")}
    path = write(tmp_path / "f.jsonl", *(rewrite.as_row(id_) for id_, rewrite in rewrites.items()))
    assert list(read_rewrites(path).items()) == list(rewrites.items())


def test_other_programs_write_an_id_and_a_text(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", {"_id": "a", "rewrite": "Öl", "model": "other"})
    rewrites = read_rewrites(path)
    assert rewrites == {"a": Rewrite("Öl")}
    require_rewrites_of({"a": EvalQuery("a", "whatever")}, rewrites, path)
    assert milliseconds_per_query(rewrites) is None


def test_a_query_costs_its_share_of_its_batch() -> None:
    rewrites = {"a": FULL, "b": Rewrite("x", cost=WritingCost(1, 1, 1, 0.5, 2.0))}
    shares = milliseconds_per_query(rewrites)
    assert shares is not None
    np.testing.assert_allclose(shares, [[50, 150], [500, 2000]])
    assert milliseconds_per_query(rewrites | {"c": Rewrite("no times")}) is None
    assert milliseconds_per_query({}) is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"rewrite": "x"}, "field '_id' must be str, got None"),
        ({"_id": "a"}, "field 'rewrite' must be str, got None"),
        ({"_id": "a", "rewrite": ["x"]}, "field 'rewrite' must be str"),
        ({"_id": "a", "rewrite": "x", "query": 3}, "field 'query' must be str, got 3"),
        ({"_id": "a", "rewrite": "x", "finished": "no"}, "field 'finished' must be bool"),
        ({"_id": "a", "rewrite": "x", "tokens": 3}, "field 'prompt_tokens' must be int or float"),
        (FULL.as_row("a") | {"rows": 0}, "rows must be at least 1"),
        (FULL.as_row("a") | {"decode_seconds": float("nan")}, "no seconds negative"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "f.jsonl", FULL.as_row("first"), row)
    with pytest.raises(DataError, match=rf"f\.jsonl:2: .*{message}"):
        read_rewrites(path)


def test_a_missing_file_and_a_query_that_stands_twice_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl is missing"):
        read_rewrites(tmp_path / "absent.jsonl")
    path = write(tmp_path / "f.jsonl", FULL.as_row("a"), FULL.as_row("a"))
    with pytest.raises(DataError, match=r"f\.jsonl:2: query 'a' stands here a second time"):
        read_rewrites(path)


def test_rewrites_must_be_of_these_queries() -> None:
    queries = {id_: EvalQuery(id_, "Where is Ulm?") for id_ in "ab"}
    with pytest.raises(DataError, match="f: 1 of 2 queries have no rewrite, the first is 'b'"):
        require_rewrites_of(queries, {"a": FULL}, "f")
    require_rewrites_of(queries, {"a": FULL, "b": FULL, "c": FULL}, "f")
    other = {"a": FULL, "b": Rewrite("x", query="Where is Kiel?")}
    with pytest.raises(DataError, match=r"query 'b' is of 'Where is Kiel\?', and .* 'Where is U"):
        require_rewrites_of(queries, other, "f")
