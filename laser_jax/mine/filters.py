"""Which candidates become negatives: those that no filter takes.

The score of a positive bounds those of the negatives (TopK-PercPos of NV-Retriever, arXiv
2407.15831): what scores almost as well may well be a positive that nobody has marked.
"""

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from laser_jax.data.schema import same_text
from laser_jax.mine.candidates import Ranking
from laser_jax.settings import require, require_in


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which candidates are negatives, and how many of them."""

    negatives: int = 7
    """Of a row, at most."""
    ranks: tuple[int, int] = (1, 100)
    """The first and the last rank that is looked at, from 1, positives counted."""
    max_share: float | None = 0.95
    """The largest score of a negative, as a share of the row's best positive's. null: no bound."""
    max_score: float | None = None
    """The largest score of a negative. null: no bound."""
    max_overlap: float | None = 0.8
    """The largest share of its runs of three words that a negative has in common with a positive,
    or of the positive's if those are fewer. null: no bound."""
    seed: int | None = None
    """Draws among what is left. null: the best ranked."""

    def __post_init__(self) -> None:
        require_in("[1, inf)", self, "", "negatives", "ranks")
        require(self.ranks[0] <= self.ranks[1], f"ranks must ascend, got {self.ranks}")
        require_in("(0, 1]", self, "", "max_share", "max_overlap")
        require_in("[0, inf)", self, "", "seed")


@functools.lru_cache(65_536)
def _runs(text: str) -> frozenset[tuple[str, ...]]:
    """The runs of three words; of a shorter text the whole."""
    words = re.findall(r"\w+", same_text(text))
    shifted = (words[i:] for i in range(min(3, len(words))))
    return frozenset(zip(*shifted, strict=False))


def overlap(a: str, b: str) -> float:
    """The share of the runs of three words, of the text with fewer, that the other holds too: 1
    where one contains the other."""
    fewer, others = sorted((_runs(a), _runs(b)), key=len)
    return len(fewer & others) / max(len(fewer), 1)


def ceiling(positives: Sequence[float], share: float | None) -> float:
    """The largest score that a negative may have beside positives of these scores: `share` of the
    best one s, or, as s may be negative, s - (1 - share) |s|. inf where `share` is None."""
    best = np.inf if share is None else max(positives)
    return best if share is None or np.isinf(best) else best - (1 - share) * abs(best)


def negatives_of(
    ranking: Ranking,
    documents: Mapping[str, str],
    query: str,
    positives: Sequence[str],
    rules: Rules,
    row: int,
) -> tuple[dict[str, dict[str, Any]], Counter[str]]:
    """The texts of a row's negatives, by rank, each with its id, rank and score; and how many
    candidates each filter took, or "none". A candidate that is no document only takes up a rank.
    `positives` are those of all rows with this query, as in training's mask of false negatives; a
    draw is a function of the seed and of `row`, the row's index."""
    known, seen = set(map(same_text, positives)), {same_text(query)}
    most, by_filter = ceiling(ranking.positives, rules.max_share), Counter[str]()
    left: list[tuple[str, dict[str, Any]]] = []
    for rank, (id_, score) in enumerate(ranking.candidates.items(), start=1):
        if not rules.ranks[0] <= rank <= rules.ranks[1] or id_ not in documents:
            continue
        text = documents[id_]
        form, taken_by = same_text(text), "none"
        if form in known:
            taken_by = "positive"
        elif form in seen:
            taken_by = "repeated"
        elif rules.max_score is not None and score > rules.max_score:
            taken_by = "max_score"
        elif score > most:
            taken_by = "max_share"
        elif any(overlap(text, positive) > (rules.max_overlap or 1) for positive in positives):
            taken_by = "max_overlap"
        else:
            left.append((text, {"id": id_, "rank": rank, "score": score}))
        seen.add(form)
        by_filter[taken_by] += 1
    places = np.arange(len(left))
    if rules.seed is not None:
        places = np.random.default_rng((rules.seed, row)).permutation(places)
    return dict(left[i] for i in sorted(places[: rules.negatives].tolist())), by_filter
