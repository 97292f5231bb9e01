"""Whether two runs differ by more than chance over the same queries.

The tests take values of one metric for the same queries in the same order, [Q], and raise a
ValueError where there are none or lengths differ.

Letters: Q queries, R resamples, P p-values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE, RESAMPLES = 0.95, 10_000
_NUMBERS_AT_A_TIME = 4_000_000
"""Bounds the memory of a block of resamples."""


@dataclass(frozen=True)
class Interval:
    """A mean difference and the interval that holds it with the confidence `CONFIDENCE`."""

    difference: float
    low: float
    high: float


def _differences(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    if len(a) != len(b) or len(a) == 0:
        wanted = "a paired test wants the same queries, at least one"
        raise ValueError(f"{wanted}: got {len(a)} and {len(b)} values")
    return np.asarray(a, np.float64) - np.asarray(b, np.float64)


def paired_bootstrap(a: Sequence[float], b: Sequence[float]) -> Interval:
    """The percentile interval of mean(a - b) when the queries are drawn again with replacement
    (Efron and Tibshirani 1993, section 13.3). All comparisons over one set of queries see the same
    draws, which depend on the number of queries alone."""
    difference_Q = _differences(a, b)
    mean = float(difference_Q.mean())
    if len(difference_Q) == 1:  # every draw is this query, and scipy wants two
        return Interval(mean, mean, mean)
    from scipy import stats  # a second to import, and training has no use for it

    low, high = stats.bootstrap(
        (difference_Q,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, _NUMBERS_AT_A_TIME // len(difference_Q)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(mean, float(low), float(high))


def permutation_p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """The two-sided p-value of mean(a - b) when a and b are swapped by chance, query by query
    (Fisher's randomisation test; Smucker, Allan and Carterette 2007 for its use on rankings).

    p = (1 + the number of random swaps with a difference as large) / (1 + R), never 0. Where there
    are at most R ways to swap, each is taken once, and p is exact.
    """
    difference_Q = _differences(a, b)
    if len(difference_Q) == 1:  # both ways to swap it have the same size, and scipy wants two
        return 1.0
    from scipy import stats

    result = stats.permutation_test(
        (difference_Q,),  # a swap turns the sign of a query's difference
        lambda d_RQ, axis: np.abs(d_RQ.mean(axis=axis)),
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=max(1, _NUMBERS_AT_A_TIME // len(difference_Q)),
        alternative="greater",
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for being several (Holm 1979): whoever calls all those below alpha
    real makes a single false claim or more with a probability of at most alpha."""
    order = np.argsort(p_values, kind="stable")
    scaled_P = np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(scaled_P))
    return corrected.tolist()
