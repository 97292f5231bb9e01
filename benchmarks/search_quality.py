"""What smaller vectors cost: nDCG@10 of float16, int8 and binary search against float32.

    python -m benchmarks.search_quality --data ../shared/data/scifact
    python -m benchmarks.search_quality --data BEIR_DIR --corpus_vectors DIR --query_vectors DIR

Without directories of vectors it makes its own, with no model: TF-IDF of words, projected onto the
first singular vectors (latent semantic analysis, Deerwester et al. 1990) and normalised. They rank
real texts well enough for a loss to show. Differences are given with their 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from benchmarks.measure import Report, command_line, environment, positive
from laser_jax.evaluation.beir import BeirDataset, Document, EvalQuery, read_beir
from laser_jax.evaluation.metrics import evaluate_run
from laser_jax.evaluation.significance import paired_bootstrap
from laser_jax.search.codes import Code, decode_vectors, encode_vectors
from laser_jax.search.topk import search
from laser_jax.search.trec import Run
from laser_jax.search.vectors import Role, read_manifest, read_shards

METRIC = "nDCG@10"
# (what to search with, how many times the depth is scored again with float32; 0 for none)
SEARCHES: tuple[tuple[Code, int], ...] = (
    ("float32", 0),
    ("float16", 0),
    ("int8", 0),
    ("binary", 0),
    ("binary", 2),
    ("binary", 4),
    ("binary", 10),
)


Vectors = tuple[list[str], np.ndarray]
"""Ids, and float32 unit rows [C, D]."""


def read_vectors(directory: str, role: Role) -> Vectors:
    """All vectors of a directory, decoded."""
    manifest = read_manifest(directory, role)
    parts = list(read_shards(directory, manifest))
    rows = [decode_vectors(rows, manifest.info.dtype) for _, rows in parts]
    return [id_ for ids, _ in parts for id_ in ids], np.concatenate(rows)


def lsa_vectors(dataset: BeirDataset, dimension: int) -> tuple[Vectors, Vectors]:
    """Documents and queries by latent semantic analysis of the documents."""
    documents = [(d.id, Counter(re.findall(r"\w+", d.text.lower()))) for d in dataset.documents]
    queries = [
        (q.id, Counter(re.findall(r"\w+", q.text.lower()))) for q in dataset.queries.values()
    ]
    frequency = Counter(word for _, words in documents for word in words)
    column = {word: i for i, word in enumerate(w for w, n in frequency.items() if n > 1)}
    weight = {word: np.log(len(documents) / frequency[word]) for word in column}

    def matrix(texts: list[tuple[str, Counter[str]]]) -> scipy.sparse.csr_array:
        entries = [
            (row, column[word], (1 + np.log(n)) * weight[word])
            for row, (_, words) in enumerate(texts)
            for word, n in words.items()
            if word in column
        ]
        rows, columns, values = (np.array(part) for part in zip(*entries, strict=True))
        made = scipy.sparse.csr_array(
            (values, (rows, columns)), shape=(len(texts), len(column)), dtype=np.float32
        )
        lengths = np.sqrt(made.multiply(made).sum(axis=1))
        return scipy.sparse.diags_array(1 / np.maximum(lengths, 1e-9)) @ made

    corpus = matrix(documents)
    start = (
        np.random.default_rng(0)
        .standard_normal(min(len(documents), len(column)))
        .astype(np.float32)
    )
    _, _, directions = scipy.sparse.linalg.svds(corpus, k=dimension, v0=start)

    def vectors(texts: list[tuple[str, Counter[str]]]) -> Vectors:
        projected = (matrix(texts) @ directions.T).astype(np.float32)  # pyright: ignore
        lengths = np.linalg.norm(projected, axis=1, keepdims=True)
        # a text without a known word points nowhere: along the first axis, as good as any
        projected[lengths[:, 0] < 1e-6] = np.eye(1, dimension, dtype=np.float32)
        lengths[lengths < 1e-6] = 1
        return [id_ for id_, _ in texts], projected / lengths

    return vectors(documents), vectors(queries)


def tiny_dataset() -> BeirDataset:
    """Documents of random words, and queries of some of a document's."""
    rng = np.random.default_rng(0)
    words = [[f"word{n}" for n in rng.integers(0, 40, 12)] for _ in range(60)]
    documents = [Document(f"d{n}", " ".join(some)) for n, some in enumerate(words)]
    queries = {f"q{n}": EvalQuery(f"q{n}", " ".join(words[n][:4])) for n in range(20)}
    return BeirDataset(documents, queries, {f"q{n}": {f"d{n}": 1} for n in range(20)})


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> Report:
    """Searches in every way, and compares each with float32.

    Raises:
        ValueError: data or vectors that cannot be read or do not belong together.
        OSError: they are not there.
    """
    here = environment()
    if options.quick:
        options.data, options.dimension, options.depth = "a tiny corpus", 16, 5
        dataset = tiny_dataset()
    else:
        dataset = read_beir(options.data, options.split)
    if options.corpus_vectors is not None:
        corpus = read_vectors(options.corpus_vectors, "documents")
        queries = read_vectors(options.query_vectors, "queries")
        made_by = options.corpus_vectors
    else:
        corpus, queries = lsa_vectors(dataset, options.dimension)
        made_by = "latent semantic analysis"
    excluded = dataset.exclusions()
    runs: dict[tuple[Code, int], Run] = {
        (code, oversample): search(
            queries[1],
            corpus[1],
            queries[0],
            corpus[0],
            options.depth,
            excluded,
            code=code,
            oversample=oversample,
        )
        for code, oversample in SEARCHES
    }
    values = {
        how: [scores[METRIC] for scores in evaluate_run(run, dataset.qrels, [METRIC]).values()]
        for how, run in runs.items()
    }
    settings = {
        "data": options.data,
        "split": options.split,
        "vectors": made_by,
        "queries": len(queries[0]),
        "documents": len(corpus[0]),
        "dimension": corpus[1].shape[1],
        "depth": options.depth,
    }
    report = Report("search_quality", arguments, settings, here)
    exact = SEARCHES[0]
    for how, run in runs.items():
        code, oversample = how
        kept = [len(run[q].keys() & runs[exact][q].keys()) / len(run[q]) for q in run]
        report.rows.append(
            {
                "code": code,
                "oversample": oversample,
                "depth": options.depth,
                "bytes_a_document": encode_vectors(corpus[1][:1], code).nbytes,
                METRIC: float(np.mean(values[how])),
                "difference": vars(paired_bootstrap(values[how], values[exact])),
                "same": float(np.mean(kept)),
            }
        )
    report.notes.append(
        f"{options.data} ({options.split}): {len(queries[0])} queries, {len(corpus[0]):,} "
        f"documents, vectors of width {corpus[1].shape[1]} by {made_by}; the first "
        f"{options.depth} documents of every query."
    )
    return report


