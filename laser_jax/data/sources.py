"""Random access to training rows, whatever file holds them.

Rows are read when they are asked for: a source keeps an index, not the texts. Only `.jsonl.gz` is
held in memory, as gzip has no random access. A source can be pickled; its copy opens the files
anew.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import mmap
import threading
from abc import ABC, abstractmethod
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from laser_jax.config import DataConfig
from laser_jax.data.schema import FIELDS, TEACHER_SCORES, Facts, TrainingRow, facts_of, parse_row
from laser_jax.files import reading
from laser_jax.files.durable import checksum_of
from laser_jax.files.reading import DataError, import_pyarrow, parse_json
from laser_jax.files.splits import one_split, split_of

PREPARED_FILE = "prepare.json"
"""In a directory written by `laser_jax.prepare`: how it was made and what is known of its rows."""

_DECODED_BYTES = 2 << 30
"""Row groups of Parquet that stay decoded."""
_ACCEPTED = (
    "a .jsonl, .jsonl.gz, .parquet, .arrow or .array_record file, or a directory of Parquet, Arrow "
    "(save_to_disk) or ArrayRecord shards or of laser_jax.prepare is wanted"
)


class Source(ABC):
    """Training rows by index, in the order of the file. `source[i]` and iteration raise a
    `DataError` at a row that is no training row."""

    path: Path
    """As given to `open_source`."""
    files: Sequence[Path]
    """In the order in which they are read."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def where(self, index: int) -> str:
        """The file and line (or row, counted from 1) of row `index`."""

    @abstractmethod
    def __getitem__(self, index: int) -> TrainingRow: ...

    def __iter__(self) -> Iterator[TrainingRow]:
        return (self[index] for index in range(len(self)))

    @functools.cached_property
    def facts(self) -> Facts:
        """Read once through all rows. Raises a `DataError` at the first that is no training row."""
        return facts_of(self)

    def __reduce__(self) -> Any:
        return type(self), (self.path,)


# --- opening ---------------------------------------------------------------------------------


