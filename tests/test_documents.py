"""Reading a corpus from any place: JSON lines, .gz, Parquet, and what is none of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from laser_jax.data.documents import Document, EvalQuery
from laser_jax.encode_corpus.documents import Corpus, Fields, Located, Place
from laser_jax.files.reading import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = [{"_id": f"d{n}", "title": "Köln" if n % 3 else "", "text": f"{n}\n"} for n in range(9)]
ITEMS = [Document(f"d{n}", f"Köln {n}\n" if n % 3 else f"{n}\n") for n in range(9)]


def lines(rows: list[dict[str, Any]]) -> bytes:
    """With a blank line behind every third."""
    texts = [json.dumps(row) + ("\n\n" if n % 3 == 2 else "\n") for n, row in enumerate(rows)]
    return "".join(texts).encode()


@pytest.fixture(params=["jsonl", "jsonl.gz", "parquet"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Nine documents in three files, the second of which is empty."""
    for n, rows in enumerate((ROWS[:5], [], ROWS[5:])):
        path = tmp_path / f"{n}.{request.param}"
        if request.param == "parquet":
            columns = {key: [row[key] for row in rows] for key in ("_id", "text", "title")}
            types = dict.fromkeys(columns, pa.string())
            pq.write_table(pa.table(columns, pa.schema(types.items())), path, row_group_size=2)
        else:
            path.write_bytes(
                gzip.compress(lines(rows)) if request.param == "jsonl.gz" else lines(rows)
            )
    return tmp_path


def test_reading_goes_on_from_the_end_of_any_document(folder: Path) -> None:
    with Corpus(folder) as corpus:
        whole = list(corpus.read())
        assert [located.item for located in whole] == ITEMS
        for n in (5, 0, 8, 4):  # back and forth
            assert list(corpus.read(whole[n].end)) == whole[n + 1 :]


def test_a_place_is_named_as_people_count(folder: Path) -> None:
    with Corpus(folder) as corpus:
        seventh = list(corpus.read())[6]
    kind = corpus.files[2]
    assert seventh.where == (f"{kind}: row 2" if kind.suffix == ".parquet" else f"{kind}:2")


def test_a_beir_directory_is_its_corpus_or_its_queries(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(lines(ROWS)))
    query = {"_id": "q", "text": "Where?", "instruction": "Find", "reasoning": "So."}
    (tmp_path / "queries.jsonl").write_bytes(lines([query]))
    with Corpus(tmp_path) as corpus:
        assert [located.item for located in corpus.read()] == ITEMS
    with Corpus(tmp_path, texts="queries") as corpus:
        (only,) = corpus.read()
    assert only.item == EvalQuery("q", "Where?", "Find", "So.")


def test_a_file_of_beir_is_not_taken_for_the_other(tmp_path: Path) -> None:
    (tmp_path / "queries.jsonl").write_bytes(lines(ROWS))
    with pytest.raises(FileNotFoundError, match=r"corpus\.jsonl is missing: with queries\.jsonl"):
        Corpus(tmp_path)
    with pytest.raises(DataError, match=r"holds queries, and documents are wanted: encode it w"):
        Corpus(tmp_path / "queries.jsonl")
    (tmp_path / "queries.jsonl").rename(tmp_path / "corpus.jsonl")
    with pytest.raises(FileNotFoundError, match=r"queries\.jsonl is missing: with corpus\.jsonl"):
        Corpus(tmp_path, texts="queries")
    with pytest.raises(DataError, match=r"corpus\.jsonl: a file of this name holds documents"):
        Corpus(tmp_path / "corpus.jsonl", texts="queries")
    (tmp_path / "corpus.jsonl.gz").touch()
    with pytest.raises(DataError, match=r"holds both corpus\.jsonl and corpus\.jsonl\.gz"):
        Corpus(tmp_path)
    (tmp_path / "corpus.jsonl.gz").unlink()
    (tmp_path / "corpus.jsonl").rename(tmp_path / "train.jsonl")
    (tmp_path / "qrels").mkdir()
    with pytest.raises(FileNotFoundError, match=r"with qrels the directory is one of BEIR"):
        Corpus(tmp_path)


