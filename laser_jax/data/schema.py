"""The training rows of LaSER: their fields, what is refused, and what is known of many."""

import hashlib
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from laser_jax.files.reading import DataError, json_object, require_unicode

_INSTRUCTIONS = 32
_MAY_BE_EMPTY = {
    "reasoning_query": "; a row without a chain of thought has an empty string there",
    "prompt": "; a row without an instruction has an empty string there",
    "negative_passages": "; a row without hard negatives has an empty list there",
}


@dataclass(frozen=True)
class TrainingRow:
    """One query with its chain of thought, its instruction and its passages."""

    query: str  # not blank
    reasoning_query: str  # the chain of thought; may be empty
    prompt: str  # the instruction of the retrieval task; may be empty
    positive_passages: tuple[str, ...]  # at least one, none blank
    negative_passages: tuple[str, ...]  # hard, the best first, none blank; there may be none
    teacher_scores: tuple[float, ...] | None = None
    """What another retriever or a cross-encoder gives each positive, then each negative."""


_STRINGS = ("query", "reasoning_query", "prompt")
_STRING_LISTS = ("positive_passages", "negative_passages")
FIELDS = (*_STRINGS, *_STRING_LISTS)
TEACHER_SCORES = "teacher_scores"
"""The field that a row may leave out."""


def parse_row(record: Any, where: str) -> TrainingRow:
    """The training row of a JSON object, which stands at `where` (file and line); fields further
    than `teacher_scores` are ignored. Raises a DataError where a field is missing, has the wrong
    type, is blank where it must not be, or is no valid Unicode."""
    record = json_object(record, where)
    values: dict[str, Any] = {}
    for name in FIELDS:
        way_out, kind = _MAY_BE_EMPTY.get(name, ""), list if name in _STRING_LISTS else str
        if name not in record:
            raise DataError(f"{where}: field '{name}' is missing{way_out}")
        if not isinstance(value := record[name], kind):
            wanted = "a list of strings" if kind is list else "a string"
            got = type(value).__name__
            raise DataError(f"{where}: '{name}' must be {wanted}, got {got}{way_out}")
        if isinstance(value, list):
            _require_passages(value, name, where)
        else:
            require_unicode(value, f"{where}: '{name}'")
        values[name] = tuple(value) if kind is list else value
    if not record["query"].strip():
        raise DataError(f"{where}: 'query' is empty")
    if not record["positive_passages"]:
        raise DataError(f"{where}: 'positive_passages' is empty; at least one is wanted")
    if record.get(TEACHER_SCORES) is not None:
        passages = sum(len(record[name]) for name in _STRING_LISTS)
        values[TEACHER_SCORES] = _teacher_scores(record[TEACHER_SCORES], passages, where)
    return TrainingRow(**values)


def _teacher_scores(scores: Any, passages: int, where: str) -> tuple[float, ...]:
    is_list = isinstance(scores, list) and len(scores) == passages
    # beyond 2^128 float32 has no numbers
    if not is_list or not all(type(s) in (int, float) and abs(s) < 2.0**128 for s in scores):
        raise DataError(
            f"{where}: '{TEACHER_SCORES}' must be {passages} finite numbers of float32, one a "
            f"positive and then one a negative, got {scores!r:.80}; leave it out of a row without"
        )
    return tuple(map(float, scores))


def _require_passages(passages: list[Any], name: str, where: str) -> None:
    for i, text in enumerate(passages):
        if not isinstance(text, str):
            raise DataError(
                f"{where}: '{name}' must be a list of strings, got a list whose item {i} is "
                f"{type(text).__name__}"
            )
        require_unicode(text, f"{where}: item {i} of '{name}'")
        if not text.strip():
            raise DataError(f"{where}: item {i} of '{name}' is empty; leave it out")


def same_text(text: str) -> str:
    """A form that is equal for queries, or passages, that count as the same: they differ in case,
    in white space or in compatible Unicode forms (NFKC) alone."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@dataclass(frozen=True)
class Facts:
    """What is known of all rows of a source once every row was read."""

    row_without_negatives: int | None
    """Index of the first, None when every row has some."""
    instructions: tuple[str, ...]
    """The longest of the distinct ones, up to 32."""
    fingerprint: str
    """A hash of the texts, and of the teacher's scores, of all rows in their order."""
    query_keys: np.ndarray = field(compare=False)
    """[rows] uint64, equal for rows whose queries are the same (`same_text`)."""
    scored_rows: int = 0
    """Those with `teacher_scores`."""


def facts_of(rows: Iterable[TrainingRow]) -> Facts:
    """Reads through all rows. Raises what their iteration raises."""
    without, scored, instructions = None, 0, set[str]()
    digest, keys = hashlib.sha256(), array("Q")
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
    """The items of a list, tuple, one-dimensional array or Series of strings, each a `what`. Raises
    a ValueError at another container, whose items come in no order (a set), are not its content (a
    dict, a DataFrame) or come once only (an iterator), and at an item that is no Unicode string."""
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
