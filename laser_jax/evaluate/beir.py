"""BEIR directories, and judgements in the forms of BEIR and TREC.

A BEIR directory holds `corpus.jsonl` (`_id`, `title`, `text`), `queries.jsonl` (`_id`, `text`) and
`qrels/<split>.tsv` (a header, then query id, document id, grade). Queries may carry three fields
more: `instruction`, `reasoning` (a chain of thought) and BRIGHT's `excluded_ids`.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laser_jax.data.documents import D, Document, EvalQuery, parse_document, parse_query, unique
from laser_jax.evaluate.metrics import Qrels
from laser_jax.files.reading import DataError, json_lines, json_object, parse_integer, text_lines
from laser_jax.search.matching import IdCount, count_ids, exclusions, identical_count, unmatched

# The forms of a judgement. trec_eval's is parsed from both ends, as BRIGHT's ids hold blanks.
_TREC = re.compile(r"\s*(\S+)\s+\S+\s+(\S.*?)\s+(\S+)\s*", re.ASCII), "'qid iter docid grade'"
_BETWEEN_TABS = re.compile(r"([^\t]*)\t([^\t]*)\t([^\t]*?)[\r\n]*")
_BEIR = _BETWEEN_TABS, "query-id, corpus-id and score between tabs"


@dataclass(frozen=True)
class BeirDataset:
    """One split: the whole corpus, and the queries that are judged in the split."""

    documents: list[Document]
    queries: dict[str, EvalQuery]
    qrels: Qrels
    unmatched: tuple[IdCount, ...] = ()
    """Ids that match nothing (see `judged_split`)."""
    ignore_identical_ids: bool = True
    """BEIR's rule: a query is not given the document that has its own id."""

    def exclusions(self, *, nothing_excluded: bool = False) -> dict[str, Collection[str]]:
        """Query id -> documents that no ranking of it holds; with `nothing_excluded` without those
        of its `excluded_ids`."""
        excluded = {} if nothing_excluded else {q.id: q.excluded_ids for q in self.queries.values()}
        return exclusions(excluded, self._identical() if self.ignore_identical_ids else ())

    @property
    def id_counts(self) -> tuple[IdCount, ...]:
        """What the footer of a table says about ids."""
        identical = self._identical()
        relevant = [q for q in identical if self.qrels.get(q, {}).get(q, 0) >= 1]
        return (
            *self.unmatched,
            *identical_count(self.queries, identical, self.ignore_identical_ids),
            *count_ids("of those, judged relevant to it", identical, relevant),
        )

    def _identical(self) -> list[str]:
        documents = {document.id for document in self.documents}
        return [query for query in self.queries if query in documents]


def _read_json_lines(
    path: Path, parse: Callable[[dict[str, Any], str], D], kind: str
) -> dict[str, D]:
    """What `parse` makes of the rows of a file, by their ids."""
    if not path.is_file():
        wanted = "corpus.jsonl, queries.jsonl and qrels/<split>.tsv"
        raise FileNotFoundError(f"{path} is missing: a BEIR directory holds {wanted}")
    rows = ((where, parse(json_object(line, where), where)) for where, line in json_lines(path))
    return unique(rows, kind)


def read_corpus(directory: str | Path) -> list[Document]:
    """Reads `corpus.jsonl`, in its order; unknown fields are ignored. Raises a FileNotFoundError,
    and a DataError on a line that is no document, an id that stands twice, or an empty file."""
    path = Path(directory) / "corpus.jsonl"
    documents = _read_json_lines(path, parse_document, "document")
    if not documents:
        raise DataError(f"{path}: holds no document")
    return list(documents.values())


def read_queries(directory: str | Path) -> dict[str, EvalQuery]:
    """Reads the `queries.jsonl` of a BEIR directory, or a file of that form, in its order: query
    id -> query. Unknown fields are ignored; raises as `read_corpus`."""
    given = Path(directory)
    path = given if given.is_file() else given / "queries.jsonl"
    return _read_json_lines(path, parse_query, "query")


