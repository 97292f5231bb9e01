"""The directory that a corpus is encoded into, and how processes share it without a server.

    plan.json               first of all: what is encoded and how it is cut (see `plan`)
    shard-00000.parquet     the vectors (see `laser_jax.search.vectors`)
    report.json             tokens and truncated texts of every shard
    manifest.json           last of all: the directory is finished
    .work/                  until then: a record of every finished shard, and what a rerun goes by

Every file takes its name when it is whole. What a shard holds depends on the plan alone, so it
does not matter who writes it, nor if two do at once. A shard is finished when its record is there
and its bytes have the record's checksum. A shard also tells of what it was made and that it is
whole, so that lost records, report and manifest are made again of the shards; a lost plan is not.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laser_jax.encode_corpus.documents import Corpus
from laser_jax.encode_corpus.plan import (
    PLAN_FILE,
    Plan,
    Settings,
    make_plan,
    plan_text,
    read_plan,
    require_same_corpus,
)
from laser_jax.files.claim import WORK_FOLDER, Claim, sweep
from laser_jax.files.durable import read_state, write_atomically
from laser_jax.files.reading import DataError
from laser_jax.search.vectors import (
    MANIFEST_FILE,
    Manifest,
    Shard,
    VectorsInfo,
    is_intact,
    read_manifest,
    recovered_shard,
    shard_name,
    write_manifest,
)
from laser_jax.settings import changes

REPORT_FILE = "report.json"
_CORPUS_FILE = "corpus.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """A finished shard."""

    count: int
    sha256: str
    """Of its file."""
    tokens: int
    truncated: int
    """Texts that were shortened."""

    def __post_init__(self) -> None:
        """Raises a TypeError on what a damaged file may hold."""
        if [type(value) for value in vars(self).values()] != [int, str, int, int]:
            raise TypeError(f"{vars(self)} is no record of a shard")

    def entry(self, number: int) -> Shard:
        """What the manifest says of shard `number`."""
        return Shard(shard_name(number), self.count, self.sha256)


class CorpusDirectory:
    """The output directory, as one of perhaps several processes sees it.

    Attributes:
        path: where it is.
    """

    def __init__(self, output: str | Path):
        self.path = Path(output)
        self._output = output
        self._work = self.path / WORK_FOLDER

    @property
    def is_finished(self) -> bool:
        return (self.path / MANIFEST_FILE).is_file()

    # --- the plan ------------------------------------------------------------------------------

    def open_plan(self, corpus: Corpus, settings: Settings) -> Plan:
        """The plan that is there, once settings and corpus are found to be the same; or a new one.

        Of several processes that find none, one makes it and the others wait (where the file system
        has locks; elsewhere each makes the same).

        Raises:
            OutputError: the directory belongs to other settings or to another program.
            DataError: the corpus is another, or cannot be used.
        """
        with Claim(
            self._output,
            PLAN_FILE,
            lambda plan: changes(plan["settings"], settings, source=PLAN_FILE),
            alone=True,
            shared=True,
        ) as claim:
            if claim.recorded is None:
                self._make_plan(claim, corpus, settings)
        plan = read_plan(self.path)
        if self.is_finished:
            self._open_again_if_damaged(plan)
        if not self.is_finished:
            self._work.mkdir(exist_ok=True)
        # Reading all of a corpus is only worth its time where the files look changed.
        stamp, seen = _stamp(corpus), self._work / _CORPUS_FILE
        if read_state(seen, list) != stamp:
            require_same_corpus(corpus, plan)
            with suppress(FileNotFoundError):  # a finished directory has no such folder
                write_atomically(seen, json.dumps(stamp))
        return plan

    def _make_plan(self, claim: Claim, corpus: Corpus, settings: Settings) -> None:
        self._work.mkdir(exist_ok=True)
        stamp = _stamp(corpus)
        plan = make_plan(corpus, settings, self._work)
        if _stamp(corpus) != stamp:
            raise DataError(f"{corpus.files[0]}: the corpus was changed while it was read")
        write_atomically(self._work / _CORPUS_FILE, json.dumps(stamp))
        claim.record(plan_text(plan))

    # --- shards --------------------------------------------------------------------------------

    def finished_shards(self, numbers: Iterable[int]) -> dict[int, Record]:
        """Those of `numbers` that are recorded as finished. The files are not looked at."""
        if self.is_finished:
            records = self._final_records()
            return {n: records[n] for n in numbers}
        return {
            n: record
            for n in numbers
            if (record := read_state(self._record_file(n), lambda v: Record(**v))) is not None
        }

    def recover(self, number: int, plan: Plan) -> bool:
        """Records a shard that is finished and has lost its record, by what it tells itself.
        Returns whether there is such a shard."""
        found = recovered_shard(self.path, shard_name(number), plan.settings.info)
        if found is None:
            return False
        shard, told = found
        try:
            record = Record(shard.count, shard.sha256, told["tokens"], told["truncated"])
        except (KeyError, TypeError):  # not a shard of this program
            return False
        origin = plan.origin(number, record.tokens, record.truncated)
        if any(told.get(key) != value for key, value in origin.items()):
            return False
        self.finish_shard(number, record)
        return True

    def is_intact(self, number: int, record: Record) -> bool:
        """Reads the shard's file and compares its checksum."""
        return is_intact(self.path, record.entry(number))

    def finish_shard(self, number: int, record: Record) -> None:
        """Records that a shard's file was written."""
        if not self.is_finished:
            try:
                write_atomically(self._record_file(number), json.dumps(vars(record)))
                return
            except FileNotFoundError:
                if not self.is_finished:  # by another process just now, which removed the folder
                    raise
        # A damaged shard was made again. On another kind of device its last digits may differ.
        records = self._final_records()
        if records[number] != record:
            records[number] = record
            self._write_end(read_manifest(self.path).info, records)

    def _record_file(self, number: int) -> Path:
        return self._work / f"{shard_name(number)}.json"

    # --- the end -------------------------------------------------------------------------------

    def finish(self, plan: Plan) -> bool:
        """Writes report and manifest if all shards are there, whoever made them. Several processes
        may do so at once: they write the same. Returns whether the directory is finished."""
        if not self.is_finished:
            records = self.finished_shards(range(len(plan.shards)))
            if len(records) < len(plan.shards) and not self.is_finished:
                return False
            try:
                if not self.is_finished:  # else another process was quicker, and took the records
                    self._write_end(plan.settings.info, list(records.values()))
            except FileNotFoundError:  # it was quicker just now, and took our part for a dead one's
                if not self.is_finished:
                    raise
        sweep(self.path)
        return True

    def _write_end(self, info: VectorsInfo, records: list[Record]) -> None:
        report = {
            "tokens": sum(r.tokens for r in records),
            "truncated": sum(r.truncated for r in records),
            "shard": ["tokens", "truncated"],
            "shards": [[r.tokens, r.truncated] for r in records],
        }
        write_atomically(self.path / REPORT_FILE, json.dumps(report) + "\n")
        entries = tuple(record.entry(number) for number, record in enumerate(records))
        write_manifest(self.path, Manifest(info, entries))

    def _final_records(self) -> list[Record]:
        shards = read_manifest(self.path).shards
        counts = read_state(self.path / REPORT_FILE, lambda report: list(report["shards"]))
        try:
            return [
                Record(shard.count, shard.sha256, *numbers)
                for shard, numbers in zip(shards, counts or (), strict=True)
            ]
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{self.path / REPORT_FILE} is absent or damaged; the command that wrote it makes "
                "it again"
            ) from error

    def _open_again_if_damaged(self, plan: Plan) -> None:
        """Takes the manifest off where manifest or report are damaged, so that both are made again
        of the shards."""
        try:
            fault = fault_of_manifest(self.path, plan)
            self._final_records()
        except DataError as error:
            fault = str(error)
        if fault is not None:
            _log.warning("%s\nManifest and report are made again of the shards", fault)
            (self.path / MANIFEST_FILE).unlink(missing_ok=True)


def fault_of_manifest(directory: Path, plan: Plan) -> str | None:
    """What is wrong with a manifest that does not have the shards of the plan; None where it has.
    Raises as `read_manifest`."""
    manifest = read_manifest(directory)
    planned = plan.settings.info, [shard.count for shard in plan.shards]
    if planned == (manifest.info, [shard.count for shard in manifest.shards]):
        return None
    return f"{directory / MANIFEST_FILE} does not have the shards of {PLAN_FILE}"


def _stamp(corpus: Corpus) -> list[list[Any]]:
    """Changes where a file is written to, or another one takes its place."""
    stats = [(path, path.stat()) for path in corpus.files]
    return [[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
