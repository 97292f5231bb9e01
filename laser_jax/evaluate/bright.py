"""Local copies of BRIGHT (arXiv 2407.12883), a domain at a time, as the dataset that BEIR gives.

A copy has the layout of the hub's `xlangai/BRIGHT`: a folder for each of

    documents, long_documents    `id`, `content`
    examples                     `id`, `query`, `gold_ids`, `gold_ids_long`, `excluded_ids`
    gpt4_reason, ...             the same, with the query as a language model rewrote it

and in it a domain's file: `DOMAIN-00000-of-00001.parquet` (all shards), `DOMAIN.parquet`,
`DOMAIN.jsonl`, `DOMAIN.jsonl.gz` or `DOMAIN.json` (a list, or a row a line). Other columns are
ignored, `reasoning` too: it was written by people who knew the gold documents.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from laser_jax.data.documents import Document, EvalQuery, id_field, id_list, unique
from laser_jax.evaluate.beir import BeirDataset, judged_split
from laser_jax.files.reading import (
    DataError,
    json_lines,
    json_object,
    parquet_rows,
    parse_json,
    text_field,
)
from laser_jax.files.splits import one_split

# The domains in the order of BRIGHT's tables, each with its task in words. The words are those of
# the table in LaSER's released evaluator (github.com/ignorejjj/LaSER at d490a81,
# src/eval/run_mteb.py, run_bright), kept to the letter; docs/evaluation.md says what else is known.
_POST = "Given a {} post, retrieve relevant passages that help answer the post."
_PROBLEM = "Given a {} problem, retrieve relevant {} that help answer the problem."
_PONY = "question about pony program language"
INSTRUCTIONS: dict[str, str] = {
    "biology": "Given a post, retrieve relevant passages that help answer the post.",
    "earth_science": "Given a post, retrieve relevant passages that help answer the post.",
    "economics": _POST.format("economics"),
    "psychology": _POST.format("psychology"),
    "robotics": _POST.format("robotics"),
    "stackoverflow": _POST.format("stackoverflow"),
    "sustainable_living": _POST.format("sustainable_living"),
    "leetcode": _PROBLEM.format("coding", "examples"),
    "pony": f"Given a {_PONY}, retrieve relevant passages that help answer the question.",
    "aops": _PROBLEM.format("Math", "examples"),
    "theoremqa_questions": _PROBLEM.format("Math", "examples"),
    "theoremqa_theorems": _PROBLEM.format("Math", "theorems"),
}
DOMAINS = tuple(INSTRUCTIONS)
EXAMPLES, REWRITTEN = "examples", " as "
ALL = "all"

_FILE = re.compile(rf"({'|'.join(DOMAINS)})((-\d+-of-\d+)?\.parquet|\.jsonl(\.gz)?|\.json)")
_NO_EXCLUSION = "N/A"

T = TypeVar("T")


def is_bright(directory: str | Path) -> bool:
    """Whether the directory looks like a copy of BRIGHT: it has a folder `examples`."""
    return (Path(directory) / EXAMPLES).is_dir()


@dataclass(frozen=True)
class BrightCopy:
    """A local copy, and what of it is read, from the folders `documents` and `queries`."""

    directory: Path
    long_documents: bool = False
    """Search whole web pages instead of passages; `gold_ids_long` are the gold documents."""
    rewrites: str | None = None
    """A folder of rewritten queries such as `gpt4_reason`, instead of `examples`."""

    @property
    def documents(self) -> str:
        return "long_documents" if self.long_documents else "documents"

    @property
    def queries(self) -> str:
        return self.rewrites or EXAMPLES

    def domains(self, names: str) -> list[str]:
        """The domains that `names` asks for, with commas between, or `all` that are there; in the
        order of `DOMAINS`. Raises a FileNotFoundError where a folder or a domain is missing, and a
        DataError on an unknown one."""
        folders = [self.directory / name for name in (self.documents, self.queries)]
        present = set.intersection(*({m[1] for m in _matches(f).values()} for f in folders))
        wanted = present if names == ALL else {name.strip() for name in names.split(",")}
        if unknown := wanted - set(DOMAINS):
            known = f"{', '.join(DOMAINS)}, or {ALL}"
            raise DataError(f"{min(unknown)!r} is no domain of BRIGHT: they are {known}")
        for domain in _in_order(wanted):
            for folder in folders:
                _files(folder, domain)
        if not wanted:
            both = f"{self.documents} and {self.queries}"
            raise FileNotFoundError(f"{self.directory}: no domain has a file in both {both}")
        return _in_order(wanted)

    def read(self, domain: str) -> BeirDataset:
        """Reads one domain. Gold documents have grade 1; a query without any is not judged and left
        out, as it is by BRIGHT's own code and by mteb. Raises a FileNotFoundError where a file is
        missing, and a DataError on a file or a row of another form, an id that stands twice, a gold
        document that the corpus lacks or that is excluded too, and as `judged_split`."""
        rows = _read(self.directory / self.documents, domain, ("id", "content"), _document)
        documents = unique(rows, "document")
        gold_field = "gold_ids_long" if self.long_documents else "gold_ids"

        def parse(row: dict[str, Any], where: str) -> tuple[EvalQuery, tuple[str, ...]]:
            query, gold = _query(row, where, INSTRUCTIONS[domain]), id_list(row, gold_field, where)
            for id_ in gold:
                if id_ in query.excluded_ids:
                    raise DataError(f"{where}: document {id_!r} is both gold and excluded")
                if id_ not in documents:
                    raise DataError(
                        f"{where}: gold document {id_!r} is not among the {len(documents)} of "
                        f"{self.documents} of this domain: the copy is incomplete, or its folders "
                        "are of two versions"
                    )
            return query, gold

        columns = ("id", "query", "excluded_ids", gold_field)
        examples = _read(self.directory / self.queries, domain, columns, parse)
        queries = unique(((where, query) for where, (query, _) in examples), "query")
        return judged_split(
            f"{self.directory} ({domain})",
            list(documents.values()),
            queries,
            {query.id: dict.fromkeys(gold, 1) for _, (query, gold) in examples if gold},
            refuse_excluded=not self.long_documents,  # exclusions name passages
        )


def _in_order(domains: Iterable[str]) -> list[str]:
    return sorted(domains, key=DOMAINS.index)


def _document(row: dict[str, Any], where: str) -> Document:
    return Document(id_field(row, "id", where, "document"), text_field(row, "content", where))


def _query(row: dict[str, Any], where: str, instruction: str) -> EvalQuery:
    id_, text = id_field(row, "id", where, "query"), text_field(row, "query", where)
    excluded = tuple(i for i in id_list(row, "excluded_ids", where) if i != _NO_EXCLUSION)
    return EvalQuery(id_, text, instruction=instruction, excluded_ids=excluded)


# --- files -------------------------------------------------------------------------------------


def _matches(folder: Path) -> dict[Path, re.Match[str]]:
    """The files of a folder of the copy that are a domain's."""
    if not folder.is_dir():
        present = sorted(p.name for p in folder.parent.glob("*") if p.is_dir())
        raise FileNotFoundError(f"{folder} is missing; folders present: {', '.join(present)}")
    matched = ((file, _FILE.fullmatch(file.name)) for file in sorted(folder.iterdir()))
    return {file: match for file, match in matched if match}


