"""Which of any number of ids stand twice, in memory that does not grow with them."""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Self

import numpy as np

_COMPARED = 1 << 20
_FIRST = 100


def _digest(id_: str) -> bytes:
    """64 bits; of 10^9 different ids two agree with a probability of 3 %."""
    return hashlib.blake2b(id_.encode(), digest_size=8).digest()


class RepeatedIds:
    """Collects hashes of ids in a temporary file, which is sorted there: 8 bytes an id on the disk.
    A context, which removes the file in the end."""

    def __init__(self, folder: Path | None = None):
        """`folder` holds the file; None takes the system's temporary folder."""
        self._file = tempfile.TemporaryFile(prefix="ids-", dir=folder)  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def add(self, id_: str) -> None:
        self._file.write(_digest(id_))

    def found(
        self, read: Callable[[], Iterable[tuple[str, str]]]
    ) -> Iterator[tuple[str, str, str]]:
        """Yields (id, place, its first place) of ids that stand at two places; of many, of the
        first hundred. Where hashes agree, `read` gives all (id, place) again to be compared."""
        if hashes := self._repeated_hashes():
            first: dict[str, str] = {}
            for id_, place in read():
                if _digest(id_) in hashes and first.setdefault(id_, place) != place:
                    yield id_, place, first[id_]

    def _repeated_hashes(self) -> set[bytes]:
        found: set[bytes] = set()
        if self._file.tell():
            self._file.flush()
            hashes = np.memmap(self._file, "<u8", "r+")
            hashes.sort()
            for start in range(0, len(hashes), _COMPARED):
                some = hashes[start : start + _COMPARED + 1]
                repeated = np.unique(some[1:][some[1:] == some[:-1]])
                found.update(value.tobytes() for value in repeated[: _FIRST - len(found)])
        return found
