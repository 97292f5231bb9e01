"""The best number of thinking steps of each query: against plain loops, and against chance."""

from __future__ import annotations

import math

import numpy as np
import pytest

from laser_jax.evaluate.oracle import StepsOracle, steps_oracle
from laser_jax.evaluate.significance import paired_bootstrap

METRIC, KS, QUERIES = "nDCG@10", (1, 2, 4), 150
Ranks = dict[int, dict[str, dict[str, float]]]


def ranked(*ids: str) -> dict[str, float]:
    return {id_: -float(place) for place, id_ in enumerate(ids)}


def worlds(seed: int, signal: float) -> tuple[Ranks, dict[str, dict[str, int]]]:
    """Rankings of 30 documents by noise. Four of them are relevant, and lifted by `signal` at the
    one K that is the query's own."""
    rng, runs, qrels = np.random.default_rng(seed), {K: {} for K in KS}, {}
    for q in range(QUERIES):
        own, level_D = KS[q % 3], np.where(np.arange(30) < 4, 0.5, 0.0)
        qrels[f"q{q}"] = {f"d{d}": int(d < 4) for d in range(6)}
        for K in KS:
            lift_D = signal * (np.arange(30) < 4) * (own == K)
            scores_D = level_D + lift_D + rng.normal(size=30)
            runs[K][f"q{q}"] = {f"d{d}": float(score) for d, score in enumerate(scores_D)}
    return runs, qrels


def oracle_of(runs: Ranks, qrels: dict[str, dict[str, int]]) -> StepsOracle:
    found = steps_oracle(runs, qrels, METRIC)
    assert found is not None
    return found


def test_the_oracle_equals_a_loop_over_queries() -> None:
    runs, qrels = worlds(0, 1.0)
    values: dict[int, list[float]] = {K: [] for K in KS}
    for query, judged in qrels.items():
        ideal = sum(1 / math.log2(rank + 1) for rank in range(1, 5))
        for K in KS:
            best = sorted(runs[K][query], key=lambda d: -runs[K][query][d])[:10]
            gains = [judged.get(d, 0) / math.log2(rank + 1) for rank, d in enumerate(best, 1)]
            values[K].append(sum(gains) / ideal)
    means = {K: float(np.mean(values[K])) for K in KS}
    fixed = max(KS, key=lambda K: (means[K], -K))
    chosen = [max(KS, key=lambda K: (values[K][q], -K)) for q in range(QUERIES)]
    best = [values[K][q] for q, K in enumerate(chosen)]
    found = oracle_of(runs, qrels)
    assert (found.metric, found.fixed_K) == (METRIC, fixed)
    assert found.mean_K == pytest.approx(np.mean(chosen))
    assert found.shares == pytest.approx({str(K): chosen.count(K) / QUERIES for K in KS})
    assert found.oracle.fixed == pytest.approx(means[fixed])
    assert found.oracle.chosen == pytest.approx(np.mean(best))
    wanted = paired_bootstrap(best, values[fixed])
    assert found.oracle.difference == pytest.approx(wanted.difference)
    assert (found.oracle.low, found.oracle.high) == pytest.approx((wanted.low, wanted.high))


def test_of_noise_the_oracle_gains_and_the_control_does_not() -> None:
    found = oracle_of(*worlds(1, 0.0))
    assert found.oracle.low > 0.05
    assert found.control is not None
    assert found.control.queries == QUERIES
    assert found.control.low < 0 < found.control.high


def test_where_queries_have_a_k_of_their_own_the_control_gains_too() -> None:
    found = oracle_of(*worlds(2, 3.0))
    assert found.control is not None
    assert 0.1 < found.control.low < found.control.difference
    assert found.control.fixed + found.control.difference == pytest.approx(found.control.chosen)


def test_each_half_is_judged_without_the_documents_of_the_other() -> None:
    """So both relevant documents, wherever they stand before each other, are first for their
    half."""
    runs = {1: {"q": ranked("a", "b", "x")}, 2: {"q": ranked("b", "a", "x")}}
    found = oracle_of(runs, {"q": {"a": 1, "b": 1, "x": 0}})
    assert found.control is not None
    assert (found.control.fixed, found.control.chosen) == (1, 1)


def test_equals_take_the_smallest_k_and_one_relevant_document_has_no_halves() -> None:
    runs = {K: {"q": ranked("a", "x"), "r": ranked("x")} for K in KS}
    found = oracle_of(runs, {"q": {"a": 1}, "r": {"b": 1}})
    assert (found.fixed_K, found.mean_K) == (1, 1)
    assert found.shares == {"1": 1, "2": 0, "4": 0}
    assert (found.oracle.difference, found.oracle.fixed) == (0, 0.5)
    assert found.control is None


def test_rankings_may_hold_their_queries_in_any_order() -> None:
    runs, qrels = worlds(0, 1.0)
    turned = {K: dict(reversed(run.items())) if K == 2 else run for K, run in runs.items()}
    assert oracle_of(turned, qrels) == oracle_of(runs, qrels)


def test_a_single_k_leaves_nothing_to_choose() -> None:
    assert steps_oracle({3: {"q": ranked("a")}}, {"q": {"a": 1}}, METRIC) is None
