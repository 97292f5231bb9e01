"""Exact search: equal to numpy's brute force on one device and on eight, ties included."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from laser_jax.search import topk
from laser_jax.search.codes import Code, decode_vectors, encode_vectors
from laser_jax.search.topk import (
    Chunk,
    StoredCorpus,
    device_mesh,
    exact_top_k,
    rescored,
    search,
    search_chunks,
)
from laser_jax.search.trec import Run, rank_documents

MESHES: dict[str, Callable[[], Mesh | None]] = {
    "1 device": lambda: None,
    "8 devices": lambda: device_mesh(jax.devices()),
    "2 x 2 x 2": lambda: jax.make_mesh(
        (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
    ),
}


@pytest.fixture(params=MESHES)
def mesh(request: pytest.FixtureRequest) -> Mesh | None:
    return MESHES[request.param]()


def corpus(documents_CD: np.ndarray, *cuts: int) -> list[Chunk]:
    """The documents with their own index as rank, cut into chunks."""
    ranks_C = np.arange(len(documents_CD), dtype=np.int32)
    return list(zip(np.split(documents_CD, cuts), np.split(ranks_C, cuts), strict=True))


def brute_force(
    queries_QD: np.ndarray, documents_CD: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    scores_QC = queries_QD.astype(np.float64) @ documents_CD.astype(np.float64).T
    indices_Qk = np.argsort(-scores_QC, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores_QC, indices_Qk, axis=1), indices_Qk


def integers(seed: int, *shape: int) -> np.ndarray:
    """Small integers: every product and sum is exact in float32, and most scores are ties."""
    return np.random.default_rng(seed).integers(-1, 2, shape).astype(np.float32)


def unit_vectors(seed: int, *shape: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.mark.parametrize(("chunk", "k"), [(1, 1), (7, 10), (32, 99), (100, 100), (1000, 150)])
def test_tied_scores_equal_brute_force(mesh: Mesh | None, chunk: int, k: int) -> None:
    queries_QD, documents_CD = integers(0, 5, 4), integers(1, 100, 4)
    scores_Qk, ranks_Qk = exact_top_k(queries_QD, corpus(documents_CD), k, mesh=mesh, chunk=chunk)
    wanted_scores, wanted_ranks = brute_force(queries_QD, documents_CD, k)
    np.testing.assert_array_equal(scores_Qk, wanted_scores)
    np.testing.assert_array_equal(ranks_Qk, wanted_ranks)
    assert (scores_Qk.dtype, ranks_Qk.dtype) == (np.float32, np.int32)
    assert scores_Qk.shape == (5, min(k, 100))


def test_random_scores_equal_brute_force(mesh: Mesh | None) -> None:
    rng = np.random.default_rng(2)
    queries_QD = rng.standard_normal((20, 48), np.float32)
    documents_CD = rng.standard_normal((1000, 48), np.float32)
    scores_Qk, ranks_Qk = exact_top_k(
        queries_QD, corpus(documents_CD), 50, mesh=mesh, chunk=300, query_block=8
    )
    wanted_scores, wanted_ranks = brute_force(queries_QD, documents_CD, 50)
    np.testing.assert_allclose(scores_Qk, wanted_scores, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(ranks_Qk, wanted_ranks)


@pytest.mark.parametrize("k", [3, 20])
def test_ties_across_blocks_of_a_long_chunk_go_to_the_lower_rank(k: int) -> None:
    # 4,096 rows of five different scores: the selection by block maxima sees ties everywhere
    queries_QD = np.ones((2, 1), np.float32)
    documents_CD = np.random.default_rng(3).integers(0, 5, (4096, 1)).astype(np.float32)
    _, ranks_Qk = exact_top_k(queries_QD, corpus(documents_CD), k, chunk=4096)
    np.testing.assert_array_equal(ranks_Qk, brute_force(queries_QD, documents_CD, k)[1])


def test_ranks_decide_ties_whatever_the_order_of_the_chunks(mesh: Mesh | None) -> None:
    queries_QD, documents_CD = integers(0, 5, 4), integers(1, 100, 4)
    mixed = np.random.default_rng(4).permutation(100).astype(np.int32)
    chunks = [(documents_CD[np.sort(p)], np.sort(p)) for p in np.split(mixed, [13, 14, 60])]
    _, ranks_Qk = exact_top_k(queries_QD, chunks, 30, mesh=mesh, chunk=16)
    np.testing.assert_array_equal(ranks_Qk, brute_force(queries_QD, documents_CD, 30)[1])


def test_all_negative_scores_are_not_beaten_by_padding(mesh: Mesh | None) -> None:
    documents = corpus(-np.ones((5, 1), np.float32))
    scores_Qk, ranks_Qk = exact_top_k(np.ones((1, 1), np.float32), documents, 9, mesh=mesh, chunk=4)
    assert scores_Qk.tolist() == [[-1.0] * 5]
    assert ranks_Qk.tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("count", [4001, 4005, 4015, 4016])
def test_rows_that_fill_up_a_block_put_no_document_aside(count: int) -> None:
    # the 20 best lie in 20 blocks of 16, and zeros, which score best of all, in those behind
    documents_CD = np.full((count, 1), -5, np.float32)
    documents_CD[: 20 * 160 : 160, 0] = -np.arange(1, 21) / 8
    ranks_C = np.arange(4096, dtype=np.int32)
    ranks_C[count:] = topk.NO_RANK
    filled = np.concatenate([documents_CD, np.zeros((4096 - count, 1), np.float32)])
    queries_QD = np.ones((2, 1), np.float32)
    scores_Qk, ranks_Qk = exact_top_k(queries_QD, [(filled, ranks_C)], 20)
    wanted = brute_force(queries_QD, documents_CD, 20)
    np.testing.assert_array_equal(scores_Qk, wanted[0])
    np.testing.assert_array_equal(ranks_Qk, wanted[1])


def test_negative_zero_ties_with_zero() -> None:
    # Whatever sign a product of zeros gets, the lower rank comes first.
    documents_CD = np.array([[-0.0], [0.0], [-0.0], [0.0]], np.float32)
    for chunk in (1, 4):
        _, ranks_Qk = exact_top_k(np.ones((1, 1), np.float32), corpus(documents_CD), 4, chunk=chunk)
        assert ranks_Qk.tolist() == [[0, 1, 2, 3]]


def test_a_search_inside_a_program_with_a_mesh_keeps_its_own(mesh: Mesh | None) -> None:
    queries_QD, documents_CD = integers(0, 5, 4), integers(1, 100, 4)
    training = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(training):
        _, ranks_Qk = exact_top_k(queries_QD, corpus(documents_CD), 10, mesh=mesh, chunk=32)
        assert jax.sharding.get_abstract_mesh().axis_names == ("data", "fsdp")
    np.testing.assert_array_equal(ranks_Qk, brute_force(queries_QD, documents_CD, 10)[1])


def test_no_query_gives_no_row() -> None:
    scores_Qk, ranks_Qk = exact_top_k(np.ones((0, 2), np.float32), corpus(integers(1, 9, 2)), 3)
    assert scores_Qk.shape == ranks_Qk.shape == (0, 3)


def test_one_program_serves_chunks_of_every_length(caplog: pytest.LogCaptureFixture) -> None:
    queries_QD, documents_CD = integers(0, 3, 5), integers(1, 70, 5)
    with jax.log_compiles():
        exact_top_k(queries_QD, corpus(documents_CD, 16, 17, 33, 34), 7, chunk=16)
    compiled = [r.message for r in caplog.records if "Finished XLA compilation" in r.message]
    assert sum("_add_chunk" in message for message in compiled) == 1


def test_chunks_are_given_up_as_the_search_goes_on() -> None:
    queries_QD, documents_CD = integers(0, 3, 5), integers(1, 160, 5)
    held = []

    def watched() -> Iterator[Chunk]:
        for chunk in corpus(documents_CD, *range(16, 160, 16)):
            held.append(sum(array.shape == (16, 5) for array in jax.live_arrays()))
            yield chunk

    exact_top_k(queries_QD, watched(), 7, chunk=16)
    assert len(held) == 10
    assert max(held) <= 2


def test_devices_exchange_nothing_but_their_top_k() -> None:
    mesh = device_mesh(jax.devices())
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def compiled(function: Any, *shapes: tuple[tuple[int, ...], Any, bool], **static: Any) -> str:
        whole = NamedSharding(mesh, PartitionSpec())
        arguments = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=split if is_split else whole)
            for shape, dtype, is_split in shapes
        ]
        return function.lower(*arguments, **static, mesh=mesh).compile().as_text()

    lists = ((8, 3, 7), np.float32, True), ((8, 3, 7), np.int32, True)
    rows = ((3, 5), np.float32, False), ((64, 5), np.float32, True), ((64,), np.int32, True)
    collectives = re.compile(r"= \S+ (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(")
    assert collectives.findall(compiled(topk._add_chunk, *lists, *rows, code="float32")) == []
    assert set(collectives.findall(compiled(topk._merge_devices, *lists))) == {"all-gather"}


@pytest.mark.parametrize(
    ("queries", "documents", "k", "chunk", "message"),
    [
        (np.ones((1, 2)), np.ones((3, 2), np.float32), 1, 1, "queries must be a float32 matrix"),
        (np.ones((1, 2), np.float32), np.ones((3, 2)), 1, 1, "must be float32 of width 2"),
        (np.ones((1, 2), np.float32), np.ones((3, 4), np.float32), 1, 1, r"shape \(3, 4\)"),
        (np.ones((1, 2), np.float32), np.ones((0, 2), np.float32), 1, 1, "no document"),
        (np.ones((1, 2), np.float32), np.ones((3, 2), np.float32), 0, 1, "got 0, 1 and 1024"),
        (np.ones((1, 2), np.float32), np.ones((3, 2), np.float32), 1, 0, "got 1, 0 and 1024"),
    ],
)
def test_impossible_arguments_are_refused(
    queries: np.ndarray, documents: np.ndarray, k: int, chunk: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        exact_top_k(queries, corpus(documents), k, chunk=chunk)


# --- codes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "least_cosine"), [("float16", 0.999999), ("int8", 0.9998), ("binary", 0.7)]
)
def test_codes_keep_directions(code: Code, least_cosine: float) -> None:
    vectors_CD = unit_vectors(5, 200, 64)
    codes_CW = encode_vectors(vectors_CD, code)
    decoded_CD = decode_vectors(codes_CW, code)
    np.testing.assert_allclose(np.linalg.norm(decoded_CD, axis=1), 1, atol=1e-6)
    assert (decoded_CD * vectors_CD).sum(axis=1).min() > least_cosine
    on_device = decode_vectors(jax.numpy.asarray(codes_CW), code)
    np.testing.assert_allclose(on_device, decoded_CD, rtol=0, atol=1e-6)
    assert codes_CW.nbytes == vectors_CD.nbytes // {"float16": 2, "int8": 4, "binary": 32}[code]


@pytest.mark.parametrize("code", ["float16", "int8", "binary"])
def test_coded_documents_are_ranked_by_what_they_decode_to(mesh: Mesh | None, code: Code) -> None:
    queries_QD, documents_CD = unit_vectors(6, 4, 16), unit_vectors(7, 90, 16)
    codes_CW = encode_vectors(documents_CD, code)
    scores_Qk, ranks_Qk = exact_top_k(
        queries_QD, corpus(codes_CW), 20, code=code, mesh=mesh, chunk=32
    )
    scores_QC = queries_QD @ decode_vectors(codes_CW, code).T
    wanted = -np.sort(-scores_QC, axis=1)[:, :20]
    np.testing.assert_allclose(scores_Qk, wanted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        np.take_along_axis(scores_QC, ranks_Qk, 1), scores_Qk, rtol=0, atol=1e-6
    )


def test_rescoring_all_candidates_gives_the_exact_ranking() -> None:
    queries_QD, documents_CD = integers(0, 5, 8), integers(1, 60, 8)
    documents = corpus(documents_CD, 7, 31)
    every = np.tile(np.random.default_rng(8).permutation(60).astype(np.int32), (5, 1))
    scores_Qk, ranks_Qk = rescored(queries_QD, documents, every, 25)
    wanted_scores, wanted_ranks = brute_force(queries_QD, documents_CD, 25)
    np.testing.assert_array_equal(scores_Qk, wanted_scores)
    np.testing.assert_array_equal(ranks_Qk, wanted_ranks)


@pytest.mark.parametrize("code", ["float32", "binary"])
def test_a_chunk_without_documents_changes_nothing(code: Code) -> None:
    queries_QD, documents_CD = unit_vectors(11, 5, 8), unit_vectors(12, 60, 8)
    ids = [f"q{i}" for i in range(5)], [f"d{i}" for i in range(60)]

    def found(*cuts: int) -> Run:
        def read() -> list[Chunk]:
            return corpus(documents_CD, *cuts)

        stored = StoredCorpus(read, ids[1])
        return search_chunks(queries_QD, stored, ids[0], 10, {}, code=code, oversample=2)

    assert found(0, 20, 20, 60) == found(20)


def test_lists_are_no_longer_than_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def record(queries_QD: np.ndarray, chunks: Any, k: int, **how: Any) -> Any:
        asked.append(k)
        return exact_top_k(queries_QD, chunks, k, **how)

    monkeypatch.setattr(topk, "exact_top_k", record)
    queries_QD, documents_CD = unit_vectors(13, 2, 8), unit_vectors(14, 6, 8)
    ids = ["q0", "q1"], list("abcdef")
    runs = [
        search(queries_QD, documents_CD, *ids, k, {"q0": ["a"]}, oversample=m)
        for k, m in ((6, 0), (1_000, 10), (2, 2))
    ]
    assert asked == [6, 6, 6]
    assert [list(ranking) for ranking in runs[1].values()] == [list(r) for r in runs[0].values()]
    assert [len(ranking) for ranking in runs[1].values()] == [5, 6]


def test_rescoring_repairs_what_the_signs_lose() -> None:
    queries_QD, documents_CD = unit_vectors(9, 20, 64), unit_vectors(10, 500, 64)
    names = [f"d{i}" for i in range(500)], [f"q{i}" for i in range(20)]

    def found(**how) -> list[set[str]]:
        run = search(queries_QD, documents_CD, names[1], names[0], 10, {}, **how)
        return [set(ranking) for ranking in run.values()]

    exact = found()
    kept = {
        m: [len(a & b) for a, b in zip(exact, found(code="binary", oversample=m), strict=True)]
        for m in (0, 5, 50)
    }
    assert sum(kept[0]) < sum(kept[5]) < sum(kept[50]) == 200


def test_only_unit_vectors_are_coded() -> None:
    with pytest.raises(ValueError, match=r"int8 keeps directions only.*row 1 has 2\.0"):
        encode_vectors(np.array([[1, 0], [0, 2]], np.float32), "int8")
    with pytest.raises(ValueError, match="row 0 has nan"):
        encode_vectors(np.array([[np.nan, 0]], np.float32), "float16")
    with pytest.raises(ValueError, match="width that 8 divides, got 2"):
        encode_vectors(np.array([[1, 0]], np.float32), "binary")
    with pytest.raises(ValueError, match="float32 matrix, got float64"):
        encode_vectors(np.eye(2), "int8")


# --- runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [3, 1000])
def test_a_search_cuts_the_ranking_of_trec_eval(mesh: Mesh | None, chunk: int) -> None:
    queries_QD, documents_CD = integers(3, 6, 3), integers(4, 60, 3)
    query_ids = [f"q{i}" for i in range(6)]
    doc_ids = [f"d{i}" for i in np.random.default_rng(5).permutation(60)]
    excluded = {"q0": ["d1", "d2", "not in the corpus"], "q3": {f"d{i}" for i in range(55)}}
    run = search(queries_QD, documents_CD, query_ids, doc_ids, 10, excluded, mesh=mesh, chunk=chunk)

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


@pytest.mark.parametrize("ids", [{"a", "b"}, {"a": 1, "b": 2}, iter("ab"), "ab", b"ab"])
def test_ids_in_no_list_are_refused_by_type(ids) -> None:
    rows, kind = np.eye(2, dtype=np.float32), type(ids).__name__
    with pytest.raises(ValueError, match=f"every query id is wanted, not a {kind}"):
        search(rows, rows, ids, ["a", "b"], 1, {})
    with pytest.raises(ValueError, match=f"every document id is wanted, not a {kind}"):
        search(rows, rows, ["a", "b"], ids, 1, {})


def test_an_excluded_id_that_stands_in_no_list_is_refused() -> None:
    rows = np.eye(2, dtype=np.float32)
    with pytest.raises(ValueError, match=r"excluded\['a'\] must be a list or set of ids"):
        search(rows, rows, ["a", "b"], ["a", "b"], 1, {"a": "b"})


def test_settings_that_cannot_be_are_refused() -> None:
    rows = np.eye(8, dtype=np.float32)
    find = functools.partial(search, rows, rows, list("abcdefgh"), list("abcdefgh"), 1, {})
    misspelt: Any = {"oversamples": 10}
    with pytest.raises(TypeError, match="a search has no setting 'oversamples'"):
        find(code="binary", **misspelt)
    with pytest.raises(ValueError, match="must be at least 1, got 1, 0 and 1024"):
        find(chunk=0)


def test_a_search_names_what_is_wrong_with_its_rows() -> None:
    one, two = np.ones((1, 2), np.float32), np.ones((2, 2), np.float32)
    with pytest.raises(ValueError, match="2 document embeddings for 1 document ids"):
        search(one, two, ["q"], ["a"], 1, {})
    with pytest.raises(ValueError, match="document id 'a' stands twice"):
        search(one, two, ["q"], ["a", "a"], 1, {})
    with pytest.raises(ValueError, match="1 of 2 document ids are not finite, the first is 'b'"):
        search(one, np.array([[1, 1], [np.nan, 1]], np.float32), ["q"], ["a", "b"], 1, {})
    for far, near in ((1e30 * one, 1e30 * two), (3e38 * one, two), (one, -3e38 * two)):
        with pytest.raises(ValueError, match="dot products may overflow float32"):
            search(np.float32(far), np.float32(near), ["q"], ["a", "b"], 1, {})
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        search(one, two, ["q"], ["a", "b"], 0, {"q": ["a"]})
    with pytest.raises(ValueError, match="documents must be a float32 matrix, got float64"):
        search(one, np.ones((2, 2)), ["q"], ["a", "b"], 1, {})
