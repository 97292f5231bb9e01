"""Which of any number of ids stand twice, in memory that hardly grows with them."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import numpy as np

_PARTS = 256
_HELD = 1 << 20
"""Hashes in memory before they go to the disk."""
_FIRST = 100


def id_hash(id_: str) -> int:
    """64 bits; of 10^9 different ids two agree with a probability of 3 %."""
    return int.from_bytes(_digest(id_), "big")


def _digest(id_: str) -> bytes:
    return hashlib.blake2b(id_.encode(), digest_size=8).digest()


class RepeatedIds:
    """Collects hashes of ids, sorted on the disk into 256 parts by their first byte; then each part
    is looked at by itself. A billion ids take 8 GB there and 32 MB of memory.

    A context, which removes its files in the end.
    """

    def __init__(self, folder: Path | None = None, held: int = _HELD):
        """
        Args:
            folder: where the files lie for the while; None takes the system's temporary folder.
            held: hashes that are kept in memory before any file is written.
        """
        self._folder, self._held = folder, held
        self._buffer = bytearray()
        self._files: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> RepeatedIds:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._files is not None:
            self._files.cleanup()

    def add(self, id_: str) -> None:
        self._buffer += _digest(id_)
        if len(self._buffer) >= 8 * self._held:
            self._spill()

    def hashes(self) -> set[int]:
        """The hashes that came more than once, as `id_hash` gives them; of many, the first hundred.
        Different ids may share one, so whoever asks compares the ids themselves."""
        if self._files is None:
            return set(_repeated(self._sorted())[:_FIRST])
        self._spill()
        found: set[int] = set()
        for part in sorted(Path(self._files.name).iterdir()):
            found.update(_repeated(np.sort(np.fromfile(part, ">u8")))[: _FIRST - len(found)])
        return found

    def _sorted(self) -> np.ndarray:
        return np.sort(np.frombuffer(bytes(self._buffer), ">u8"))

    def _spill(self) -> None:
        if self._files is None:
            self._files = tempfile.TemporaryDirectory(prefix="ids-", dir=self._folder)
        hashes = self._sorted()
        bounds = np.arange(1, _PARTS, dtype=np.uint64) << np.uint64(56)
        for number, part in enumerate(np.split(hashes, np.searchsorted(hashes, bounds))):
            with open(Path(self._files.name) / f"{number:02x}", "ab") as file:
                file.write(part.tobytes())
        self._buffer.clear()


def _repeated(hashes: np.ndarray) -> list[int]:
    """Of sorted hashes, those that are equal to the one before."""
    return np.unique(hashes[1:][hashes[1:] == hashes[:-1]]).tolist()
