"""The plan of a directory of vectors: of what its shards are made, and where each begins.

`plan.json` is written before anything else and never changed. Whoever encodes a shard, wherever and
whenever, reads it there, so that all shards are cut from one corpus in one way.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laser_jax.config import as_dict, from_dict
from laser_jax.encode_corpus.documents import Corpus, Fields, Located, Place
from laser_jax.evaluate.beir import Document, EvalQuery
from laser_jax.files.durable import read_state
from laser_jax.search.repeated_ids import RepeatedIds, id_hash
from laser_jax.search.trec import DatasetError
from laser_jax.search.vectors import Role, VectorsError, VectorsInfo

PLAN_FILE = "plan.json"
_FORMAT, _VERSION = "laser_jax corpus plan", 1


@dataclass(frozen=True)
class Settings:
    """All that the vectors depend on beside the corpus. Two runs that differ in any of it never
    write into one directory."""

    info: VectorsInfo
    instruction: str | None
    fields: Fields
    skip_bad_lines: bool
    shard_documents: int
    batch_size: int
    batch_tokens: int
    length_multiple: int

    @property
    def texts(self) -> Role:
        """What is encoded."""
        return self.info.role


@dataclass(frozen=True)
class PlannedShard:
    """The documents of one shard."""

    begin: Place
    count: int
    sha256: str
    """Of their ids and texts."""


@dataclass(frozen=True)
class Plan:
    """What `plan.json` says."""

    settings: Settings
    files: tuple[str, ...]
    """Names of the corpus's files, for people to read."""
    skipped: int
    """Bad lines that are left out."""
    shards: tuple[PlannedShard, ...]

    @property
    def count(self) -> int:
        return sum(shard.count for shard in self.shards)

    def origin(self, number: int, tokens: int, truncated: int) -> dict[str, Any]:
        """What shard `number` tells about itself: a hash of all that decides on its vectors, and
        the counts of its record."""
        made_of = [as_dict(self.settings), self.shards[number].sha256]
        digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        return {"made_of": digest, "tokens": tokens, "truncated": truncated}


