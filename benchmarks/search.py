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

    python -m benchmarks.search --shapes 1384x1146880x1024 --chunk 163840 --no_numpy
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import (
    BenchmarkError,
    Report,
    command_line,
    environment,
    positive,
    ratio_cell,
    seconds_cell,
    time_alternating,
    timing_fields,
    torch_device,
    torch_threads,
    torch_unusable,
)
from laser_jax.search.topk import DEFAULT_CHUNK, exact_top_k

Shape = tuple[int, int, int]
Found = tuple[np.ndarray, np.ndarray]
"""Scores and rows of the corpus, each [Q, k], best first."""
Search = Callable[[], Found]

SHAPES = [(1, 100_000, 512), (500, 100_000, 512), (1384, 100_000, 1024)]
OURS, RESIDENT = "ours, from the host", "ours, on the device"
TOLERANCE = 2e-5
"""Of a score: float32 sums of some thousand products, in another order."""


def shape_of(text: str) -> Shape:
    """An argparse type: `500x100000x512` is 500 queries, 100,000 documents of width 512."""
    parts = text.split("x")
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(f"QUERIESxDOCUMENTSxWIDTH is wanted, got {text}")
    queries, documents, width = map(positive, parts)
    return queries, documents, width


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


def ours(
    queries_QD: np.ndarray, chunks: Sequence[tuple[Any, np.ndarray]], k: int, chunk: int
) -> Found:
    """`exact_top_k`: all queries at once, up to 2,048."""
    block = min(len(queries_QD), 2048)
    return exact_top_k(queries_QD, chunks, k, chunk=chunk, query_block=block)


def numpy_search(queries_QD: np.ndarray, corpus_CD: np.ndarray, k: int, chunk: int) -> Found:
    scores_Qn = np.empty((len(queries_QD), 0), np.float32)
    rows_Qn = np.empty((len(queries_QD), 0), np.int64)
    for start, piece_MD in pieces(corpus_CD, chunk):
        scores_QM = queries_QD @ piece_MD.T
        best_Qk = np.argpartition(scores_QM, -min(k, len(piece_MD)), axis=1)[:, -k:]
        scores_Qn = np.hstack([scores_Qn, np.take_along_axis(scores_QM, best_Qk, axis=1)])
        rows_Qn = np.hstack([rows_Qn, best_Qk + start])
    order_Qk = np.argsort(-scores_Qn, axis=1)[:, :k]
    return (
        np.take_along_axis(scores_Qn, order_Qk, axis=1),
        np.take_along_axis(rows_Qn, order_Qk, axis=1),
    )


def torch_search(queries_QD: np.ndarray, corpus_CD: np.ndarray, k: int, chunk: int) -> Search:
    import torch

    device = torch_device()
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


def contenders_for(
    queries_QD: np.ndarray, corpus_CD: np.ndarray, options: argparse.Namespace
) -> dict[str, Search]:
    """Those that can run here, by name."""
    k, chunk = options.k, options.chunk
    ranks_C = np.arange(len(corpus_CD), dtype=np.int32)
    on_host = [(corpus_CD, ranks_C)]
    found: dict[str, Search] = {OURS: lambda: ours(queries_QD, on_host, k, chunk)}
    parts = np.array_split(ranks_C, -(-len(ranks_C) // chunk))
    on_device = [(jax.device_put(corpus_CD[part]), part) for part in parts]
    found[RESIDENT] = lambda: ours(queries_QD, on_device, k, chunk)
    if not options.no_numpy:
        found["NumPy"] = lambda: numpy_search(queries_QD, corpus_CD, k, chunk)
    if not options.no_torch and torch_unusable() is None:
        found["PyTorch"] = torch_search(queries_QD, corpus_CD, k, chunk)
    if not options.no_faiss and importlib.util.find_spec("faiss") is not None:
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


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> Report:
    """Checks and times the contenders on every shape.

    Raises:
        BenchmarkError: a contender finds something else.
    """
    if options.quick:
        options.shapes, options.chunk, options.k = [(3, 500, 16)], 128, 10
    settings = {
        "shapes": options.shapes,
        "k": options.k,
        "chunk": options.chunk,
        "repeats": options.repeats,
        "torch_threads": torch_threads(),
    }
    report = Report("search", arguments, settings, environment())
    if not options.no_torch and (reason := torch_unusable()):
        report.notes.append(f"PyTorch is not measured: {reason}.")
    if not options.no_faiss and importlib.util.find_spec("faiss") is None:
        report.notes.append("FAISS is not measured: faiss absent: pip install laser-jax[bench].")
    for queries, documents, width in options.shapes:
        queries_QD, corpus_CD = unit_rows(1, queries, width), unit_rows(2, documents, width)
        contenders = contenders_for(queries_QD, corpus_CD, options)
        wanted = contenders[OURS]()
        for name, search in contenders.items():
            require_found(name, search(), wanted, queries_QD, corpus_CD)
        times = time_alternating(contenders, repeats=options.repeats)
        flops = 2 * queries * documents * width
        for name in contenders:
            seconds = float(np.median(times[name]))
            report.rows.append(
                {"contender": name, "queries": queries, "documents": documents, "width": width}
                | timing_fields(times, name, base=OURS)
                | {"queries_per_second": queries / seconds, "flops_per_second": flops / seconds}
            )
    return report


COLUMNS = {
    "search": lambda row: row["contender"],
    "queries × documents × width": lambda row: (
        f"{row['queries']:,} × {row['documents']:,} × {row['width']:,}"
    ),
    "time (quartiles)": lambda row: seconds_cell(row["seconds"]),
    "× ours (quartiles)": lambda row: ratio_cell(row["ratio"]),
    "queries/s": lambda row: f"{row['queries_per_second']:,.1f}",
    "GFLOP/s": lambda row: f"{row['flops_per_second'] / 1e9:,.0f}",
}


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = command_line("search", __doc__, repeats=5)
    shapes = " ".join("x".join(map(str, shape)) for shape in SHAPES)
    parser.add_argument(
        "--shapes", type=shape_of, nargs="+", default=SHAPES, help=f"default {shapes}"
    )
    parser.add_argument("--k", type=positive, default=100, help="documents a query; default 100")
    parser.add_argument(
        "--chunk",
        type=positive,
        default=DEFAULT_CHUNK,
        help=f"documents scored at a time, by all but FAISS; default {DEFAULT_CHUNK}",
    )
    for name in ("numpy", "torch", "faiss"):
        parser.add_argument(f"--no_{name}", action="store_true", help=f"without {name}")
    options = parser.parse_args(arguments)
    measure(options, arguments).finish(COLUMNS, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
