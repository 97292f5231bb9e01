"""Ids that stand twice, found without holding the ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from laser_jax.search import repeated_ids
from laser_jax.search.repeated_ids import RepeatedIds, id_hash


def test_exactly_the_repeated_ids_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where two equal hashes stand at both sides of a cut between those that are compared."""
    monkeypatch.setattr(repeated_ids, "_COMPARED", 7)
    numbers = np.random.default_rng(0).integers(0, 3_000, 500)
    repeated = {str(n) for n in numbers if (numbers == n).sum() > 1}
    with RepeatedIds(tmp_path) as ids:
        for n in numbers:
            ids.add(str(n))
        assert ids.hashes() == {id_hash(id_) for id_ in repeated}
    assert 0 < len(repeated) < 100
    assert list(tmp_path.iterdir()) == []


def test_of_many_repeated_ids_the_first_hundred_are_enough(tmp_path: Path) -> None:
    with RepeatedIds(tmp_path) as ids:
        for n in range(2_000):
            ids.add(str(n % 1_000))
        assert len(ids.hashes()) == 100


def test_no_ids_are_no_repeated_ids() -> None:
    with RepeatedIds() as ids:
        assert ids.hashes() == set()
        ids.add("a")
        assert ids.hashes() == set()
