"""What smaller vectors cost: nDCG@10 of float16, int8 and binary search against float32.

    python benchmarks/search_quality.py --data ../shared/data/scifact
    python benchmarks/search_quality.py --data BEIR_DIR --corpus_vectors DIR --query_vectors DIR

Without directories of vectors it makes its own, with no model: TF-IDF of words, projected onto the
first singular vectors (latent semantic analysis, Deerwester et al. 1990) and normalised. They rank
real texts well enough for a loss to show. Differences are given with their 95 % bootstrap interval.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from laser_jax.config import ConfigError, parse_command_line
from laser_jax.evaluation.beir import BeirDataset, read_beir
from laser_jax.evaluation.metrics import evaluate_run
from laser_jax.evaluation.results import markdown_table
from laser_jax.evaluation.significance import paired_bootstrap
from laser_jax.search.codes import Code, decode_vectors, encode_vectors
from laser_jax.search.topk import search
from laser_jax.search.trec import Run
from laser_jax.search.vectors import read_manifest, read_shards

METRIC = "nDCG@10"
DEPTH = 100
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


@dataclass(frozen=True)
class Options:
    """Measures what smaller vectors cost."""

    data: str
    """A BEIR directory."""
    split: str = "test"
    corpus_vectors: str | None = None
    query_vectors: str | None = None
    dimension: int = 512
    """Of the vectors made without a model; a multiple of 8."""

    def __post_init__(self) -> None:
        if (self.corpus_vectors is None) != (self.query_vectors is None):
            raise ConfigError("give both corpus_vectors and query_vectors, or neither")


Vectors = tuple[list[str], np.ndarray]
"""Ids, and float32 unit rows [C, D]."""


def read_vectors(directory: str) -> Vectors:
    """All vectors of a directory, decoded."""
    manifest = read_manifest(directory)
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


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    try:
        options = parse_command_line(Options, "python benchmarks/search_quality.py", arguments)
        dataset = read_beir(options.data, options.split)
        if options.corpus_vectors and options.query_vectors:
            corpus, queries = (
                read_vectors(options.corpus_vectors),
                read_vectors(options.query_vectors),
            )
        else:
            corpus, queries = lsa_vectors(dataset, options.dimension)
        excluded = {q.id: q.excluded_ids for q in dataset.queries.values()}
        runs: dict[tuple[Code, int], Run] = {
            (code, oversample): search(
                queries[1],
                corpus[1],
                queries[0],
                corpus[0],
                DEPTH,
                excluded,
                code=code,
                oversample=oversample,
            )
            for code, oversample in SEARCHES
        }
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    values = {
        how: [scores[METRIC] for scores in evaluate_run(run, dataset.qrels, [METRIC]).values()]
        for how, run in runs.items()
    }
    exact = SEARCHES[0]
    rows = []
    for (code, oversample), run in runs.items():
        how = (code, oversample)
        loss = paired_bootstrap(values[how], values[exact])
        kept = np.mean([len(run[q].keys() & runs[exact][q].keys()) / len(run[q]) for q in run])
        rows.append(
            [
                code + (f", {oversample} x {DEPTH} scored again" if oversample else ""),
                str(encode_vectors(corpus[1][:1], code).nbytes),
                f"{np.mean(values[how]):.4f}",
                f"{loss.difference:+.4f}",
                f"{loss.low:+.4f} to {loss.high:+.4f}",
                f"{kept:.4f}",
            ]
        )
    print(
        f"{options.data} ({options.split}): {len(queries[0])} queries, {len(corpus[0])} documents, "
        f"width {corpus[1].shape[1]}, "
        + (options.corpus_vectors or "vectors by latent semantic analysis")
    )
    header = [
        "search with",
        "bytes a document",
        METRIC,
        "loss",
        "95 % interval",
        f"same of {DEPTH}",
    ]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
