"""Which shapes batches have, and how rows are cut into them."""

from __future__ import annotations

import numpy as np
import pytest

from laser_jax.data.buckets import Buckets


def indexed(lengths: list[int]) -> list[tuple[int, list[int]]]:
    return [(place, [1] * length) for place, length in enumerate(lengths)]


def test_there_are_four_widths_an_octave_each_a_multiple_of_the_length_multiple() -> None:
    widths = sorted({Buckets().width(length) for length in range(1, 1025)})
    assert widths == [32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024]
    assert {Buckets(length_multiple=48).width(length) % 48 for length in range(1, 700)} == {0}


def test_beyond_the_shortest_widths_no_more_than_a_fifth_of_the_longest_row_is_padding() -> None:
    for length in range(129, 9000):
        assert length <= Buckets().width(length) <= 1.25 * length


def test_a_batch_holds_a_number_of_rows_or_of_tokens_whichever_is_less() -> None:
    buckets = Buckets(batch_size=64, batch_tokens=4096)
    rows = {width: buckets.sizes(width) for width in (32, 64, 128, 512, 8192)}
    assert rows == {32: [64], 64: [64], 128: [32], 512: [8], 8192: [1]}


def test_numbers_of_rows_are_multiples_of_the_devices_that_share_them() -> None:
    buckets = Buckets(batch_size=60, batch_tokens=1024, short_batches=(1, 9), row_multiple=8)
    assert buckets.sizes(32) == [8, 16, 32]
    assert buckets.sizes(8192) == [8]


def test_a_short_batch_takes_the_smallest_shape_that_holds_it() -> None:
    buckets = Buckets(batch_size=64, short_batches=(8, 1))
    shapes = [buckets.shape([[1] * 40] * count) for count in (1, 2, 8, 9, 64)]
    assert shapes == [(1, 64), (8, 64), (8, 64), (64, 64), (64, 64)]


@pytest.mark.parametrize("cut", [[], [100], [3, 50, 51]])
def test_every_row_is_in_one_batch_and_only_the_last_is_short(cut) -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 100).tolist()
    buckets = Buckets(batch_size=16, batch_tokens=1024)
    blocks = np.split(np.arange(100), cut)
    batches = list(buckets.batches([[indexed(lengths)[i] for i in block] for block in blocks]))
    assert sorted(place for batch in batches for place, _ in batch) == list(range(100))
    for batch in batches:
        rows = [row for _, row in batch]
        assert [len(lengths) for lengths in rows] == sorted(map(len, rows), reverse=True)
        size, width = buckets.shape(rows)
        assert size == len(rows) or batch is batches[-1]
        assert size * width <= 1024


def test_the_shapes_named_for_warming_up_are_all_that_occur() -> None:
    buckets = Buckets(batch_size=16, batch_tokens=1024, short_batches=(1, 4))
    rng = np.random.default_rng(1)
    seen = set()
    for count in range(1, 60):
        for batch in buckets.batches([indexed(rng.integers(20, 201, count).tolist())]):
            seen.add(buckets.shape([row for _, row in batch]))
    assert seen <= set(buckets.shapes(20, 200))
    assert len(seen) > 10


def test_no_rows_make_no_batch() -> None:
    assert list(Buckets().batches([])) == list(Buckets().batches([[], []])) == []


@pytest.mark.parametrize("name", ["batch_size", "batch_tokens", "length_multiple", "row_multiple"])
def test_a_size_below_one_is_refused(name) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Buckets(**{name: 0})
    with pytest.raises(ValueError, match="short_batches"):
        Buckets(short_batches=(0,))


def least(buckets: Buckets, lengths: list[int], overhead: int) -> int:
    """What the cheapest batches cost, by trying all: `lengths` are in descending order."""
    if not lengths:
        return 0
    costs = []
    for count in range(1, min(len(lengths), buckets.sizes(buckets.width(lengths[0]))[-1]) + 1):
        size, width = buckets.shape([[0] * length for length in lengths[:count]])
        costs.append(size * width + overhead + least(buckets, lengths[count:], overhead))
    return min(costs)


@pytest.mark.parametrize("overhead", [0, 20, 100, 5000])
def test_rows_are_cut_into_the_batches_that_cost_least(overhead: int) -> None:
    buckets = Buckets(batch_size=6, batch_tokens=200, length_multiple=8, short_batches=(1, 3))
    rng = np.random.default_rng(0)
    for count in range(11):
        lengths = sorted(rng.integers(1, 60, count).tolist(), reverse=True)
        places = rng.permutation(count).tolist()
        rows = [(place, [0] * length) for place, length in zip(places, lengths, strict=True)]
        batches = list(buckets.cut(rng.permutation(np.array(rows, object)).tolist(), overhead))
        cost = 0
        for batch in batches:
            size, width = buckets.shape([row for _, row in batch])
            cost += size * width + overhead
        assert cost == least(buckets, lengths, overhead)
        cut = [row for batch in batches for row in batch]
        assert [len(row) for _, row in cut] == lengths
        assert sorted(place for place, _ in cut) == list(range(count))


@pytest.mark.parametrize(
    ("count", "overhead", "sizes"),
    [
        *((1, 0, [1]), (7, 0, [1] * 7), (9, 50, [8, 1]), (9, 2000, [9])),
        *((31, 50, [8, 8, 8, 7]), (31, 500, [31])),
        *((64, 0, [64]), (66, 0, [64, 1, 1]), (66, 200, [64, 2])),
    ],
)
def test_a_batch_that_costs_much_beside_its_tokens_is_seldom_cut(
    count: int, overhead: int, sizes: list[int]
) -> None:
    rows = [(place, [0] * (1 + place % 30)) for place in range(count)]
    batches = Buckets(short_batches=(1, 8)).cut(rows, overhead)
    assert [len(batch) for batch in batches] == sizes
