"""Intervals and p-values: against exact enumeration, and the claims of their docstrings."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from benchmarks.ablation_table import grouped_bootstrap
from laser_jax.evaluate import significance
from laser_jax.evaluate.significance import holm, paired_bootstrap, permutation_p_value

RNG = np.random.default_rng(0)
A = RNG.random(40).tolist()
B = (np.array(A) - RNG.normal(0.1, 0.2, 40)).tolist()


def test_the_interval_holds_the_difference_and_is_the_same_again() -> None:
    interval = paired_bootstrap(A, B)
    assert interval.difference == pytest.approx(np.mean(A) - np.mean(B))
    assert interval.low < interval.difference < interval.high
    assert paired_bootstrap(A, B) == interval


def test_the_interval_has_the_width_of_the_normal_one() -> None:
    interval = paired_bootstrap(A, B)
    error = np.std(np.subtract(A, B)) / np.sqrt(len(A))
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_blocks_of_any_size_give_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(significance, "RESAMPLES", 500)
    whole = paired_bootstrap(A, B), permutation_p_value(A, B)
    monkeypatch.setattr(significance, "_NUMBERS_AT_A_TIME", 7 * len(A))
    parts = paired_bootstrap(A, B), permutation_p_value(A, B)
    assert parts == whole


def test_one_group_gives_the_interval_of_its_queries() -> None:
    queries, group = paired_bootstrap(A, B), grouped_bootstrap([A], [B])
    assert group.difference == pytest.approx(queries.difference)
    width = queries.high - queries.low
    assert (group.low, group.high) == pytest.approx((queries.low, queries.high), abs=0.05 * width)


def test_groups_are_drawn_again_as_well() -> None:
    """Constant groups leave nothing but which groups are drawn: all 27 draws of three of them."""
    constants = (0.0, 0.25, 1.0)
    interval = grouped_bootstrap([[c] * 9 for c in constants], [[0.0] * 9] * 3, confidence=0.9)
    means = [np.mean(draw) for draw in product(constants, repeat=3)]
    low, high = np.quantile(means, [0.05, 0.95], method="inverted_cdf")
    assert (interval.low, interval.high) == pytest.approx((low, high))


def test_variances_between_groups_and_within_add_up() -> None:
    a = RNG.normal(0, 1, (12, 1)) + RNG.normal(0, 2, (12, 20))
    interval = grouped_bootstrap(a.tolist(), np.zeros_like(a).tolist())
    # means of groups vary by themselves; queries drawn within them add their own share again
    variance = a.mean(axis=1).var() / 12 + a.var(axis=1).mean() / (12 * 20)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * np.sqrt(variance), rel=0.05)


def test_every_group_weighs_the_same() -> None:
    interval = grouped_bootstrap([[1.0], [0.0] * 99], [[0.0], [0.0] * 99])
    assert interval.difference == 0.5
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_the_p_value_is_that_of_all_swaps() -> None:
    a, b = A[:10], B[:10]
    differences = np.subtract(a, b)
    sums = [abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=10)]
    exact = np.mean([s >= abs(differences.sum()) * (1 - 1e-12) for s in sums])
    assert permutation_p_value(a, b) == pytest.approx(exact, abs=0.01)
    assert permutation_p_value(b, a) == pytest.approx(exact, abs=0.01)


def test_equal_runs_differ_with_probability_one_and_no_p_value_is_zero(monkeypatch) -> None:
    assert permutation_p_value(A, A) == 1
    monkeypatch.setattr(significance, "RESAMPLES", 99)
    assert permutation_p_value(np.add(A, 1).tolist(), A) == 1 / 100


def test_p_values_are_false_alarms_as_often_as_they_say(monkeypatch) -> None:
    monkeypatch.setattr(significance, "RESAMPLES", 99)
    rng = np.random.default_rng(3)
    p_values = [
        permutation_p_value(rng.normal(size=20).tolist(), rng.normal(size=20).tolist())
        for _ in range(300)
    ]
    assert np.mean(np.array(p_values) <= 0.1) == pytest.approx(0.1, abs=0.05)


def test_a_single_query_shows_nothing_by_chance() -> None:
    assert paired_bootstrap([0.75], [0.5]) == significance.Interval(0.25, 0.25, 0.25)
    assert permutation_p_value([0.75], [0.5]) == 1


def test_few_queries_are_swapped_in_every_way_once() -> None:
    # only no swap and the swap of all four give so large a difference
    assert permutation_p_value([1.0] * 4, [0.0] * 4) == 2 / 2**4


def test_holm_by_hand() -> None:
    # sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, never falling
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("test", [paired_bootstrap, permutation_p_value])
def test_what_is_not_paired_is_refused(test) -> None:
    with pytest.raises(ValueError, match="the same queries"):
        test([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="at least one"):
        test([], [])
