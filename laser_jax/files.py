"""Files that are seen either whole or not at all, and their checksum."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


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
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
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
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()
            finally:
                os.close(descriptor)


def parts_of(folder: Path) -> list[Path]:
    """The temporary files in a folder, of processes that write there or were killed."""
    return sorted(folder.glob(".*.part"))


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is seen either whole or not at all, even after a power cut."""
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def no_link(path: str, flags: int) -> int:
    """An `opener` for files whose name others know beforehand, such as locks: a link that somebody
    has put there is an error instead of being followed."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def checksum(paths: Iterable[Path]) -> str:
    """The sha256 of the names and the bytes of some files, in their order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(f"{path.name}:".encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
