"""Retrieval metrics with the semantics of trec_eval.

Documents are ranked by `laser_jax.search.trec.rank_documents`, ties included. Every value equals
that of pytrec_eval to the last digit: sums run in rank order in double precision.

The queries that count are pytrec_eval's too: those that are in the run, if with an empty entry, and
have judgements. A judged query without any relevant document scores 0.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from laser_jax.search.trec import Run, rank_documents
from laser_jax.settings import ConfigError, require

METRICS = ("nDCG@10", "Recall@100", "MRR@10")
"""Those of the programs."""
Qrels = dict[str, dict[str, int]]
"""Query id -> document id -> graded relevance; 1 and above is relevant."""


# Every metric takes the grades of the first documents of a ranking, and all grades of its query.


def _gain(gains: Sequence[int]) -> float:
    # math.log2 is C's, as in trec_eval; numpy's vectorised one may differ in the last digit.
    # No `sum`: from Python 3.12 on it compensates for rounding, and trec_eval does not.
    total = 0.0
    for rank, gain in enumerate(gains, start=1):
        if gain > 0:
            total += gain / math.log2(rank + 1)
    return total


def _ndcg(grades: list[int], judged: list[int], cutoff: int) -> float:
    """trec_eval's ndcg_cut: gain = grade, discount = log2(rank + 1), ideal over all judgements."""
    ideal = _gain(sorted(judged, reverse=True)[:cutoff])
    return _gain(grades) / ideal if ideal > 0 else 0.0


def _exponential_ndcg(grades: list[int], judged: list[int], cutoff: int) -> float:
    """nDCG with gain = 2^grade - 1 (Burges et al. 2005); the same as `_ndcg` on grades 0 and 1."""
    most = max(judged, default=0)
    if most > 1000:
        raise ValueError(f"nDCG_exp wants grades up to 1000, got {most}: is it a grade?")
    retrieved, ideal = ([2 ** max(g, 0) - 1 for g in of] for of in (grades, judged))
    return _ndcg(retrieved, ideal, cutoff)


def _recall(grades: list[int], judged: list[int], cutoff: int) -> float:
    """Share of the relevant documents within the first `cutoff`."""
    return _relevant(grades) / max(_relevant(judged), 1)


def _precision(grades: list[int], judged: list[int], cutoff: int) -> float:
    """Relevant documents within the first `cutoff`, over `cutoff` however few were retrieved."""
    return _relevant(grades) / cutoff


def _reciprocal_rank(grades: list[int], judged: list[int], cutoff: int) -> float:
    """1 / rank of the first relevant document, 0 when it is not within the first `cutoff`."""
    return next((1.0 / rank for rank, grade in enumerate(grades, start=1) if grade >= 1), 0.0)


def _average_precision(grades: list[int], judged: list[int], cutoff: int) -> float:
    """trec_eval's map_cut: precision at each relevant rank, over all relevant documents."""
    total, found = 0.0, 0
    for rank, grade in enumerate(grades, start=1):
        if grade >= 1:
            found += 1
            total += found / rank
    return total / max(_relevant(judged), 1)


def _hit(grades: list[int], judged: list[int], cutoff: int) -> float:
    """1 when a relevant document is within the first `cutoff`, else 0."""
    return float(_relevant(grades) > 0)


def _relevant(grades: Sequence[int]) -> int:
    return sum(grade >= 1 for grade in grades)


_Metric = Callable[[list[int], list[int], int], float]
_METRICS: dict[str, _Metric] = {
    "nDCG": _ndcg,
    "nDCG_exp": _exponential_ndcg,
    "Recall": _recall,
    "P": _precision,
    "MRR": _reciprocal_rank,
    "MAP": _average_precision,
    "Hit": _hit,
}


def _parse_metric(name: str) -> tuple[_Metric, int]:
    match = re.fullmatch(r"([A-Za-z_]+)@([1-9][0-9]*)", name)
    if match is None or match[1] not in _METRICS:
        wanted = f"NAME@CUTOFF, for example nDCG@10, with NAME one of {', '.join(_METRICS)}"
        raise ConfigError(f"metrics: unknown metric {name!r}: wanted {wanted}")
    return _METRICS[match[1]], int(match[2])


def deepest_cutoff(names: Sequence[str]) -> int:
    """How many documents of a ranking the metrics look at. Raises a ConfigError where there is no
    metric or an unknown one."""
    require(bool(names), "metrics must name one metric at least")
    return max(_parse_metric(name)[1] for name in names)


def evaluate_run(
    run: Mapping[str, Mapping[str, float]],
    qrels: Mapping[str, Mapping[str, int]],
    metrics: Sequence[str] = ("nDCG@10", "Recall@100"),
) -> dict[str, dict[str, float]]:
    """The metrics of every query that the run holds and the qrels judge: query id, in the order of
    the run -> metric -> value in [0, 1]. Documents without a grade count as 0. `metrics` are
    NAME@CUTOFF with NAME one of nDCG (linear gain), nDCG_exp (gain 2^grade - 1), Recall, P, MRR,
    MAP, Hit. Raises a ValueError on an unknown metric, a NaN score or a grade beyond floats."""
    parsed = {name: _parse_metric(name) for name in metrics}
    per_query = {}
    for query, scores in run.items():
        if not qrels.get(query):
            continue
        judged = list(qrels[query].values())
        grades = [qrels[query].get(document, 0) for document in rank_documents(scores)]
        per_query[query] = {
            name: metric(grades[:cut], judged, cut) for name, (metric, cut) in parsed.items()
        }
    return per_query


def without_relevant(qrels: Mapping[str, Mapping[str, int]]) -> int:
    """How many judged queries have no relevant document."""
    return sum(max(grades.values()) < 1 for grades in qrels.values())


def without_excluded(run: Run, excluded: Mapping[str, Collection[str]]) -> Run:
    """The run without the documents that a query must not be given (BRIGHT)."""
    removed = {query: set(excluded.get(query, ())) for query in run}
    return {
        query: {d: score for d, score in scores.items() if d not in removed[query]}
        for query, scores in run.items()
    }


def mean(per_query: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean of every metric over queries. Raises a ValueError when there is none."""
    if not per_query:
        raise ValueError("no query to average over: do run and judgements name different queries?")
    names = next(iter(per_query.values()))
    return {name: float(np.mean([values[name] for values in per_query.values()])) for name in names}
