"""Files: written so that they are seen either whole or not at all, read by one rule, and locked.

Everything that is read is UTF-8. A byte-order mark at the beginning of a line is no part of it
(files that were put together have some within). Numbers are written in ASCII digits. A key that
stands twice in a settings file is refused, since one of its two values would be lost.
"""

from __future__ import annotations

import errno
import glob
import gzip
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar, cast

import numpy as np
import yaml
from filelock import lock_descriptor

T = TypeVar("T")

LONGEST_LINE = 64 << 20
"""Bytes. A longer line is no row of data: a small .gz can hold one that unfolds to gigabytes."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(
    r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(?i:inf|infinity|nan)"
)


class DataError(ValueError):
    """A file of rows, judgements, rankings or settings that cannot be used. The message names the
    file, the line and what is wrong there."""


# --- reading ---------------------------------------------------------------------------------


def decode(content: bytes, where: str | Path) -> str:
    """UTF-8 as text, without the byte-order mark that may stand before it.

    Raises:
        DataError: not UTF-8; begins with `where`.
    """
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
    """Yields (line number, line) of a file that `open_lines` opened, as they stand, line ends and
    byte-order mark kept.

    Args:
        offset: bytes (of a .gz, unpacked) to pass over first, and `number` the lines in them.

    Raises:
        DataError: a line is longer than `LONGEST_LINE`, or a compressed file is damaged.
    """
    try:
        file.seek(offset)
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise DataError(
                    f"{path}:{number}: longer than {LONGEST_LINE:,} bytes, which no row is; one "
                    "line for each row is wanted"
                )
            yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}:{number + 1}: cannot be read, not a whole gzip file: {error}"
        ) from error


def text_lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """Yields ("file:line", line) of a UTF-8 file, plain or .gz, line ends kept.

    Raises:
        FileNotFoundError: when the file is missing.
        DataError: as `raw_lines`, and where a line is not UTF-8.
    """
    path = Path(path)
    with open_lines(path) as file:
        for number, line in raw_lines(path, file):
            yield f"{path}:{number}", decode(line, f"{path}:{number}")


def json_lines(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """("file:line", line) of the lines of a file, plain or .gz, that are not blank."""
    path = Path(path)
    with open_lines(path) as file:
        for number, line in raw_lines(path, file):
            if not is_blank(line):
                yield f"{path}:{number}", line


def parse_json(content: bytes, where: str | Path) -> Any:
    """The value of a line, or of a record, of JSON. Of a key that stands twice the last counts.

    Raises:
        DataError: not UTF-8 or no JSON, or with a number too long or lists too deep for Python.
    """
    return _json(content, where)


def read_json(path: Path) -> Any:
    """The value that a JSON file of settings holds. Raises as `parse_json`, and a DataError where a
    key stands twice in an object."""
    return _json(path.read_bytes(), path, object_pairs_hook=_unique)


def _json(content: bytes, where: str | Path, **options: Any) -> Any:
    text = decode(content, where)
    try:
        return json.loads(text, **options)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from error


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
                    raise yaml.constructor.ConstructorError(
                        None,
                        None,
                        f"the key {key.value!r} stands twice; take one of them out",
                        key.start_mark,
                    )
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
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: it is none, a key stands twice in a mapping, or it is too deep for Python.
    """
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
    """The module, for a Parquet or Arrow file or directory. Raises an ImportError that names the
    extra."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"{path}: reading and writing Parquet and Arrow needs pyarrow: pip install "
            "laser-jax[parquet]"
        ) from error
    return pyarrow


def parse_integer(text: str) -> int | None:
    """An integer in ASCII digits; None for anything else, `1_0` and `1.0` included."""
    return int(text) if _INTEGER.fullmatch(text) else None


def parse_number(text: str) -> float | None:
    """A number in ASCII digits, or inf or nan; None for anything else, `1_0` included."""
    return float(text) if _NUMBER.fullmatch(text) else None


# --- splits ----------------------------------------------------------------------------------

_SPLIT = re.compile(r"train|training|valid|validation|val|dev|test|testing|eval|evaluation")
_SHARD = re.compile(r"(.+?)(\.array_record)?-(\d+)-of-(\d+)([-.].*)?")


def split_of(name: str) -> str | None:
    """The split that a data file's name tells, or None.

    Of a shard it is what stands last before the numbers, as the hub, datasets and tfds name them:
    `train-00000-of-00002.parquet`, `NAME-train.array_record-00000-of-00002`. Of other names it is
    the last word that is a split's, such as `train` or `validation`.
    """
    if shard := _SHARD.fullmatch(name):
        return shard[1].rpartition("-")[2]
    words = re.split(r"[^a-z]+", name.partition(".")[0].lower())
    return next((word for word in reversed(words) if _SPLIT.fullmatch(word)), None)


def one_split(path: Path, files: Sequence[Path]) -> list[Path]:
    """Those of a directory's data files that belong to one split, so that no test rows are taken
    for training rows.

    Args:
        path: the directory, or `directory/SPLIT` for one of several.
        files: all candidates in the directory.

    Raises:
        DataError: the directory holds several splits and `path` names none or another one, or a
            shard of it is missing.
    """
    splits: dict[str | None, list[Path]] = {}
    for file in files:
        splits.setdefault(split_of(file.name), []).append(file)
    named = [str(path / split) for split in splits if split is not None]
    if not path.is_dir():
        if path.name not in splits:
            there = " or ".join(str(path.parent / split) for split in splits if split)
            raise DataError(f"{path}: no such file or directory; {there or 'no split'} is there")
        chosen = splits[path.name]
    elif len(splits) == 1:
        (chosen,) = splits.values()
    else:
        rest = "" if None not in splits else f" (of {splits[None][0].name} the name tells none)"
        raise DataError(f"{path} holds several splits, name one: {' or '.join(named)}{rest}")
    present = {file.name for file in chosen}
    for shard in filter(None, map(_SHARD.fullmatch, present)):
        if shard[5] is None or "-" not in shard[5]:  # no checksum in the names
            start, end = shard.span(3)
            for number in range(int(shard[4])):
                name = f"{shard.string[:start]}{number:0{end - start}d}{shard.string[end:]}"
                if name not in present:
                    raise DataError(
                        f"{chosen[0].parent / name} is missing; fetch or prepare it again, or, if "
                        "the others are all that is meant, rename them"
                    )
    return chosen


# --- writing -----------------------------------------------------------------------------------


def flush(path: Path) -> None:
    """Returns when a file's bytes, or the names in a folder, are on the disk. A file system that
    has no such promise for folders gives none."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives the name of a temporary file beside `path`, which takes its place when the block ends.

    If the block or the move fails, the temporary file is removed and what stood at `path` stays. A
    file that was moved is on the disk, so it outlives a power cut. Several processes can write one
    file at once; the last one wins.

    The temporary name is drawn by chance and made by this call, so that nobody else who can write
    into the folder can have put a link there. Its writer holds a lock on it; one without, of a
    process that was killed, is removed when the file is written again (where the file system has
    locks: elsewhere it stays, see `parts_of`).

    Raises:
        OSError: as in the block, and where it named no file (a full disk), naming `path`.
    """
    _remove_abandoned(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with suppress(OSError):  # a file system without locks
            lock_descriptor(descriptor, blocking=False)
        yield part
        flush(part)
        part.replace(path)
        flush(path.parent)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with suppress(OSError):  # it is gone, is a link, is locked, or there are no locks
            descriptor = os.open(part, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if lock_descriptor(descriptor, blocking=False):
                    part.unlink()
            finally:
                os.close(descriptor)


@contextmanager
def folder_written_whole(directory: Path) -> Iterator[Path]:
    """Gives a temporary folder in `directory`, whose files move there in the order of their names
    when the block ends, and vanish if it fails. The first one moves when all are on the disk.

    What earlier calls have left there that were killed is removed, so of two processes that write
    into one directory at once the first may fail, with a FileNotFoundError.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".partial-") as name:
        folder = Path(name)
        yield folder
        files = sorted(folder.iterdir())
        for file in files:
            flush(file)
        for file in files:
            file.replace(directory / file.name)
        flush(directory)