def read_qrels_file(path: str | Path) -> Qrels:
    """Reads judgements, plain or .gz. A name that ends in `.tsv` or `.tsv.gz` is BEIR's form: a
    header, then query id, document id and grade between tabs. Any other is trec_eval's:
    `qid iter docid grade`, without a header; docid may hold blanks. Raises a FileNotFoundError, and
    a DataError on a missing header, a line of another form, a grade that is no integer, or two
    grades for one pair."""
    beir = Path(path).name.removesuffix(".gz").endswith(".tsv")
    form, wanted = _BEIR if beir else _TREC
    qrels: Qrels = {}
    for number, (where, line) in enumerate(text_lines(path), start=1):
        if number > 1 and not line.strip():
            continue
        if (judgement := form.fullmatch(line)) is None:
            raise DataError(f"{where}: wanted {wanted}, got {line!r}")
        query, document, grade = judgement.groups()
        if beir and number == 1:
            if re.match(r"\W*\d", grade):  # a number of any form, which names no column
                header = r"'query-id\tcorpus-id\tscore'"
                raise DataError(f"{where}: the header is missing; put {header} above")
            continue
        value = parse_integer(grade)
        if value is None:
            raise DataError(f"{where}: the score must be an integer, got {grade!r}")
        grades = qrels.setdefault(query, {})
        if (before := grades.setdefault(document, value)) != value:
            pair = f"query {query!r} and document {document!r}"
            raise DataError(f"{where}: {pair} have score {before} above and {grade} here")
    if not qrels:
        raise DataError(f"{path}: holds no judgement")
    return qrels


def read_qrels(directory: str | Path, split: str) -> Qrels:
    """Reads `qrels/<split>.tsv` of a BEIR directory by `read_qrels_file`. A FileNotFoundError names
    the splits that are there."""
    folder = Path(directory) / "qrels"
    path = folder / f"{split}.tsv"
    if not path.is_file():
        present = ", ".join(sorted(p.stem for p in folder.glob("*.tsv"))) or "none"
        raise FileNotFoundError(f"{path} is missing; splits present: {present}")
    return read_qrels_file(path)


def judged_split(
    where: object,
    documents: list[Document],
    queries: Mapping[str, EvalQuery],
    qrels: Qrels,
    *,
    refuse_excluded: bool = True,
) -> BeirDataset:
    """The dataset of those queries that are judged, with the ids that match nothing counted. Raises
    a DataError, which names the directory `where`, if no judged document is in the corpus, no
    relevant one or, to `refuse_excluded`, no excluded one."""
    known = {document.id for document in documents}
    judged = dict.fromkeys(document for grades in qrels.values() for document in grades)
    relevant = dict.fromkeys(d for ds in qrels.values() for d, grade in ds.items() if grade >= 1)
    kept = {id_: query for id_, query in queries.items() if id_ in qrels}
    excluded = [document for query in kept.values() for document in query.excluded_ids]
    lacking = unmatched("judged documents that the corpus lacks", judged, known, where)
    if relevant.keys() != judged.keys():
        lacking += unmatched("relevant documents that the corpus lacks", relevant, known, where)
    what = "excluded documents that the corpus lacks"
    lacking += unmatched(what, excluded, known, where, refuse_all=refuse_excluded)
    lacking += unmatched("queries without judgements", queries, qrels, where)
    lacking += unmatched("judged queries that are not there, left out", qrels, queries, where)
    of_queries = {id_: grades for id_, grades in qrels.items() if id_ in queries}
    return BeirDataset(documents, kept, of_queries, lacking)


def read_beir(directory: str | Path, split: str) -> BeirDataset:
    """Reads one split of a BEIR directory; of the queries, those that have qrels in it. A judged
    document that the corpus lacks (ArguAna has some) stays in the qrels, as it does for trec_eval,
    and counts as never retrieved. Raises a FileNotFoundError when a file is missing, and a
    DataError when one cannot be used or lacks a judged query, and as `judged_split`."""
    qrels, queries = read_qrels(directory, split), read_queries(directory)
    if unknown := [id_ for id_ in qrels if id_ not in queries]:
        raise DataError(
            f"{Path(directory) / 'qrels' / split}.tsv judges {len(unknown)} queries that "
            f"queries.jsonl lacks, the first is {unknown[0]!r}"
        )
    return judged_split(f"{directory} ({split})", read_corpus(directory), queries, qrels)
