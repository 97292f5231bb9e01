"""Exact top-k search over document embeddings, chunk by chunk.

Letters: Q queries, C documents, D model, M documents of a chunk, k results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

DEFAULT_CHUNK = 16_384


def _chunk_scores(queries_QD: jax.Array, chunk_MD: jax.Array) -> jax.Array:
    # HIGHEST: a TPU or an Ampere GPU would otherwise multiply float32 in bfloat16 or TF32.
    scores_QM = jnp.einsum("qd,md->qm", queries_QD, chunk_MD, precision=jax.lax.Precision.HIGHEST)
    # top_k orders -0.0 below 0.0, which would break that tie by sign instead of by index.
    return jnp.where(scores_QM == 0, 0.0, scores_QM)


@partial(jax.jit, static_argnames="k")
def _first_chunk(
    queries_QD: jax.Array, chunk_MD: jax.Array, *, k: int
) -> tuple[jax.Array, jax.Array]:
    return jax.lax.top_k(_chunk_scores(queries_QD, chunk_MD), k)


@jax.jit
def _merge_chunk(
    best_Qk: jax.Array,
    indices_Qk: jax.Array,
    queries_QD: jax.Array,
    chunk_MD: jax.Array,
    start: jax.Array,
    seen: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Merges documents start..start+M into the running top k; those below `seen` are in it."""
    k = best_Qk.shape[1]
    document_M = start + jnp.arange(chunk_MD.shape[0], dtype=jnp.int32)
    scores_QM = jnp.where(
        (document_M >= seen)[None, :], _chunk_scores(queries_QD, chunk_MD), -jnp.inf
    )
    new_Qk, position_Qk = jax.lax.top_k(scores_QM, k)
    # top_k prefers the lower position, and the running ones, which come first, are lower documents
    merged_Qk, choice_Qk = jax.lax.top_k(jnp.concatenate([best_Qk, new_Qk], axis=1), k)
    candidates = jnp.concatenate([indices_Qk, start + position_Qk], axis=1)
    return merged_Qk, jnp.take_along_axis(candidates, choice_Qk, axis=1)


def exact_top_k(
    queries_QD: np.ndarray | jax.Array,
    documents_CD: np.ndarray | jax.Array,
    k: int,
    *,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """The k documents of largest dot product for every query, exactly; ties by the lower index.

    Documents stay on the host and go to the device `chunk` at a time (at least k), so that at most
    [Q, chunk] scores exist. One program serves all chunks but the first: the last one is moved back
    to full length, and what it repeats is masked.

    Args:
        queries_QD: float32.
        documents_CD: float32. Pass them in the order of `trec_order` for trec_eval's ties.
        k: how many; all C are returned when there are fewer than k.
        chunk: documents scored at a time.

    Returns:
        scores float32 and indices into the documents int32, each [Q, min(k, C)], best first.

    Raises:
        ValueError: on embeddings that are not float32 matrices of one width, on no document, or on
            k or chunk below 1.
    """
    documents_CD = np.asarray(documents_CD)
    for name, array in (("queries", queries_QD), ("documents", documents_CD)):
        if array.ndim != 2 or array.dtype != np.float32:
            raise ValueError(
                f"{name} must be a float32 matrix, got {array.dtype} of shape {array.shape}"
            )
    if queries_QD.shape[1] != documents_CD.shape[1]:
        raise ValueError(
            f"queries have width {queries_QD.shape[1]}, documents {documents_CD.shape[1]}"
        )
    count = documents_CD.shape[0]
    if count == 0:
        raise ValueError("there is no document to search")
    if k < 1 or chunk < 1:
        raise ValueError(f"k and chunk must be at least 1, got k {k} and chunk {chunk}")

    k = min(k, count)
    chunk = min(max(chunk, k), count)
    queries_QD = jnp.asarray(queries_QD)
    best_Qk, indices_Qk = _first_chunk(queries_QD, jnp.asarray(documents_CD[:chunk]), k=k)
    for seen in range(chunk, count, chunk):
        start = min(seen, count - chunk)
        best_Qk, indices_Qk = _merge_chunk(
            best_Qk,
            indices_Qk,
            queries_QD,
            jnp.asarray(documents_CD[start : start + chunk]),
            jnp.int32(start),
            jnp.int32(seen),
        )
    return best_Qk, indices_Qk


def trec_order(doc_ids: Sequence[str]) -> np.ndarray:
    """The permutation [C] int64 that puts documents in descending order of their ids.

    trec_eval breaks ties by the larger id. On documents in this order, breaking them by the lower
    index is the same, also where the tie straddles the cut.
    """
    return np.array(sorted(range(len(doc_ids)), key=doc_ids.__getitem__, reverse=True), np.int64)


def _check_rows(name: str, embeddings: np.ndarray, ids: Sequence[str]) -> None:
    if len(embeddings) != len(ids):
        raise ValueError(f"{len(embeddings)} {name} embeddings for {len(ids)} {name} ids")
    if len(set(ids)) != len(ids):
        repeated = next(id_ for id_, times in Counter(ids).items() if times > 1)
        raise ValueError(f"{name} id {repeated!r} stands twice")
    broken = ~np.isfinite(embeddings).all(axis=-1)
    if broken.any():
        raise ValueError(
            f"the embeddings of {broken.sum()} of {len(ids)} {name} ids are not finite, the first "
            f"is {ids[int(broken.argmax())]!r}"
        )


def search(
    query_embeddings: np.ndarray | jax.Array,
    doc_embeddings: np.ndarray | jax.Array,
    query_ids: Sequence[str],
    doc_ids: Sequence[str],
    k: int,
    excluded: Mapping[str, Collection[str]],
    *,
    chunk: int = DEFAULT_CHUNK,
) -> dict[str, dict[str, float]]:
    """The top k documents of every query, without the excluded ones.

    Exclusions are taken out before the cut, so a query still gets k documents where there are k.

    Args:
        query_embeddings: [Q, D] float32.
        doc_embeddings: [C, D] float32, in any order.
        query_ids: the Q ids of the queries.
        doc_ids: the C ids of the documents.
        k: documents per query.
        excluded: query id -> ids of documents it must not be given (BRIGHT); ids that are not in
            the corpus are ignored.
        chunk: documents scored at a time.

    Returns:
        A run for `laser_jax.evaluation.metrics`: query id -> document id -> score, best first, ties
        in trec_eval's order.

    Raises:
        ValueError: on ids that stand twice or do not match the rows, on embeddings that are not
            finite, and as `exact_top_k` does.
    """
    query_embeddings, doc_embeddings = np.asarray(query_embeddings), np.asarray(doc_embeddings)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    _check_rows("query", query_embeddings, query_ids)
    _check_rows("document", doc_embeddings, doc_ids)
    corpus = set(doc_ids)
    removed = {query: corpus.intersection(excluded.get(query, ())) for query in query_ids}
    order = trec_order(doc_ids)
    scores_Qk, indices_Qk = exact_top_k(
        query_embeddings,
        doc_embeddings[order],
        k + max(map(len, removed.values()), default=0),
        chunk=chunk,
    )
    run = {}
    for query, scores, indices in zip(
        query_ids, np.asarray(scores_Qk).tolist(), order[np.asarray(indices_Qk)], strict=True
    ):
        ranked = [(doc_ids[i], s) for i, s in zip(indices, scores, strict=True)]
        run[query] = dict([(d, s) for d, s in ranked if d not in removed[query]][:k])
    return run
