"""Random access to training rows, whatever file holds them.

Rows are read when they are asked for: a source keeps an index, not the texts. Only `.jsonl.gz` is
held in memory, as gzip has no random access. A source can be pickled; its copy opens the files
anew.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
import mmap
import threading
from abc import ABC, abstractmethod
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from laser_jax.config import DataConfig
from laser_jax.data.schema import FIELDS, DataError, RowTokens, TrainingRow, parse_row
from laser_jax.files.reading import (
    import_pyarrow,
    is_blank,
    open_lines,
    parse_json,
    raw_lines,
    read_json,
)
from laser_jax.files.splits import one_split, split_of

PREPARED_FILE = "prepare.json"
"""In a directory written by `laser_jax.prepare`: how it was made and what is known of its rows."""

_DECODED_BYTES = 2 << 30
"""Row groups of Parquet that stay decoded."""
_INSTRUCTIONS = 32
_FETCH_AGAIN = "fetch it again from where it came"
_ACCEPTED = (
    "a .jsonl, .jsonl.gz, .parquet, .arrow or .array_record file, or a directory of Parquet, Arrow "
    "(save_to_disk) or ArrayRecord shards or of laser_jax.prepare is wanted"
)


@dataclass(frozen=True)
class Facts:
    """What is known of all rows once every row was read.

    Attributes:
        row_without_negatives: index of the first, None when every row has some.
        instructions: the longest of the distinct instructions, up to 32.
    """

    row_without_negatives: int | None
    instructions: tuple[str, ...]


class Source(ABC):
    """Training rows by index, in the order of the file.

    `source[i]` and iteration raise a `DataError` at a row that is no training row.

    Attributes:
        path: as given to `open_source`.
        files: in the order in which they are read; none where the rows are in memory.
        tokenization: how the rows' tokens were made; None for rows without tokens.
    """

    path: Path
    files: Sequence[Path] = ()
    tokenization: dict[str, Any] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def where(self, index: int) -> str:
        """The file and line (or row, counted from 1) of row `index`."""

    @abstractmethod
    def __getitem__(self, index: int) -> TrainingRow: ...

    def __iter__(self) -> Iterator[TrainingRow]:
        return (self[index] for index in range(len(self)))

    @property
    def facts(self) -> Facts:
        """Read once through all rows. Raises a `DataError` at the first that is no training row."""
        return self._read[0]

    @property
    def fingerprint(self) -> str:
        """Of the texts of all rows in their order, read as `facts` is; tokens do not count."""
        return self._read[1]

    @functools.cached_property
    def _read(self) -> tuple[Facts, str]:
        finder, digest = FactFinder(), hashlib.sha256()
        for row in self:
            finder.add(row)
            digest.update(repr([getattr(row, name) for name in FIELDS]).encode())
        return finder.facts(), digest.hexdigest()[:16]

    def __reduce__(self) -> Any:
        return type(self), (self.path,)


class FactFinder:
    """Gathers the facts of rows that are added one after another."""

    def __init__(self) -> None:
        self._rows = 0
        self._row_without_negatives: int | None = None
        self._instructions: set[str] = set()

    def add(self, row: TrainingRow) -> None:
        if self._row_without_negatives is None and not row.negative_passages:
            self._row_without_negatives = self._rows
        self._rows += 1
        self._instructions.add(row.prompt)
        if len(self._instructions) > 100 * _INSTRUCTIONS:
            self._instructions = set(longest_instructions(self._instructions))

    def facts(self) -> Facts:
        return Facts(self._row_without_negatives, longest_instructions(self._instructions))


def longest_instructions(instructions: Iterable[str]) -> tuple[str, ...]:
    """The longest of the distinct instructions in UTF-8, up to 32: bytes come nearer to tokens than
    characters do, of which a Chinese one takes as many as a word."""

    def size(text: str) -> int:
        return len(text.encode("utf-8", "surrogatepass"))

    by_length = sorted(set(instructions), key=lambda text: (-size(text), text))
    return tuple(by_length[:_INSTRUCTIONS])


# --- opening ---------------------------------------------------------------------------------


def open_source(path: str | Path) -> Source:
    """Opens training rows and checks every one; rows that `prepare` wrote were checked by it.

    Args:
        path: a `.jsonl`, `.jsonl.gz`, `.parquet`, `.arrow` or ArrayRecord file; a directory of
            Parquet, Arrow or ArrayRecord shards, read in the order of their names; a directory of
            Hugging Face `save_to_disk`; or one of `laser_jax.prepare` or tfds. Of a directory with
            several splits, `directory/SPLIT`.

    Raises:
        DataError: nothing there, no rows, an unknown kind, or a damaged or wrong row. The message
            names the file and the line (or row, counted from 1).
        ImportError: pyarrow is wanted and not installed.
    """
    source = open_unchecked(path)
    source.facts  # noqa: B018  reads all rows
    return source


def open_sources(data: DataConfig) -> list[Source]:
    """The sources of `data.train` or `data.mixture`. Raises as `open_source`."""
    if not data.train and not data.mixture:
        raise DataError("data.train is empty; it must name training rows (or use data.mixture)")
    return [open_source(source.path) for source in data.sources]


def open_unchecked(path: str | Path) -> Source:
    """As `open_source`, but a wrong row is found only when it is read."""
    path = Path(path)
    if path.is_dir() or (not path.exists() and _kinds_in(path.parent)):
        source = _open_directory(path)
    elif not path.is_file():
        raise DataError(f"{path}: no such file or directory; {_ACCEPTED}")
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        source = JsonlSource(path)
    elif path.suffix == ".parquet":
        source = ParquetSource(path)
    elif path.suffix == ".arrow":
        source = ArrowSource(path)
    elif ".array_record" in path.name:
        source = ArrayRecordSource(path)
    else:
        raise DataError(f"{path}: unknown suffix; {_ACCEPTED}")
    if not len(source):
        raise DataError(f"{path}: holds no rows")
    return source


def is_there(path: str | Path) -> bool:
    """Whether `path` is a file, a directory, or a split of a directory."""
    path = Path(path)
    return path.exists() or any(split_of(p.name) == path.name for p in path.parent.glob("*"))


def _open_directory(path: Path) -> Source:
    """Of a directory, or of `directory/SPLIT`."""
    directory = path if path.is_dir() else path.parent
    if any((directory / name).is_file() for name in ("features.json", PREPARED_FILE)):
        return PreparedSource(path)
    if (path / "dataset_dict.json").is_file():
        splits = _member(path / "dataset_dict.json", "splits", "save the dataset again")
        raise DataError(
            f"{path} holds several splits, name one: "
            + " or ".join(str(path / split) for split in splits)
        )
    if (path / "state.json").is_file():
        return ArrowSource(path)
    kinds = _kinds_in(directory)
    if len(kinds) == 1:
        return kinds[0](path)
    if kinds:
        raise DataError(
            f"{path} holds {' and '.join(kind.pattern for kind in kinds)}: name one file, or move "
            "the others away"
        )
    nested = next(iter(sorted(path.rglob("features.json"))), None)
    meant = f". Was {nested.parent} meant?" if nested else ""
    raise DataError(f"{path}: holds no rows of a known kind; {_ACCEPTED}{meant}")


def _kinds_in(directory: Path) -> list[type[_Sharded]]:
    kinds: tuple[type[_Sharded], ...] = (ArrowSource, ParquetSource, ArrayRecordSource)
    return [kind for kind in kinds if _candidates(directory, kind.pattern)]


def _candidates(directory: Path, pattern: str) -> list[Path]:
    # datasets leaves what map and filter made, as cache-*.arrow, beside the rows
    return [p for p in sorted(directory.glob(pattern)) if not p.name.startswith(("cache-", "."))]


def rows_per_epoch(sources: Sequence[Source]) -> int:
    """Rows of one epoch of a mixture: as many as its sources hold together."""
    return sum(map(len, sources))


def locate(sources: Sequence[Source], index: int) -> tuple[int, int]:
    """Source and row of an index into the concatenation of the sources (`Batch.rows_B`)."""
    ends = list(itertools.accumulate(map(len, sources)))
    if not 0 <= index < ends[-1]:
        raise IndexError(f"row {index} of {ends[-1]}")
    source = bisect.bisect_right(ends, index)
    return source, index - (ends[source] - len(sources[source]))


def describe_row(sources: Sequence[Source], index: int) -> str:
    """File and line of an index into the concatenation of the sources (`Batch.rows_B`)."""
    source, row = locate(sources, index)
    return sources[source].where(row)


# --- kinds of sources ------------------------------------------------------------------------


class RowsSource(Source):
    """Training rows that are in memory."""

    def __init__(self, rows: Sequence[TrainingRow], path: str | Path = "rows"):
        self.path = Path(path)
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        return f"{self.path}: row {index + 1}"

    def __getitem__(self, index: int) -> TrainingRow:
        return self._rows[index]

    def __reduce__(self) -> Any:
        return RowsSource, (self._rows, self.path)


class JsonlSource(Source):
    """One JSON object a line; blank lines are skipped."""

    def __init__(self, path: Path):
        self.path, self.files = path, (path,)
        starts, numbers, start, held = array("q"), array("q"), 0, bytearray()
        with open_lines(path) as file:
            for number, line in raw_lines(path, file):
                if not is_blank(line):
                    starts.append(start)
                    numbers.append(number)
                start += len(line)
                if path.suffix == ".gz":
                    held += line
        self._bytes = held if path.suffix == ".gz" else _map(path)
        self._starts, self._numbers = np.array(starts), np.array(numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def where(self, index: int) -> str:
        return f"{self.path}:{self._numbers[index]}"

    def __getitem__(self, index: int) -> TrainingRow:
        start = int(self._starts[index])
        end = self._bytes.find(b"\n", start)
        line = bytes(self._bytes[start : len(self._bytes) if end < 0 else end])
        return parse_row(parse_json(line, self.where(index)), self.where(index))


def _map(path: Path) -> bytes | mmap.mmap:
    if not path.stat().st_size:
        return b""  # an empty file cannot be mapped
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class _Sharded(Source):
    """Rows in parts (files, row groups, record batches), found by bisection. The files are a single
    one, or those in a directory that the pattern fits and that are of one split."""

    pattern: str

    def __init__(self, path: Path, files: Sequence[Path] | None = None):
        self.path = path
        if files is None and not path.is_file():
            found = _candidates(path if path.is_dir() else path.parent, self.pattern)
            if not found:
                raise DataError(f"{path}: holds no rows in {self.pattern}; {_ACCEPTED}")
            files = one_split(path, found)
        self.files = (path,) if files is None else files
        self._ends: list[int] = []
        """Number of rows up to and including each part."""
        self._file_starts: list[int] = []
        """Number of rows before each file."""

    def _begin_file(self) -> None:
        self._file_starts.append(len(self))

    def _add_part(self, rows: int) -> None:
        self._ends.append(len(self) + rows)

    def _part(self, index: int) -> tuple[int, int]:
        """The part that holds row `index`, and the row's place in it."""
        part = bisect.bisect_right(self._ends, index)
        return part, index - (self._ends[part - 1] if part else 0)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def where(self, index: int) -> str:
        file = bisect.bisect_right(self._file_starts, index) - 1
        return f"{self.files[file]}: row {index - self._file_starts[file] + 1}"


