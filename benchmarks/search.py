"""Exact search: ours, and what else finds the k largest dot products of every query.

    python -m benchmarks.search [--shapes 500x100000x512 ...] [--k 100]

A shape is queries x documents x width. Vectors are random unit rows in float32, and scores are
products in float32. All contenders hold the corpus before the clock starts, and each must return
scores that are those of the documents that it names, and the same scores.

ours, from the host     `exact_top_k`, the corpus streaming to the device in every search
ours, on the device     `exact_top_k` over chunks that lie there
NumPy                   matmul and argpartition, `--chunk` documents at a time
PyTorch                 matmul and topk, likewise, on the device of JAX
FAISS                   IndexFlatIP, on the CPU

On a GPU, a search as large as all of BRIGHT:

    python -m benchmarks.search --shapes 1384x1146880x1024 --chunk 163840 --without numpy
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.measure import BenchmarkError, Report, Row, timing_fields
from laser_jax.search.topk import DEFAULT_CHUNK, exact_top_k

Found = tuple[np.ndarray, np.ndarray]
"""Scores and rows of the corpus, each [Q, k], best first."""
Search = Callable[[], Found]

SHAPES = [(1, 100_000, 512), (500, 100_000, 512), (1384, 100_000, 1024)]
OURS, RESIDENT = "ours, from the host", "ours, on the device"
OTHERS = ("numpy", "torch", "faiss")
TOLERANCE = 2e-5
"""Of a score: float32 sums of some thousand products, in another order."""


def unit_rows(seed: int, rows: int, width: int) -> np.ndarray:
    """Random unit rows, [rows, width] float32, drawn on the device some at a time."""

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key: jax.Array, count: int) -> jax.Array:
        drawn = jax.random.normal(key, (count, width), jnp.float32)
        return drawn / jnp.linalg.norm(drawn, axis=1, keepdims=True)

    out, size = np.empty((rows, width), np.float32), 2**17
    for i, start in enumerate(range(0, rows, size)):
        count = min(size, rows - start)
        out[start : start + count] = draw(jax.random.fold_in(jax.random.key(seed), i), count)
    return out


def pieces(corpus: Any, chunk: int) -> Iterator[tuple[int, Any]]:
    """Where a piece begins, and the piece."""
    for start in range(0, len(corpus), chunk):
        yield start, corpus[start : start + chunk]


def numpy_search(queries_QD: np.ndarray, corpus_CD: np.ndarray, k: int, chunk: int) -> Found:
    scores_Qn = np.empty((len(queries_QD), 0), np.float32)
    rows_Qn = np.empty((len(queries_QD), 0), np.int64)
    for start, piece_MD in pieces(corpus_CD, chunk):
        scores_QM = queries_QD @ piece_MD.T
        best_Qk = np.argpartition(scores_QM, -min(k, len(piece_MD)), axis=1)[:, -k:]
        scores_Qn = np.hstack([scores_Qn, np.take_along_axis(scores_QM, best_Qk, axis=1)])
        rows_Qn = np.hstack([rows_Qn, best_Qk + start])
    order_Qk = np.argsort(-scores_Qn, axis=1)[:, :k]
    scores_Qk, rows_Qk = (np.take_along_axis(a, order_Qk, axis=1) for a in (scores_Qn, rows_Qn))
    return scores_Qk, rows_Qk


def torch_search(queries_QD: np.ndarray, corpus_CD: np.ndarray, k: int, chunk: int) -> Search:
    import torch

    device = measure.torch_device()
    queries, corpus = (torch.from_numpy(a).to(device) for a in (queries_QD, corpus_CD))

    @torch.inference_mode()
    def run() -> Found:
        best: Any = None
        for start, piece in pieces(corpus, chunk):
            scores, rows = (queries @ piece.T).topk(min(k, len(piece)), dim=1)
            rows = rows + start
            if best is not None:
                scores, rows = torch.cat([best[0], scores], 1), torch.cat([best[1], rows], 1)
                scores, places = scores.topk(k, dim=1)
                rows = rows.gather(1, places)
            best = scores, rows
        return best[0].cpu().numpy(), best[1].cpu().numpy()

    return run


def faiss_search(queries_QD: np.ndarray, corpus_CD: np.ndarray, k: int) -> Search:
    import faiss

    index: Any = faiss.IndexFlatIP(corpus_CD.shape[1])
    index.add(corpus_CD)
    return lambda: index.search(queries_QD, k)


def why_not(other: str) -> str | None:
    """Why a library is not measured, in words; None where it can be."""
    if other == "torch":
        return measure.torch_unusable()
    absent = importlib.util.find_spec(other) is None
    return f"{other} absent: pip install laser-jax[bench]" if absent else None


def contenders_for(
    queries_QD: np.ndarray, corpus_CD: np.ndarray, options: argparse.Namespace
) -> dict[str, Search]:
    """Those that can run here, by name."""
    k, chunk = options.k, options.chunk
    ranks_C = np.arange(len(corpus_CD), dtype=np.int32)
    parts = np.array_split(ranks_C, -(-len(ranks_C) // chunk))
    on_device = [(jax.device_put(corpus_CD[part]), part) for part in parts]
    top = functools.partial(exact_top_k, k=k, chunk=chunk, query_block=min(len(queries_QD), 2048))
    found: dict[str, Search] = {
        OURS: lambda: top(queries_QD, [(corpus_CD, ranks_C)]),
        RESIDENT: lambda: top(queries_QD, on_device),
    }
    usable = [name for name in OTHERS if name not in options.without and why_not(name) is None]
    if "numpy" in usable:
        found["NumPy"] = lambda: numpy_search(queries_QD, corpus_CD, k, chunk)
    if "torch" in usable:
        found["PyTorch"] = torch_search(queries_QD, corpus_CD, k, chunk)
    if "faiss" in usable:
        found["FAISS"] = faiss_search(queries_QD, corpus_CD, k)
    return found


def require_found(
    name: str, got: Found, wanted: Found, queries_QD: np.ndarray, corpus_CD: np.ndarray
) -> None:
    """Raises a BenchmarkError where a contender does not find the k best of every query."""
    scores_Qk, rows_Qk = got
    for query in range(0, len(queries_QD), max(1, len(queries_QD) // 50)):
        true_k = corpus_CD[rows_Qk[query]] @ queries_QD[query]
        if not np.abs(true_k - scores_Qk[query]).max() <= TOLERANCE:
            raise BenchmarkError(f"{name}: scores of query {query} are not those of its documents")
    distance = float(np.abs(scores_Qk - wanted[0]).max())
    if not distance <= TOLERANCE:
        raise BenchmarkError(
            f"{name} finds other documents than ours: a score is {distance:.2g} off"
        )


def fill(options: argparse.Namespace, report: Report) -> None:
    """Checks and times the contenders on every shape.

    Raises:
        BenchmarkError: a contender finds something else.
    """
    for other in OTHERS:
        if reason := "--without" if other in options.without else why_not(other):
            report.notes.append(f"{other} is not measured: {reason}.")
    for queries, documents, width in options.shapes:
        queries_QD, corpus_CD = unit_rows(1, queries, width), unit_rows(2, documents, width)
        contenders = contenders_for(queries_QD, corpus_CD, options)
        wanted = contenders[OURS]()
        for name, search in contenders.items():
            require_found(name, search(), wanted, queries_QD, corpus_CD)
        times = measure.time_alternating(contenders, repeats=options.repeats)
        for name in contenders:
            row: Row = {"contender": name, "queries": queries, "documents": documents}
            row |= {"width": width, "k": options.k} | timing_fields(times, name, base=OURS)
            row["queries_per_second"] = queries / row["seconds"]["median"]
            row["flops_per_second"] = 2 * width * documents * row["queries_per_second"]
            report.rows.append(row)


COLUMNS = {
    "search": measure.value("contender"),
    "queries × documents × width": lambda row: (
        f"{row['queries']:,} × {row['documents']:,} × {row['width']:,}"
    ),
    "time (quartiles)": measure.seconds(),
    "× ours (quartiles)": measure.ratio(),
    "queries/s": measure.value("queries_per_second", ",.1f"),
    "GFLOP/s": measure.value("flops_per_second", ",.0f", 1e9),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    shape = measure.sizes_of("queries", "documents", "width")
    text = f"default {' '.join('x'.join(map(str, shape)) for shape in SHAPES)}"
    parser.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, help=text)
    numbers = {
        "k": (100, "documents a query"),
        "chunk": (DEFAULT_CHUNK, "documents scored at a time, by all but FAISS"),
    }
    measure.add_numbers(parser, numbers)
    parser.add_argument("--without", choices=OTHERS, nargs="*", default=[], help="not these")


QUICK = {"shapes": [(3, 500, 16)], "chunk": 128, "k": 10}
PROGRAM = measure.Program("search", __doc__, fill, COLUMNS, add_flags, QUICK, repeats=5)

if __name__ == "__main__":
    PROGRAM.main(sys.argv[1:])
