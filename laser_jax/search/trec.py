"""TREC runs: their order of documents, and the files that hold them.

trec_eval orders the documents of a query by score, descending, and documents of equal score by id,
descending. It stores scores as C floats, so two scores that agree in float32 are equal.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from laser_jax.data.documents import document_id_fault, excluded_ids, query_id_fault
from laser_jax.files.durable import written_whole
from laser_jax.files.reading import DataError, json_object, parse_number, text_field, text_lines

Run = dict[str, dict[str, float]]
"""Query id -> document id -> score."""

# Parsed from both ends, as BRIGHT's document ids hold blanks; ASCII, as ids may hold other spaces.
_LINE = re.compile(r"\s*(\S+)\s+\S+\s+(\S.*?)\s+([0-9]+)\s+(\S+)\s+\S+\s*", re.ASCII)


def rank_documents(scores: Mapping[str, float]) -> list[str]:
    """The documents of one query in trec_eval's order. Raises a ValueError on a score that is NaN,
    which has no place in any order."""
    with np.errstate(over="ignore"):  # a C float overflows to infinity as well
        values = np.fromiter(scores.values(), np.float64, len(scores)).astype(np.float32)
    if np.isnan(values).any():
        document = list(scores)[int(np.isnan(values).argmax())]
        raise ValueError(f"the score of document {document!r} is NaN; a ranking needs numbers")
    ranked = sorted(zip(values.tolist(), scores, strict=True), reverse=True)
    return [document for _, document in ranked]


def trec_order(doc_ids: Sequence[str]) -> np.ndarray:
    """The permutation [C] int64 that puts documents in descending order of their ids. On documents
    in this order ties go to the lower index, also where the tie straddles the cut."""
    return np.array(sorted(range(len(doc_ids)), key=doc_ids.__getitem__, reverse=True), np.int64)


def read_trec_run(path: str | Path) -> Run:
    """Reads a TREC run, plain or .gz: `qid Q0 docid rank score tag`, where docid may hold blanks.
    The rank is not used: trec_eval orders by the score. Raises a FileNotFoundError, and a DataError
    on a line of another form, a score that is NaN, a document that a query ranks twice, or a file
    without any line."""
    run: Run = {}
    for where, line in text_lines(path):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise DataError(f"{where}: wanted 'qid Q0 docid rank score tag', got {line!r}")
        query, document, _, score = match.groups()
        value = parse_number(score)
        if value is None:
            raise DataError(f"{where}: the score must be a number, got {score!r}")
        if math.isnan(value):
            of = f"document {document!r} of query {query!r}"
            raise DataError(f"{where}: the score of {of} is NaN; a ranking needs numbers")
        scores = run.setdefault(query, {})
        if document in scores:
            raise DataError(f"{where}: query {query!r} ranks {document!r} a second time")
        scores[document] = value
    if not run:
        raise DataError(f"{path}: holds no ranked document")
    return run


def write_trec_run(run: Run, path: str | Path, tag: str) -> None:
    """Writes a TREC run in trec_eval's order, ranks from 1, scores with all their digits. A query
    without documents leaves no line, so it is not in the run that is read back. Raises a ValueError
    on a query id or tag with a blank, a document id that would not be read back
    (`document_id_fault`) or a NaN score, and an OSError; what stood there stays."""
    for name in (*run, tag):
        if fault := query_id_fault(name):
            raise ValueError(f"{name!r} cannot stand in a TREC run: it {fault}")
    for query, document in ((query, d) for query, scores in run.items() for d in scores):
        if fault := document_id_fault(document):
            of = f"document id {document!r} of query {query!r}"
            raise ValueError(f"{of} cannot stand in a TREC run: it {fault}")
    lines = (
        # repr of a float is the shortest text that reads back as the same double
        f"{query} Q0 {document} {rank} {float(scores[document])!r} {tag}\n"
        for query, scores in run.items()
        for rank, document in enumerate(rank_documents(scores), start=1)
    )
    with written_whole(Path(path)) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)


def read_excluded(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Reads which documents a query must not be given: query id, where there is one, -> document
    ids. A `.jsonl` is a BEIR `queries.jsonl` with BRIGHT's field `excluded_ids`; a `.tsv` has a
    query id and a document id with a tab between in each line, without a header. Raises a
    FileNotFoundError, and a DataError on another name or a line of another form."""
    path = Path(path)
    if path.suffix not in (".jsonl", ".tsv"):
        raise DataError(f"{path}: excluded documents are read from a .jsonl or a .tsv file")
    excluded: dict[str, tuple[str, ...]] = {}
    for where, line in text_lines(path):
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            row = json_object(line.encode(), where)
            query, documents = text_field(row, "_id", where), excluded_ids(row, where)
        else:
            query, *documents = line.rstrip("\r\n").split("\t")
            if len(documents) != 1:
                raise DataError(f"{where}: wanted query-id, a tab and corpus-id, got {line!r}")
        if documents:
            excluded[query] = (*excluded.get(query, ()), *documents)
    return excluded
