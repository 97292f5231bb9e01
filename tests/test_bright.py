"""Copies of BRIGHT as the hub has them: what is read, and what a damaged copy says."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from laser_jax.data.documents import Document, EvalQuery
from laser_jax.evaluate.bright import (
    DOMAINS,
    INSTRUCTIONS,
    BrightCopy,
    is_bright,
)
from laser_jax.files.reading import DataError

Rows = list[dict[str, Any]]

DOCUMENTS: Rows = [
    {"id": "light/Moth_0.txt", "content": " Moths keep the moon at one angle. "},
    {"id": "light/Moth 1.txt", "content": "A lamp is too near for that."},
    {"id": "heat/LED_0.txt", "content": "An LED gives little heat."},
]
LONG: Rows = [
    {"id": "light/Moth.txt", "content": "Moths keep the moon at one angle. A lamp is too near."},
    {"id": "heat/LED.txt", "content": "An LED gives little heat."},
]


def example(id_: str, **fields: Any) -> dict[str, Any]:
    return {
        "query": f"Why do moths fly at lamps, {id_}?",
        "reasoning": "written by people who knew the gold documents",
        "id": id_,
        "excluded_ids": ["N/A"],
        "gold_ids_long": ["light/Moth.txt"],
        "gold_ids": ["light/Moth_0.txt", "light/Moth 1.txt"],
        "gold_answer": "They keep a lamp at one angle.",
    } | fields


EXAMPLES: Rows = [
    example("0"),
    example("1", gold_ids=["heat/LED_0.txt"], excluded_ids=["light/Moth_0.txt", "elsewhere"]),
]


def write_json_lines(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_shards(path: Path, rows: Rows) -> None:
    """Two files, as the hub cuts long tables."""
    for number, part in enumerate((rows[:1], rows[1:])):
        write_parquet(path.with_name(f"{path.stem}-{number:05d}-of-00002.parquet"), part)


def write_list(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n " + json.dumps(rows, indent=1))


def write_gzip(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_copy(
    directory: Path,
    write: Callable[[Path, Rows], None] = write_json_lines,
    suffix: str = ".jsonl",
    domains: tuple[str, ...] = ("biology",),
) -> Path:
    rewritten = [row | {"query": f"Moths, {row['id']}, in other words"} for row in EXAMPLES]
    tables = {
        "documents": DOCUMENTS,
        "long_documents": LONG,
        "examples": EXAMPLES,
        "gpt4_reason": rewritten,
    }
    for folder, rows in tables.items():
        for domain in domains:
            write(directory / folder / f"{domain}{suffix}", rows)
    return directory


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return write_copy(tmp_path)


@pytest.mark.parametrize(
    ("write", "suffix"),
    [
        (write_json_lines, ".jsonl"),
        (write_json_lines, ".json"),
        (write_list, ".json"),
        (write_gzip, ".jsonl.gz"),
        (write_parquet, ".parquet"),
        (write_parquet, "-00000-of-00001.parquet"),
        (write_shards, ".parquet"),
    ],
)
def test_every_form_of_file_gives_the_same_dataset(
    tmp_path: Path, write: Callable[[Path, Rows], None], suffix: str
) -> None:
    dataset = BrightCopy(write_copy(tmp_path, write, suffix)).read("biology")
    assert dataset.documents == [
        Document("light/Moth_0.txt", " Moths keep the moon at one angle. "),
        Document("light/Moth 1.txt", "A lamp is too near for that."),
        Document("heat/LED_0.txt", "An LED gives little heat."),
    ]
    instruction = INSTRUCTIONS["biology"]
    assert list(dataset.queries.values()) == [
        EvalQuery("0", "Why do moths fly at lamps, 0?", instruction),
        EvalQuery(
            "1",
            "Why do moths fly at lamps, 1?",
            instruction,
            excluded_ids=("light/Moth_0.txt", "elsewhere"),
        ),
    ]
    assert dataset.qrels == {
        "0": {"light/Moth_0.txt": 1, "light/Moth 1.txt": 1},
        "1": {"heat/LED_0.txt": 1},
    }


def test_long_documents_have_gold_ids_of_their_own(copy: Path) -> None:
    dataset = BrightCopy(copy, long_documents=True).read("biology")
    assert [document.id for document in dataset.documents] == ["light/Moth.txt", "heat/LED.txt"]
    assert dataset.qrels == {"0": {"light/Moth.txt": 1}, "1": {"light/Moth.txt": 1}}


def test_rewrites_stand_in_for_the_queries_and_nothing_else_changes(copy: Path) -> None:
    plain, rewritten = (
        BrightCopy(copy).read("biology"),
        BrightCopy(copy, rewrites="gpt4_reason").read("biology"),
    )
    assert [query.text for query in rewritten.queries.values()] == [
        "Moths, 0, in other words",
        "Moths, 1, in other words",
    ]
    assert (rewritten.qrels, rewritten.documents) == (plain.qrels, plain.documents)
    for id_, query in rewritten.queries.items():
        assert query.excluded_ids == plain.queries[id_].excluded_ids


def test_a_query_without_gold_documents_is_not_judged(copy: Path) -> None:
    write_json_lines(copy / "examples" / "biology.jsonl", [example("0"), example("1", gold_ids=[])])
    dataset = BrightCopy(copy).read("biology")
    assert list(dataset.queries) == list(dataset.qrels) == ["0"]


def test_all_are_the_domains_that_the_copy_holds_in_the_order_of_the_tables(
    tmp_path: Path,
) -> None:
    copy = write_copy(tmp_path, domains=("pony", "aops", "biology", "theoremqa_theorems"))
    (copy / "long_documents" / "aops.jsonl").unlink()
    (copy / "examples" / "notes.txt").write_text("no domain")
    assert BrightCopy(copy).domains("all") == ["biology", "pony", "aops", "theoremqa_theorems"]
    assert BrightCopy(copy).domains("pony, biology") == ["biology", "pony"]
    assert BrightCopy(copy, long_documents=True).domains("all") == [
        "biology",
        "pony",
        "theoremqa_theorems",
    ]
    assert is_bright(copy)
    assert not is_bright(copy / "examples")


def test_there_are_twelve_domains_each_with_an_instruction() -> None:
    assert len(DOMAINS) == 12
    assert all(text.startswith("Given a") and text.endswith(".") for text in INSTRUCTIONS.values())


# --- bad copies --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": "biolgy"}, r"'biolgy' is no domain of BRIGHT: they are biology, earth_science,"),
        ({"names": "biology,pony"}, r"documents holds no file of pony; domains present: biology"),
        ({"names": "all", "rewrites": "gpt5_reason"}, r"gpt5_reason is missing; folders present: "),
    ],
)
def test_what_a_copy_lacks_is_named_beside_what_it_has(
    copy: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((DataError, FileNotFoundError), match=message):
        BrightCopy(copy, rewrites=options.get("rewrites")).domains(options["names"])


def test_a_copy_without_any_domain_in_both_folders_says_so(copy: Path) -> None:
    (copy / "examples" / "biology.jsonl").rename(copy / "examples" / "pony.jsonl")
    with pytest.raises(FileNotFoundError, match="no domain has a file in both documents and exam"):
        BrightCopy(copy).domains("all")


def test_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    copy = write_copy(tmp_path, write_shards, ".parquet")
    (copy / "documents" / "biology-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"biology-00001-of-00002\.parquet is missing"):
        BrightCopy(copy).read("biology")


def test_two_files_of_one_domain_are_an_error(copy: Path) -> None:
    write_parquet(copy / "documents" / "biology.parquet", DOCUMENTS)
    with pytest.raises(DataError, match=r"found biology\.jsonl, biology\.parquet"):
        BrightCopy(copy).read("biology")


def test_a_missing_column_is_named_beside_those_present(tmp_path: Path) -> None:
    copy = write_copy(tmp_path, write_parquet, ".parquet")
    write_parquet(copy / "documents" / "biology.parquet", [{"_id": "a", "content": "text"}])
    with pytest.raises(
        DataError, match=r"biology\.parquet: no column 'id'; the columns are \['_id', 'content'"
    ):
        BrightCopy(copy).read("biology")


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    copy = write_copy(tmp_path, write_parquet, ".parquet")
    file = copy / "examples" / "biology.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"examples/biology\.parquet: cannot be read after row"):
        BrightCopy(copy).read("biology")


BAD_EXAMPLES: list[tuple[dict[str, Any], str]] = [
    (example("2", gold_ids=["gone"]), "gold document 'gone' is not among the 3 of documents of"),
    (
        example("2", excluded_ids=["light/Moth_0.txt"]),
        "document 'light/Moth_0.txt' is both gold and excluded",
    ),
    (example("2 3"), "query id '2 3' is empty or holds blanks"),
    (example("2", query=None), "field 'query' must be a string, got None"),
    (example("2", gold_ids="a"), "field 'gold_ids' must be a list of strings, got 'a'"),
    ({"id": "2", "query": "q", "gold_ids": []}, "field 'excluded_ids' must be a list of strings"),
]


@pytest.mark.parametrize(("row", "message"), BAD_EXAMPLES)
def test_a_bad_query_is_named(copy: Path, row: dict[str, Any], message: str) -> None:
    write_json_lines(copy / "examples" / "biology.jsonl", [example("0"), row])
    with pytest.raises(DataError, match=rf"examples/biology\.jsonl:2: {message}"):
        BrightCopy(copy).read("biology")


def test_an_id_that_stands_twice_is_an_error(copy: Path) -> None:
    write_json_lines(copy / "examples" / "biology.jsonl", [example("0"), example("0")])
    with pytest.raises(DataError, match=r"biology\.jsonl:2: query id '0' stands here a second"):
        BrightCopy(copy).read("biology")
    write_json_lines(copy / "documents" / "biology.jsonl", [*DOCUMENTS, DOCUMENTS[0]])
    with pytest.raises(DataError, match=r":4: document id 'light/Moth_0.txt' stands here a sec"):
        BrightCopy(copy).read("biology")


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        ("", ".jsonl", "holds no row"),
        ('{"id": "a", "content": "x"}\n{torn\n', ".jsonl", r"biology\.jsonl:2: not valid JSON"),
        ("[1]", ".json", r"biology\.json, row 1: wanted a JSON object, got int"),
        ("[{", ".json", r"biology\.json: not valid JSON"),
        ('{"id": "a\\tb", "content": ""}\n', ".jsonl", r"document id 'a\\tb' holds a tab"),
    ],
)
def test_a_bad_file_of_documents_is_named(
    copy: Path, content: str, suffix: str, message: str
) -> None:
    (copy / "documents" / "biology.jsonl").unlink()
    (copy / "documents" / f"biology{suffix}").write_text(content)
    with pytest.raises(DataError, match=message):
        BrightCopy(copy).read("biology")
