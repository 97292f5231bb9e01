"""Which of any number of ids stand twice, in memory that does not grow with them."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import numpy as np

_COMPARED = 1 << 20
_FIRST = 100


def id_hash(id_: str) -> int:
    """64 bits; of 10^9 different ids two agree with a probability of 3 %."""
    return int.from_bytes(_digest(id_), "little")


def _digest(id_: str) -> bytes:
    return hashlib.blake2b(id_.encode(), digest_size=8).digest()


class RepeatedIds:
    """Collects hashes of ids in a file, which is sorted there: 8 bytes an id on the disk. A
    context, which removes the file in the end."""

    def __init__(self, folder: Path | None = None):
        """
        Args:
            folder: where the file lies for the while; None takes the system's temporary folder.
        """
        self._file = tempfile.TemporaryFile(prefix="ids-", dir=folder)  # noqa: SIM115

    def __enter__(self) -> RepeatedIds:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def add(self, id_: str) -> None:
        self._file.write(_digest(id_))

    def hashes(self) -> set[int]:
        """The hashes that came more than once, as `id_hash` gives them; of many, the first hundred.
        Different ids may share one, so whoever asks compares the ids themselves."""
        found: set[int] = set()
        if self._file.tell():
            self._file.flush()
            hashes = np.memmap(self._file, "<u8", "r+")
            hashes.sort()
            for start in range(0, len(hashes), _COMPARED):
                some = hashes[start : start + _COMPARED + 1]
                repeated = np.unique(some[1:][some[1:] == some[:-1]])
                found.update(repeated[: _FIRST - len(found)].tolist())
        return found