def _files(folder: Path, domain: str) -> list[Path]:
    """A domain's file, or all of its shards in their order."""
    matches = _matches(folder)
    files = [file for file, match in matches.items() if match[1] == domain]
    if not files:
        present = ", ".join(_in_order({match[1] for match in matches.values()})) or "none"
        raise FileNotFoundError(f"{folder} holds no file of {domain}; domains present: {present}")
    if len(files) > 1 and not all("-of-" in file.name for file in files):
        found = ", ".join(file.name for file in files)
        raise DataError(f"{folder}: wanted one file of {domain} or its shards, found {found}")
    return one_split(folder, files)


def _read(
    folder: Path, domain: str, columns: tuple[str, ...], parse: Callable[[dict[str, Any], str], T]
) -> list[tuple[str, T]]:
    """("file:line", what `parse` makes of it) of every row of a domain's file or shards."""
    files = _files(folder, domain)
    rows = [
        (where, parse(json_object(row, where), where))
        for file in files
        for where, row in _rows(file, columns)
    ]
    if not rows:
        raise DataError(f"{files[0]}: holds no row")
    return rows


def _rows(file: Path, columns: tuple[str, ...]) -> Iterable[tuple[str, Any]]:
    """("file:line" or "file, row n", row or its line) of a file."""
    if file.suffix == ".parquet":
        numbered = parquet_rows(file, columns, columns)
    else:
        with file.open("rb") as opened:  # no .gz begins with a bracket
            is_list = opened.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        if not is_list:
            return json_lines(file)
        numbered = enumerate(parse_json(file.read_bytes(), file), start=1)
    return ((f"{file}, row {number}", row) for number, row in numbered)
