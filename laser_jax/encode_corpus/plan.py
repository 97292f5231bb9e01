"""The plan of a directory of vectors: of what its shards are made, and where each begins.

`plan.json` is written before anything else and never changed. Whoever encodes a shard reads it
there, so that all shards are cut from one corpus in one way.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from laser_jax.config import as_dict, from_dict
from laser_jax.data.documents import EvalQuery
from laser_jax.encode_corpus.documents import Corpus, Fields, Located, Place
from laser_jax.files.durable import digest_of, read_state
from laser_jax.files.reading import DataError
from laser_jax.search.repeated_ids import RepeatedIds
from laser_jax.search.vectors import VectorsInfo

PLAN_FILE = "plan.json"
_FORMAT, _VERSION = "laser_jax corpus plan", 1


@dataclass(frozen=True)
class Settings:
    """All that the vectors depend on beside the corpus: a directory's are made with one."""

    info: VectorsInfo
    instruction: str | None
    fields: Fields
    skip_bad_lines: bool
    shard_documents: int
    batch_size: int
    batch_tokens: int
    length_multiple: int


@dataclass(frozen=True)
class PlannedShard:
    """The documents of one shard."""

    begin: Place
    count: int
    sha256: str
    """The hash of their ids and texts."""


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

    def origin(self, number: int, tokens: int | None, truncated: int | None) -> dict[str, Any]:
        """What shard `number` tells about itself: a hash of all that decides on its vectors, and
        how many tokens and shortened texts it has."""
        made_of = [as_dict(self.settings), self.shards[number].sha256]
        return {"made_of": digest_of(made_of), "tokens": tokens, "truncated": truncated}


def contents_hash(documents: Sequence[Located]) -> str:
    """The sha256 of documents, or queries, in their order."""
    digest = hashlib.sha256()
    for located in documents:
        item = located.item
        instruction = item.instruction if isinstance(item, EvalQuery) else None
        for part in (item.id, item.text, instruction):
            content = b"" if part is None else part.encode()
            digest.update(b"%d " % (-1 if part is None else len(content)))
            digest.update(content)
    return digest.hexdigest()


def query_instruction(located: Located, given: str | None) -> str:
    """The instruction of a query: the one given for all, or its own. Raises a DataError, which
    names the line, where there is neither."""
    assert isinstance(located.item, EvalQuery)
    instruction = located.item.instruction if given is None else given
    if instruction is None:
        raise DataError(
            f"{located.where}: query {located.item.id!r} has no instruction: pass "
            '--instruction, the task in words, or "" for none'
        )
    return instruction


def make_plan(corpus: Corpus, settings: Settings, folder: Path) -> Plan:
    """Cuts a corpus into shards. Reads all of it once, a shard at a time; a temporary file in
    `folder` takes 8 bytes a document. Raises a DataError on no document, an id that stands twice, a
    bad line, or a query without an instruction."""
    shards = []

    def placed() -> Iterator[tuple[str, str]]:
        return ((located.item.id, located.where) for located in corpus.read())

    with RepeatedIds(folder) as repeated:
        for shard, documents in _shards(corpus, settings.shard_documents):
            shards.append(shard)
            for located in documents:
                if settings.info.role == "queries":
                    query_instruction(located, settings.instruction)
                repeated.add(located.item.id)
        if not shards:
            raise DataError(f"{corpus.files[0]}: holds no {settings.info.role}")
        skipped = corpus.bad_lines  # before a second reading passes over them again
        for id_, where, first in repeated.found(placed):
            raise DataError(f"{where}: id {id_!r} stands here a second time, first at {first}")
    return Plan(settings, tuple(path.name for path in corpus.files), skipped, tuple(shards))


def _shards(corpus: Corpus, size: int) -> Iterator[tuple[PlannedShard, list[Located]]]:
    """Reads a corpus and cuts it into shards of `size` documents. Those of one are in memory: a
    list is emptied when the next one is asked for."""
    begin, documents = Place(), corpus.read()
    with tqdm(desc="read", unit="doc", disable=None, leave=False) as progress:
        while shard := list(itertools.islice(documents, size)):
            yield PlannedShard(begin, len(shard), contents_hash(shard)), shard
            begin = shard[-1].end
            progress.update(len(shard))
            shard.clear()


def read_planned(corpus: Corpus, shard: PlannedShard, name: str) -> list[Located]:
    """The documents of a shard. Raises a DataError where the plan was made of others."""
    documents = list(itertools.islice(corpus.read(shard.begin), shard.count))
    if len(documents) != shard.count or contents_hash(documents) != shard.sha256:
        raise _changed(corpus, name)
    return documents


def require_same_corpus(corpus: Corpus, plan: Plan) -> None:
    """Reads the whole corpus. Raises a DataError, which names the shard, where another document
    than in the plan stands somewhere, or one more or less."""
    found = (shard for shard, _ in _shards(corpus, plan.settings.shard_documents))
    for number, (shard, planned) in enumerate(itertools.zip_longest(found, plan.shards)):
        if shard != planned:
            rest = "what follows the last shard"
            raise _changed(corpus, rest if planned is None else f"shard {number}")


def _changed(corpus: Corpus, what: str) -> DataError:
    return DataError(
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
    values: dict[str, Any] = {"format": _FORMAT, "version": _VERSION}
    values |= {"settings": as_dict(plan.settings), "files": list(plan.files)}
    values |= {"count": plan.count, "skipped": plan.skipped}
    values["shard"] = ["file", "offset", "line", "count", "sha256"]
    head = json.dumps(values, indent=1, ensure_ascii=False).removesuffix("\n}")
    return f'{head},\n "shards": [\n  {shards}\n ]\n}}\n'


def read_plan(directory: Path) -> Plan:
    """Reads `plan.json`. Raises a DataError where it is absent, damaged or of another version."""
    path = directory / PLAN_FILE
    way_out = (
        "nobody knows of which corpus its shards are. Bring the plan back from a copy, choose "
        "another --output, or delete that directory"
    )
    values = read_state(path, dict)
    if values is None:
        raise DataError(f"{directory} has no whole {PLAN_FILE}: {way_out}")
    found = values.get("format"), values.get("version")
    if found != (_FORMAT, _VERSION):
        raise DataError(f"{path}: wanted {(_FORMAT, _VERSION)}, got {found}")
    try:
        settings = from_dict(Settings, values["settings"], source=f"{path}: settings")
        shards = [
            PlannedShard(Place(file, offset, line), count, sha256)
            for file, offset, line, count, sha256 in values["shards"]
        ]
        return Plan(settings, tuple(values["files"]), values["skipped"], tuple(shards))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: damaged: {error!r}. So {way_out}") from error