class ParquetSource(_Sharded):
    """A Parquet file or the `*.parquet` of a directory. Row groups are decoded when first read and
    stay so up to 2 GiB: larger data is slow in shuffled order, and wants `laser_jax.prepare`."""

    pattern = "*.parquet"

    def __init__(self, path: Path):
        super().__init__(path)
        pyarrow = import_pyarrow(path)
        self._groups: list[tuple[Path, int]] = []
        for file in self.files:
            try:
                with pyarrow.parquet.ParquetFile(file) as opened:
                    metadata = opened.metadata
            except (pyarrow.ArrowInvalid, OSError) as error:
                raise DataError(
                    f"{file}: not a Parquet file, or a damaged one: {error}; {_FETCH_AGAIN}"
                ) from error
            self._begin_file()
            for group in range(metadata.num_row_groups):
                self._groups.append((file, group))
                self._add_part(metadata.row_group(group).num_rows)
        self._lock = threading.Lock()
        self._decoded: OrderedDict[int, Any] = OrderedDict()
        self._decoded_bytes = 0

    def __getitem__(self, index: int) -> TrainingRow:
        group, row = self._part(index)
        with self._lock:
            table = self._table(group)
        return _table_row(table, row, self.where(index))

    def _table(self, group: int) -> Any:
        if group in self._decoded:
            self._decoded.move_to_end(group)
            return self._decoded[group]
        pyarrow = import_pyarrow(self.path)
        file, number = self._groups[group]
        try:
            with pyarrow.parquet.ParquetFile(file) as opened:
                table = opened.read_row_group(number, columns=list(FIELDS))
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise DataError(
                f"{file}: row group {number} is damaged: {error}; {_FETCH_AGAIN}"
            ) from error
        self._decoded[group] = table
        self._decoded_bytes += table.nbytes
        while self._decoded_bytes > _DECODED_BYTES and len(self._decoded) > 1:
            self._decoded_bytes -= self._decoded.popitem(last=False)[1].nbytes
        return table


