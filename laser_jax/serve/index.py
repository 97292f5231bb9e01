"""A corpus in memory: vectors and texts, and the search over them."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from laser_jax.evaluate.beir import BeirDataset
from laser_jax.files.reading import DataError
from laser_jax.inference.retriever import EncodingStats, LatentRetriever
from laser_jax.search.codes import Code, decode_vectors
from laser_jax.search.topk import NO_RANK, device_mesh, exact_top_k
from laser_jax.search.trec import trec_order
from laser_jax.search.vectors import read_ids, read_manifest, read_shards

_log = logging.getLogger(__name__)
_QUERIES = (1, 8, 64)
"""How many queries a search may have; programs are compiled for these."""
_MOST = 100
"""Documents of a search at most."""
_PIECE, _ROW_MULTIPLE = 1 << 20, 128
"""Documents that are scored at a time at most, and of which each device has a multiple."""


class Index:
    """The documents of a corpus, to be searched exactly: `ids` [C] in trec_eval's order, so that a
    document's rank is its place, and `texts` by id, empty where the corpus's were not given. A
    search gives `most` documents."""

    def __init__(
        self, ids: Sequence[str], rows_CW: np.ndarray, code: Code, texts: Mapping[str, str]
    ) -> None:
        """Places the rows of one document or more, coded as `code`, on all devices of this process.
        Raises a DataError where a text is missing."""
        if texts and (missing := [id_ for id_ in ids if id_ not in texts]):
            raise DataError(
                f"{len(missing)} of {len(ids)} ids of --corpus_vectors, the first is "
                f"{missing[0]!r}, are not in --corpus: give the corpus that was encoded"
            )
        order_C = trec_order(ids)
        self.ids = [ids[int(c)] for c in order_C]
        self.texts, self._mesh = texts, device_mesh()
        self._code: Code = code
        self.most = min(_MOST, len(ids))
        self._width = decode_vectors(rows_CW[:1], code).shape[1]
        # pieces of one length, which the search neither cuts nor copies, stay on the devices
        C, multiple = len(ids), _ROW_MULTIPLE * self._mesh.size
        length = -(-C // (-(-C // _PIECE)))
        self._length = -(-length // multiple) * multiple
        split = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        self._pieces: list[Any] = []
        for start in range(0, C, self._length):
            places = order_C[start : start + self._length]
            spare = self._length - len(places)
            ranks = np.arange(start, start + len(places), dtype=np.int32)
            ranks = np.pad(ranks, (0, spare), constant_values=NO_RANK)
            piece = np.pad(rows_CW[places], ((0, spare), (0, 0)))
            self._pieces.append((jax.device_put(piece, split), ranks))

    def warm_up(self) -> None:
        """Compiles the search."""
        for count in _QUERIES:
            self.search(np.zeros((count, self._width), np.float32), 1)

    def search(self, queries_QD: np.ndarray, k: int) -> list[list[tuple[str, float]]]:
        """The first k <= `most` documents of each query, best first, with their cosines. Queries
        are float32 unit rows."""
        found: list[list[tuple[str, float]]] = []
        for start in range(0, len(queries_QD), _QUERIES[-1]):
            block_QD = queries_QD[start : start + _QUERIES[-1]]
            size = next(size for size in _QUERIES if size >= len(block_QD))
            scores_Qk, ranks_Qk = exact_top_k(
                np.pad(block_QD, ((0, size - len(block_QD)), (0, 0))),
                self._pieces,
                self.most,
                code=self._code,
                mesh=self._mesh,
                chunk=self._length,
                query_block=size,
            )
            for q in range(len(block_QD)):
                pairs = zip(ranks_Qk[q, :k].tolist(), scores_Qk[q, :k].tolist(), strict=True)
                found.append([(self.ids[rank], score) for rank, score in pairs])
        return found


def encode_index(
    retriever: LatentRetriever, corpus: BeirDataset, stats: EncodingStats
) -> tuple[Index, np.ndarray]:
    """The index of a corpus that is embedded now, and its vectors [C, D] float32."""
    texts = {document.id: document.text for document in corpus.documents}
    listed = list(texts.values())
    vectors_CD = retriever.encode_document(listed, show_progress_bar=True, stats=stats)
    _log.info("%d documents, of which %d were shortened", stats.texts, stats.truncated)
    return Index(list(texts), vectors_CD, "float32", texts), vectors_CD


def read_index(
    directory: str | Path, identity: tuple[str, str, int | None], corpus: BeirDataset | None
) -> tuple[Index, np.ndarray | None]:
    """The index of a directory of vectors, and the vectors [C, D] float32 in the order of `corpus`
    (None without one). `identity` is `model_hash` and `prompt_hash` of the model that is served,
    and its own K of documents if it has one; a DataError says that the directory is of another."""
    manifest = read_manifest(directory, "documents")
    info = manifest.info
    keys = ("model_hash", "prompt_hash", "num_thinking_steps")
    for key, wanted in zip(keys, identity, strict=True):
        if wanted is not None and (found := getattr(info, key)) != wanted:
            raise DataError(
                f"{directory}: its {key} is {found}, and that of the served model is {wanted}: its "
                "vectors cannot be compared with the model's. Encode the corpus by this model, "
                "in the same compute_dtype"
            )
    if manifest.count == 0:
        raise DataError(f"{directory}: holds no vector")
    ids = read_ids(directory, manifest)
    rows_CW = np.concatenate([rows for _, rows in read_shards(directory, manifest)])
    texts = {} if corpus is None else {doc.id: doc.text for doc in corpus.documents}
    index = Index(ids, rows_CW, info.dtype, texts)
    if corpus is None:
        return index, None
    places = {id_: place for place, id_ in enumerate(ids)}
    if lacking := [id_ for id_ in texts if id_ not in places]:
        raise DataError(
            f"{directory}: has no vector for {len(lacking)} of {len(texts)} documents of --corpus, "
            f"the first is {lacking[0]!r}: encode the corpus again"
        )
    return index, decode_vectors(rows_CW[[places[id_] for id_ in texts]], info.dtype)
