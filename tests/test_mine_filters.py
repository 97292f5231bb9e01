"""The filters of mining, one at a time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from laser_jax.mine.candidates import Ranking
from laser_jax.mine.filters import Rules, ceiling, negatives_of, overlap

TEXTS = {f"d{n}": f"text number {n} says something of its own {n}" for n in range(20)}
SCORES = {id_: 20.0 - n for n, id_ in enumerate(TEXTS)}


def mined(
    *positives: float, known: tuple[str, ...] = ("Something else.",), row: int = 0, **rules: Any
) -> tuple[list[str], Counter[str]]:
    """Ids of the negatives, and what the filters took, for positives of these scores."""
    ranking = Ranking(SCORES, list(positives))
    rules = {"max_overlap": None, "negatives": 20} | rules
    found, by_filter = negatives_of(ranking, TEXTS, "a query", known, Rules(**rules), row)
    return [source["id"] for source in found.values()], by_filter


def ids(first: int, last: int) -> list[str]:
    return [f"d{n}" for n in range(first, last + 1)]


def test_ranks_are_a_window_from_one_on() -> None:
    found, by_filter = mined(0.0, ranks=(3, 5), max_share=None)
    assert found == ids(2, 4)
    assert by_filter == {"none": 3}


def test_max_score_bounds_the_score_itself() -> None:
    found, by_filter = mined(100.0, max_score=15.0)
    assert found == ids(5, 19)
    assert by_filter == {"max_score": 5, "none": 15}


@pytest.mark.parametrize("positives", [(10.0,), (10.0, 2.0), (0.0, 10.0)])
def test_max_share_bounds_the_score_by_that_of_the_best_positive(
    positives: tuple[float, ...],
) -> None:
    found, by_filter = mined(*positives, max_share=0.9)
    assert found == ids(11, 19)  # scores of 9 and less
    assert by_filter == {"max_share": 11, "none": 9}


@pytest.mark.parametrize(
    ("positives", "share", "most"),
    [
        ((0.8, 0.2), 0.95, 0.76),
        ((-0.5,), 0.95, -0.525),
        ((-0.5,), 1.0, -0.5),
        ((0.0,), 0.5, 0.0),
        ((-np.inf, 4.0), 0.5, 2.0),
        ((-np.inf,), 1.0, -np.inf),
        ((-np.inf,), None, np.inf),
    ],
)
def test_the_ceiling_is_never_above_the_positive(
    positives: tuple[float, ...], share: float | None, most: float
) -> None:
    assert ceiling(positives, share) == pytest.approx(most)


def test_known_positives_and_the_query_are_no_negatives_in_any_spelling() -> None:
    texts = {"a": "A  QUERY", "b": "ｋｎｏｗｎ one", "c": "new", "d": " New ", "e": "other"}
    ranking = Ranking(dict.fromkeys(texts, 1.0), [9.0])
    rules = Rules(max_overlap=None)
    found, by_filter = negatives_of(ranking, texts, "a query", ["Known one"], rules, 0)
    assert list(found) == ["new", "other"]
    assert by_filter == {"repeated": 2, "positive": 1, "none": 2}


@pytest.mark.parametrize(
    ("a", "b", "share"),
    [
        ("one two three four", "One, two; three four!", 1.0),
        ("one two three four", "zero one two three five", 1 / 2),
        ("one two three", "zero one two three five", 1.0),
        ("one two three four five six", "one two three four nine ten", 2 / 4),
        ("one two three one two three", "one two three", 1.0),
        ("one two", "one two", 1.0),
        ("one two", "one two three", 0.0),
        ("...", "one", 0.0),
    ],
)
def test_overlap_is_the_share_of_runs_of_three_words(a: str, b: str, share: float) -> None:
    assert overlap(a, b) == overlap(b, a) == pytest.approx(share)


def test_a_text_too_near_to_any_positive_is_taken() -> None:
    near = "It is told that " + TEXTS["d3"]
    found, by_filter = mined(30.0, known=("Nothing alike.", near), max_overlap=0.8)
    assert found == [id_ for id_ in TEXTS if id_ != "d3"]
    assert by_filter == {"none": 19, "max_overlap": 1}
    assert mined(30.0, known=(near,), max_overlap=1.0)[0] == list(TEXTS)


def test_ids_of_no_document_only_take_up_a_rank() -> None:
    ranking = Ranking({"gone": 9.0} | SCORES, [30.0])
    found, by_filter = negatives_of(ranking, TEXTS, "q", ["p"], Rules(ranks=(1, 2)), 0)
    assert [source["rank"] for source in found.values()] == [2]
    assert by_filter == {"none": 1}


def test_the_best_are_taken_first_and_a_draw_goes_by_seed_and_row() -> None:
    assert mined(30.0, negatives=4)[0] == ids(0, 3)
    drawn = [
        mined(30.0, negatives=4, seed=seed, row=row)[0]
        for seed, row in ((1, 0), (1, 0), (1, 1), (2, 0))
    ]
    assert drawn[0] == drawn[1]
    assert len({tuple(one) for one in drawn}) == 3
    for one in drawn:
        assert len(set(one)) == 4
        assert one == sorted(one, key=list(TEXTS).index)  # the best first
    left = {id_ for row in range(60) for id_ in mined(30.0, negatives=4, seed=0, row=row)[0]}
    assert left == set(TEXTS)
    assert mined(30.0, negatives=25, seed=0)[0] == list(TEXTS)
