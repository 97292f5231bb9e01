"""BM25 as Lucene computes it, by the library bm25s: k1 = 0.9, b = 0.4."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from laser_jax.files.terminal import extra

with extra("mine", "BM25"):
    import bm25s
    from Stemmer import Stemmer

_K1, _B = 0.9, 0.4


def tokenize(texts: Sequence[str]) -> list[list[str]]:
    """The tokens of every text: its runs of two or more letters, digits or underscores in lower
    case, without Lucene's 33 English stop words, stemmed by Porter's stemmer."""
    settings = {"stopwords": "en", "stemmer": Stemmer("porter"), "show_progress": False}
    return bm25s.tokenize(list(texts), return_ids=False, **settings)  # type: ignore[return-value]


class BM25:
    """Scores texts by the statistics of a corpus: with the number N of documents, n of those that
    hold a token, f of the token in a text of L tokens and the corpus's mean length M, the sum over
    the query's tokens of log(1 + (N - n + 0.5) / (n + 0.5)) f / (f + k1 (1 - b + b L / M))."""

    def __init__(self, documents: Sequence[Sequence[str]]):
        """Indexes the tokens of C documents, one of which has some."""
        self._index = bm25s.BM25(method="lucene", k1=_K1, b=_B)
        self._index.index(documents, show_progress=False)
        self._count = len(documents)
        self._holding = Counter(token for tokens in documents for token in set(tokens))
        self._mean_length = sum(map(len, documents)) / len(documents)

    def scores(self, query: Sequence[str]) -> np.ndarray:
        """[C] float32, of every document; 0 where it shares no token with the query."""
        known = [token for token in query if token in self._holding]
        return self._index.get_scores(known) if known else np.zeros(self._count, np.float32)

    def score(self, query: Sequence[str], text: Sequence[str]) -> float:
        """The score of any text, which need not be a document."""
        times, penalty = Counter(text), _K1 * (1 - _B + _B * len(text) / self._mean_length)
        return sum(
            math.log1p((self._count - n + 0.5) / (n + 0.5)) * f / (f + penalty)
            for token in query
            if (n := self._holding[token]) and (f := times[token])
        )