class ArrowSource(_Sharded):
    """Arrow files, memory-mapped: those of Hugging Face `save_to_disk`, a directory's `*.arrow`, or
    a single one."""

    pattern = "*.arrow"

    def __init__(self, path: Path):
        state = path / "state.json"
        files = None
        if state.is_file():
            listed = _member(state, "_data_files", "save the dataset again")
            files = [path / entry["filename"] for entry in listed]
        super().__init__(path, files)
        pyarrow = import_pyarrow(path)
        self._batches: list[Any] = []
        for file in self.files:
            self._begin_file()
            try:
                for batch in _record_batches(pyarrow, file):
                    self._batches.append(batch)
                    self._add_part(batch.num_rows)
            except FileNotFoundError as error:
                raise DataError(f"{file} is missing, and {state} names it") from error
            except (pyarrow.ArrowInvalid, OSError) as error:
                raise DataError(
                    f"{file}: not an Arrow file, or a damaged one: {error}; {_FETCH_AGAIN}"
                ) from error

    def __getitem__(self, index: int) -> TrainingRow:
        part, row = self._part(index)
        return _table_row(self._batches[part], row, self.where(index))


def _table_row(table: Any, row: int, where: str) -> TrainingRow:
    """A row of a pyarrow table or record batch."""
    try:
        values = table.slice(row, 1).to_pylist()[0]
    except (ValueError, IndexError, OverflowError) as error:  # no UTF-8, or wrong lengths
        raise DataError(f"{where}: its values are damaged: {error}; {_FETCH_AGAIN}") from error
    return parse_row(values, where)


