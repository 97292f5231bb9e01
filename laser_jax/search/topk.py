"""Exact top-k search on the devices of a mesh, chunk by chunk.

Letters: Q queries, C documents, M documents of a chunk, n blocks of B documents, c chosen blocks,
D model, W stored width of a document (`laser_jax.search.codes`), k results, P devices.

Every document has a rank: its place in `trec_order` of the whole corpus. A ranking goes by score,
descending, then by rank. Every device keeps a running top k of its rows of each chunk; the lists
are merged once, at the end. The top k of the parts is taken inside `shard_map`, since a top_k over
a sharded axis has been wrong (jax#19271) and slow (xla#25487).
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from laser_jax.data.schema import as_strings
from laser_jax.search.codes import Code, decode_vectors, encode_vectors, require_matrix
from laser_jax.search.trec import Run, trec_order

DEFAULT_CHUNK, DEFAULT_QUERY_BLOCK = 32_768, 1_024
NO_RANK = np.iinfo(np.int32).max
"""The rank of a row that only fills a chunk up."""
_CUTTABLE = 128
"""`_top_of_chunk` cuts rows of a device that are a multiple of this into blocks of any length."""

Chunk = tuple[np.ndarray, np.ndarray]
"""Rows of documents [M, W] and their ranks [M] int32, ascending."""


def device_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """One axis over `devices`; None takes all of this process."""
    chosen = np.array(jax.local_devices() if devices is None else devices)
    return Mesh(chosen, ("documents",), axis_types=(AxisType.Auto,))


# --- on the devices ----------------------------------------------------------------------------


def _first_k(scores_Qm: jax.Array, ranks_Qm: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The first k of lists in any order, by score and then by rank."""
    negated_Qm, ranks_Qm = jax.lax.sort((-scores_Qm, ranks_Qm), num_keys=2, dimension=1)
    return -negated_Qm[:, :k], ranks_Qm[:, :k]


def _comparable(scores: jax.Array, ranks: jax.Array) -> jax.Array:
    """The scores with one zero, as top_k orders -0.0 below 0.0, and -inf for what only fills up."""
    return jnp.where(ranks == NO_RANK, -jnp.inf, jnp.where(scores == 0, 0.0, scores))


def _top_of_chunk(scores_QM: jax.Array, ranks_M: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The top k of rows whose ranks ascend, so that ties go to the lower position.

    Long chunks are cut into blocks, of which only the k with the largest maxima are looked into:
    the top k lie in them, since each block before another holds a document before any of its own.
    One block more is taken, as rows that fill up, which come last, may raise the maximum of a block
    with documents before them.
    """
    Q, M = scores_QM.shape
    k = min(k, M)
    # about sqrt(M / k), where both selections are as long, and a divisor of M
    B = math.gcd(1 << (M // k).bit_length() // 2, M)
    if B == 1:
        best_Qk, position_Qk = jax.lax.top_k(_comparable(scores_QM, ranks_M[None]), k)
        return best_Qk, ranks_M[position_Qk]
    blocks_QnB, ranks_nB = scores_QM.reshape(Q, M // B, B), ranks_M.reshape(M // B, B)
    maxima_Qn = _comparable(blocks_QnB.max(axis=2), ranks_nB[None, :, 0])
    _, chosen_Qc = jax.lax.top_k(maxima_Qn, min(k + 1, M // B))
    chosen_Qc = jnp.sort(chosen_Qc, axis=1)  # back to the order of positions
    candidates_QcB = jnp.take_along_axis(blocks_QnB, chosen_Qc[:, :, None], axis=1)
    candidates_QcB = _comparable(candidates_QcB, ranks_nB[chosen_Qc])
    best_Qk, place_Qk = jax.lax.top_k(candidates_QcB.reshape(Q, -1), k)
    position_Qk = jnp.take_along_axis(chosen_Qc, place_Qk // B, axis=1) * B + place_Qk % B
    return best_Qk, ranks_M[position_Qk]


@partial(jax.jit, static_argnames=("code", "mesh"), donate_argnums=(0, 1))
def _add_chunk(
    best_PQk: jax.Array,
    ranks_PQk: jax.Array,
    queries_QD: jax.Array,
    codes_MW: jax.Array,
    ranks_M: jax.Array,
    *,
    code: Code,
    mesh: Mesh,
) -> tuple[jax.Array, jax.Array]:
    """Merges a chunk, whose rows are split over the devices, into each device's own top k."""

    def on_device(best_1Qk, ranks_1Qk, queries_QD, codes_mW, ranks_m):
        documents_mD = decode_vectors(codes_mW, code)
        # highest: a TPU or an Ampere GPU would otherwise multiply float32 in bfloat16 or TF32.
        scores_Qm = jnp.einsum("qd,md->qm", queries_QD, documents_mD, precision="highest")
        k = best_1Qk.shape[2]
        new = _top_of_chunk(scores_Qm, ranks_m, k)
        both = zip((best_1Qk[0], ranks_1Qk[0]), new, strict=True)
        scores_Qn, ranks_Qn = (jnp.concatenate(of, axis=1) for of in both)
        best_Qk, ranks_Qk = _first_k(scores_Qn, ranks_Qn, k)
        return best_Qk[None], ranks_Qk[None]

    split, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    specs = (split, split, whole, split, split)
    merge = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=(split, split))
    return merge(best_PQk, ranks_PQk, queries_QD, codes_MW, ranks_M)


