"""BEIR directories and TREC runs.

A BEIR directory holds `corpus.jsonl` (`_id`, `title`, `text`), `queries.jsonl` (`_id`, `text`) and
`qrels/<split>.tsv` (a header, then query id, document id, grade). Queries may carry three fields
more: `instruction`, `reasoning` (a chain of thought) and BRIGHT's `excluded_ids`.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from laser_jax.evaluation.metrics import Qrels, Run, rank_documents

# Parsed from both ends, as BRIGHT's document ids hold blanks; ASCII, as ids may hold other spaces.
_TREC_LINE = re.compile(r"\s*(\S+)\s+\S+\s+(\S.*?)\s+([0-9]+)\s+(\S+)\s+\S+\s*", re.ASCII)


class DatasetError(ValueError):
    """A file of a dataset or run that cannot be used. The message names file and line."""


@dataclass(frozen=True)
class Document:
    """A document: its title, a blank and its text, or the text alone where there is no title."""

    id: str
    text: str


@dataclass(frozen=True)
class EvalQuery:
    """A query with the fields that only some datasets have."""

    id: str
    text: str
    instruction: str | None = None
    reasoning: str | None = None
    excluded_ids: tuple[str, ...] = ()
    """Documents to be removed from the ranking before it is cut (BRIGHT)."""


@dataclass(frozen=True)
class BeirDataset:
    """One split: the whole corpus, and the queries that are judged in the split."""

    documents: list[Document]
    queries: dict[str, EvalQuery]
    qrels: Qrels


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("file:line", object) for every line that is not blank."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: a BEIR directory holds corpus.jsonl, queries.jsonl and "
            "qrels/<split>.tsv"
        )
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DatasetError(f"{where}: not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise DatasetError(f"{where}: wanted a JSON object, got {type(row).__name__}")
            yield where, row


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if key not in row:
        raise DatasetError(f"{where}: no field {key!r}; the fields are {sorted(row)}")
    if not isinstance(row[key], str):
        raise DatasetError(f"{where}: field {key!r} must be a string, got {row[key]!r}")
    return row[key]


def _optional_text(row: dict[str, Any], key: str, where: str) -> str | None:
    return None if row.get(key) is None else _text(row, key, where)


def _excluded_ids(row: dict[str, Any], where: str) -> tuple[str, ...]:
    ids = row.get("excluded_ids")
    if ids is None:
        return ()
    if not isinstance(ids, list) or not all(isinstance(i, str) for i in ids):
        raise DatasetError(f"{where}: field 'excluded_ids' must be a list of strings, got {ids!r}")
    return tuple(ids)


def read_corpus(directory: str | Path) -> list[Document]:
    """Reads `corpus.jsonl`, in its order. Fields other than _id, title and text are ignored.

    Raises:
        FileNotFoundError: when the file is missing.
        DatasetError: on a line that is no document, an id that stands twice, or an empty file.
    """
    path = Path(directory) / "corpus.jsonl"
    documents: dict[str, Document] = {}
    for where, row in _json_lines(path):
        id_, text = _text(row, "_id", where), _text(row, "text", where)
        title = _optional_text(row, "title", where)
        if id_ in documents:
            raise DatasetError(f"{where}: document id {id_!r} stands here for the second time")
        documents[id_] = Document(id_, f"{title} {text}" if title else text)
    if not documents:
        raise DatasetError(f"{path}: holds no document")
    return list(documents.values())


def read_queries(directory: str | Path) -> dict[str, EvalQuery]:
    """Reads `queries.jsonl`, in its order: query id -> query. Unknown fields are ignored.

    Raises:
        FileNotFoundError: when the file is missing.
        DatasetError: on a line that is no query, or an id that stands twice.
    """
    queries: dict[str, EvalQuery] = {}
    for where, row in _json_lines(Path(directory) / "queries.jsonl"):
        id_ = _text(row, "_id", where)
        if id_ in queries:
            raise DatasetError(f"{where}: query id {id_!r} stands here for the second time")
        queries[id_] = EvalQuery(
            id=id_,
            text=_text(row, "text", where),
            instruction=_optional_text(row, "instruction", where),
            reasoning=_optional_text(row, "reasoning", where),
            excluded_ids=_excluded_ids(row, where),
        )
    return queries


def _is_integer(text: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]+", text) is not None


def read_qrels_file(path: str | Path) -> Qrels:
    """Reads a BEIR qrels file: a header, then query id, document id and grade between tabs.

    Raises:
        FileNotFoundError: when the file is missing.
        DatasetError: on a missing header, a line without three fields, a grade that is no integer,
            or two grades for one pair (the same line twice is accepted).
    """
    qrels: Qrels = {}
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            fields = line.rstrip("\n").split("\t")
            if number > 1 and not line.strip():
                continue
            if len(fields) != 3:
                raise DatasetError(
                    f"{where}: wanted query-id, corpus-id and score between tabs, got {line!r}"
                )
            query, document, grade = fields
            if number == 1:
                if _is_integer(grade):
                    raise DatasetError(
                        f"{where}: the header is missing; put 'query-id\\tcorpus-id\\tscore' above"
                    )
                continue
            if not _is_integer(grade):
                raise DatasetError(f"{where}: the score must be an integer, got {grade!r}")
            grades = qrels.setdefault(query, {})
            if grades.setdefault(document, int(grade)) != int(grade):
                raise DatasetError(
                    f"{where}: query {query!r} and document {document!r} have score "
                    f"{grades[document]} above and {grade} here"
                )
    if not qrels:
        raise DatasetError(f"{path}: holds no judgement")
    return qrels


def read_qrels(directory: str | Path, split: str) -> Qrels:
    """Reads `qrels/<split>.tsv` of a BEIR directory (see `read_qrels_file`).

    Raises:
        FileNotFoundError: when the split is missing; names the splits that are there.
        DatasetError: when the file cannot be used.
    """
    folder = Path(directory) / "qrels"
    path = folder / f"{split}.tsv"
    if not path.is_file():
        present = sorted(p.stem for p in folder.glob("*.tsv"))
        raise FileNotFoundError(
            f"{path} is missing; splits present: {', '.join(present) or 'none'}"
        )
    return read_qrels_file(path)


def read_beir(directory: str | Path, split: str) -> BeirDataset:
    """Reads one split of a BEIR directory; of the queries, those that have qrels in it.

    A judged document that the corpus lacks (ArguAna has some) stays in the qrels, as it does for
    trec_eval, and counts as never retrieved.

    Raises:
        FileNotFoundError: when a file is missing.
        DatasetError: when a file cannot be used, or a judged query is not in queries.jsonl.
    """
    qrels = read_qrels(directory, split)
    queries = read_queries(directory)
    unknown = [id_ for id_ in qrels if id_ not in queries]
    if unknown:
        raise DatasetError(
            f"{Path(directory) / 'qrels' / split}.tsv judges {len(unknown)} queries that "
            f"queries.jsonl lacks, the first is {unknown[0]!r}"
        )
    return BeirDataset(
        documents=read_corpus(directory),
        queries={id_: query for id_, query in queries.items() if id_ in qrels},
        qrels=qrels,
    )


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def read_trec_run(path: str | Path) -> Run:
    """Reads a TREC run, plain or .gz: `qid Q0 docid rank score tag`, where docid may hold blanks.

    The rank is not used: trec_eval orders by the score.

    Raises:
        FileNotFoundError: when the file is missing.
        DatasetError: on a line of another form, or a document that a query ranks twice.
    """
    run: Run = {}
    with _open_text(Path(path)) as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            match = _TREC_LINE.fullmatch(line)
            if match is None:
                raise DatasetError(f"{where}: wanted 'qid Q0 docid rank score tag', got {line!r}")
            query, document, _, score = match.groups()
            try:
                value = float(score)
            except ValueError as error:
                raise DatasetError(f"{where}: the score must be a number, got {score!r}") from error
            scores = run.setdefault(query, {})
            if document in scores:
                raise DatasetError(f"{where}: query {query!r} ranks {document!r} a second time")
            scores[document] = value
    return run


def write_trec_run(run: Run, path: str | Path, tag: str) -> None:
    """Writes a TREC run in trec_eval's order, ranks from 1, scores with all their digits.

    A query without documents leaves no line, so it is not in the run that is read back.

    Raises:
        ValueError: on a query id or tag with a blank, a document id that would not be read back
            (empty, a line break in it, or a blank at an end) or a NaN score; nothing is written.
    """
    for name in (*run, tag):
        if re.fullmatch(r"\S+", name, re.ASCII) is None:
            raise ValueError(f"{name!r} cannot stand in a TREC run: it is empty or holds blanks")
    for query, scores in run.items():
        for document in scores:
            if re.fullmatch(r"\S([^\r\n]*\S)?", document, re.ASCII) is None:
                raise ValueError(
                    f"document id {document!r} of query {query!r} cannot stand in a TREC run: it "
                    "is empty, holds a line break, or begins or ends with a blank"
                )
    rankings = {query: rank_documents(scores) for query, scores in run.items()}
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        for query, ranking in rankings.items():
            for rank, document in enumerate(ranking, start=1):
                # repr of a float is the shortest text that reads back as the same double
                score = repr(float(run[query][document]))
                file.write(f"{query} Q0 {document} {rank} {score} {tag}\n")
