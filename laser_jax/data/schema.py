"""The training rows of LaSER: their fields, what is refused, and what is known of many."""

from __future__ import annotations

import hashlib
import math
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from laser_jax.files.reading import DataError

_INSTRUCTIONS = 32
_MAY_BE_EMPTY = {
    "reasoning_query": "; a row without a chain of thought has an empty string there",
    "prompt": "; a row without an instruction has an empty string there",
    "negative_passages": "; a row without hard negatives has an empty list there",
}


@dataclass(frozen=True)
class TrainingRow:
    """One query with its chain of thought, its instruction and its passages.

    Attributes:
        query: the query text, not blank.
        reasoning_query: the chain of thought; may be empty.
        prompt: the instruction of the retrieval task; may be empty.
        positive_passages: at least one, none blank.
        negative_passages: hard negatives, the best first, none blank; there may be none.
        teacher_scores: what another retriever or a cross-encoder gives each positive, then each
            negative; None in most rows.
    """

    query: str
    reasoning_query: str
    prompt: str
    positive_passages: tuple[str, ...]
    negative_passages: tuple[str, ...]
    teacher_scores: tuple[float, ...] | None = None


_STRINGS = ("query", "reasoning_query", "prompt")
_STRING_LISTS = ("positive_passages", "negative_passages")
FIELDS = (*_STRINGS, *_STRING_LISTS)
TEACHER_SCORES = "teacher_scores"
"""The field that a row may leave out."""


def parse_row(record: Any, where: str) -> TrainingRow:
    """The training row of a JSON object; fields further than `teacher_scores` are ignored.

    Args:
        record: what the file holds there, in Python types.
        where: the file and line, for the message.

    Raises:
        DataError: a field is missing, has the wrong type, is blank where it must not be, or is no
            valid Unicode.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: an object is wanted, got {type(record).__name__}")
    for name in FIELDS:
        if name not in record:
            raise DataError(f"{where}: field '{name}' is missing{_MAY_BE_EMPTY.get(name, '')}")
    for name in _STRINGS:
        if not isinstance(record[name], str):
            raise DataError(
                f"{where}: '{name}' must be a string, got {type(record[name]).__name__}"
                + _MAY_BE_EMPTY.get(name, "")
            )
        require_unicode(record[name], f"{where}: '{name}'")
    if not record["query"].strip():
        raise DataError(f"{where}: 'query' is empty")
    for name in _STRING_LISTS:
        _require_passages(record[name], name, where)
    if not record["positive_passages"]:
        raise DataError(f"{where}: 'positive_passages' is empty; at least one is wanted")
    values: dict[str, Any] = {name: record[name] for name in _STRINGS}
    values |= {name: tuple(record[name]) for name in _STRING_LISTS}
    if record.get(TEACHER_SCORES) is not None:
        passages = sum(len(record[name]) for name in _STRING_LISTS)
        values[TEACHER_SCORES] = _teacher_scores(record[TEACHER_SCORES], passages, where)
    return TrainingRow(**values)


def _teacher_scores(scores: Any, passages: int, where: str) -> tuple[float, ...]:
    is_list = isinstance(scores, list) and len(scores) == passages
    if not is_list or not all(type(s) in (int, float) and math.isfinite(s) for s in scores):
        raise DataError(
            f"{where}: '{TEACHER_SCORES}' must be {passages} finite numbers, one a positive and "
            f"then one a negative, got {scores!r:.80}; leave it out of a row without scores"
        )
    return tuple(map(float, scores))


def _require_passages(passages: Any, name: str, where: str) -> None:
    if not isinstance(passages, list):
        raise DataError(
            f"{where}: '{name}' must be a list of strings, got {type(passages).__name__}"
            + _MAY_BE_EMPTY.get(name, "")
        )
    for i, text in enumerate(passages):
        if not isinstance(text, str):
            raise DataError(
                f"{where}: '{name}' must be a list of strings, got a list whose item {i} is "
                f"{type(text).__name__}"
            )
        require_unicode(text, f"{where}: item {i} of '{name}'")
        if not text.strip():
            raise DataError(f"{where}: item {i} of '{name}' is empty; leave it out")


def require_unicode(text: str, what: str) -> None:
    """Raises a DataError, which names `what` it is, where the text holds half a surrogate pair:
    JSON can spell one, and no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} is no Unicode text: its character {error.start} is half a surrogate pair, "
            f"{text[error.start]!r}; take it out, or replace it by "
            'text.encode(errors="replace").decode()'
        ) from error


def same_text(text: str) -> str:
    """A form that is equal for queries, or passages, that count as the same: they differ in case,
    in white space or in compatible Unicode forms (NFKC) alone."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@dataclass(frozen=True)
class Facts:
    """What is known of all rows of a source once every row was read.

    Attributes:
        row_without_negatives: index of the first, None when every row has some.
        instructions: the longest of the distinct instructions, up to 32.
        fingerprint: a hash of the texts, and of the teacher's scores, of all rows in their order.
        query_keys: [rows] uint64, equal for rows whose queries are the same (`same_text`).
    """

    row_without_negatives: int | None
    instructions: tuple[str, ...]
    fingerprint: str
    query_keys: np.ndarray = field(compare=False)
    scored_rows: int = 0
    """Those with `teacher_scores`."""


def facts_of(rows: Iterable[TrainingRow]) -> Facts:
    """Reads through all rows. Raises what their iteration raises."""
    without, instructions, digest, keys = None, set[str](), hashlib.sha256(), array("Q")
    scored = 0
    for index, row in enumerate(rows):
        if without is None and not row.negative_passages:
            without = index
        instructions.add(row.prompt)
        if len(instructions) > 100 * _INSTRUCTIONS:
            instructions = set(longest_instructions(instructions))
        digest.update(repr([getattr(row, name) for name in FIELDS]).encode())
        if row.teacher_scores is not None:
            digest.update(repr(row.teacher_scores).encode())
            scored += 1
        key = hashlib.blake2b(same_text(row.query).encode(), digest_size=8).digest()
        keys.append(int.from_bytes(key, "little"))
    longest = longest_instructions(instructions)
    return Facts(without, longest, digest.hexdigest()[:16], np.array(keys, np.uint64), scored)


def longest_instructions(instructions: Iterable[str]) -> tuple[str, ...]:
    """The longest of the distinct instructions in UTF-8, up to 32: bytes come nearer to tokens than
    characters do, of which a Chinese one takes as many as a word."""

    def size(text: str) -> int:
        return len(text.encode("utf-8", "surrogatepass"))

    by_length = sorted(set(instructions), key=lambda text: (-size(text), text))
    return tuple(by_length[:_INSTRUCTIONS])


def as_strings(what: str, values: Any) -> list[str]:
    """The items of a list, tuple, one-dimensional array or Series of strings.

    Raises:
        ValueError: another container, whose items come in no order (a set), are not its content (a
            dict, a DataFrame) or come once only (an iterator); or the place of the first item that
            is no string, or no Unicode. `what` is an item's name.
    """
    ordered = isinstance(values, Sequence) or len(getattr(values, "shape", ())) == 1
    if not ordered or isinstance(values, str | bytes):
        raise ValueError(
            f"a list, tuple or Series with a string for every {what} is wanted, not a "
            f"{type(values).__name__}: pass the strings as a list, in the order of the results"
        )
    listed = list(values)
    for place, text in enumerate(listed):
        if not isinstance(text, str):
            raise ValueError(f"{what} {place} is no string but {text!r:.60}")
        require_unicode(text, f"{what} {place}")
    return listed
