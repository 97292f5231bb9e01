"""What latent thoughts say: whether the likeliest tokens of each step are words of the query, of
the relevant documents, of the written rationale, or of none.

Words are compared as BM25 compares them: by stems, without stop words. A token is a word's where
the one begins with the other and both have three letters or more. What stands in the query counts
as the query's alone. The document and the rationale of another query are the control.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from laser_jax.evaluate.beir import BeirDataset
from laser_jax.mine.bm25 import tokenize
from laser_jax.think.thought import Inspector

TEXTS = ("query", "document", "another's document", "rationale", "another's rationale")
OTHER, NO_WORD = "none of its own", "no word"
KINDS = (*TEXTS, OTHER, NO_WORD)
TOP = 5
"""Tokens of a step."""


def shares(model: str | Path, dataset: BeirDataset, steps: int) -> list[dict[str, float]]:
    """For each step the share of its likeliest tokens, of all queries, that are each text's. Those
    of `TEXTS` overlap."""
    inspector = Inspector.load(model, None, top_tokens=TOP, top_documents=1)
    counts: list[Counter[str]] = [Counter() for _ in range(steps)]
    for (text, instruction), stems in _stems(dataset):
        thought = inspector.think(text, instruction=instruction, num_thinking_steps=steps)
        for count, step in zip(counts, thought.steps, strict=True):
            for pieces in tokenize([token.text for token in step.tokens]):
                kinds = {kind for kind in TEXTS if any(_among(p, stems[kind]) for p in pieces)}
                own = kinds & {"query", "document", "rationale"}
                count.update({"query"} if "query" in own else kinds)
                count.update([] if own else [OTHER if pieces else NO_WORD])
    total = TOP * len(dataset.queries)
    return [{kind: count[kind] / total for kind in KINDS} for count in counts]


def _among(piece: str, stems: set[str]) -> bool:
    long = [stem for stem in stems if len(stem) > 2]
    return len(piece) > 2 and any(s.startswith(piece) or piece.startswith(s) for s in long)


def _stems(dataset: BeirDataset) -> Iterator[tuple[tuple[str, str | None], dict[str, set[str]]]]:
    """Every query with its instruction, and the stems of the texts of `TEXTS`; those of the others
    without the query's."""
    documents = {document.id: document.text for document in dataset.documents}
    queries = list(dataset.queries.values())
    relevant = [
        " ".join(documents[id_] for id_, grade in dataset.qrels.get(q.id, {}).items() if grade > 0)
        for q in queries
    ]
    texts = ([q.text for q in queries], relevant, [q.reasoning or "" for q in queries])
    asked, found, reasons = ([set(words) for words in tokenize(part)] for part in texts)
    for i, query in enumerate(queries):
        others = (found[i], found[i - 1], reasons[i], reasons[i - 1])
        own = (asked[i], *(other - asked[i] for other in others))
        yield (query.text, query.instruction), dict(zip(TEXTS, own, strict=True))
