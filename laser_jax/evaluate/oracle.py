"""What it would be worth to choose the number of thinking steps query by query.

Letters: Q queries, K numbers of thinking steps.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from laser_jax.evaluate.metrics import Qrels, evaluate_run, without_excluded
from laser_jax.evaluate.significance import paired_bootstrap
from laser_jax.search.trec import Run


@dataclass(frozen=True)
class Choice:
    """A K of its own for each query against one for all: mean values of the metric, and the
    difference with its interval over queries."""

    queries: int
    fixed: float
    """With the K that is best for all."""
    chosen: float
    """With the K of each query."""
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class StepsOracle:
    """The best K of each query. Of equals it is the smallest K, for one query and for all."""

    metric: str
    fixed_K: int
    """The K with the highest mean."""
    mean_K: float
    """The mean of the queries' best K."""
    shares: dict[str, float]
    """K -> share of the queries whose best it is."""
    oracle: Choice
    """The best K of each query, by the judgements that score it: above `fixed` by chance alone."""
    control: Choice | None
    """K chosen by one half of a query's relevant documents and scored by the other, over queries
    with two or more; None where there is no such query."""


def steps_oracle(runs: Mapping[int, Run], qrels: Qrels, metric: str) -> StepsOracle | None:
    """Compares the best K of each query with the best one for all, and what is left of the gain
    where the judgements that choose are not those that score. None of a single K. `runs` are K ->
    ranking, of the same queries."""
    if len(runs) < 2:
        return None
    Ks, values_KQ = np.array(sorted(runs)), _values(runs, qrels, metric)
    best_Q, fixed = values_KQ.argmax(axis=0), int(values_KQ.mean(axis=1).argmax())
    return StepsOracle(
        metric=metric,
        fixed_K=int(Ks[fixed]),
        mean_K=float(Ks[best_Q].mean()),
        shares={str(K): float((best_Q == place).mean()) for place, K in enumerate(Ks)},
        oracle=_choice(_picked(values_KQ, best_Q), values_KQ[fixed]),
        control=_control(runs, qrels, metric),
    )


def _control(runs: Mapping[int, Run], qrels: Qrels, metric: str) -> Choice | None:
    """Each half chooses once and scores once. A ranking is judged by one half without the documents
    of the other."""
    halves = _halves(qrels)
    if not halves[0]:
        return None
    values = []
    for judged, other in (halves, halves[::-1]):
        hidden = {query: [d for d, grade in g.items() if grade > 0] for query, g in other.items()}
        left = {K: without_excluded(run, hidden) for K, run in runs.items()}
        values.append(_values(left, judged, metric))
    chosen, fixed = [], []
    for choosing_KQ, scoring_KQ in (values, values[::-1]):
        chosen.append(_picked(scoring_KQ, choosing_KQ.argmax(axis=0)))
        fixed.append(scoring_KQ[choosing_KQ.mean(axis=1).argmax()])
    return _choice(np.mean(chosen, axis=0), np.mean(fixed, axis=0))


def _halves(qrels: Qrels) -> tuple[Qrels, Qrels]:
    """The judgements of the queries with two relevant documents or more, each with one half of them
    drawn by chance, but always the same."""
    rng = np.random.default_rng(0)
    halves: tuple[Qrels, Qrels] = ({}, {})
    for query in sorted(qrels):
        relevant = sorted(document for document, grade in qrels[query].items() if grade > 0)
        others = {document: grade for document, grade in qrels[query].items() if grade <= 0}
        if len(relevant) > 1:
            order = rng.permutation(relevant).tolist()
            for half, drawn in zip(halves, (order[::2], order[1::2]), strict=True):
                half[query] = others | {document: qrels[query][document] for document in drawn}
    return halves


def _values(runs: Mapping[int, Run], qrels: Qrels, metric: str) -> np.ndarray:
    """The metric [K, Q] float64, K ascending, of the queries that are ranked and judged."""
    found = [evaluate_run(runs[K], qrels, [metric]) for K in sorted(runs)]
    queries = dict.fromkeys(query for values in found for query in values)
    return np.array([[values[query][metric] for query in queries] for values in found])


def _picked(values_KQ: np.ndarray, places_Q: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values_KQ, places_Q[None], axis=0)[0]


def _choice(chosen_Q: np.ndarray, fixed_Q: np.ndarray) -> Choice:
    interval = paired_bootstrap(chosen_Q.tolist(), fixed_Q.tolist())
    means = float(fixed_Q.mean()), float(chosen_Q.mean())
    return Choice(len(fixed_Q), *means, **asdict(interval))
