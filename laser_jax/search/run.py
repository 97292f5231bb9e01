"""Exact search over directories of vectors, shard by shard, on all devices of this machine:
`python -m laser_jax.search --corpus_vectors DIR --query_vectors DIR --output RUN.trec`."""

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from laser_jax.command_line import program
from laser_jax.data.documents import query_id_fault
from laser_jax.files.reading import DataError
from laser_jax.search.codes import decode_vectors
from laser_jax.search.matching import exclusions, identical_count, unmatched
from laser_jax.search.topk import Chunk, StoredCorpus, device_mesh, search_chunks
from laser_jax.search.trec import Run, read_excluded, trec_order, write_trec_run
from laser_jax.search.vectors import Manifest, read_ids, read_manifest, read_shards
from laser_jax.settings import require_in

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchOptions:
    """Ranks a corpus for every query by exact search over vectors, and writes a TREC run."""

    corpus_vectors: str
    """A finished directory of document vectors."""
    query_vectors: str
    """One of query vectors, of the same model."""
    output: str
    """The TREC run to write."""
    k: int = 100
    """Documents per query."""
    excluded: str | None = None
    """Documents that a query must not be given: a queries.jsonl with `excluded_ids`, or a .tsv of
    query and document id."""
    ignore_identical_ids: bool = True
    """BEIR's rule: a query is not given the document that has its own id."""
    code: Literal["stored", "float16", "int8", "binary"] = "stored"
    """What to search with; other than as stored, it is an approximation."""
    oversample: int = 0
    """m >= 1: the best m k documents are scored again with the vectors as stored."""

    def __post_init__(self) -> None:
        require_in("[1, inf)", self, "", "k")
        require_in("[0, inf)", self, "", "oversample")


def search_directories(options: SearchOptions) -> Run:
    """The run that `options` ask for. Raises a FileNotFoundError or DataError on bad input."""
    corpus = read_manifest(options.corpus_vectors, "documents")
    queries = read_manifest(options.query_vectors, "queries")
    _require_comparable(options, corpus, queries)
    query_ids = read_ids(options.query_vectors, queries)
    for id_ in query_ids:
        if fault := query_id_fault(id_):
            fault = f"query id {id_!r} {fault}, so it cannot stand in a TREC run"
            raise DataError(f"{options.query_vectors}: {fault}")
    shards = read_shards(options.query_vectors, queries)
    queries_QD = np.concatenate([decode_vectors(rows, queries.info.dtype) for _, rows in shards])
    doc_ids = read_ids(options.corpus_vectors, corpus)
    return search_chunks(
        queries_QD,
        _stored_corpus(options.corpus_vectors, corpus, doc_ids),
        query_ids,
        options.k,
        _excluded(options, query_ids, doc_ids),
        code=corpus.info.dtype if options.code == "stored" else options.code,
        oversample=options.oversample,
        mesh=device_mesh(),
    )


def _require_comparable(options: SearchOptions, corpus: Manifest, queries: Manifest) -> None:
    of_manifest = {options.corpus_vectors: corpus, options.query_vectors: queries}
    if empty := [directory for directory, held in of_manifest.items() if held.count == 0]:
        raise DataError(f"{empty[0]}: holds no vector")
    for key in ("model_hash", "prompt_hash", "dimension"):
        of_corpus, of_queries = getattr(corpus.info, key), getattr(queries.info, key)
        if of_corpus != of_queries:
            raise DataError(
                f"{key} of {options.query_vectors} is {of_queries!r}, that of "
                f"{options.corpus_vectors} {of_corpus!r}: their vectors cannot be compared"
            )
    Ks = (queries.info.num_thinking_steps, corpus.info.num_thinking_steps)
    _log.info("queries thought at K = %d, documents at K = %d", *Ks)


def _stored_corpus(directory: str, manifest: Manifest, doc_ids: Sequence[str]) -> StoredCorpus:
    """The documents of a directory, read shard by shard."""
    order_C = trec_order(doc_ids)
    rank_C = np.argsort(order_C).astype(np.int32)

    def read() -> Iterator[Chunk]:
        start = 0
        bar = {"total": len(manifest.shards), "unit": "shard", "disable": None, "leave": False}
        for ids, rows in tqdm(read_shards(directory, manifest), "search", **bar):
            ranks = rank_C[start : start + len(ids)]
            start += len(ids)
            order = np.argsort(ranks)
            yield rows[order], ranks[order]

    return StoredCorpus(read, [doc_ids[int(i)] for i in order_C], manifest.info.dtype)


def _excluded(
    options: SearchOptions, query_ids: Sequence[str], doc_ids: Sequence[str]
) -> dict[str, Collection[str]]:
    """Query id -> documents that it is not given. Says which ids match nothing."""
    path = options.excluded
    excluded = read_excluded(path) if path else {}
    documents, queries = set(doc_ids), set(query_ids)
    identical = [query for query in query_ids if query in documents]
    named = [document for query in query_ids for document in excluded.get(query, ())]
    for count in (
        *unmatched("queries with exclusions that have no vector", excluded, queries, path),
        *unmatched("excluded documents that the corpus lacks", named, documents, path),
        *identical_count(query_ids, identical, options.ignore_identical_ids),
    ):
        _log.info("%s", count)
    return exclusions(excluded, identical if options.ignore_identical_ids else ())


def _write(options: SearchOptions) -> None:
    if Path(options.output).is_dir():  # now, not after the search
        raise IsADirectoryError(f"--output {options.output} is a directory; name the run in it")
    if not Path(options.output).parent.is_dir():
        raise FileNotFoundError(f"the folder of --output {options.output} does not exist")
    run = search_directories(options)
    write_trec_run(run, options.output, "laser_jax")
    print(f"{options.output}: {len(run)} queries, {sum(map(len, run.values()))} documents")


main = program("search", SearchOptions, _write)