def test_fields_can_have_other_names(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"docid": ["a"], "body": ["b"], "title": ["c"]}), path)
    with Corpus(path, fields=Fields("docid", "body", "head")) as corpus:
        assert [located.item for located in corpus.read()] == [Document("a", "b")]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"_id": ["a"]}, r"no column 'text'; the columns are \['_id'\]"),
        ({"_id": [1], "text": ["b"]}, "row 1: field '_id' must be a string, got 1"),
        ({"_id": ["a"], "text": [None]}, "row 1: field 'text' must be a string, got None"),
        ({"_id": ["a\tb"], "text": ["b"]}, r"row 1: document id 'a\\tb' holds a tab"),
    ],
)
def test_a_parquet_without_documents_is_named(
    tmp_path: Path, columns: dict[str, list[Any]], message: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with Corpus(tmp_path / "t.parquet") as corpus, pytest.raises(DataError, match=message):
        list(corpus.read())


def test_bad_rows_are_left_out_where_they_may_be(tmp_path: Path) -> None:
    path, said = tmp_path / "t.parquet", []
    pq.write_table(pa.table({"_id": ["a", "b", "c"], "text": ["1", None, "3"]}), path)
    with Corpus(path, skipped=said.append) as corpus:
        found: list[Located] = list(corpus.read())
        assert [located.item.id for located in found] == ["a", "c"]
        assert corpus.bad_lines == 1
        assert [located.item.id for located in corpus.read(found[0].end)] == ["c"]
    assert found[1].end == Place(0, 3, 3)
    assert said[0] == f"{path}: row 2: field 'text' must be a string, got None"


def test_a_line_too_deep_for_python_is_left_out_where_it_may_be(tmp_path: Path) -> None:
    path, said = tmp_path / "c.jsonl", []
    path.write_bytes(b'{"_id": ' + b"[" * 100_000 + b'\n{"_id": "a", "text": "1"}\n')
    with Corpus(path, skipped=said.append) as corpus:
        assert [located.item.id for located in corpus.read()] == ["a"]
        assert corpus.bad_lines == 1
    assert said[0].startswith(f"{path}:1: not valid JSON")
    with Corpus(path) as corpus, pytest.raises(DataError, match=r"c\.jsonl:1: not valid JSON"):
        list(corpus.read())


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines(ROWS))[:-12])
    with Corpus(path) as corpus, pytest.raises(DataError, match=r"a\.jsonl\.gz:\d+: cannot be"):
        list(corpus.read())
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 no")
    with Corpus(path) as corpus, pytest.raises(DataError, match="not a whole Parquet file"):
        list(corpus.read())
    text = pa.array([b"\xff"], pa.binary()).view(pa.string())  # which pyarrow writes as it is
    pq.write_table(pa.table({"_id": ["1"], "text": text}), path)
    with Corpus(path) as corpus, pytest.raises(DataError, match=r"a\.parquet: cannot .*'utf-8'"):
        list(corpus.read())


def test_a_folder_of_two_kinds_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds nothing to read"):
        Corpus(tmp_path)
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.parquet").touch()
    with pytest.raises(DataError, match="holds both JSON lines and Parquet"):
        Corpus(tmp_path)
    with pytest.raises(DataError, match=r"a \.jsonl, \.jsonl\.gz or \.parquet is wanted"):
        Corpus(Path(__file__))


def test_splits_of_a_corpus_are_not_merged(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_bytes(lines(ROWS[:1]))
    with pytest.raises(DataError, match=r"holds several splits, name one"):
        Corpus(tmp_path)
    assert Corpus(tmp_path / "test").files == [tmp_path / "test.jsonl"]
    with pytest.raises(FileNotFoundError, match="neither a file nor a directory"):
        Corpus(tmp_path / "dev")