def open_source(path: str | Path) -> Source:
    """Opens training rows and checks every one; rows that `prepare` wrote were checked by it.

    The path is a `.jsonl`, `.jsonl.gz`, `.parquet`, `.arrow` or ArrayRecord file; a directory of
    Parquet, Arrow or ArrayRecord shards, read in the order of their names; one of Hugging Face
    `save_to_disk`, `laser_jax.prepare` or tfds; or `directory/SPLIT` where it has several splits.

    A DataError names the file and the line (or row, counted from 1) and says: nothing there, no
    rows, an unknown kind, or a damaged or wrong row. An ImportError: pyarrow is not installed.
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
    elif kind := next((kind for kind in _SHARDED if path.match(kind.pattern)), None):
        source = kind(path)
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
    """Opens a directory, or `directory/SPLIT`."""
    directory = path if path.is_dir() else path.parent
    if any((directory / name).is_file() for name in ("features.json", PREPARED_FILE)):
        return PreparedSource(path)
    if (description := path / "dataset_dict.json").is_file():
        splits = _description(description, "save the dataset again", "splits")["splits"]
        named = " or ".join(str(path / split) for split in splits)
        raise DataError(f"{path} holds several splits, name one: {named}")
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
    return [kind for kind in _SHARDED if _candidates(directory, kind.pattern)]


def _candidates(directory: Path, pattern: str) -> list[Path]:
    # datasets leaves what map and filter made, as cache-*.arrow, beside the rows
    return [p for p in sorted(directory.glob(pattern)) if not p.name.startswith(("cache-", "."))]


def _description(file: Path, way_out: str, listed: str | None = None) -> dict[str, Any]:
    """The JSON object in a file that describes rows; `listed` is a key that must hold a list."""
    try:
        values = reading.read_object(file)
    except DataError as error:
        fault = str(error).removeprefix(f"{file}: ")
        raise DataError(f"{file} is damaged: {fault}; {way_out}") from error
    if listed is not None and not isinstance(values.get(listed), list):
        raise DataError(f"{file} is damaged: it has no list {listed!r}; {way_out}")
    return values


# --- rows of several sources -------------------------------------------------------------------


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


def rows_of_same_query(sources: Sequence[Source]) -> dict[int, np.ndarray]:
    """The rows whose query stands in other rows too, by index into the concatenation of the sources
    (`Batch.rows_B`): for each all rows with that query, itself among them, in their order."""
    keys = np.concatenate([source.facts.query_keys for source in sources])
    order = np.argsort(keys, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(keys[order])) + 1)
    return {int(row): group for group in groups if len(group) > 1 for row in group}


# --- kinds of sources ------------------------------------------------------------------------


class JsonlSource(Source):
    """One JSON object a line; blank lines are skipped."""

    def __init__(self, path: Path):
        self.path, self.files = path, (path,)
        starts, numbers, start, held = array("q"), array("q"), 0, bytearray()
        with reading.open_lines(path) as file:
            for number, line in reading.raw_lines(path, file):
                if not reading.is_blank(line):
                    starts.append(start)
                    numbers.append(number)
                start += len(line)
                if path.suffix == ".gz":
                    held += line
        self._starts, self._numbers = np.array(starts), np.array(numbers)
        self._bytes: bytearray | mmap.mmap = held
        if path.suffix != ".gz" and start:  # an empty file cannot be mapped
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._numbers)

    def where(self, index: int) -> str:
        return f"{self.path}:{self._numbers[index]}"

    def __getitem__(self, index: int) -> TrainingRow:
        start = int(self._starts[index])
        end = self._bytes.find(b"\n", start)
        line = bytes(self._bytes[start : len(self._bytes) if end < 0 else end])
        return parse_row(parse_json(line, self.where(index)), self.where(index))


class _Sharded(Source):
    """Rows in parts of files (row groups, record batches, whole files), found by bisection. The
    files are a single one, or those in a directory that the pattern fits and that are of one
    split."""

    pattern: str

    def __init__(self, path: Path, files: Sequence[Path] | None = None):
        self.path = path
        if files is None and not path.is_file():
            found = _candidates(path if path.is_dir() else path.parent, self.pattern)
            if not found:
                raise DataError(f"{path}: holds no rows in {self.pattern}; {_ACCEPTED}")
            files = one_split(path, found)
        self.files = (path,) if files is None else files
        self._parts: list[Any] = []
        self._starts, self._file_starts = [0], []
        for file in self.files:
            self._file_starts.append(len(self))
            for rows, part in self._open(file):
                self._parts.append(part)
                self._starts.append(len(self) + rows)

    @abstractmethod
    def _open(self, file: Path) -> Iterable[tuple[int, Any]]:
        """The number of rows of each part of a file, and what `_values` finds them by."""

    @abstractmethod
    def _values(self, part: Any, row: int, where: str) -> Any:
        """The record at a place of a part, in Python types. Raises a DataError if damaged."""

    def _find(self, index: int) -> tuple[Any, int]:
        """The part that holds row `index`, and the row's place in it."""
        part = bisect.bisect_right(self._starts, index) - 1
        return self._parts[part], index - self._starts[part]

    def __len__(self) -> int:
        return self._starts[-1]

    def where(self, index: int) -> str:
        file = bisect.bisect_right(self._file_starts, index) - 1
        return f"{self.files[file]}: row {index - self._file_starts[file] + 1}"

    def __getitem__(self, index: int) -> TrainingRow:
        where = _Sharded.where(self, index)  # that of a prepared directory reads the row as well
        return parse_row(self._values(*self._find(index), where), where)


@contextmanager
def _damage(what: str) -> Iterator[None]:
    """Turns what libraries raise at files that cannot be read into a DataError."""
    try:
        yield
    except (ValueError, IndexError, OverflowError, RuntimeError, OSError) as error:
        raise DataError(f"{what}: {error}; fetch it again from where it came") from error


class ParquetSource(_Sharded):
    """A Parquet file or the `*.parquet` of a directory. Row groups are decoded when first read and
    stay so up to 2 GiB: larger data is slow in shuffled order, and wants `laser_jax.prepare`."""

    pattern = "*.parquet"

    def __init__(self, path: Path):
        super().__init__(path)
        self._lock = threading.Lock()
        self._decoded: OrderedDict[tuple[Path, int], Any] = OrderedDict()
        self._decoded_bytes = 0

    def _open(self, file: Path) -> Iterable[tuple[int, Any]]:
        parquet = import_pyarrow(file).parquet
        with _damage(f"{file}: not a Parquet file, or a damaged one"):
            read = parquet.read_metadata(file)
            groups = range(read.num_row_groups)
            return [(read.row_group(group).num_rows, (file, group)) for group in groups]

    def _values(self, part: tuple[Path, int], row: int, where: str) -> Any:
        with self._lock:
            if part not in self._decoded:
                self._decode(*part)
            self._decoded.move_to_end(part)
            table = self._decoded[part]
        return _table_row(table, row, where)

    def _decode(self, file: Path, group: int) -> None:
        parquet = import_pyarrow(file).parquet
        with _damage(f"{file}: row group {group} is damaged"), parquet.ParquetFile(file) as opened:
            given = {*FIELDS, TEACHER_SCORES} & {*opened.schema_arrow.names}
            table = opened.read_row_group(group, columns=sorted(given))
        self._decoded[file, group] = table
        self._decoded_bytes += table.nbytes
        while self._decoded_bytes > _DECODED_BYTES and len(self._decoded) > 1:
            self._decoded_bytes -= self._decoded.popitem(last=False)[1].nbytes


