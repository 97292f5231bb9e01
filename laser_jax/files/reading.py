"""Files that others wrote, read by one rule.

Everything is UTF-8. A byte-order mark at the beginning of a line is no part of it (files that were
put together have some within). Numbers are written in ASCII digits. A key that stands twice in a
settings file is refused, since one of its two values would be lost.
"""

import gzip
import json
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import yaml

from laser_jax.files.terminal import extra

_ROWS_PER_READ = 1024
LONGEST_LINE = 64 << 20
"""Bytes. A longer line is no row of data: a small .gz can hold one that unfolds to gigabytes."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|(?i:inf(inity)?|nan))")


class DataError(ValueError):
    """A file of rows, judgements, rankings or settings that cannot be used. The message names the
    file, the line and what is wrong there."""


def decode(content: bytes, where: str | Path) -> str:
    """UTF-8 as text, without the byte-order mark that may stand before it. Raises a DataError,
    which begins with `where`, if it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error}") from error


def is_blank(line: bytes) -> bool:
    """Whether a line holds nothing but white space and perhaps a byte-order mark."""
    return not line.removeprefix(_BYTE_ORDER_MARK).strip()


def open_lines(path: Path) -> BinaryIO:
    """A file of lines, plain or .gz."""
    return cast("BinaryIO", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def raw_lines(
    path: Path, file: BinaryIO, offset: int = 0, number: int = 0
) -> Iterator[tuple[int, bytes]]:
    """Yields (line number, line) of a file that `open_lines` opened, line ends and byte-order mark
    kept, behind `offset` bytes (of a .gz, unpacked) and the `number` of lines in them. Raises a
    DataError at a line longer than `LONGEST_LINE`, or a damaged compressed file."""
    try:
        file.seek(offset)
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                fault = f"longer than {LONGEST_LINE:,} bytes, which no row is"
                raise DataError(f"{path}:{number}: {fault}; one line for each row is wanted")
            yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        fault = f"cannot be read, not a whole gzip file: {error}"
        raise DataError(f"{path}:{number + 1}: {fault}") from error


def _located(path: str | Path) -> Iterator[tuple[str, bytes]]:
    path = Path(path)
    with open_lines(path) as file:
        for number, line in raw_lines(path, file):
            yield f"{path}:{number}", line


def text_lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """Yields ("file:line", line) of a UTF-8 file, plain or .gz, line ends kept. Raises a
    FileNotFoundError, and a DataError as `raw_lines` and where a line is not UTF-8."""
    return ((where, decode(line, where)) for where, line in _located(path))


def json_lines(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """Yields ("file:line", line) of the lines of a file, plain or .gz, that are not blank."""
    return ((where, line) for where, line in _located(path) if not is_blank(line))


def parse_json(content: bytes, where: str | Path, *, unique: bool = False) -> Any:
    """The value of a line, or of a record, of JSON. Of a key that stands twice the last counts.
    Raises a DataError where it is not UTF-8 or no JSON, has a number too long or lists too deep for
    Python, or has a key twice in an object though keys are to be `unique`."""
    text = decode(content, where)
    try:
        return json.loads(text, object_pairs_hook=_unique if unique else None)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from error


def read_json(path: Path) -> Any:
    """The value that a JSON file of settings holds. Raises as `parse_json` with unique keys."""
    return parse_json(path.read_bytes(), path, unique=True)


def json_object(value: Any, where: str | Path) -> dict[str, Any]:
    """The JSON object of a line, or of its value; a DataError where it holds something else."""
    value = parse_json(value, where) if isinstance(value, bytes) else value
    if not isinstance(value, dict):
        raise DataError(f"{where}: wanted a JSON object, got {type(value).__name__}")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file of settings holds. Raises as `read_json` and `json_object`."""
    return json_object(read_json(path), path)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object; take one of them out")
    return values


class _Loader(yaml.SafeLoader):
    """YAML whose keys stand once, and whose numbers are those of JSON: no 1_000, no octal 010, no
    1:30, but 1e-3."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    fault = f"the key {key.value!r} stands twice; take one of them out"
                    raise yaml.constructor.ConstructorError(None, None, fault, key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?[0-9]+",
    "tag:yaml.org,2002:float": r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}
_Loader.yaml_implicit_resolvers = {
    first: [entry for entry in entries if entry[0] not in _NUMBERS]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises a yaml.YAMLError where it is none, a key stands twice in a
    mapping, or it is too deep for Python."""
    try:
        return yaml.load(text.removeprefix("\ufeff"), _Loader)
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error


def read_yaml(path: Path) -> Any:
    """The value that a YAML file holds. Raises a DataError that names the file and the line."""
    try:
        return parse_yaml(decode(path.read_bytes(), path))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not a YAML file: {error}") from error


def import_pyarrow(path: str | Path) -> Any:
    """The module, for Parquet or Arrow at `path`. Raises an ImportError that names the extra."""
    with extra("parquet", f"{path}: reading and writing Parquet and Arrow"):
        import pyarrow
        import pyarrow.parquet
    return pyarrow


def parquet_rows(
    path: Path, columns: Collection[str], needed: Sequence[str], start: int = 0, hint: str = ""
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number from 1, row) behind row `start`, with those of `columns` that the file has, in
    memory that does not grow with it. Raises a DataError where one of the columns `needed` is
    missing (then with the `hint`) or the file is damaged, and as `import_pyarrow`."""
    pyarrow, number = import_pyarrow(path), start
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if missing := [name for name in needed if name not in names]:
                there = f"the columns are {sorted(names)}{hint}"
                raise DataError(f"{path}: no column {missing[0]!r}; {there}")
            first, left, group = 0, start, file.metadata.row_group
            while first < file.num_row_groups and left >= group(first).num_rows:
                left -= group(first).num_rows
                first += 1
            groups = range(first, file.num_row_groups)
            given = [name for name in names if name in columns]
            for batch in file.iter_batches(_ROWS_PER_READ, groups, given):
                for row in batch.slice(min(left, batch.num_rows)).to_pylist():
                    number += 1
                    yield number, row
                left = max(left - batch.num_rows, 0)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        fault = f"cannot be read after row {number}, not a whole Parquet file"
        raise DataError(f"{path}: {fault}: {error}") from error


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


def text_field(row: dict[str, Any], key: str, where: str) -> str:
    """The string `row[key]`, or a DataError where it is missing, no string or not Unicode (a lone
    surrogate)."""
    if key not in row:
        raise DataError(f"{where}: no field {key!r}; the fields are {sorted(row)}")
    if not isinstance(row[key], str):
        raise DataError(f"{where}: field {key!r} must be a string, got {row[key]!r}")
    require_unicode(row[key], f"{where}: field {key!r}")
    return row[key]


def parse_integer(text: str) -> int | None:
    """An integer in ASCII digits; None for anything else, `1_0` and `1.0` included."""
    return int(text) if _INTEGER.fullmatch(text) else None


def parse_number(text: str) -> float | None:
    """A number in ASCII digits, or inf or nan; None for anything else, `1_0` included."""
    return float(text) if _NUMBER.fullmatch(text) else None
