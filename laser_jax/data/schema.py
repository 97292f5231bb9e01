"""The training rows of LaSER: their fields and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from laser_jax.files.reading import DataError

_STRINGS = ("query", "reasoning_query", "prompt")
_STRING_LISTS = ("positive_passages", "negative_passages")
FIELDS = (*_STRINGS, *_STRING_LISTS)


@dataclass(frozen=True)
class RowTokens:
    """The token ids of a row, each an int32 array, as `laser_jax.prepare` stores them.

    Attributes:
        query: of the query's prompt.
        explicit: of the explicit view's input.
        segment_ends: positions in `explicit` of the last token of every segment.
        positives, negatives: of the passages' prompts, in the row's order.
    """

    query: np.ndarray
    explicit: np.ndarray
    segment_ends: np.ndarray
    positives: tuple[np.ndarray, ...]
    negatives: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class TrainingRow:
    """One query with its chain of thought, its instruction and its passages.

    Attributes:
        query: the query text, not blank.
        reasoning_query: the chain of thought; may be empty.
        prompt: the instruction of the retrieval task; may be empty.
        positive_passages: at least one, none blank.
        negative_passages: hard negatives, the best first, none blank; there may be none.
        tokens: set where they were stored with the row.
    """

    query: str
    reasoning_query: str
    prompt: str
    positive_passages: tuple[str, ...]
    negative_passages: tuple[str, ...]
    tokens: RowTokens | None = field(default=None, compare=False, repr=False)


def parse_row(record: Any, where: str) -> TrainingRow:
    """The training row of a JSON object; further fields are ignored.

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
            raise DataError(f"{where}: field '{name}' is missing{_may_be_empty(name)}")
    for name in _STRINGS:
        if not isinstance(record[name], str):
            raise DataError(
                f"{where}: '{name}' must be a string, got {type(record[name]).__name__}"
                + _may_be_empty(name)
            )
        require_unicode(record[name], f"{where}: '{name}'")
    if not record["query"].strip():
        raise DataError(f"{where}: 'query' is empty")
    for name in _STRING_LISTS:
        _require_passages(record[name], name, where)
    if not record["positive_passages"]:
        raise DataError(f"{where}: 'positive_passages' is empty; at least one is wanted")
    return TrainingRow(
        query=record["query"],
        reasoning_query=record["reasoning_query"],
        prompt=record["prompt"],
        positive_passages=tuple(record["positive_passages"]),
        negative_passages=tuple(record["negative_passages"]),
    )


def _require_passages(passages: Any, name: str, where: str) -> None:
    if not isinstance(passages, list):
        raise DataError(
            f"{where}: '{name}' must be a list of strings, got {type(passages).__name__}"
            + _may_be_empty(name)
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
    """Raises a DataError where the text is no valid Unicode; names `what` it is."""
    # JSON can spell half of a surrogate pair, which no tokenizer takes
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} is not valid Unicode: {error}") from error


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
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{what} {place} is no Unicode text: its character {error.start} is half a "
                f"surrogate pair, {text[error.start]!r}; take it out, or replace it by "
                'text.encode(errors="replace").decode()'
            ) from error
    return listed


def _may_be_empty(name: str) -> str:
    return {
        "reasoning_query": "; a row without a chain of thought has an empty string there",
        "prompt": "; a row without an instruction has an empty string there",
        "negative_passages": "; a row without hard negatives has an empty list there",
    }.get(name, "")