class ArrowSource(_Sharded):
    """Arrow files, memory-mapped: those of Hugging Face `save_to_disk`, a directory's `*.arrow`, or
    a single one."""

    pattern = "*.arrow"

    def __init__(self, path: Path):
        files = None
        if (state := path / "state.json").is_file():
            listed = _description(state, "save the dataset again", "_data_files")["_data_files"]
            files = [path / entry["filename"] for entry in listed]
            if missing := [file for file in files if not file.is_file()]:
                raise DataError(f"{missing[0]} is missing, and {state} names it")
        super().__init__(path, files)

    def _open(self, file: Path) -> Iterable[tuple[int, Any]]:
        pyarrow = import_pyarrow(file)
        with _damage(f"{file}: not an Arrow file, or a damaged one"):
            mapped = pyarrow.memory_map(str(file))
            if mapped.read(6) == b"ARROW1":  # the file format; save_to_disk writes streams
                reader = pyarrow.ipc.open_file(mapped)
                batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            else:
                mapped.seek(0)
                batches = list(pyarrow.ipc.open_stream(mapped))
        return [(batch.num_rows, batch) for batch in batches]

    def _values(self, part: Any, row: int, where: str) -> Any:
        return _table_row(part, row, where)


def _table_row(table: Any, row: int, where: str) -> Any:
    """A row of a pyarrow table or record batch, which may hold wrong lengths or no UTF-8."""
    with _damage(f"{where}: its values are damaged"):
        return table.slice(row, 1).to_pylist()[0]


class ArrayRecordSource(_Sharded):
    """ArrayRecord files: each record is a JSON object, or a tf.Example with the features of
    `laser_jax.data.reasoning_retrieval`. tfds is not asked, even of a directory that it wrote: it
    imports whatever class the directory's features.json names."""

    pattern = "*.array_record*"

    def _open(self, file: Path) -> Iterable[tuple[int, Any]]:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        with _damage(f"{file}: not an ArrayRecord file, or a damaged one"):
            records = ArrayRecordDataSource([str(file)])
            return [(len(records), records)]

    def _values(self, part: Any, row: int, where: str) -> Any:
        with _damage(f"{where}: the file is damaged"):
            record = part[row]
        return parse_json(record, where) if record[:1] == b"{" else _example_values(record, where)


def _example_values(record: bytes, where: str) -> dict[str, Any]:
    """The fields of a training row, and its `origin`, in a tf.Example, whose features are lists.
    Raises a DataError where the record is none, or a text of it is not UTF-8."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    messages: Any = tf_example_pb2
    try:
        features = messages.Example.FromString(record).features.feature
        lists = {
            name: [text.decode() for text in features[name].bytes_list.value]
            for name in (*FIELDS, "origin")
            if name in features
        }
    except DecodeError as error:
        raise DataError(f"{where}: neither a JSON object nor a tf.Example: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error}") from error
    return {
        name: texts[0] if not name.endswith("passages") and len(texts) == 1 else texts
        for name, texts in lists.items()
    }


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
        self._known = _description(known, again) if known.is_file() else {}

    @functools.cached_property
    def facts(self) -> Facts:
        """The facts of the files as prepared; a DataError names one that was changed since."""
        if changed := changed_shards(self.files, self._known.get("checksums")):
            raise DataError(
                f"{changed[0]} is not as it was prepared: cut short, changed, or another shard's; "
                "run the same laser_jax.prepare again, which writes it anew"
            )
        return super().facts

    def where(self, index: int) -> str:
        place = f"{self.path}: row {index + 1}"
        origin = self._values(*self._find(index), place).get("origin")
        return f"{place} ({origin})" if origin else place


_SHARDED: tuple[type[_Sharded], ...] = (ArrowSource, ParquetSource, ArrayRecordSource)


def changed_shards(files: Iterable[Path], checksums: dict[str, str] | None) -> list[Path]:
    """Those files that are not as the sha256 under their name says; none without checksums."""
    if checksums is None:
        return []
    return [f for f in files if not f.is_file() or checksums.get(f.name) != checksum_of(f)]
