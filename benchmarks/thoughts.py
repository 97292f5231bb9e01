"""What latent thoughts hold, step by step: the document that a state ranks first by itself, what it
would say next, and whose words that is: the query's, the relevant documents', the rationale's.

Words are compared as BM25 compares them: by stems, without stop words. A token is a word's where
the one begins with the other and both have three letters or more. What stands in the query counts
as the query's alone. The document and the rationale of another query are the control.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from laser_jax.batch import Array, Tokens
from laser_jax.config import RetrieverConfig
from laser_jax.data.tokenization import PromptTokenizer, load_tokenizer, right_pad
from laser_jax.encoder import backbone_for, load_pretrained
from laser_jax.evaluate.beir import BeirDataset
from laser_jax.losses import normalize
from laser_jax.mine.bm25 import tokenize
from laser_jax.modeling.backbone import Variables
from laser_jax.thinking import top_tokens
from laser_jax.views import latent_view

TEXTS = ("query", "document", "another's document", "rationale", "another's rationale")
OTHER, NO_WORD = "none of its own", "no word"
KINDS = (*TEXTS, OTHER, NO_WORD)
TOP = 5  # tokens of a step


def words(model: Path, dataset: BeirDataset) -> list[dict[str, float]]:
    """For each of the model's K steps the share of its likeliest tokens, of all queries, that are
    each text's. Those of `TEXTS` overlap."""
    variables, config = load_pretrained(model)
    prompts = PromptTokenizer(load_tokenizer(model), config.prompt)
    rows = [prompts.query(q.text, q.instruction or "") for q in dataset.queries.values()]
    nowhere_CD = np.zeros((1, config.backbone.hidden_size), np.float32)
    said = read_trajectories(variables, config, rows, nowhere_CD, top=TOP).tokens_QKn
    counts: list[Counter[str]] = [Counter() for _ in range(config.num_thinking_steps)]
    for ids_Kn, stems in zip(said.tolist(), _stems(dataset), strict=True):
        for count, ids_n in zip(counts, ids_Kn, strict=True):
            for pieces in tokenize([str(prompts.tokenizer.decode([id_])) for id_ in ids_n]):
                kinds = {kind for kind in TEXTS if any(_among(p, stems[kind]) for p in pieces)}
                own = kinds & {"query", "document", "rationale"}
                count.update({"query"} if "query" in own else kinds)
                count.update([] if own else [OTHER if pieces else NO_WORD])
    return [{k: count[k] / (TOP * len(rows)) for k in KINDS} for count in counts]


def _among(piece: str, stems: set[str]) -> bool:
    long = [stem for stem in stems if len(stem) > 2]
    return len(piece) > 2 and any(piece.startswith(s) or s.startswith(piece) for s in long)


def _stems(dataset: BeirDataset) -> Iterator[dict[str, set[str]]]:
    """For every query the stems of the texts of `TEXTS`; those of the others without its own."""
    documents = {document.id: document.text for document in dataset.documents}
    queries = list(dataset.queries.values())
    relevant = [
        " ".join(documents[id_] for id_, grade in dataset.qrels.get(q.id, {}).items() if grade > 0)
        for q in queries
    ]
    texts = ([q.text for q in queries], relevant, [q.reasoning or "" for q in queries])
    asked, found, reasons = ([set(words) for words in tokenize(part)] for part in texts)
    for i in range(len(queries)):
        others = (found[i], found[i - 1], reasons[i], reasons[i - 1])
        yield dict(zip(TEXTS, (asked[i], *(o - asked[i] for o in others)), strict=True))


class Trajectories(NamedTuple):
    """A reading of every state of Q queries."""

    first_QK: Array
    """int32, the document nearest to the state alone, as the trajectory loss compares them."""
    tokens_QKn: Array
    """int32, the likeliest next tokens, best first."""
    entropy_QK: Array
    """float32, of the next-token distribution, in nats."""


def read_trajectories(
    variables: Variables,
    config: RetrieverConfig,
    rows: Sequence[Sequence[int]],
    documents_CD: np.ndarray,
    *,
    top: int = 1,
    batch_size: int = 64,
) -> Trajectories:
    """Reads every state of queries, rows of token ids; `documents_CD` are float32 unit rows."""
    backbone = backbone_for(config, variables)
    # queries are repeated to fill the last batch
    ids_QT, lengths_Q = right_pad([*rows, *[rows[-1]] * (-len(rows) % batch_size)], 0, 8)

    @jax.jit
    def read(variables: Variables, tokens: Tokens) -> Trajectories:
        K, pooling = config.num_thinking_steps, config.pooling
        hidden_BKD = latent_view(backbone, variables, tokens, K, pooling)
        scores_BKC = jnp.einsum("bkd,cd->bkc", normalize(hidden_BKD), documents_CD)
        said = top_tokens(backbone, variables, hidden_BKD, top)
        return Trajectories(scores_BKC.argmax(-1), said.ids_BKn, said.entropy_BK)

    variables, count = jax.device_put(variables), len(ids_QT) // batch_size
    batches = zip(np.split(ids_QT, count), np.split(lengths_Q, count), strict=True)
    parts = [jax.device_get(read(variables, Tokens(*batch))) for batch in batches]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[: len(rows)], *parts)


def shares(found_QK: Array, wanted_QH: np.ndarray) -> np.ndarray:
    """[K, H] float64, the share of queries of which step k holds thing h."""
    return (found_QK[:, :, None] == wanted_QH[:, None, :]).mean(axis=0)
