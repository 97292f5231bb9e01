"""A source without a file, for tests of what is made of rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from laser_jax.data.schema import TrainingRow
from laser_jax.data.sources import Source


class RowsSource(Source):
    """Training rows that are in memory."""

    def __init__(self, rows: Sequence[TrainingRow], path: str = "rows"):
        self.path, self._rows = Path(path), rows

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        return f"{self.path}: row {index + 1}"

    def __getitem__(self, index: int) -> TrainingRow:
        return self._rows[index]
