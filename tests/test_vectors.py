"""Directories of vectors, and the program that searches them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laser_jax.files.reading import DataError
from laser_jax.search.codes import encode_vectors
from laser_jax.search.run import main
from laser_jax.search.topk import search
from laser_jax.search.trec import read_trec_run
from laser_jax.search.vectors import (
    Manifest,
    Shard,
    VectorsInfo,
    read_ids,
    read_manifest,
    read_shard,
    read_shards,
    shard_name,
    verify,
    write_manifest,
    write_shard,
)

pytest.importorskip("pyarrow")

INFO = VectorsInfo(
    "model", "prompt", num_thinking_steps=3, dtype="float32", dimension=16, role="documents"
)


def unit_vectors(seed: int, count: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, 16)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_directory(
    directory: Path, ids: list[str], vectors: np.ndarray, *, shards: int, **info: Any
) -> Manifest:
    of_all = dataclasses.replace(INFO, **info)
    entries = [
        write_shard(
            directory,
            shard_name(n),
            [ids[i] for i in rows],
            encode_vectors(vectors[rows], of_all.dtype),
            of_all,
        )
        for n, rows in enumerate(np.array_split(np.arange(len(ids)), shards))
    ]
    manifest = Manifest(of_all, tuple(entries))
    write_manifest(directory, manifest)
    return manifest


DOCUMENTS = unit_vectors(0, 50)
DOCUMENT_IDS = [f"folder/d {i}.txt" for i in np.random.default_rng(1).permutation(50)]
QUERIES, QUERY_IDS = unit_vectors(2, 7), [f"q{i}" for i in range(7)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_directory(tmp_path / "corpus", DOCUMENT_IDS, DOCUMENTS, shards=3)
    return tmp_path / "corpus"


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    of_queries = {"role": "queries", "num_thinking_steps": 5}
    write_directory(tmp_path / "queries", QUERY_IDS, QUERIES, shards=1, **of_queries)
    return tmp_path / "queries"


# --- the format --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_directory_survives_writing_and_reading(tmp_path: Path, dtype) -> None:
    written = write_directory(tmp_path, DOCUMENT_IDS, DOCUMENTS, shards=4, dtype=dtype)
    manifest = read_manifest(tmp_path)
    assert manifest == written
    assert (manifest.count, len(manifest.shards)) == (50, 4)
    assert read_ids(tmp_path, manifest) == DOCUMENT_IDS
    parts = list(read_shards(tmp_path, manifest))
    assert [id_ for ids, _ in parts for id_ in ids] == DOCUMENT_IDS
    np.testing.assert_array_equal(
        np.concatenate([rows for _, rows in parts]), encode_vectors(DOCUMENTS, dtype)
    )
    assert verify(tmp_path) == []


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    first = write_directory(tmp_path / "a", DOCUMENT_IDS, DOCUMENTS, shards=2)
    assert write_directory(tmp_path / "b", DOCUMENT_IDS, DOCUMENTS, shards=2) == first


def test_a_shard_without_rows_is_one(tmp_path: Path) -> None:
    manifest = write_directory(tmp_path, [], DOCUMENTS[:0], shards=1)
    ids, rows = read_shard(tmp_path, manifest.shards[0], manifest.info)
    assert (ids, rows.shape) == ([], (0, 16))


@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        (["a", "a\tb"], DOCUMENTS[:2], r"id 'a\\tb' holds a tab or a line break"),
        (["a", ""], DOCUMENTS[:2], "id '' is empty"),
        (["a", "a"], DOCUMENTS[:2], "id 'a' stands twice"),
        (["a", "b"], np.stack([DOCUMENTS[0], np.full(16, np.nan, np.float32)]), "not finite.*'b'"),
        (["a", "b"], np.stack([np.zeros(16, np.float32), DOCUMENTS[0]]), "all zero.*'a'"),
        (["a"], DOCUMENTS[:2], r"wanted float32 of shape \(1, 16\), got float32 of shape \(2, 16"),
        (["a"], DOCUMENTS[:1].astype(np.float64), "wanted float32 of shape .* got float64"),
    ],
)
def test_what_is_no_shard_is_not_written(
    tmp_path: Path, ids: list[str], rows: np.ndarray, message: str
) -> None:
    with pytest.raises(DataError, match=rf"shard-00000\.parquet: .*{message}"):
        write_shard(tmp_path, shard_name(0), ids, rows, INFO)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_part_of_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> int:
        path.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*shard-00000\.parquet'"):
        write_shard(tmp_path, shard_name(0), ["a"], DOCUMENTS[:1], INFO)
    assert list(tmp_path.iterdir()) == []


# --- damage ------------------------------------------------------------------------------------


def test_verify_names_every_damaged_missing_and_foreign_shard(corpus: Path) -> None:
    damaged = corpus / shard_name(0)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    (corpus / shard_name(2)).rename(corpus / "other.parquet")
    first, second, third = verify(corpus)
    assert f"{damaged}: damaged: its sha256" in first
    assert f"{corpus / shard_name(2)} is missing" in second
    assert f"{corpus / 'other.parquet'}: not named by manifest.json" in third


def test_an_id_in_two_shards_is_named_with_both(tmp_path: Path) -> None:
    manifest = write_directory(tmp_path, ["a", "b"], DOCUMENTS[:2], shards=2)
    shard = write_shard(tmp_path, shard_name(1), ["a"], DOCUMENTS[:1], INFO)
    manifest = Manifest(INFO, (manifest.shards[0], shard))
    write_manifest(tmp_path, manifest)
    message = f"{tmp_path / shard_name(1)}: id 'a' stands twice, it is in {shard_name(0)} too"
    with pytest.raises(DataError, match=message):
        read_ids(tmp_path, manifest)
    assert verify(tmp_path) == [message]


def test_a_shard_of_another_model_is_refused(tmp_path: Path) -> None:
    manifest = write_directory(tmp_path, ["a"], DOCUMENTS[:1], shards=1)
    other = dataclasses.replace(INFO, model_hash="other")
    with pytest.raises(DataError, match=r"model_hash is 'model', and manifest\.json says 'other'"):
        read_shard(tmp_path, manifest.shards[0], other)


def test_what_is_no_parquet_is_named(tmp_path: Path) -> None:
    content = b"not a parquet file"
    (tmp_path / "x.parquet").write_bytes(content)
    shard = Shard("x.parquet", 1, hashlib.sha256(content).hexdigest())
    with pytest.raises(DataError, match=r"x\.parquet: no shard of vectors"):
        read_shard(tmp_path, shard, INFO)
    with pytest.raises(DataError, match=r"x\.parquet: no shard of vectors"):
        read_ids(tmp_path, Manifest(INFO, (shard,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "parquet"}, "'format' must be 'laser_jax vectors'"),
        ({"version": 2}, "version 2, this program reads 1"),
        ({"count": 51}, "the shards hold 50 vectors, 'count' is 51"),
        ({"dtype": "float64"}, "float64"),
        ({"dimension": 0}, "must be at least 1"),
        ({"extra": 1}, "extra"),
        ({"shards": [{"file": "../a.parquet", "count": 50, "sha256": ""}]}, "is no file name"),
        ({"shards": 3}, "'shards' must be a list"),
    ],
)
def test_a_faulty_manifest_is_refused(corpus: Path, change: dict[str, Any], message: str) -> None:
    path = corpus / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=f"(?s)manifest.json: .*{message}"):
        read_manifest(corpus)


def test_an_unfinished_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no finished directory of vectors"):
        read_manifest(tmp_path)


# --- the program -------------------------------------------------------------------------------


def options(corpus: Path, queries: Path, output: Path, *more: str) -> list[str]:
    where = ["--corpus_vectors", str(corpus), "--query_vectors", str(queries)]
    return [*where, "--output", str(output), *more]


def test_the_program_writes_the_run_of_a_search(
    corpus: Path, queries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    excluded = tmp_path / "excluded.tsv"
    excluded.write_text(f"q1\t{DOCUMENT_IDS[3]}\nq1\t{DOCUMENT_IDS[40]}\n")
    output = tmp_path / "run.trec"
    main(options(corpus, queries, output, "--k", "20", "--excluded", str(excluded)))
    wanted = search(
        QUERIES,
        DOCUMENTS,
        QUERY_IDS,
        DOCUMENT_IDS,
        20,
        {"q1": [DOCUMENT_IDS[3], DOCUMENT_IDS[40]]},
    )
    run = read_trec_run(output)
    assert {query: list(ranking) for query, ranking in run.items()} == {
        query: list(ranking) for query, ranking in wanted.items()
    }
    for query, ranking in run.items():
        assert ranking == pytest.approx(wanted[query], abs=1e-6)
    said = capsys.readouterr()
    assert "7 queries, 140 documents" in said.out
    assert "queries thought at K = 5, documents at K = 3" in said.err


def test_ties_go_by_id_across_shards(tmp_path: Path, queries: Path) -> None:
    ids = [f"d{i}" for i in np.random.default_rng(5).permutation(90)]
    same = np.tile(DOCUMENTS[:1], (90, 1))
    write_directory(tmp_path / "same", ids, same, shards=4)
    main(options(tmp_path / "same", queries, tmp_path / "run.trec", "--k", "30"))
    # the run is checked as it was written, since reading it would sort by id once more
    lines = (tmp_path / "run.trec").read_text().splitlines()[:30]
    assert [line.split()[2] for line in lines] == sorted(ids, reverse=True)[:30]


def test_a_coarse_search_with_rescoring_finds_the_same(
    corpus: Path, queries: Path, tmp_path: Path
) -> None:
    for name, more in {
        "exact": (),
        "signs": ("--code", "binary"),
        "again": ("--code", "binary", "--oversample", "10"),
    }.items():
        main(options(corpus, queries, tmp_path / name, "--k", "5", *more))
    exact, signs, again = (read_trec_run(tmp_path / n) for n in ("exact", "signs", "again"))
    assert {q: list(r) for q, r in exact.items()} == {q: list(r) for q, r in again.items()}
    assert {q: set(r) for q, r in exact.items()} != {q: set(r) for q, r in signs.items()}


def test_queries_are_not_searched_as_a_corpus_nor_documents_for(
    corpus: Path, queries: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run.trec"
    for pair in ((queries, corpus), (queries, queries)):
        with pytest.raises(SystemExit, match="queries: holds vectors of queries, and documents"):
            main(options(*pair, output))
    with pytest.raises(SystemExit, match="corpus: holds vectors of documents, and queries are"):
        main(options(corpus, corpus, output))
    assert not output.exists()


def test_a_shard_must_have_the_role_of_the_manifest(corpus: Path) -> None:
    path = corpus / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"role": "queries"}))
    assert [fault.split(": ")[1] for fault in verify(corpus)] == [
        "role is 'documents', and manifest.json says 'queries'"
    ] * 3


def test_a_query_is_not_given_the_document_of_its_own_id(
    queries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = ["q3", *DOCUMENT_IDS[1:]]
    write_directory(tmp_path / "same", ids, DOCUMENTS, shards=2)
    output = tmp_path / "run.trec"
    main(options(tmp_path / "same", queries, output, "--k", "49"))
    run = read_trec_run(output)
    assert set(run["q3"]) == set(ids) - {"q3"}
    assert sum("q3" in ranking for ranking in run.values()) >= 5  # others may have it
    said = "documents with the id of their query, dropped from its ranking (BEIR's rule): 1 of 7"
    assert said in capsys.readouterr().err
    main(options(tmp_path / "same", queries, output, "--ignore_identical_ids", "false"))
    assert set(read_trec_run(output)["q3"]) == set(ids)
    assert "kept (ignore_identical_ids false): 1 of 7" in capsys.readouterr().err


def test_exclusions_that_match_nothing_are_said_or_refused(
    corpus: Path, queries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    excluded = tmp_path / "excluded.tsv"
    excluded.write_text(f"q1\t{DOCUMENT_IDS[3]}\nq1\t{DOCUMENT_IDS[4]} \nother\tx\n")
    main(options(corpus, queries, tmp_path / "run.trec", "--excluded", str(excluded)))
    said = capsys.readouterr().err
    assert "queries with exclusions that have no vector: 1 of 2, the first is 'other'" in said
    lacking = f"{DOCUMENT_IDS[4]} "
    assert f"excluded documents that the corpus lacks: 1 of 2, the first is {lacking!r}" in said
    for text, message in (
        (f"other\t{DOCUMENT_IDS[3]}\n", "queries with exclusions.*like 'q0'.*leave the list away"),
        (f"q1\t{DOCUMENT_IDS[3]} \n", r"excluded\.tsv: excluded documents that the corpus lacks"),
    ):
        excluded.write_text(text)
        with pytest.raises(SystemExit, match=message):
            main(options(corpus, queries, tmp_path / "run.trec", "--excluded", str(excluded)))


def test_the_program_refuses_what_cannot_be_compared(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run.trec"
    write_directory(
        tmp_path / "other", QUERY_IDS, QUERIES, shards=1, role="queries", model_hash="other"
    )
    with pytest.raises(SystemExit, match=r"error: model_hash of .*other.*cannot be compared"):
        main(options(corpus, tmp_path / "other", output))
    write_directory(tmp_path / "blank", ["q 1"], QUERIES[:1], shards=1, role="queries")
    with pytest.raises(SystemExit, match="query id 'q 1' is empty or holds blanks"):
        main(options(corpus, tmp_path / "blank", output))
    write_directory(tmp_path / "empty", [], QUERIES[:0], shards=1)
    with pytest.raises(SystemExit, match="empty: holds no vector"):
        main(options(tmp_path / "empty", tmp_path / "blank", output))
    with pytest.raises(SystemExit, match=r"folder of --output .* does not exist"):
        main(options(corpus, tmp_path / "other", tmp_path / "no" / "run.trec"))
    with pytest.raises(SystemExit, match=r"--output .* is a directory; name the run in it"):
        main(options(corpus, tmp_path / "other", tmp_path))
    with pytest.raises(SystemExit, match="k must be at least 1, got 0"):
        main(options(corpus, tmp_path / "other", output, "--k", "0"))
    assert not output.exists()
