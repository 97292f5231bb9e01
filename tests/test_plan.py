"""How a corpus is cut, and how the cut is kept."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from laser_jax.encode_corpus.documents import Corpus, Fields
from laser_jax.encode_corpus.plan import (
    Plan,
    Settings,
    make_plan,
    plan_text,
    read_plan,
    read_planned,
)
from laser_jax.files.reading import DataError
from laser_jax.search import repeated_ids
from laser_jax.search.vectors import VectorsInfo

SETTINGS = Settings(
    VectorsInfo("model", "prompt", 3, "int8", 16, "documents"),
    instruction=None,
    fields=Fields(),
    skip_bad_lines=False,
    shard_documents=4,
    batch_size=64,
    batch_tokens=8192,
    length_multiple=32,
)


def write(path: Path, count: int, **more: Any) -> Path:
    rows = ({"_id": f"d{n}", "text": f"text {n}", **more} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plan_of(path: Path, settings: Settings = SETTINGS) -> Plan:
    with Corpus(path) as corpus:
        return make_plan(corpus, settings, path.parent)


def test_shards_hold_the_documents_in_their_order(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", 10)
    plan = plan_of(path)
    assert [shard.count for shard in plan.shards] == [4, 4, 2]
    with Corpus(path) as corpus:
        for number in (1, 0, 2):
            found = read_planned(corpus, plan.shards[number], "x")
            wanted = range(4 * number, min(4 * number + 4, 10))
            assert [located.item.id for located in found] == [f"d{n}" for n in wanted]
            assert found[0].where == f"{path}:{4 * number + 1}"


def test_a_corpus_that_fills_its_last_shard_has_no_empty_one(tmp_path: Path) -> None:
    assert [shard.count for shard in plan_of(write(tmp_path / "c.jsonl", 8)).shards] == [4, 4]


def test_a_plan_survives_writing_and_reading(tmp_path: Path) -> None:
    plan = plan_of(write(tmp_path / "c.jsonl", 10))
    (tmp_path / "plan.json").write_text(plan_text(plan))
    assert read_plan(tmp_path) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "wanted .* got"),
        ({"version": 2}, "wanted .* got"),
        ({"shards": [[1, 2]]}, "damaged: .*from a copy"),
        ({"settings": {}}, "settings"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    values = json.loads(plan_text(plan_of(write(tmp_path / "c.jsonl", 3))))
    (tmp_path / "plan.json").write_text(json.dumps(values | change))
    with pytest.raises(DataError, match=f"(?s)plan.json: .*{message}"):
        read_plan(tmp_path)


def test_an_equal_hash_alone_is_no_repeated_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a billion ids two may share their 64 bits."""
    monkeypatch.setattr(repeated_ids, "_digest", lambda id_: id_[:2].encode().ljust(8))
    assert len(plan_of(write(tmp_path / "c.jsonl", 90)).shards) == 23
    path = write(tmp_path / "twice.jsonl", 90)
    path.write_text(path.read_text() + path.read_text().splitlines()[41] + "\n")
    with pytest.raises(DataError, match=r"twice\.jsonl:91: id 'd41' stands .* first at .*:42$"):
        plan_of(path)


def test_a_plan_takes_no_more_memory_for_a_longer_corpus(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        path = write(tmp_path / f"{count}.jsonl", count, title="x" * 2_000)
        tracemalloc.start()
        plan_of(path, dataclasses.replace(SETTINGS, shard_documents=200))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(2_000) < peak(200) + 100_000  # the corpus has 4 MB