class Contents:
    """The sha256 of documents, in their order."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, item: Document | EvalQuery) -> None:
        instruction = item.instruction if isinstance(item, EvalQuery) else None
        for part in (item.id, item.text, instruction):
            content = b"" if part is None else part.encode()
            self._digest.update(b"%d " % (-1 if part is None else len(content)))
            self._digest.update(content)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def query_instruction(located: Located, given: str | None) -> str:
    """The instruction of a query: the one given for all, or its own.

    Raises:
        VectorsError: there is neither; names the line.
    """
    assert isinstance(located.item, EvalQuery)
    instruction = located.item.instruction if given is None else given
    if instruction is None:
        raise VectorsError(
            f"{located.where}: query {located.item.id!r} has no instruction: pass "
            '--instruction, the task in words, or "" for none'
        )
    return instruction


def make_plan(
    corpus: Corpus,
    settings: Settings,
    *,
    skipped: Callable[[], int],
    folder: Path,
    advance: Callable[[int], object],
) -> Plan:
    """Cuts a corpus into shards. Reads all of it once, a document at a time.

    Args:
        skipped: how many bad lines the corpus has passed over.
        folder: for temporary files, 8 bytes a document beyond the first million.
        advance: called with the number of documents of each shard.

    Raises:
        DatasetError: no document; an id that stands twice, with both places; a bad line.
        VectorsError: a query without an instruction.
    """
    shards: list[PlannedShard] = []
    with RepeatedIds(folder) as repeated:
        for begin, documents in _cut(corpus, settings.shard_documents):
            contents, count = Contents(), 0
            for located in documents:
                if settings.texts == "queries":
                    query_instruction(located, settings.instruction)
                contents.add(located.item)
                repeated.add(located.item.id)
                count += 1
            shards.append(PlannedShard(begin, count, contents.hexdigest()))
            advance(count)
        suspects = repeated.hashes()
    if not shards:
        raise DatasetError(f"{corpus.files[0]}: holds no {settings.texts}")
    number_skipped = skipped()  # before the second reading passes over them again
    if suspects:
        _refuse_repeated(corpus, suspects)
    return Plan(settings, tuple(p.name for p in corpus.files), number_skipped, tuple(shards))


def _cut(corpus: Corpus, size: int) -> Iterator[tuple[Place, Iterator[Located]]]:
    """Where each shard begins, and its documents, which are to be read before the next shard."""
    begin = end = Place()
    documents = corpus.read()

    def shard(first: Located) -> Iterator[Located]:
        nonlocal end
        for located in itertools.chain([first], itertools.islice(documents, size - 1)):
            end = located.end
            yield located

    for first in documents:
        yield begin, shard(first)
        begin = end


def _refuse_repeated(corpus: Corpus, suspects: set[int]) -> None:
    """Raises a DatasetError on the first id that stands twice, among those with these hashes."""
    first: dict[str, str] = {}
    for located in corpus.read():
        id_ = located.item.id
        if id_hash(id_) in suspects:
            if id_ in first:
                raise DatasetError(
                    f"{located.where}: id {id_!r} stands here a second time, the first is at "
                    f"{first[id_]}"
                )
            first[id_] = located.where


def read_planned(corpus: Corpus, shard: PlannedShard, name: str) -> list[Located]:
    """The documents of a shard.

    Raises:
        DatasetError: they are not those that the plan was made of.
    """
    contents = Contents()
    documents = list(itertools.islice(corpus.read(shard.begin), shard.count))
    for located in documents:
        contents.add(located.item)
    if len(documents) != shard.count or contents.hexdigest() != shard.sha256:
        raise _changed(corpus, name)
    return documents


def require_same_corpus(corpus: Corpus, plan: Plan, advance: Callable[[int], object]) -> None:
    """Reads the whole corpus and compares it with the plan.

    Raises:
        DatasetError: another document stands somewhere, or one more or less; names the shard.
    """
    cut = _cut(corpus, plan.settings.shard_documents)
    for number, shard in enumerate(plan.shards):
        begin, documents = next(cut, (None, iter(())))
        contents, count = Contents(), 0
        for located in documents:
            contents.add(located.item)
            count += 1
        if (begin, count, contents.hexdigest()) != (shard.begin, shard.count, shard.sha256):
            raise _changed(corpus, f"shard {number}")
        advance(count)
    if next(cut, None) is not None:
        raise _changed(corpus, "what follows the last shard")


def _changed(corpus: Corpus, what: str) -> DatasetError:
    return DatasetError(
        f"{corpus.files[0]}: the corpus is not the one that the shards are cut from: {what} has "
        "other documents, or they stand elsewhere. Restore the corpus, or choose another --output"
    )


# --- the file ----------------------------------------------------------------------------------


def plan_text(plan: Plan) -> str:
    """What `plan.json` holds; a line a shard."""
    shards = ",\n  ".join(
        json.dumps([s.begin.file, s.begin.offset, s.begin.line, s.count, s.sha256])
        for s in plan.shards
    )
    values = {
        "format": _FORMAT,
        "version": _VERSION,
        "settings": as_dict(plan.settings),
        "files": list(plan.files),
        "count": plan.count,
        "skipped": plan.skipped,
        "shard": ["file", "offset", "line", "count", "sha256"],
    }
    head = json.dumps(values, indent=1, ensure_ascii=False).removesuffix("\n}")
    return f'{head},\n "shards": [\n  {shards}\n ]\n}}\n'


def plan_values(directory: Path) -> dict[str, Any] | None:
    """What `plan.json` holds; None where it is absent or damaged."""
    return read_state(directory / PLAN_FILE, lambda values: {**values, "format": values["format"]})


def read_plan(directory: Path) -> Plan:
    """Reads `plan.json`.

    Raises:
        VectorsError: it is absent or damaged, or no plan of this version.
    """
    path = directory / PLAN_FILE
    way_out = (
        "nobody knows of which corpus its shards are. Bring the plan back from a copy, choose "
        "another --output, or delete that directory"
    )
    values = plan_values(directory)
    if values is None:
        raise VectorsError(f"{directory} has no whole {PLAN_FILE}: {way_out}")
    found = values["format"], values.get("version")
    if found != (_FORMAT, _VERSION):
        raise VectorsError(f"{path}: wanted {(_FORMAT, _VERSION)}, got {found}")
    try:
        if "texts" in values["settings"]:  # where older versions put what is the role now
            values["settings"]["info"]["role"] = values["settings"].pop("texts")
        return Plan(
            from_dict(Settings, values["settings"], source=f"{path}: settings"),
            tuple(values["files"]),
            values["skipped"],
            tuple(
                PlannedShard(Place(file, offset, line), count, sha256)
                for file, offset, line, count, sha256 in values["shards"]
            ),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise VectorsError(f"{path}: damaged: {error!r}. So {way_out}") from error


def differing(old: Settings, new: Settings) -> list[str]:
    """ "key was x, is y" for every setting that differs."""

    def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, "" if key == "info" else f"{key}.")
            else:
                yield f"{prefix}{key}", value

    was = dict(flat(as_dict(old)))
    return [
        f"{key} was {was[key]!r}, is {value!r}"
        for key, value in flat(as_dict(new))
        if was[key] != value
    ]
