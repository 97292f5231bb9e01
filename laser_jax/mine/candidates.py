"""Rankings of a corpus for training rows: by BM25, by a model, or out of a TREC run.
Documents are a dict of ids and texts. C documents, R rows, D model."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from laser_jax.data.schema import TrainingRow, same_text
from laser_jax.evaluate.beir import read_queries
from laser_jax.files.reading import DataError
from laser_jax.inference.options import SplitConfig, local_mesh
from laser_jax.inference.retriever import EncodingStats, LatentRetriever
from laser_jax.search.matching import unmatched
from laser_jax.search.topk import device_mesh, search
from laser_jax.search.trec import rank_documents, read_trec_run

_log = logging.getLogger(__name__)


class Ranking(NamedTuple):
    """What a retriever says for one row."""

    candidates: dict[str, float]
    """Document id -> score, in trec_eval's order."""
    positives: list[float]
    """The score of each positive, -inf where it has none."""


def rank_by_bm25(
    rows: Sequence[TrainingRow], documents: Mapping[str, str], depth: int
) -> list[Ranking]:
    """Ranks by BM25 of the query's text. A positive is scored whether the corpus holds it or not;
    what shares no token with the query is no candidate. Raises a DataError where no document has a
    token, and an ImportError that names the extra."""
    from laser_jax.mine.bm25 import BM25, tokenize

    ids = sorted(documents, reverse=True)  # so that ties stand in trec_eval's order
    corpus, depth = tokenize([documents[id_] for id_ in ids]), min(depth, len(ids))
    if not any(corpus):
        raise DataError("no document of the corpus has a token for BM25")
    index, rankings = BM25(corpus), []
    for row in tqdm(rows, "bm25", unit="row", disable=None, leave=False):
        query, *positives = tokenize([row.query, *row.positive_passages])
        scores_C = index.scores(query)
        kth = np.partition(scores_C, -depth)[-depth]
        best = np.flatnonzero((scores_C >= kth) & (scores_C > 0))
        best = best[np.argsort(-scores_C[best], kind="stable")][:depth]
        candidates = {ids[i]: float(scores_C[i]) for i in best}
        rankings.append(Ranking(candidates, [index.score(query, text) for text in positives]))
    return rankings


def rank_by_model(
    model: Path,
    how: Mapping[str, Any],
    rows: Sequence[TrainingRow],
    documents: Mapping[str, str],
    depth: int,
) -> list[Ranking]:
    """Ranks by a model's latent view, with each row's own instruction, on all devices of this
    process. A positive that the corpus lacks is embedded like a document. `how` it is loaded, and
    what is raised, are `LatentRetriever.from_pretrained`'s and `encode_query`'s."""
    retriever = LatentRetriever.from_pretrained(model, mesh=local_mesh(SplitConfig()), **how)
    texts, stats = list(documents.values()), EncodingStats()
    texts += dict.fromkeys(t for row in rows for t in row.positive_passages).keys() - set(texts)
    vectors = retriever.encode_document(texts, show_progress_bar=True, stats=stats)
    queries, instructions = [row.query for row in rows], [row.prompt for row in rows]
    queries_RD = retriever.encode_query(queries, instruction=instructions, stats=stats)
    _log.info("%d of %d texts did not fit and were shortened", stats.truncated, stats.texts)
    ids_R, ids_C = [str(r) for r in range(len(rows))], list(documents)
    documents_CD = vectors[: len(ids_C)]
    run = search(queries_RD, documents_CD, ids_R, ids_C, depth, {}, mesh=device_mesh())
    place = {text: i for i, text in enumerate(texts)}
    return [
        Ranking(run[id_], [float(vectors[place[t]] @ query_D) for t in row.positive_passages])
        for id_, row, query_D in zip(ids_R, rows, queries_RD, strict=True)
    ]


def rank_by_run(
    path: Path, corpus: str, rows: Sequence[TrainingRow], documents: Mapping[str, str], depth: int
) -> list[Ranking]:
    """Takes the rankings of a TREC run. Rows have no ids: a row's query is the one with its text
    (`same_text`) in the queries.jsonl beside the corpus. A positive has the score of the ranked
    document with its text, if there is one. Raises a FileNotFoundError or DataError where the run
    or queries.jsonl cannot be read, or no id or no query matches; the log counts those that do not.
    """
    run = read_trec_run(path)
    queries = read_queries(corpus)
    id_of = {same_text(query.text): id_ for id_, query in queries.items() if id_ in run}
    ranked = [id_ for scores in run.values() for id_ in scores]
    wanted = [same_text(row.query) for row in rows]
    for count in (
        *unmatched("queries of the run that queries.jsonl lacks", run, queries, path),
        *unmatched("documents of the run that the corpus lacks", ranked, documents, path),
        *unmatched("queries of the rows that the run does not rank", wanted, id_of, path),
    ):
        _log.info("%s", count)
    forms, rankings = {id_: same_text(text) for id_, text in documents.items()}, []
    for row, query in zip(rows, wanted, strict=True):
        scores = run.get(id_of.get(query, ""), {})
        best = rank_documents(scores)
        of_text = {forms[id_]: scores[id_] for id_ in reversed(best) if id_ in forms}
        positives = [of_text.get(same_text(text), -np.inf) for text in row.positive_passages]
        rankings.append(Ranking({id_: scores[id_] for id_ in best[:depth]}, positives))
    return rankings
