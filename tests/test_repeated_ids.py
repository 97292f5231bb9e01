"""Ids that stand twice, found without holding the ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from laser_jax.search import repeated_ids
from laser_jax.search.repeated_ids import RepeatedIds


def test_exactly_the_repeated_ids_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where two equal hashes stand at both sides of a cut between those that are compared."""
    monkeypatch.setattr(repeated_ids, "_COMPARED", 7)
    numbers = np.random.default_rng(0).integers(0, 3_000, 500)
    repeated = {str(n) for n in numbers if (numbers == n).sum() > 1}
    placed = [(str(n), f"place {i}") for i, n in enumerate(numbers)]
    first = dict(reversed(placed))
    with RepeatedIds(tmp_path) as ids:
        for id_, _ in placed:
            ids.add(id_)
        found = list(ids.found(lambda: placed))
    assert {id_ for id_, *_ in found} == repeated
    assert found == [(i, p, first[i]) for i, p in placed if i in repeated and p != first[i]]
    assert 0 < len(repeated) < 100
    assert list(tmp_path.iterdir()) == []


def test_of_many_repeated_ids_the_first_hundred_are_enough(tmp_path: Path) -> None:
    with RepeatedIds(tmp_path) as ids:
        placed = [(str(n % 1_000), str(n)) for n in range(2_000)]
        for id_, _ in placed:
            ids.add(id_)
        assert len(list(ids.found(lambda: placed))) == 100


def test_no_ids_are_no_repeated_ids() -> None:
    with RepeatedIds() as ids:
        assert list(ids.found(list)) == []
        ids.add("a")
        assert list(ids.found(lambda: pytest.fail("read again"))) == []
