from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from laser_jax.data.documents import Document, EvalQuery
from laser_jax.evaluate.beir import (
    BeirDataset,
    read_beir,
    read_corpus,
    read_qrels,
    read_qrels_file,
    read_queries,
)
from laser_jax.files.reading import DataError

HEADER = "query-id\tcorpus-id\tscore\n"


def write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    write_lines(
        tmp_path / "corpus.jsonl",
        [
            {"_id": "d1", "title": "Title", "text": "body"},
            {"_id": "d2", "title": "", "text": "untitled"},
            {"_id": "d3", "text": "no title field", "metadata": {}},
        ],
    )
    write_lines(
        tmp_path / "queries.jsonl",
        [
            {"_id": "q1", "text": "plain", "answer": "ignored"},
            {
                "_id": "q2",
                "text": "rich",
                "instruction": "find",
                "reasoning": "a\n\nb",
                "excluded_ids": ["d1", "d3"],
            },
            {"_id": "q3", "text": "of another split", "instruction": None},
        ],
    )
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text(HEADER + "q2\td2\t2\nq1\td1\t1\nq1\td2\t0\n")
    (tmp_path / "qrels" / "dev.tsv").write_text(HEADER + "q3\td1\t1\n")
    return tmp_path


def test_a_document_is_its_title_and_text_or_its_text_alone(beir: Path) -> None:
    assert read_corpus(beir) == [
        Document("d1", "Title body"),
        Document("d2", "untitled"),
        Document("d3", "no title field"),
    ]


def test_the_extra_fields_of_a_query_are_optional(beir: Path) -> None:
    assert read_queries(beir) == {
        "q1": EvalQuery("q1", "plain"),
        "q2": EvalQuery("q2", "rich", "find", "a\n\nb", ("d1", "d3")),
        "q3": EvalQuery("q3", "of another split"),
    }


def test_a_split_holds_the_queries_it_judges(beir: Path) -> None:
    dataset = read_beir(beir, "test")
    assert list(dataset.queries) == ["q1", "q2"]
    assert dataset.qrels == {"q2": {"d2": 2}, "q1": {"d1": 1, "d2": 0}}
    assert len(dataset.documents) == 3


def counts_of(dataset: BeirDataset) -> list[tuple[str, int, int, str]]:
    return [(count.what, count.count, count.of, count.first) for count in dataset.id_counts]


def test_ids_that_match_nothing_are_counted(beir: Path) -> None:
    unjudged = ("queries without judgements", 1, 3, "q3")
    assert counts_of(read_beir(beir, "test")) == [unjudged]
    queries = (beir / "queries.jsonl").read_text()
    (beir / "queries.jsonl").write_text(queries.replace('"d3"', '"d3 "'))
    (beir / "qrels" / "test.tsv").write_text(HEADER + "q2\td2\t2\nq1\td1 \t1\nq1\td2\t0\n")
    assert counts_of(read_beir(beir, "test")) == [
        ("judged documents that the corpus lacks", 1, 2, "d1 "),
        ("excluded documents that the corpus lacks", 1, 2, "d3 "),
        unjudged,
    ]


@pytest.mark.parametrize(
    ("grades", "excluded", "message"),
    [
        (
            "q2\td2 \t2\nq1\td1 \t1\n",
            "d1",
            r"judged documents that the corpus lacks: 2 of 2, .*'d2 '",
        ),
        ("q2\td2 \t2\nq1\td1\t0\n", "d1", "relevant documents that the corpus lacks: 1 of 1"),
        ("q2\td2\t2\nq1\td1\t1\n", "D1", "excluded documents that the corpus lacks: 2 of 2"),
    ],
)
def test_a_list_of_which_no_id_matches_is_refused(
    beir: Path, grades: str, excluded: str, message: str
) -> None:
    queries = (beir / "queries.jsonl").read_text().replace('"d3"', '"D3"')
    (beir / "queries.jsonl").write_text(queries.replace('["d1"', f'["{excluded}"'))
    (beir / "qrels" / "test.tsv").write_text(HEADER + grades)
    with pytest.raises(DataError, match=rf"\(test\): {message}.*not one matches"):
        read_beir(beir, "test")