def _search(row: dict[str, Any]) -> str:
    again = f", {row['oversample']} × {row['depth']} scored again" if row["oversample"] else ""
    return row["code"] + again


def _difference(row: dict[str, Any], form: str) -> str:
    """Empty in the row that the others are compared with."""
    exact = (row["code"], row["oversample"]) == SEARCHES[0]
    return "" if exact else form.format(**row["difference"])


COLUMNS = {
    "search with": _search,
    "bytes a document": lambda row: f"{row['bytes_a_document']:,}",
    METRIC: lambda row: f"{row[METRIC]:.4f}",
    "less float32's": lambda row: _difference(row, "{difference:+.4f}"),
    "95 % interval": lambda row: _difference(row, "{low:+.4f} to {high:+.4f}"),
    "same documents": lambda row: f"{row['same']:.2%}",
}


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = command_line("search_quality", __doc__, repeats=None)
    parser.add_argument("--data", help="a BEIR directory; --quick makes a tiny corpus instead")
    parser.add_argument("--split", default="test", help="default test")
    parser.add_argument("--corpus_vectors", help="a directory of vectors")
    parser.add_argument("--query_vectors", help="a directory of vectors")
    parser.add_argument(
        "--dimension",
        type=positive,
        default=512,
        help="of the vectors made without a model, a multiple of 8; default 512",
    )
    parser.add_argument(
        "--depth", type=positive, default=100, help="documents of a query; default 100"
    )
    options = parser.parse_args(arguments)
    if options.data is None and not options.quick:
        parser.error("--data DIR is wanted: a BEIR directory, such as ../shared/data/scifact")
    if (options.corpus_vectors is None) != (options.query_vectors is None):
        parser.error("give both --corpus_vectors and --query_vectors, or neither")
    if options.dimension % 8:
        parser.error(f"--dimension must be a multiple of 8, got {options.dimension}")
    try:
        report = measure(options, arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    report.finish(COLUMNS, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