def parts_of(folder: Path) -> list[Path]:
    """The temporary files in a folder, of processes that write there or were killed."""
    return sorted(folder.glob(".*.part"))


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is seen either whole or not at all, even after a power cut."""
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


# --- reading what a program has left -------------------------------------------------------------


def read_state(path: Path, parse: Callable[[Any], T]) -> T | None:
    """What `parse` makes of a small JSON file in which a program of ours keeps its state.

    Args:
        parse: takes the values that the file holds, and raises a ValueError, KeyError or TypeError
            on those that cannot be.

    Returns:
        None where the file is absent or damaged. The two are one case for every caller: what the
        file held is derived again, or else it is missed and the message says what to do. Damage is
        named on stderr.
    """
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        print(f"{path} is damaged and counts as absent: {error!r}", file=sys.stderr)
        return None


def read_state_lines(path: Path, parse: Callable[[Any], T]) -> list[T]:
    """As `read_state`, of a file that has such values line by line; [] where it is absent.

    A last line without its end was cut off by a kill and is left out. So are damaged lines; they
    are named on stderr, and the file as it was is kept as NAME.damaged.
    """
    found: list[T] = []
    damaged: list[str] = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(parse(json.loads(line.decode("utf-8"))))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            damaged.append(f"{path}:{number} is damaged and left out: {error!r}")
    if damaged:
        kept = path.with_name(f"{path.name}.damaged")
        shutil.copyfile(path, kept)
        print(*damaged, f"The file as it was is {kept}", sep="\n", file=sys.stderr)
    return found


# --- hashes ------------------------------------------------------------------------------------


def checksum(paths: Iterable[Path]) -> str:
    """The sha256 of the names and the bytes of some files, in their order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(f"{path.name}:".encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class Digest:
    """The sha256 of weights, taken of them as they are read, in whatever files they lie. So it is
    of what was read, whatever happens to the files in the meantime."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, name: str, value: np.ndarray) -> np.ndarray:
        """Adds a tensor, in the dtype of its file, and gives it back."""
        self._digest.update(f"{name} {value.dtype} {value.shape}:".encode())
        self._digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        return value

    def add_tree(self, tree: Mapping[str, Any], name: str) -> None:
        """Adds the leaves of nested dicts, `name` before theirs."""
        for key, value in sorted(tree.items()):
            if isinstance(value, Mapping):
                self.add_tree(value, f"{name}.{key}")
            else:
                self.add(f"{name}.{key}", np.asarray(value))

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


# --- locks -------------------------------------------------------------------------------------


def no_link(path: str, flags: int) -> int:
    """An `opener` for files whose name others know beforehand, such as locks: a link that somebody
    has put there is an error instead of being followed."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def lock(file: IO[Any], *, wait: bool) -> bool:
    """Takes the kernel's lock on an open file. It ends when the file is closed or the process ends,
    however that ends.

    Returns:
        Whether it was taken: not, where another process holds it and `wait` is False.

    Raises:
        OSError: the file system has no locks; says what to do.
    """
    try:
        return lock_descriptor(file.fileno(), blocking=wait)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}: this file system has no locks, so two programs could write here at "
            "once. Choose a place on a local disk, on NFS with its lock service, or on Lustre "
            "mounted with -o flock",
            str(file.name),
        ) from error
