"""Files that are seen either whole or not at all, their checksum, and the one reader of what
programs keep in small files."""

import errno
import glob
import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import lock_descriptor

T = TypeVar("T")
_log = logging.getLogger(__name__)


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
    file that was moved outlives a power cut. Of several processes that write one file the last one
    wins. The temporary name is drawn by chance, so that nobody can have put a link there. Its
    writer holds a lock on it; one without, of a killed process, is removed when the file is written
    again (where the file system has locks: elsewhere it stays, see `parts_of`). An OSError
    of the block that named no file (a full disk) names `path`.
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
def folder_written_whole(directory: Path, last: str | None = None) -> Iterator[Path]:
    """Gives a temporary folder in `directory`, whose files, those of inner folders too, move there
    in the order of their names when the block ends, and vanish if it fails. The first one moves
    when all are on the disk, and one of the name `last`, which says that all is there, at the end.

    What earlier calls have left there that were killed is removed, so of two processes that write
    into one directory at once the first may fail, with a FileNotFoundError.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".partial-") as name:
        folder = Path(name)
        yield folder
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        files.sort(key=lambda file: file.name == last)
        for file in files:
            flush(file)
        for file in files:
            target = directory / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
        for parent in {directory, *(directory / f.relative_to(folder).parent for f in files)}:
            flush(parent)


def parts_of(folder: Path) -> list[Path]:
    """The temporary files in a folder, of processes that write there or were killed."""
    return sorted(folder.glob(".*.part"))


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is seen either whole or not at all, even after a power cut."""
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def json_text(values: Any) -> str:
    """The text of a JSON file for people and programs."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, values: Any) -> None:
    """Writes such a file, whole or not at all."""
    write_atomically(path, json_text(values))


def read_state(path: Path, parse: Callable[[Any], T]) -> T | None:
    """What `parse` makes of a small JSON file in which a program of ours keeps its state; it raises
    a ValueError, KeyError or TypeError on values that cannot be. None stands for a file that is
    absent or, which is logged, damaged: for every caller one case."""
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        _log.warning("%s is damaged and counts as absent: %r", path, error)
        return None


def read_state_lines(path: Path, parse: Callable[[Any], T]) -> list[T]:
    """As `read_state`, of a file that has such values line by line; [] where it is absent. A last
    line without its end was cut off by a kill and is left out. So are damaged lines; they are
    logged, and the file as it was is kept as NAME.damaged."""
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
        _log.warning("%s\nThe file as it was is %s", "\n".join(damaged), kept)
    return found


def checksum_of(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(paths: Iterable[Path]) -> str:
    """The sha256 of the names and the bytes of some files, in their order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}:".encode() + bytes.fromhex(checksum_of(path)))
    return digest.hexdigest()


def digest_of(values: Any) -> str:
    """The sha256 of plain JSON types, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


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
