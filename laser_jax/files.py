"""Files that are seen either whole or not at all, and their checksum."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path, tag: str = "") -> Iterator[Path]:
    """Gives the name of a temporary file beside `path`, which takes its place when the block ends.

    If the block or the move fails, the temporary file is removed and what stood at `path` stays. A
    file that was moved is on the disk, so it outlives a power cut.

    Args:
        tag: stands in the temporary name, so that several processes can write one file at once; the
            last one wins. A killed process then leaves its part behind: see `parts_of`.

    Raises:
        OSError: as in the block, and where it named no file (a full disk), naming `path`.
    """
    part = path.with_name(f".{path.name}{tag and '.'}{tag}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def parts_of(folder: Path) -> list[Path]:
    """The temporary files in a folder, of processes that write there or were killed."""
    return sorted(folder.glob(".*.part"))


def write_atomically(path: Path, text: str, tag: str = "") -> None:
    """Writes a file that is seen either whole or not at all, even after a power cut. `tag` is as in
    `written_whole`."""
    with written_whole(path, tag) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def checksum(paths: Iterable[Path]) -> str:
    """The sha256 of the names and the bytes of some files, in their order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(f"{path.name}:".encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