def test_a_document_with_the_id_of_its_query_is_excluded_unless_it_is_to_be_kept() -> None:
    query = EvalQuery("d1", "a query that is a document", excluded_ids=("d2",))
    other = EvalQuery("q", "another")
    documents = [Document("d1", "the same"), Document("d2", "x"), Document("d3", "y")]
    queries, qrels = {"d1": query, "q": other}, {"d1": {"d1": 1, "d3": 1}, "q": {"d1": 1}}
    dataset = BeirDataset(documents, queries, qrels)
    assert dataset.exclusions() == {"d1": ("d2", "d1"), "q": ()}
    assert dataset.exclusions(nothing_excluded=True) == {"d1": ("d1",)}
    dropped, judged = dataset.id_counts
    assert (dropped.count, dropped.of, dropped.first) == (1, 2, "d1")
    assert "dropped" in dropped.what
    assert str(judged) == "of those, judged relevant to it: 1 of 1, the first is 'd1'"
    kept = dataclasses.replace(dataset, ignore_identical_ids=False)
    assert kept.exclusions() == {"d1": ("d2",), "q": ()}
    assert kept.exclusions(nothing_excluded=True) == {}
    assert "kept" in kept.id_counts[0].what


@pytest.mark.parametrize(
    ("name", "documents", "queries"),
    [
        ("2wiki", 9616, 164),
        ("entailmentbank", 11763, 340),
        ("musique", 5021, 200),
        ("scifact", 5183, 300),
        ("strategyqa", 6096, 229),
    ],
)
def test_shared_datasets_have_the_counts_of_their_readme(
    shared_data: Path, name: str, documents: int, queries: int
) -> None:
    dataset = read_beir(shared_data / name, "test")
    assert (len(dataset.documents), len(dataset.queries)) == (documents, queries)
    assert all(query.instruction for query in dataset.queries.values())
    assert all(bool(query.reasoning) == (name != "scifact") for query in dataset.queries.values())


def test_a_missing_split_names_those_present(beir: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"train\.tsv is missing; splits present: dev, test"
    ):
        read_qrels(beir, "train")


def test_a_missing_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"corpus\.jsonl is missing"):
        read_corpus(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q1\td1\t1\n", r"test\.tsv:1: the header is missing"),
        (HEADER + "q1 d1 1\n", r"test\.tsv:2: wanted query-id, corpus-id and score between tabs"),
        (HEADER + "q1\td1\t0.5\n", r"test\.tsv:2: the score must be an integer, got '0\.5'"),
        (HEADER + "q1\td1\t1\nq1\td1\t0\n", r"test\.tsv:3: .* have score 1 above and 0 here"),
        (HEADER, r"test\.tsv: holds no judgement"),
        (HEADER + "q9\td1\t1\n", r"test\.tsv judges 1 queries that queries\.jsonl lacks.*'q9'"),
    ],
)
def test_faulty_qrels_are_refused_with_their_line(beir: Path, content: str, message: str) -> None:
    (beir / "qrels" / "test.tsv").write_text(content)
    with pytest.raises(DataError, match=message):
        read_beir(beir, "test")


