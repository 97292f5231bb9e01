"""FAISS indexes of a directory of vectors, for corpora that want an approximate search.

index.faiss   the index; FAISS numbers the vectors in the order of the directory
ids.json      their ids in that order, and what the vectors are (`VectorsInfo`)
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from laser_jax.config import as_dict, from_dict
from laser_jax.data.schema import as_strings
from laser_jax.files.durable import read_state, write_atomically, written_whole
from laser_jax.search.codes import decode_vectors
from laser_jax.search.trec import Run, rank_documents
from laser_jax.search.vectors import (
    VectorsError,
    VectorsInfo,
    read_ids,
    read_manifest,
    read_shards,
)

INDEX_FILE, IDS_FILE = "index.faiss", "ids.json"


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("FAISS is not installed: pip install laser-jax[bench]") from error
    return faiss


def export_faiss(
    vectors: str | Path, output: str | Path, *, factory: str = "Flat", training_rows: int = 262_144
) -> None:
    """Builds an inner-product index of a directory of vectors, shard by shard.

    Args:
        vectors: a finished directory of document vectors; float16 and int8 rows are decoded.
        output: the directory to write.
        factory: FAISS' own description: "Flat" is exact, "SQfp16", "IVF1024,SQ8", "HNSW32" are not.
        training_rows: how many vectors, from the first on, an index that must be trained sees.

    Raises:
        FileNotFoundError, VectorsError: the vectors cannot be used.
        ImportError: without faiss.
    """
    faiss = _faiss()
    manifest = read_manifest(vectors, "documents")
    if manifest.count == 0:
        raise VectorsError(f"{vectors}: holds no vector")
    ids = read_ids(vectors, manifest)
    index = faiss.index_factory(manifest.info.dimension, factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        sample: list[np.ndarray] = []
        for _, rows in read_shards(vectors, manifest):
            sample.append(decode_vectors(rows, manifest.info.dtype))
            if sum(map(len, sample)) >= training_rows:
                break
        index.train(np.concatenate(sample)[:training_rows])
    for _, rows in read_shards(vectors, manifest):
        index.add(decode_vectors(rows, manifest.info.dtype))
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with written_whole(output / INDEX_FILE) as part:
        faiss.write_index(index, str(part))
    write_atomically(
        output / IDS_FILE, json.dumps({"info": as_dict(manifest.info), "ids": ids}) + "\n"
    )


@dataclass(frozen=True)
class FaissIndex:
    """An index that `export_faiss` wrote."""

    index: Any
    ids: list[str]
    info: VectorsInfo

    @classmethod
    def load(cls, directory: str | Path) -> FaissIndex:
        """Reads both files.

        Raises:
            FileNotFoundError: when one is missing.
            VectorsError: when they do not belong together.
        """
        faiss = _faiss()
        directory = Path(directory)
        for name in (INDEX_FILE, IDS_FILE):
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory / name} is missing: export the index again")
        values = read_state(
            directory / IDS_FILE, lambda v: {"info": dict(v["info"]), "ids": list(v["ids"])}
        )
        if values is None:
            raise VectorsError(f"{directory / IDS_FILE} is damaged: export the index again")
        if "role" not in values["info"]:
            raise VectorsError(
                f"{directory / IDS_FILE}: does not say what the vectors are of, as older versions "
                "did not: export the index again"
            )
        info = from_dict(VectorsInfo, values["info"], source=str(directory / IDS_FILE))
        index = faiss.read_index(str(directory / INDEX_FILE))
        if (index.ntotal, index.d) != (len(values["ids"]), info.dimension):
            raise VectorsError(
                f"{directory}: {INDEX_FILE} holds {index.ntotal} vectors of width {index.d}, "
                f"{IDS_FILE} names {len(values['ids'])} of width {info.dimension}"
            )
        return cls(index, values["ids"], info)

    def search(
        self,
        queries_QD: np.ndarray,
        query_ids: Sequence[str],
        k: int,
        excluded: Mapping[str, Collection[str]],
    ) -> Run:
        """The k documents that FAISS finds for each query, in trec_eval's order.

        FAISS breaks a tie at the cut in its own way, so the last documents may differ from those of
        `laser_jax.search.topk.search`.

        Args:
            queries_QD: float32.
            excluded: as there.
        """
        query_ids = as_strings("query id", query_ids)
        removed = {query: set(excluded.get(query, ())) for query in query_ids}
        depth = k + max(map(len, removed.values()), default=0)
        scores_Qk, places_Qk = self.index.search(np.ascontiguousarray(queries_QD), depth)
        run: Run = {}
        for query, scores_k, places_k in zip(query_ids, scores_Qk, places_Qk, strict=True):
            # FAISS pads with -1 where it found fewer
            found = {
                self.ids[place]: float(score)
                for place, score in zip(places_k, scores_k, strict=True)
                if place >= 0 and self.ids[place] not in removed[query]
            }
            run[query] = {document: found[document] for document in rank_documents(found)[:k]}
        return run
