"""Retrieval metrics with the semantics of trec_eval.

A ranking is ordered by score, descending, then by document id, descending. trec_eval stores scores
as C floats, so two scores that agree in float32 are a tie. Every value equals that of pytrec_eval
to the last digit: sums run in rank order in double precision.

Which queries count is pytrec_eval's rule too: those that are in the run and have judgements. A
judged query without any relevant document scores 0; a query that the run lacks is left out, so a
run must hold an (empty) entry for a query that found nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Run = dict[str, dict[str, float]]
"""Query id -> document id -> score."""
Qrels = dict[str, dict[str, int]]
"""Query id -> document id -> graded relevance; 1 and above is relevant."""


def rank_documents(scores: Mapping[str, float]) -> list[str]:
    """The documents of one query in trec_eval's order.

    Raises:
        ValueError: when a score is NaN, which has no place in any order.
    """
    with np.errstate(over="ignore"):  # a C float overflows to infinity as well
        values = np.fromiter(scores.values(), np.float64, len(scores)).astype(np.float32)
    if np.isnan(values).any():
        document = list(scores)[int(np.isnan(values).argmax())]
        raise ValueError(f"the score of document {document!r} is NaN; a ranking needs numbers")
    ranked = sorted(zip(values.tolist(), scores, strict=True), reverse=True)
    return [document for _, document in ranked]


@dataclass(frozen=True)
class _JudgedRanking:
    """One query's ranking as its grades, in rank order, beside all the grades that were given."""

    retrieved: list[int]
    judged: list[int]

    @property
    def num_relevant(self) -> int:
        return sum(grade >= 1 for grade in self.judged)


def _discounted_gain(grades: Sequence[int]) -> float:
    # math.log2 is C's, as in trec_eval; numpy's vectorised one may differ in the last digit.
    total = 0.0
    for index, grade in enumerate(grades):
        if grade > 0:
            total += grade / math.log2(index + 2)
    return total


def _ndcg(ranking: _JudgedRanking, cutoff: int) -> float:
    """trec_eval's ndcg_cut: gain = grade, discount = log2(rank + 1), ideal over all judgements."""
    ideal = _discounted_gain(sorted(ranking.judged, reverse=True)[:cutoff])
    return _discounted_gain(ranking.retrieved[:cutoff]) / ideal if ideal > 0 else 0.0


def _recall(ranking: _JudgedRanking, cutoff: int) -> float:
    """Share of the relevant documents within the first `cutoff`."""
    if ranking.num_relevant == 0:
        return 0.0
    return sum(grade >= 1 for grade in ranking.retrieved[:cutoff]) / ranking.num_relevant


def _precision(ranking: _JudgedRanking, cutoff: int) -> float:
    """Relevant documents within the first `cutoff`, over `cutoff` however few were retrieved."""
    return sum(grade >= 1 for grade in ranking.retrieved[:cutoff]) / cutoff


def _reciprocal_rank(ranking: _JudgedRanking, cutoff: int) -> float:
    """1 / rank of the first relevant document, 0 when it is not within the first `cutoff`."""
    for index, grade in enumerate(ranking.retrieved[:cutoff]):
        if grade >= 1:
            return 1.0 / (index + 1)
    return 0.0


def _average_precision(ranking: _JudgedRanking, cutoff: int) -> float:
    """trec_eval's map_cut: precision at each relevant rank, over all relevant documents."""
    if ranking.num_relevant == 0:
        return 0.0
    total, found = 0.0, 0
    for index, grade in enumerate(ranking.retrieved[:cutoff]):
        if grade >= 1:
            found += 1
            total += found / (index + 1)
    return total / ranking.num_relevant


def _hit(ranking: _JudgedRanking, cutoff: int) -> float:
    """1 when a relevant document is within the first `cutoff`, else 0."""
    return float(any(grade >= 1 for grade in ranking.retrieved[:cutoff]))


_METRICS: dict[str, Callable[[_JudgedRanking, int], float]] = {
    "nDCG": _ndcg,
    "Recall": _recall,
    "P": _precision,
    "MRR": _reciprocal_rank,
    "MAP": _average_precision,
    "Hit": _hit,
}


def _parse_metric(name: str) -> tuple[Callable[[_JudgedRanking, int], float], int]:
    match = re.fullmatch(r"([A-Za-z]+)@([1-9][0-9]*)", name)
    if match is None or match[1] not in _METRICS:
        raise ValueError(
            f"unknown metric {name!r}: wanted NAME@CUTOFF, for example nDCG@10, with NAME one of "
            f"{', '.join(_METRICS)}"
        )
    return _METRICS[match[1]], int(match[2])


def evaluate_run(
    run: Mapping[str, Mapping[str, float]],
    qrels: Mapping[str, Mapping[str, int]],
    metrics: Sequence[str] = ("nDCG@10", "Recall@100"),
) -> dict[str, dict[str, float]]:
    """The metrics of every query that the run holds and the qrels judge.

    Args:
        run: query id -> document id -> score.
        qrels: query id -> document id -> graded relevance. Documents without one count as 0.
        metrics: NAME@CUTOFF with NAME one of nDCG (linear gain), Recall, P, MRR, MAP, Hit.

    Returns:
        Query id, in the order of the run -> metric as named in `metrics` -> value in [0, 1].

    Raises:
        ValueError: on an unknown metric or a NaN score.
    """
    parsed = {name: _parse_metric(name) for name in metrics}
    per_query = {}
    for query, scores in run.items():
        if not qrels.get(query):
            continue
        grades = qrels[query]
        ranking = _JudgedRanking(
            retrieved=[grades.get(document, 0) for document in rank_documents(scores)],
            judged=list(grades.values()),
        )
        per_query[query] = {name: metric(ranking, cut) for name, (metric, cut) in parsed.items()}
    return per_query


def mean(per_query: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean of every metric over the queries of `evaluate_run`.

    Raises:
        ValueError: when there is no query, as when run and qrels name different ones.
    """
    if not per_query:
        raise ValueError("no query to average over: no query of the run has judgements")
    names = next(iter(per_query.values()))
    return {name: float(np.mean([values[name] for values in per_query.values()])) for name in names}
