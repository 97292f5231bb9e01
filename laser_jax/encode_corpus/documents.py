"""The documents of a corpus, or its queries, one after the other from any place: JSON lines and
Parquet, in memory that does not grow with the corpus."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Self

from laser_jax.data.documents import (
    BEIR_FIELDS,
    Document,
    EvalQuery,
    Fields,
    parse_document,
    parse_query,
)
from laser_jax.files.reading import (
    DataError,
    is_blank,
    json_object,
    open_lines,
    parquet_rows,
    raw_lines,
)
from laser_jax.files.splits import one_split, split_of
from laser_jax.search.vectors import Role

_BEIR = {"documents": "corpus.jsonl", "queries": "queries.jsonl"}
_KINDS = ((".jsonl", ".jsonl.gz"), (".parquet",))


@dataclass(frozen=True)
class Place:
    """Where a document begins."""

    file: int = 0
    """Which of the corpus's files."""
    offset: int = 0
    """Bytes before it in that file (of a .gz: unpacked), or rows of Parquet."""
    line: int = 0
    """Lines or rows before it."""


@dataclass(frozen=True)
class Located:
    """A document, or query, and where it stands."""

    where: str
    """"file:line" of JSON lines, "file: row n" of Parquet."""
    item: Document | EvalQuery
    end: Place
    """Where the next one begins."""


class Corpus:
    """The documents, or queries, of one or several files, in the order of the files' names: what is
    read are `files`, and `bad_lines` were left out until now."""

    def __init__(
        self,
        path: str | Path,
        *,
        texts: Role = "documents",
        fields: Fields = BEIR_FIELDS,
        skipped: Callable[[str], object] | None = None,
    ):
        """Looks for the files; reads none. `path` is a .jsonl, .jsonl.gz or .parquet; or a
        directory: of BEIR (corpus.jsonl or queries.jsonl, perhaps .gz), or else one whose files are
        all of one of those kinds. `skipped` is given the message of every bad line or row, which is
        then left out; None makes them errors. Raises a FileNotFoundError or DataError where there
        is nothing to be read."""
        self.files = _files(Path(path), texts)
        self.bad_lines = 0
        self._skipped = skipped
        self._parse: Callable[[dict[str, Any], str], Document | EvalQuery] = parse_query
        self._columns, self._needed = {"_id", "text", "instruction"}, ["_id", "text"]
        if texts == "documents":
            self._parse = partial(parse_document, fields=fields)
            self._columns, self._needed = {*vars(fields).values()}, [fields.id, fields.text]
        self._open: tuple[int, BinaryIO] | None = None

    def read(self, start: Place | None = None) -> Iterator[Located]:
        """The documents from `start` on, to the end of the last file. One read at a time: the next
        one begins where this one's file is open, since what a .gz holds before a place has to be
        unpacked. Raises a DataError where a line or row is no document, and is not to be skipped,
        or a file is damaged."""
        start = start or Place()
        for number in range(start.file, len(self.files)):
            rows = self._rows if self.files[number].suffix == ".parquet" else self._lines
            for where, row, end in rows(number, start if number == start.file else Place(number)):
                try:
                    item = self._parse(json_object(row, where), where)
                except DataError as error:
                    if self._skipped is None:
                        raise
                    self.bad_lines += 1
                    self._skipped(str(error))
                else:
                    yield Located(where, item, end)

    def _lines(self, number: int, start: Place) -> Iterator[tuple[str, bytes, Place]]:
        path, offset = self.files[number], start.offset
        for line, content in raw_lines(path, self._file(number), offset, start.line):
            offset += len(content)
            if not is_blank(content):
                yield f"{path}:{line}", content, Place(number, offset, line)

    def _rows(self, number: int, start: Place) -> Iterator[tuple[str, dict[str, Any], Place]]:
        path, hint = self.files[number], ". --fields '[ID, TEXT, TITLE]' names others"
        for row, record in parquet_rows(path, self._columns, self._needed, start.offset, hint):
            yield f"{path}: row {row}", record, Place(number, row, row)

    def _file(self, number: int) -> BinaryIO:
        if self._open is None or self._open[0] != number:
            self.close()
            self._open = number, open_lines(self.files[number])
        return self._open[1]

    def close(self) -> None:
        """Closes the file that was read last."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _files(path: Path, texts: Role) -> list[Path]:
    """The files of a corpus. Raises a FileNotFoundError or DataError where there are none."""
    names = {role: (name, f"{name}.gz") for role, name in _BEIR.items()}
    if path.is_file():
        if not path.name.endswith(sum(_KINDS, ())):
            raise DataError(f"{path}: a .jsonl, .jsonl.gz or .parquet is wanted")
        for role, of_role in names.items():
            if role != texts and path.name in of_role:
                way_out = f"encode it with --texts {role}, or give it another name"
                held = f"a file of this name holds {role}, and {texts} are wanted"
                raise DataError(f"{path}: {held}: {way_out}")
        return [path]
    directory = path if path.is_dir() else path.parent
    if not path.is_dir() and path.name not in [split_of(p.name) for p in directory.glob("*")]:
        raise FileNotFoundError(f"{path} is neither a file nor a directory")
    files = sorted(p for p in directory.iterdir() if p.is_file())
    beir, wanted = [p for p in files if p.name in names[texts]], _BEIR[texts]
    if len(beir) == 1:
        return beir
    if beir:
        raise DataError(f"{path}: holds both {wanted} and {wanted}.gz: name one of them")
    others = {name for of_role in names.values() for name in of_role} & {p.name for p in files}
    if others or (directory / "qrels").is_dir():
        raise FileNotFoundError(
            f"{directory / wanted} is missing: with {min(others, default='qrels')} the directory "
            f"is one of BEIR, whose {texts} are there or in {wanted}.gz. Restore it, or name a file"
        )
    kinds = [[p for p in files if p.name.endswith(endings)] for endings in _KINDS]
    found = [kind for kind in kinds if kind]
    if len(found) != 1:
        what = "both JSON lines and Parquet: name one file" if found else "nothing to read"
        raise DataError(
            f"{path}: holds {what}. A directory of BEIR ({wanted}), of .jsonl(.gz) files or of "
            ".parquet files is wanted"
        )
    return one_split(path, found[0])