def _record_batches(pyarrow: Any, file: Path) -> list[Any]:
    mapped = pyarrow.memory_map(str(file))
    if mapped.read(6) == b"ARROW1":  # the file format; save_to_disk writes streams
        reader = pyarrow.ipc.open_file(mapped)
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]
    mapped.seek(0)
    return list(pyarrow.ipc.open_stream(mapped))


class ArrayRecordSource(_Sharded):
    """ArrayRecord files: each record is a JSON object, or a tf.Example with the features of
    `laser_jax.data.reasoning_retrieval`.

    tfds is not asked, even of a directory that it wrote: it imports whatever class the directory's
    features.json names.
    """

    pattern = "*.array_record*"

    def __init__(self, path: Path):
        super().__init__(path)
        self._records = _array_records(self.files)
        for file in self.files:
            self._begin_file()
            self._add_part(len(_array_records([file])))

    def __getitem__(self, index: int) -> TrainingRow:
        return self._row(index)[0]

    def _row(self, index: int) -> tuple[TrainingRow, Any]:
        """The row, and the features of its tf.Example by name, {} of a JSON object."""
        where, record = _Sharded.where(self, index), self._record(index)
        if record[:1] == b"{":
            return parse_row(parse_json(record, where), where), {}
        features = _features(record, where)
        return parse_row(_fields(features, where), where), features

    def _record(self, index: int) -> bytes:
        try:
            return self._records[index]
        except (RuntimeError, ValueError) as error:
            raise DataError(
                f"{_Sharded.where(self, index)}: the file is damaged: {error}; {_FETCH_AGAIN}"
            ) from error


