from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from laser_jax.evaluation.metrics import rank_documents
from laser_jax.search import exact_top_k, search, trec_order


def brute_force(
    queries_QD: np.ndarray, documents_CD: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    scores_QC = queries_QD.astype(np.float64) @ documents_CD.astype(np.float64).T
    indices_Qk = np.argsort(-scores_QC, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores_QC, indices_Qk, axis=1), indices_Qk


def integers(seed: int, *shape: int) -> np.ndarray:
    """Small integers: every product and sum is exact in float32, and most scores are ties."""
    return np.random.default_rng(seed).integers(-1, 2, shape).astype(np.float32)


@pytest.mark.parametrize("chunk", [1, 7, 10, 32, 99, 100, 101, 1000])
@pytest.mark.parametrize("k", [1, 10, 99, 100, 150])
def test_tied_scores_equal_brute_force_for_every_chunk(chunk: int, k: int) -> None:
    queries_QD, documents_CD = integers(0, 5, 4), integers(1, 100, 4)
    scores_Qk, indices_Qk = exact_top_k(queries_QD, documents_CD, k, chunk=chunk)
    wanted_scores, wanted_indices = brute_force(queries_QD, documents_CD, k)
    np.testing.assert_array_equal(scores_Qk, wanted_scores)
    np.testing.assert_array_equal(indices_Qk, wanted_indices)
    assert scores_Qk.dtype == jnp.float32
    assert indices_Qk.dtype == jnp.int32
    assert scores_Qk.shape == (5, min(k, 100))


@pytest.mark.parametrize("chunk", [64, 300, 4096])
def test_random_scores_equal_brute_force(chunk: int) -> None:
    rng = np.random.default_rng(2)
    queries_QD = rng.standard_normal((20, 48), np.float32)
    documents_CD = rng.standard_normal((1000, 48), np.float32)
    scores_Qk, indices_Qk = exact_top_k(queries_QD, jnp.asarray(documents_CD), 50, chunk=chunk)
    wanted_scores, wanted_indices = brute_force(queries_QD, documents_CD, 50)
    np.testing.assert_allclose(scores_Qk, wanted_scores, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(indices_Qk, wanted_indices)


@pytest.mark.parametrize("chunk", [2, 10])
def test_all_negative_scores_are_not_beaten_by_padding(chunk: int) -> None:
    documents_CD = -np.ones((5, 1), np.float32)
    scores_Qk, indices_Qk = exact_top_k(np.ones((1, 1), np.float32), documents_CD, 5, chunk=chunk)
    assert np.asarray(scores_Qk).tolist() == [[-1.0] * 5]
    assert np.asarray(indices_Qk).tolist() == [[0, 1, 2, 3, 4]]


def test_negative_zero_ties_with_zero() -> None:
    # Whatever sign a product of zeros gets, the lower index comes first.
    documents_CD = np.array([[-0.0], [0.0], [-0.0], [0.0]], np.float32)
    _, indices_Qk = exact_top_k(np.ones((1, 1), np.float32), documents_CD, 4, chunk=4)
    assert np.asarray(indices_Qk).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("queries", "documents", "k", "chunk", "message"),
    [
        (np.ones((1, 2)), np.ones((3, 2), np.float32), 1, 1, "queries must be a float32 matrix"),
        (np.ones((1, 2), np.float32), np.ones(3, np.float32), 1, 1, "documents must be a float32"),
        (np.ones((1, 2), np.float32), np.ones((3, 4), np.float32), 1, 1, "width 2, documents 4"),
        (np.ones((1, 2), np.float32), np.ones((0, 2), np.float32), 1, 1, "no document"),
        (np.ones((1, 2), np.float32), np.ones((3, 2), np.float32), 0, 1, "got k 0 and chunk 1"),
        (np.ones((1, 2), np.float32), np.ones((3, 2), np.float32), 1, 0, "got k 1 and chunk 0"),
    ],
)
def test_impossible_arguments_are_refused(
    queries: np.ndarray, documents: np.ndarray, k: int, chunk: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        exact_top_k(queries, documents, k, chunk=chunk)


def test_trec_order_is_descending_by_code_point() -> None:
    ids = ["d1", "d10", "Z", "d2", "\u00e9", "a b"]
    assert [ids[i] for i in trec_order(ids)] == ["\u00e9", "d2", "d10", "d1", "a b", "Z"]


@pytest.mark.parametrize("chunk", [3, 16, 1000])
def test_a_search_cuts_the_ranking_of_trec_eval(chunk: int) -> None:
    queries_QD, documents_CD = integers(3, 6, 3), integers(4, 60, 3)
    query_ids = [f"q{i}" for i in range(6)]
    doc_ids = [f"d{i}" for i in np.random.default_rng(5).permutation(60)]
    excluded = {"q0": ["d1", "d2", "not in the corpus"], "q3": {f"d{i}" for i in range(55)}}
    run = search(queries_QD, documents_CD, query_ids, doc_ids, 10, excluded, chunk=chunk)

    assert list(run) == query_ids
    for query, scores_C in zip(query_ids, queries_QD @ documents_CD.T, strict=True):
        allowed = {
            d: float(s)
            for d, s in zip(doc_ids, scores_C, strict=True)
            if d not in excluded.get(query, ())
        }
        wanted = rank_documents(allowed)[:10]
        assert list(run[query].items()) == [(d, allowed[d]) for d in wanted]
    assert [len(ranking) for ranking in run.values()] == [10, 10, 10, 5, 10, 10]


def test_a_search_names_what_is_wrong_with_its_rows() -> None:
    one, two = np.ones((1, 2), np.float32), np.ones((2, 2), np.float32)
    with pytest.raises(ValueError, match="2 document embeddings for 1 document ids"):
        search(one, two, ["q"], ["a"], 1, {})
    with pytest.raises(ValueError, match="document id 'a' stands twice"):
        search(one, two, ["q"], ["a", "a"], 1, {})
    with pytest.raises(ValueError, match="1 of 2 document ids are not finite, the first is 'b'"):
        search(one, np.array([[1, 1], [np.nan, 1]], np.float32), ["q"], ["a", "b"], 1, {})
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        search(one, two, ["q"], ["a", "b"], 0, {"q": ["a"]})
