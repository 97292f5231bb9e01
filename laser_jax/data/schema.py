"""The training rows of LaSER and how they are read from JSONL and Parquet."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STRINGS = ("query", "reasoning_query", "prompt")
_STRING_LISTS = ("positive_passages", "negative_passages")


class DataError(ValueError):
    """Training data that cannot be used. The message names the file, the line and the field."""


@dataclass(frozen=True)
class TrainingRow:
    """One query with its chain of thought, its instruction and its passages.

    Attributes:
        query: the query text, not blank.
        reasoning_query: the chain of thought; may be empty.
        prompt: the instruction of the retrieval task; may be empty.
        positive_passages: at least one.
        negative_passages: hard negatives, the best first; may be empty.
    """

    query: str
    reasoning_query: str
    prompt: str
    positive_passages: tuple[str, ...]
    negative_passages: tuple[str, ...]


def read_training_rows(path: str | Path) -> list[TrainingRow]:
    """Reads the rows of a `.jsonl`, `.jsonl.gz` or `.parquet` file, in the file's order.

    Blank lines are skipped and further fields are ignored.

    Raises:
        DataError: a missing or empty file, an unknown suffix, malformed JSON, or a row whose
            field is missing, has the wrong type, or is empty where it must not be. The message
            names the file and the line (of Parquet: the row, counted from 1).
        ImportError: a Parquet file, and pyarrow is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; data.train must name a file of training rows")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        records = _json_lines(path)
    elif path.suffix == ".parquet":
        records = _parquet_records(path)
    else:
        raise DataError(f"{path}: unknown suffix; a .jsonl, .jsonl.gz or .parquet file is wanted")
    rows = [_parse(record, where) for where, record in records]
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    yield where, json.loads(line)
                except UnicodeDecodeError as error:
                    raise DataError(f"{where}: not UTF-8: {error}") from error
                except json.JSONDecodeError as error:
                    raise DataError(f"{where}: malformed JSON: {error}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file: {error}") from error


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"{path}: reading Parquet needs pyarrow: pip install laser-jax[parquet]"
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file: {error}") from error
    number = 0
    with file:
        for batch in file.iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", record


def _parse(record: Any, where: str) -> TrainingRow:
    if not isinstance(record, dict):
        raise DataError(f"{where}: an object is wanted, got {type(record).__name__}")
    for name in (*_STRINGS, *_STRING_LISTS):
        if name not in record:
            raise DataError(f"{where}: field '{name}' is missing{_may_be_empty(name)}")
    for name in _STRINGS:
        if not isinstance(record[name], str):
            raise DataError(
                f"{where}: '{name}' must be a string, got {type(record[name]).__name__}"
                + _may_be_empty(name)
            )
    for name in _STRING_LISTS:
        texts = record[name]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            got = type(texts).__name__
            if isinstance(texts, list):
                wrong = next(i for i, text in enumerate(texts) if not isinstance(text, str))
                got = f"a list whose item {wrong} is {type(texts[wrong]).__name__}"
            raise DataError(f"{where}: '{name}' must be a list of strings, got {got}")
    if not record["query"].strip():
        raise DataError(f"{where}: 'query' is empty")
    if not record["positive_passages"]:
        raise DataError(f"{where}: 'positive_passages' is empty; at least one is wanted")
    return TrainingRow(
        query=record["query"],
        reasoning_query=record["reasoning_query"],
        prompt=record["prompt"],
        positive_passages=tuple(record["positive_passages"]),
        negative_passages=tuple(record["negative_passages"]),
    )


def _may_be_empty(name: str) -> str:
    return {
        "reasoning_query": "; a row without a chain of thought has an empty string there",
        "prompt": "; a row without an instruction has an empty string there",
        "negative_passages": "; a row without hard negatives has an empty list there",
    }.get(name, "")