def _features(record: bytes, where: str) -> Any:
    """The features of a tf.Example by name."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    messages: Any = tf_example_pb2
    try:
        return messages.Example.FromString(record).features.feature
    except DecodeError as error:
        raise DataError(
            f"{where}: neither a JSON object nor a tf.Example of training rows: {error}"
        ) from error


def _array_records(files: Sequence[Path]) -> Any:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    try:
        return ArrayRecordDataSource([str(file) for file in files])
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"{', '.join(map(str, files))}: not an ArrayRecord file, or a damaged one: {error}; "
            f"{_FETCH_AGAIN}"
        ) from error


class PreparedSource(ArrayRecordSource):
    """A tfds directory with ArrayRecord files, such as `laser_jax.prepare` writes."""

    def __init__(self, path: Path):
        directory = path if path.is_dir() else path.parent
        if not (directory / "dataset_info.json").is_file():
            raise DataError(
                f"{directory} has no dataset_info.json: its preparation was not finished; run the "
                "same laser_jax.prepare again"
            )
        super().__init__(path)
        known = directory / PREPARED_FILE
        again = "delete it, or prepare the rows again into another directory"
        self._known = _read_object(known, again) if known.is_file() else {}
        self.tokenization = self._known.get("tokenization")

    @functools.cached_property
    def facts(self) -> Facts:
        """As they were found when the rows were prepared, if the files are still those."""
        if "facts" not in self._known:
            return super().facts
        # older releases wrote no checksums
        if changed := changed_shards(self.files, self._known.get("checksums")):
            raise DataError(
                f"{changed[0]} is not as it was prepared: cut short, changed, or another shard's; "
                "run the same laser_jax.prepare again, which writes it anew"
            )
        values = self._known["facts"]
        return Facts(values["row_without_negatives"], tuple(values["instructions"]))

    @property
    def fingerprint(self) -> str:
        if "fingerprint" in self._known:
            return self._known["fingerprint"]
        if "input" not in self._known:
            return super().fingerprint
        # of an older release: of the bytes that were prepared
        made_of = [self._known["input"], self._known.get("on_bad_row")]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]

    def where(self, index: int) -> str:
        place = f"{self.path}: row {index + 1}"
        features = _features(self._record(index), place)
        origin = b"".join(features["origin"].bytes_list.value).decode(errors="replace")
        return f"{place} ({origin})" if origin else place

    def __getitem__(self, index: int) -> TrainingRow:
        row, features = self._row(index)
        if self.tokenization is None:
            return row

        def ids(name: str) -> np.ndarray:
            return np.array(features[name].int64_list.value, np.int32)

        tokens = RowTokens(
            query=ids("query_ids"),
            explicit=ids("explicit_ids"),
            segment_ends=ids("segment_ends"),
            positives=_split(ids("positive_ids"), ids("positive_lengths")),
            negatives=_split(ids("negative_ids"), ids("negative_lengths")),
        )
        return replace(row, tokens=tokens)


def changed_shards(files: Iterable[Path], checksums: dict[str, str] | None) -> list[Path]:
    """Those that are not as their sha256, by name, says; none where there are no checksums."""
    return [
        file
        for file in files
        if checksums is not None
        and not (file.is_file() and checksums.get(file.name) == checksum_of(file))
    ]


def checksum_of(file: Path) -> str:
    """The sha256 of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _fields(features: Any, where: str) -> dict[str, Any]:
    """The fields of a training row among the features of a tf.Example, which are lists all."""
    try:
        lists = {
            name: [text.decode() for text in features[name].bytes_list.value]
            for name in FIELDS
            if name in features
        }
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error}") from error
    return {
        name: texts[0] if not name.endswith("passages") and len(texts) == 1 else texts
        for name, texts in lists.items()
    }


def _split(ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(np.split(ids, np.cumsum(lengths)[:-1])) if len(lengths) else ()


def _read_object(file: Path, way_out: str) -> dict[str, Any]:
    """A JSON object out of a file that describes rows."""
    try:
        values = read_json(file)
    except DataError as error:
        fault = str(error).removeprefix(f"{file}: ")
        raise DataError(f"{file} is damaged: {fault}; {way_out}") from error
    if not isinstance(values, dict):
        raise DataError(f"{file} is damaged: an object is wanted; {way_out}")
    return values


def _member(file: Path, key: str, way_out: str) -> list[Any]:
    """The list under `key`, as `_read_object`."""
    value = _read_object(file, way_out).get(key)
    if not isinstance(value, list):
        raise DataError(f"{file} is damaged: it has no list {key!r}; {way_out}")
    return value
