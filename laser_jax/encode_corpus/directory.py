"""The directory that a corpus is encoded into, and how processes share it without a server.

    plan.json               first of all: what is encoded and how it is cut (see `plan`)
    shard-00000.parquet     the vectors (see `laser_jax.search.vectors`)
    manifest.json           last of all: the directory is finished
    .work/                  until then: a record of every finished shard, and what a rerun goes by

Every file takes its name when it is whole. What a shard holds depends on the plan alone, so it
does not matter who writes it, nor if two do at once. It is finished when its record is there and
its bytes have the record's checksum. A shard also tells of what it was made and that it is whole,
so that lost records and a lost manifest are made again of the shards; a lost plan is not.
"""

import json
import logging
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
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
    read_manifest,
    recovered_shard,
    shard_name,
    shard_of,
    shard_values,
    write_manifest,
)
from laser_jax.settings import Change, changes

_CORPUS_FILE = "corpus.json"
_log = logging.getLogger(__name__)


class CorpusDirectory:
    """The output directory `path`, as one of perhaps several processes sees it."""

    def __init__(self, output: str | Path):
        self.path, self._output = Path(output), output
        self._work = self.path / WORK_FOLDER

    @property
    def is_finished(self) -> bool:
        return (self.path / MANIFEST_FILE).is_file()

    # --- the plan ------------------------------------------------------------------------------

    def open_plan(self, corpus: Corpus, settings: Settings) -> Plan:
        """The plan that is there, once settings and corpus are found to be the same; or a new one.
        Of several processes that find none, one makes it and the others wait (where the file system
        has locks; elsewhere each makes the same). Raises an OutputError where the directory belongs
        to other settings or another program, and a DataError where the corpus is another or bad."""

        def changed(plan: dict[str, Any]) -> list[Change]:
            return changes(plan["settings"], settings, source=PLAN_FILE)

        stamp, seen = _stamp(corpus), self._work / _CORPUS_FILE
        with Claim(self._output, PLAN_FILE, changed, alone=True, shared=True) as claim:
            if claim.recorded is None:
                self._work.mkdir(exist_ok=True)
                plan = make_plan(corpus, settings, self._work)
                if _stamp(corpus) != stamp:
                    raise DataError(f"{corpus.files[0]}: the corpus was changed while it was read")
                write_atomically(seen, json.dumps(stamp))
                claim.record(plan_text(plan))
        plan = read_plan(self.path)
        if self.is_finished:
            self._open_again_if_damaged(plan)
        if not self.is_finished:
            self._work.mkdir(exist_ok=True)
        # Reading all of a corpus is only worth its time where the files look changed.
        if read_state(seen, list) != stamp:
            require_same_corpus(corpus, plan)
            with suppress(FileNotFoundError):  # a finished directory has no such folder
                write_atomically(seen, json.dumps(stamp))
        return plan

    # --- shards --------------------------------------------------------------------------------

    def finished_shards(self, numbers: Iterable[int]) -> dict[int, Shard]:
        """Those of `numbers` that are recorded as finished. The files are not looked at."""
        if self.is_finished:
            shards = read_manifest(self.path).shards
            return {n: shards[n] for n in numbers}
        records = {n: self._record_file(n) for n in numbers}
        found = {n: read_state(r, partial(shard_of, where=str(r))) for n, r in records.items()}
        return {n: shard for n, shard in found.items() if shard is not None}

    def count_finished(self, plan: Plan) -> int:
        return len(self.finished_shards(range(len(plan.shards))))

    def recover(self, number: int, plan: Plan) -> bool:
        """Records a shard that is finished and has lost its record, by what it tells itself.
        Returns whether there is such a shard."""
        found = recovered_shard(self.path, shard_name(number), plan.settings.info)
        if found is None:
            return False
        shard, told = found
        if not plan.origin(number, shard.tokens, shard.truncated).items() <= told.items():
            return False
        self.finish_shard(number, shard)
        return True

    def finish_shard(self, number: int, shard: Shard) -> None:
        """Records that a shard's file was written."""
        if not self.is_finished:
            try:
                write_atomically(self._record_file(number), json.dumps(shard_values(shard)))
                return
            except FileNotFoundError:
                if not self.is_finished:  # by another process just now, which removed the folder
                    raise
        # A damaged shard was made again. On another kind of device its last digits may differ.
        manifest = read_manifest(self.path)
        shards = (*manifest.shards[:number], shard, *manifest.shards[number + 1 :])
        if shards != manifest.shards:
            write_manifest(self.path, Manifest(manifest.info, shards))

    def _record_file(self, number: int) -> Path:
        return self._work / f"{shard_name(number)}.json"

    # --- the end -------------------------------------------------------------------------------

    def finish(self, plan: Plan) -> bool:
        """Writes the manifest if all shards are there, whoever made them. Several processes may do
        so at once: they write the same. Returns whether the directory is finished."""
        if not self.is_finished:
            shards = self.finished_shards(range(len(plan.shards)))
            if len(shards) == len(plan.shards):
                try:
                    write_manifest(self.path, Manifest(plan.settings.info, tuple(shards.values())))
                except FileNotFoundError:  # another was quicker, and took our part for a dead one's
                    if not self.is_finished:
                        raise
            elif not self.is_finished:  # else another was quicker, and took the records
                return False
        sweep(self.path)
        return True

    def _open_again_if_damaged(self, plan: Plan) -> None:
        """Takes off a manifest that is damaged, so that it is made again of the shards."""
        try:
            fault = fault_of_manifest(self.path, plan)
        except DataError as error:
            fault = str(error)
        if fault is not None:
            _log.warning("%s\nIt is made again of the shards", fault)
            (self.path / MANIFEST_FILE).unlink(missing_ok=True)


def fault_of_manifest(directory: Path, plan: Plan) -> str | None:
    """What is wrong with a manifest that does not have the shards of the plan; None where it has.
    Raises as `read_manifest`."""
    manifest = read_manifest(directory)
    counts, planned = ([shard.count for shard in of.shards] for of in (manifest, plan))
    if manifest.info == plan.settings.info and counts == planned:
        return None
    return f"{directory / MANIFEST_FILE} does not have the shards of {PLAN_FILE}"


def _stamp(corpus: Corpus) -> list[list[Any]]:
    """Changes where a file is written to, or another one takes its place."""
    stats = [(path, path.stat()) for path in corpus.files]
    return [[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
