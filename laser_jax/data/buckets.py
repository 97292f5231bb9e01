"""Token rows to batches of few shapes, so that few programs are compiled. No arrays in here."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

IndexedRow = tuple[int, Sequence[int]]
"""A row of token ids and its place among all rows."""


@dataclass(frozen=True)
class Buckets:
    """The shapes [B, T] that batches may have, and how rows are cut into such batches.

    There are four widths T an octave: 32, 64, ..., 256, 320, 384, 448, 512, 640, ... with a
    `length_multiple` of 32. A width has one number of rows B, about `batch_tokens` / T, and beside
    it those of `short_batches`.
    """

    batch_size: int = 64
    """The most rows of a batch."""
    batch_tokens: int = 8192
    """The most tokens of a batch, padding included; a row that is longer is a batch of its own."""
    length_multiple: int = 32
    """Every width is a multiple of this."""
    short_batches: tuple[int, ...] = ()
    """Smaller numbers of rows, for single queries and for what is left over at the end. Each is one
    more shape at every width."""
    row_multiple: int = 1
    """Every number of rows is rounded to a multiple of this: the devices that share a batch."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if min(value if isinstance(value, tuple) else (value,), default=1) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def width(self, length: int) -> int:
        """The T of a batch whose longest row has `length` tokens."""
        quarter_octave = 1 << max((length - 1).bit_length() - 3, 0)
        return _round_up(length, _round_up(quarter_octave, self.length_multiple))

    def sizes(self, width: int) -> list[int]:
        """The numbers of rows that a batch of this width may have, in ascending order."""
        fitting = self.batch_tokens // width // self.row_multiple * self.row_multiple
        largest = min(_round_up(self.batch_size, self.row_multiple), fitting)
        largest = max(largest, self.row_multiple)
        short = {_round_up(size, self.row_multiple) for size in self.short_batches}
        return [*sorted(size for size in short if size < largest), largest]

    def shape(self, rows: Sequence[Sequence[int]]) -> tuple[int, int]:
        """The smallest shape [B, T] that holds a batch that `batches` cut."""
        width = self.width(max(map(len, rows)))
        return next(size for size in self.sizes(width) if size >= len(rows)), width

    def shapes(self, shortest: int, longest: int) -> list[tuple[int, int]]:
        """Every shape that rows of `shortest` to `longest` tokens can need."""
        widths = [self.width(shortest)]
        while widths[-1] < longest:
            widths.append(self.width(widths[-1] + 1))
        return [(size, width) for width in widths for size in self.sizes(width)]

    def cut(self, rows: Iterable[IndexedRow], overhead: int = 0) -> Iterator[list[IndexedRow]]:
        """Cuts rows that are all there into the batches that cost least together, the longest rows
        first. A batch costs its tokens, padding included, and `overhead` tokens beside them."""
        left = sorted(rows, key=lambda row: len(row[1]), reverse=True)
        # of the rows from each place on: what they cost, and how many the first batch may have
        costs, takes = [0] * (len(left) + 1), [0] * len(left)
        for place in reversed(range(len(left))):
            width = self.width(len(left[place][1]))
            costs[place], negative = min(
                (size * width + overhead + costs[min(place + size, len(left))], -size)
                for size in self.sizes(width)
            )
            takes[place] = -negative
        place = 0
        while place < len(left):
            yield left[place : place + takes[place]]
            place += takes[place]

    def batches(self, blocks: Iterable[Sequence[IndexedRow]]) -> Iterator[list[IndexedRow]]:
        """Cuts rows that arrive in blocks into batches, the longest row of a block first. What a
        block leaves over goes into the next, so that only the very last batch is not full."""
        left: list[IndexedRow] = []
        for block in blocks:
            left = sorted([*left, *block], key=lambda row: len(row[1]), reverse=True)
            while left and (size := self.sizes(self.width(len(left[0][1])))[-1]) <= len(left):
                yield left[:size]
                left = left[size:]
        if left:
            yield left


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
