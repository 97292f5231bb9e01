"""Documents and queries, and the rows of files that become one. Their ids are such as may stand in
a TREC run."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from laser_jax.files.reading import DataError, text_field


@dataclass(frozen=True)
class Fields:
    """The names of a document's fields, or columns. The title's may be absent."""

    id: str = "_id"
    text: str = "text"
    title: str = "title"


BEIR_FIELDS = Fields()


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


D = TypeVar("D", Document, EvalQuery)


def query_id_fault(query: str) -> str | None:
    """Why an id cannot stand in a TREC run; None when it can."""
    return None if re.fullmatch(r"\S+", query, re.ASCII) else "is empty or holds blanks"


def document_id_fault(document: str) -> str | None:
    """Why an id cannot stand in a TREC run or a table of judgements; None when it can. Blanks
    inside are allowed (BRIGHT has them); tabs separate columns."""
    if not document:
        return "is empty"
    if re.search(r"[\t\r\n]", document):
        return "holds a tab or a line break"
    return None if re.fullmatch(r"\S(.*\S)?", document, re.ASCII) else "begins or ends with a blank"


def _optional_text(row: dict[str, Any], key: str, where: str) -> str | None:
    return None if row.get(key) is None else text_field(row, key, where)


def parse_document(row: dict[str, Any], where: str, fields: Fields = BEIR_FIELDS) -> Document:
    """A row as a document, or a DataError that begins with `where`."""
    id_, text = id_field(row, fields.id, where, "document"), text_field(row, fields.text, where)
    title = _optional_text(row, fields.title, where)
    return Document(id_, f"{title} {text}" if title else text)


def id_field(row: dict[str, Any], key: str, where: str, kind: Literal["document", "query"]) -> str:
    """The id `row[key]`, or a DataError where it is none that may stand in a TREC run."""
    id_ = text_field(row, key, where)
    if fault := (document_id_fault if kind == "document" else query_id_fault)(id_):
        raise DataError(f"{where}: {kind} id {id_!r} {fault}")
    return id_


def parse_query(row: dict[str, Any], where: str) -> EvalQuery:
    """A row as a query, or a DataError that begins with `where`."""
    return EvalQuery(
        id=id_field(row, "_id", where, "query"),
        text=text_field(row, "text", where),
        instruction=_optional_text(row, "instruction", where),
        reasoning=_optional_text(row, "reasoning", where),
        excluded_ids=excluded_ids(row, where),
    )


def unique(rows: Iterable[tuple[str, D]], kind: str) -> dict[str, D]:
    """Documents or queries by their id, in their order, from ("file:line", document or query); a
    DataError where the id of one, a `kind`, stands twice."""
    by_id: dict[str, D] = {}
    for where, row in rows:
        if row.id in by_id:
            raise DataError(f"{where}: {kind} id {row.id!r} stands here a second time")
        by_id[row.id] = row
    return by_id


def id_list(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    """The ids `row[key]`, or a DataError where it is no list of strings."""
    ids = row.get(key)
    if not isinstance(ids, list) or not all(isinstance(id_, str) for id_ in ids):
        raise DataError(f"{where}: field {key!r} must be a list of strings, got {ids!r}")
    return tuple(ids)


def excluded_ids(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """The field `excluded_ids` of a row of queries; () where there is none."""
    return () if row.get("excluded_ids") is None else id_list(row, "excluded_ids", where)