def test_the_same_judgement_twice_is_one_judgement(beir: Path) -> None:
    (beir / "qrels" / "test.tsv").write_text(HEADER + "q1\td1\t1\nq1\td1\t1\n\n")
    assert read_qrels(beir, "test") == {"q1": {"d1": 1}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "wanted a JSON object, got list"),
        ('{"text": "t"}', r"no field '_id'; the fields are \['text'\]"),
        ('{"_id": 7, "text": "t"}', "field '_id' must be a string, got 7"),
        ('{"_id": "d1", "text": "t"}', "document id 'd1' stands here a second time"),
        ('{"_id": "d9", "text": "t", "title": 1}', "field 'title' must be a string"),
    ],
)
def test_a_faulty_document_is_refused_with_its_line(beir: Path, line: str, message: str) -> None:
    path = beir / "corpus.jsonl"
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(DataError, match=re.escape(str(path)) + ":5: " + message):
        read_corpus(beir)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"_id": "q1", "text": "t"}, "query id 'q1' stands here a second time"),
        ({"_id": "q9"}, "no field 'text'"),
        ({"_id": "q9", "text": "t", "reasoning": ["a"]}, "field 'reasoning' must be a string"),
        ({"_id": "q9", "text": "t", "excluded_ids": "d1"}, "must be a list of strings, got 'd1'"),
    ],
)
def test_a_faulty_query_is_refused_with_its_line(
    beir: Path, row: dict[str, object], message: str
) -> None:
    path = beir / "queries.jsonl"
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=re.escape(str(path)) + ":4: .*" + message):
        read_queries(beir)


def test_an_empty_corpus_is_refused(beir: Path) -> None:
    (beir / "corpus.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no document"):
        read_corpus(beir)


@pytest.mark.parametrize(
    ("id_", "fault"),
    [("a\tb", "holds a tab"), ("", "is empty"), (" a", "begins or ends with a blank")],
)
def test_a_document_id_that_no_table_holds_is_refused(beir: Path, id_: str, fault: str) -> None:
    write_lines(beir / "corpus.jsonl", [{"_id": id_, "text": "t"}])
    with pytest.raises(DataError, match=re.escape(f"corpus.jsonl:1: document id {id_!r} {fault}")):
        read_corpus(beir)


def test_a_line_that_is_not_utf8_is_named(beir: Path) -> None:
    path = beir / "corpus.jsonl"
    path.write_bytes(path.read_bytes() + b'{"_id": "d4", "text": "\xff"}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl:4: not UTF-8"):
        read_corpus(beir)


def test_judgements_of_trec_eval_are_read_by_their_name(tmp_path: Path) -> None:
    path = tmp_path / "qrels.txt"
    path.write_text("q1 0 with two  blanks.txt 2\nq1\t0\td\t-1\n\n")
    assert read_qrels_file(path) == {"q1": {"with two  blanks.txt": 2, "d": -1}}
    path.write_text("q1 0 d\n")
    with pytest.raises(DataError, match=r"qrels\.txt:1: wanted 'qid iter docid grade'"):
        read_qrels_file(path)


def test_a_byte_order_mark_is_no_part_of_an_id(tmp_path: Path) -> None:
    trec, table = tmp_path / "qrels.txt", tmp_path / "qrels.tsv"
    trec.write_text("q1 0 a 1\nq2 0 b 1\n", encoding="utf-8-sig")
    table.write_text("query-id\tcorpus-id\tscore\nq1\ta\t1\nq2\tb\t1\n", encoding="utf-8-sig")
    assert read_qrels_file(trec) == read_qrels_file(table) == {"q1": {"a": 1}, "q2": {"b": 1}}


@pytest.mark.parametrize("grade", ["1", "1.0", "-1.5", "1e0", "1_0", "٣"])
def test_a_judgement_is_not_taken_for_the_header(tmp_path: Path, grade: str) -> None:
    path = tmp_path / "test.tsv"
    path.write_text(f"q1\td1\t{grade}\nq2\td2\t1\n")
    with pytest.raises(DataError, match=r"test\.tsv:1: the header is missing"):
        read_qrels_file(path)
    path.write_text(f"query-id\tcorpus-id\tgrade (0-3)\nq1\td1\t{grade}\n")
    if grade == "1":
        assert read_qrels_file(path) == {"q1": {"d1": 1}}
    else:
        with pytest.raises(DataError, match=r"test\.tsv:2: the score must be an integer"):
            read_qrels_file(path)


def test_a_line_too_deep_for_python_is_named(beir: Path) -> None:
    path = beir / "corpus.jsonl"
    path.write_bytes(path.read_bytes() + b'{"_id": ' + b"[" * 100_000 + b"\n")
    with pytest.raises(DataError, match=r"corpus\.jsonl:4: not valid JSON"):
        read_corpus(beir)