@partial(jax.jit, static_argnames="mesh")
def _merge_devices(
    best_PQk: jax.Array, ranks_PQk: jax.Array, *, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    _, Q, k = best_PQk.shape
    whole = NamedSharding(mesh, PartitionSpec())
    lists = jax.lax.with_sharding_constraint((best_PQk, ranks_PQk), whole)
    scores_Qn, ranks_Qn = (x_PQk.transpose(1, 0, 2).reshape(Q, -1) for x_PQk in lists)
    return _first_k(scores_Qn, ranks_Qn, k)


# --- on the host -------------------------------------------------------------------------------


def _checked(chunks: Iterable[Chunk], queries_QD: np.ndarray, code: Code) -> Iterator[Chunk]:
    """The chunks. Raises a ValueError on one whose documents are not what they should be."""
    D = queries_QD.shape[1]
    dtype, width = ("uint8", D // 8) if code == "binary" else (code, D)
    for codes_MW, ranks_M in chunks:
        if codes_MW.dtype != dtype or codes_MW.shape[1:] != (width,):
            wanted = f"{dtype} of width {width} ({code}, queries of width {D})"
            got = f"{codes_MW.dtype} of shape {codes_MW.shape}"
            raise ValueError(f"documents must be {wanted}, got {got}")
        # a dot product that leaves float32 would be Inf or NaN, or sort a document behind others
        both = () if code == "binary" else (queries_QD, codes_MW)
        peaks = [max(float(a.max(initial=0)), -float(a.min(initial=0))) for a in both]
        if peaks and not math.prod(peaks) * D < float(np.finfo(np.float32).max):
            held = "queries hold numbers up to {:.3g}, documents up to {:.3g}".format(*peaks)
            fault = f"dot products may overflow float32: {held}"
            raise ValueError(f"{fault}; normalise both to length 1")
        yield codes_MW, ranks_M


def _pieces(chunks: Iterable[Chunk], most: int, devices: int) -> Iterator[Chunk]:
    """The chunks in pieces of `most` rows at most. Zeros without a rank fill them up to the length
    of the longest so far, rounded up so that the devices have as many rows each. The pieces of a
    chunk are about equally long, so that little is filled up."""
    rows = 0
    for codes_MW, ranks_M in chunks:
        count = max(-(-len(codes_MW) // most), 1)
        rows = max(rows, -(-len(codes_MW) // count))
        cuttable, equal = (-(-rows // of) * of for of in (_CUTTABLE * devices, devices))
        length = cuttable if cuttable <= most else equal
        xp: Any = np if isinstance(codes_MW, np.ndarray) else jnp  # where the documents lie
        for start in range(0, len(codes_MW), rows or 1):
            piece_MW, of_piece_M = codes_MW[start : start + rows], ranks_M[start : start + rows]
            if spare := length - len(piece_MW):
                piece_MW = xp.pad(piece_MW, ((0, spare), (0, 0)))
                of_piece_M = np.pad(of_piece_M, (0, spare), constant_values=NO_RANK)
            yield piece_MW, of_piece_M


def exact_top_k(
    queries_QD: np.ndarray | jax.Array,
    chunks: Iterable[Chunk],
    k: int,
    *,
    code: Code = "float32",
    mesh: Mesh | None = None,
    chunk: int = DEFAULT_CHUNK,
    query_block: int = DEFAULT_QUERY_BLOCK,
) -> tuple[np.ndarray, np.ndarray]:
    """The k documents of largest dot product for every query, exactly; ties, of float32 scores as
    computed, by the lower rank.

    Documents stream from the host: at most two pieces of `chunk` rows and [query_block, chunk]
    scores are on the devices at a time, however long the corpus is.

    Args:
        queries_QD: float32.
        chunks: the corpus, coded as `code`, whose decoded rows are scored; every rank from 0 to
            C - 1 once. A chunk may end with rows that are no documents, of rank `NO_RANK`.
        mesh: any mesh of this process, which splits the rows; None takes the first device.
        chunk, query_block: the most documents, by all devices together, and queries at a time.

    Returns:
        scores float32 and ranks int32, each [Q, min(k, C)], best first.

    Raises:
        ValueError: on queries or documents of another type or width, or so long that a dot product
            may overflow; on no document, or on k, chunk or query_block below 1.
    """
    queries_QD = np.asarray(queries_QD)
    require_matrix("queries", queries_QD)
    if min(k, chunk, query_block) < 1:
        got = f"{k}, {chunk} and {query_block}"
        raise ValueError(f"k, chunk and query_block must be at least 1, got {got}")
    mesh = device_mesh(jax.local_devices()[:1]) if mesh is None else mesh
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    blocks = _query_blocks(queries_QD, query_block, mesh)
    shapes = [(mesh.size, len(block_QD), k) for block_QD in blocks]
    # one pair of arrays a block, as each is donated
    empty = [(np.full(s, -np.inf, np.float32), np.full(s, NO_RANK, np.int32)) for s in shapes]
    best = jax.device_put(empty, split)
    count = 0
    with jax.set_mesh(mesh):  # the caller's program may have set another
        for piece in _pieces(_checked(chunks, queries_QD, code), chunk, mesh.size):
            count += int((np.asarray(piece[1]) != NO_RANK).sum())
            codes_MW, ranks_M = jax.device_put(piece, split)
            jax.block_until_ready(best)  # or the host would put the whole corpus on the devices
            best = [
                _add_chunk(*lists, block_QD, codes_MW, ranks_M, code=code, mesh=mesh)
                for lists, block_QD in zip(best, blocks, strict=True)
            ]
        if count == 0:
            raise ValueError("there is no document to search")
        merged = jax.device_get([_merge_devices(*lists, mesh=mesh) for lists in best])
    none = np.zeros((0, k), np.float32), np.zeros((0, k), np.int32)  # where there is no query
    scores_Qk, ranks_Qk = map(np.concatenate, zip(none, *merged, strict=True))
    return scores_Qk[: len(queries_QD), :count], ranks_Qk[: len(queries_QD), :count]


def _query_blocks(queries_QD: np.ndarray, most: int, mesh: Mesh) -> list[jax.Array]:
    """The queries in blocks of one length, on every device; the last is filled up with zeros."""
    Q = len(queries_QD)
    length = min(most, Q) or 1
    filled_QD = np.pad(queries_QD, ((0, -Q % length), (0, 0)))
    whole = NamedSharding(mesh, PartitionSpec())
    return [jax.device_put(filled_QD[s : s + length], whole) for s in range(0, Q, length)]


def rescored(
    queries_QD: np.ndarray,
    chunks: Iterable[Chunk],
    ranks_Qn: np.ndarray,
    k: int,
    *,
    code: Code = "float32",
) -> tuple[np.ndarray, np.ndarray]:
    """The first k of each query's candidates `ranks_Qn`, by scores of better vectors, on the host:
    scores float32 and ranks int32, each [Q, min(k, n)], best first, ties by the lower rank.
    `chunks` is the corpus again, coded as `code`."""
    scores_Qn = np.full(ranks_Qn.shape, -np.inf, np.float32)
    for codes_MW, ranks_M in chunks:
        if len(ranks_M) == 0:
            continue
        place_Qn = np.minimum(np.searchsorted(ranks_M, ranks_Qn), len(ranks_M) - 1)
        for query, here_n in enumerate(ranks_M[place_Qn] == ranks_Qn):
            rows_iW = codes_MW[place_Qn[query, here_n]]
            if len(rows_iW):
                rows_iD = decode_vectors(rows_iW, code)
                scores_Qn[query, here_n] = rows_iD @ queries_QD[query]
    order_Qk = np.lexsort((ranks_Qn, -scores_Qn), axis=1)[:, :k]
    take = partial(np.take_along_axis, indices=order_Qk, axis=1)
    return take(scores_Qn), take(ranks_Qn)


def _check_rows(name: str, embeddings: np.ndarray, ids: Sequence[str]) -> None:
    ids = as_strings(f"{name} id", ids)
    if len(embeddings) != len(ids):
        raise ValueError(f"{len(embeddings)} {name} embeddings for {len(ids)} {name} ids")
    if len(set(ids)) != len(ids):
        repeated = next(id_ for id_, times in Counter(ids).items() if times > 1)
        raise ValueError(f"{name} id {repeated!r} stands twice")
    broken = ~np.isfinite(embeddings).all(axis=-1)
    if broken.any():
        which = f"{broken.sum()} of {len(ids)} {name} ids are not finite"
        first = ids[int(broken.argmax())]
        raise ValueError(f"the embeddings of {which}, the first is {first!r}")


@dataclass(frozen=True)
class StoredCorpus:
    """Documents that need not fit into memory."""

    read: Callable[[], Iterable[Chunk]]
    """Begins a pass over them."""
    ranked_ids: Sequence[str]
    """The C ids in trec_eval's order, so that a document's rank is its index."""
    stored: Code = "float32"
    """How the rows are coded."""


class SearchSettings(TypedDict, total=False):
    """How to search."""

    code: Code
    """Search with documents coded so; coarser than stored, it is an approximation."""
    oversample: int
    """0, or m >= 1: the best m k documents by `code` are scored again, with the vectors as stored,
    in a second pass."""
    mesh: Mesh | None
    """Devices to spread the documents over; None takes the first one."""
    chunk: int
    """Documents scored at a time."""


def search_chunks(
    queries_QD: np.ndarray,
    corpus: StoredCorpus,
    query_ids: Sequence[str],
    k: int,
    excluded: Mapping[str, Collection[str]],
    **settings: Unpack[SearchSettings],
) -> Run:
    """`search` over a corpus that is read chunk by chunk."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if unknown := settings.keys() - SearchSettings.__annotations__.keys():
        raise TypeError(f"a search has no setting {min(unknown)!r}")
    for query, ids in excluded.items():
        if isinstance(ids, str):
            raise ValueError(f"excluded[{query!r}] must be a list or set of ids, not {ids!r}")
    ranked_ids, stored = corpus.ranked_ids, corpus.stored
    code, oversample = settings.get("code", stored), settings.get("oversample", 0)
    known = {document for ids in excluded.values() for document in ids}.intersection(ranked_ids)
    removed = {query: known.intersection(excluded.get(query, ())) for query in query_ids}
    depth = k + max(map(len, removed.values()), default=0)

    def coded() -> Iterator[Chunk]:
        for rows_MW, ranks_M in corpus.read():
            yield encode_vectors(decode_vectors(rows_MW, stored), code), ranks_M

    scores_Qk, ranks_Qk = exact_top_k(
        queries_QD,
        corpus.read() if code == stored else coded(),
        # lists as long as k are on the devices; an empty corpus is refused there
        max(min(depth * max(oversample, 1), len(ranked_ids)), 1),
        code=code,
        mesh=settings.get("mesh"),
        chunk=settings.get("chunk", DEFAULT_CHUNK),
    )
    if oversample:
        scores_Qk, ranks_Qk = rescored(queries_QD, corpus.read(), ranks_Qk, depth, code=stored)
    run: Run = {}
    rankings = zip(query_ids, scores_Qk.tolist(), ranks_Qk.tolist(), strict=True)
    for query, scores_k, ranks_k in rankings:
        ranked = [(ranked_ids[int(r)], s) for r, s in zip(ranks_k, scores_k, strict=True)]
        run[query] = dict([(d, s) for d, s in ranked if d not in removed[query]][:k])
    return run


def search(
    query_embeddings: np.ndarray | jax.Array,
    doc_embeddings: np.ndarray | jax.Array,
    query_ids: Sequence[str],
    doc_ids: Sequence[str],
    k: int,
    excluded: Mapping[str, Collection[str]],
    **settings: Unpack[SearchSettings],
) -> Run:
    """The top k documents of every query, without the excluded ones, which leave before the cut.

    Args:
        query_embeddings, doc_embeddings: [Q, D] and [C, D] float32, documents in any order.
        excluded: query id -> ids of documents it must not be given (BRIGHT); ids that are not in
            the corpus are ignored.
        settings: code, oversample, mesh, chunk: see `SearchSettings`.

    Returns:
        Query id -> document id -> score, best first, ties in trec_eval's order.

    Raises:
        ValueError: on ids that stand twice or do not match the rows, on embeddings that are not
            finite, and as `exact_top_k` and `encode_vectors` do.
    """
    query_embeddings, doc_embeddings = np.asarray(query_embeddings), np.asarray(doc_embeddings)
    require_matrix("documents", doc_embeddings)
    _check_rows("query", query_embeddings, query_ids)
    _check_rows("document", doc_embeddings, doc_ids)
    order_C = trec_order(doc_ids)
    chunk = max(settings.get("chunk", DEFAULT_CHUNK), 1)  # less is refused by `exact_top_k`
    pieces = max(-(-len(order_C) // chunk), 1)

    def read() -> Iterator[Chunk]:
        # in pieces, so that the permuted corpus is never a second copy
        for ranks_M in np.array_split(np.arange(len(order_C), dtype=np.int32), pieces):
            yield doc_embeddings[order_C[ranks_M]], ranks_M

    corpus = StoredCorpus(read, [doc_ids[int(i)] for i in order_C])
    return search_chunks(query_embeddings, corpus, query_ids, k, excluded, **settings)
