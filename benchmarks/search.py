"""Exact search: ours, and what else finds the k largest dot products of every query.

    python -m benchmarks.search [--shapes 500x100000x512 ...] [--k 100]

A shape is queries x documents x width. Vectors are random unit rows in float32, and scores are
products in float32. All contenders hold the corpus before the clock starts, and each must return
scores that are those of the documents that it names, and the same scores.

ours, from the host     `exact_top_k`, the corpus streaming to the device in every search
ours, on the device     `exact_top_k` over chunks that lie there
PyTorch                 matmul and topk, on the device of JAX
FAISS                   IndexFlatIP, on the CPU
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import measure
from benchmarks.measure import BenchmarkError, Report, Row, timing_fields
from laser_jax.search.topk import DEFAULT_CHUNK, exact_top_k

Found = tuple[np.ndarray, np.ndarray]
"""Scores and rows of the corpus, each [Q, k], best first."""
Search = Callable[[], Found]

SHAPES = [(1, 100_000, 512), (500, 100_000, 512), (1384, 100_000, 1024)]
OURS, RESIDENT = "ours, from the host", "ours, on the device"
TOLERANCE = 2e-5
"""Of a score: float32 sums of some thousand products, in another order."""


def unit_rows(seed: int, rows: int, width: int) -> np.ndarray:
    """Random unit rows, [rows, width] float32."""
    drawn = np.random.default_rng(seed).standard_normal((rows, width), np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn


def torch_search(queries_QD: np.ndarray, corpus_CD: np.ndarray, k: int) -> Search:
    import torch

    device = measure.torch_device()
    queries, corpus = (torch.from_numpy(a).to(device) for a in (queries_QD, corpus_CD))

    @torch.inference_mode()
    def run() -> Found:
        scores, rows = (queries @ corpus.T).topk(k, dim=1)
        return scores.cpu().numpy(), rows.cpu().numpy()

    return run


def faiss_search(queries_QD: np.ndarray, corpus_CD: np.ndarray, k: int) -> Search:
    import faiss

    index: Any = faiss.IndexFlatIP(corpus_CD.shape[1])
    index.add(corpus_CD)
    return lambda: index.search(queries_QD, k)


OTHERS: dict[str, Callable[[np.ndarray, np.ndarray, int], Search]] = {
    "PyTorch": torch_search,
    "FAISS": faiss_search,
}


def why_not(other: str, without: Sequence[str]) -> str | None:
    """Why another is not measured, in words; None where it is."""
    if other in without:
        return "--without"
    if other == "PyTorch":
        return measure.torch_unusable()
    absent = other == "FAISS" and importlib.util.find_spec("faiss") is None
    return "absent: pip install laser-jax[bench]" if absent else None


def our_searches(
    queries_QD: np.ndarray, corpus_CD: np.ndarray, k: int, chunk: int
) -> dict[str, Search]:
    """Ours, by name."""
    ranks_C = np.arange(len(corpus_CD), dtype=np.int32)
    parts = np.array_split(ranks_C, -(-len(ranks_C) // chunk))
    on_device = [(jax.device_put(corpus_CD[part]), part) for part in parts]
    top = functools.partial(exact_top_k, k=k, chunk=chunk, query_block=min(len(queries_QD), 2048))
    return {
        OURS: lambda: top(queries_QD, [(corpus_CD, ranks_C)]),
        RESIDENT: lambda: top(queries_QD, on_device),
    }


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
    reasons = {other: why_not(other, options.without) for other in OTHERS}
    report.notes += [f"{other} is not measured: {why}." for other, why in reasons.items() if why]
    for queries, documents, width in options.shapes:
        queries_QD, corpus_CD = unit_rows(1, queries, width), unit_rows(2, documents, width)
        contenders = our_searches(queries_QD, corpus_CD, options.k, options.chunk)
        contenders |= {
            other: search(queries_QD, corpus_CD, options.k)
            for other, search in OTHERS.items()
            if reasons[other] is None
        }
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
    measure.add_shapes(parser, "shapes", ("queries", "documents", "width"), SHAPES)
    numbers = {
        "k": (100, "documents a query"),
        "chunk": (DEFAULT_CHUNK, "documents that ours scores at a time"),
    }
    measure.add_numbers(parser, numbers)
    parser.add_argument("--without", choices=OTHERS, nargs="*", default=[], help="not these")


QUICK = {"shapes": [(3, 500, 16)], "chunk": 128, "k": 10}
PROGRAM = measure.Program("search", __doc__, fill, COLUMNS, add_flags, QUICK, repeats=5)

if __name__ == "__main__":
    PROGRAM.main(sys.argv[1:])
