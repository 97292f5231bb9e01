"""Encodes a corpus of any size into a directory of vectors, which `laser_jax.search` reads:

    python -m laser_jax.encode_corpus --model DIR --input corpus.jsonl --output DIR
    python -m laser_jax.encode_corpus ... --shard i/n          an array job's task i of n
    python -m laser_jax.encode_corpus ... --engine ray --ray.workers 8 --ray.gpus 1
    python -m laser_jax.encode_corpus --verify DIR             status 1 if anything is wrong

The input is JSON lines (plain or .gz), Parquet or a BEIR directory. It is read once and cut into
shards; each is encoded and written by itself. The same command goes on where an earlier one was
stopped, makes damaged shards again, and refuses another model, K, prompt or corpus. See
docs/corpus.md.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from laser_jax.command_line import parse_command_line
from laser_jax.encode_corpus.directory import CorpusDirectory, Record
from laser_jax.encode_corpus.encoding import (
    CorpusConfig,
    ShardEncoder,
    open_corpus,
    part_of,
    settings_of,
)
from laser_jax.encode_corpus.plan import PLAN_FILE, Plan, read_plan
from laser_jax.files.terminal import fail, printable
from laser_jax.inference.retriever import EncodingStats
from laser_jax.search.vectors import MANIFEST_FILE, read_manifest, shard_name, verify

_SHOWN_BAD_LINES = 5


@dataclass(frozen=True)
class VerifyOptions:
    """Checks a finished directory of vectors, every byte and all ids. Status 1 on any fault."""

    verify: str
    """The directory."""


class _BadLines:
    """Counts skipped lines and shows the first few."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, message: str) -> None:
        self.count += 1
        if self.count <= _SHOWN_BAD_LINES:
            tqdm.write(f"skipped: {printable(message)}")


class Progress:
    """Documents and tokens by the clock: a bar on a terminal, a line for each shard elsewhere."""

    def __init__(self, total: int, done: int):
        """`total` documents are this run's, of which `done` were there before."""
        self._bar = tqdm(total=total, initial=done, desc="encode", unit="doc", disable=None)
        self._done, self._left = done, total - done
        self._began = time.monotonic()
        self._tokens = self._documents = 0  # in shards that this run has finished

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def batch(self, stats: EncodingStats) -> None:
        """Shows what the shard that is being encoded has come to."""
        rate = (self._tokens + stats.tokens) / self.seconds
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update(self._done + self._documents + stats.texts - self._bar.n)

    def shard(self, number: int, record: Record) -> None:
        """Counts a finished shard."""
        self._tokens += record.tokens
        self._documents += record.count
        self.batch(EncodingStats())
        if self._bar.disable:
            left = (self._left - self._documents) * self.seconds / self._documents
            end = f"ETA {tqdm.format_interval(left)}"
            print(f"{shard_name(number)}: {self.rates()}, {end}", flush=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def rates(self) -> str:
        """Since the beginning, model loading and compilation included."""
        documents, tokens = self._documents, self._tokens
        return (
            f"{documents:,} documents in {self.seconds:,.1f} s, "
            f"{documents / self.seconds:,.1f} docs/s, {tokens / self.seconds:,.0f} tokens/s"
        )


def encode_corpus(config: CorpusConfig) -> bool:
    """Encodes the shards that `config` asks for and that are not there yet.

    Returns:
        Whether the directory is finished: all shards are there, whoever made them.

    Raises:
        ValueError, OSError, ImportError: bad input, with file and line; a directory of another
            model, K, prompt or corpus, with what differs; a full disk.
    """
    settings = settings_of(config)
    bad_lines = _BadLines()
    directory = CorpusDirectory(Path(config.output).absolute())
    with (
        open_corpus(config, bad_lines) as corpus,
        tqdm(desc="read", unit="doc", disable=None, leave=False) as bar,
    ):
        plan = directory.open_plan(
            corpus, settings, skipped=lambda: bad_lines.count, advance=bar.update
        )
    print(
        f"{config.output}: {plan.count:,} {settings.texts} in {len(plan.shards):,} shards"
        + (f", {plan.skipped:,} bad lines left out" if plan.skipped else "")
    )
    if config.plan_only:
        return directory.is_finished
    i, n = part_of(config.shard)
    mine = range(i, len(plan.shards), n)
    missing = _missing(directory, plan, mine)
    if missing:
        total, left = (sum(plan.shards[n].count for n in numbers) for numbers in (mine, missing))
        with Progress(total, total - left) as progress, _told_what_is_there(directory, plan):
            if config.engine == "ray":
                from laser_jax.encode_corpus.on_ray import encode_on_ray

                encode_on_ray(config, plan, directory, missing, progress.shard)
            else:
                with ShardEncoder(config, plan, directory) as encoder:
                    attention = encoder.retriever.encoder.attention
                    print(f"device: {encoder.device}, attention: {attention}")
                    for number in missing:
                        progress.shard(number, encoder.encode(number, progress.batch))
        print(f"encoded {progress.rates()}")
    finished = directory.finish(plan)
    _print_end(directory, plan, range(len(plan.shards)) if finished else mine)
    return finished


def _missing(directory: CorpusDirectory, plan: Plan, numbers: Sequence[int]) -> list[int]:
    """Those of the shards `numbers` that are to be encoded: absent or damaged ones."""
    for number in set(numbers) - directory.finished_shards(numbers).keys():
        directory.recover(number, plan)
    records = directory.finished_shards(numbers)
    intact = set()
    for number in tqdm(records, "check", unit="shard", disable=None, leave=False):
        if directory.is_intact(number, records[number]):
            intact.add(number)
        else:
            tqdm.write(f"{shard_name(number)} is missing or damaged and is encoded again")
    if intact:
        print(f"{len(intact):,} of {len(numbers):,} shards are there already")
    return [number for number in numbers if number not in intact]


@contextlib.contextmanager
def _told_what_is_there(directory: CorpusDirectory, plan: Plan) -> Iterator[None]:
    try:
        yield
    except BaseException:
        print(
            f"stopped: {_count_finished(directory, plan):,} of {len(plan.shards):,} shards are "
            "finished; the same command goes on with the others",
            flush=True,
        )
        raise


def _count_finished(directory: CorpusDirectory, plan: Plan) -> int:
    return len(directory.finished_shards(range(len(plan.shards))))


def _print_end(directory: CorpusDirectory, plan: Plan, numbers: Sequence[int]) -> None:
    records = directory.finished_shards(numbers).values()
    if count := sum(record.count for record in records):
        tokens = sum(record.tokens for record in records)
        truncated = sum(record.truncated for record in records)
        print(
            f"{count:,} {plan.settings.texts}, {tokens / count:.1f} tokens each, "
            f"{truncated:,} shortened ({truncated / count:.2%})"
        )
    if directory.is_finished:
        print(f"{directory.path} is finished")
    else:
        left = len(plan.shards) - _count_finished(directory, plan)
        print(f"{directory.path}: {left:,} shards of {len(plan.shards):,} are still to come")


def _verify(directory: str) -> None:
    faults = verify(directory)
    if (Path(directory) / PLAN_FILE).is_file():
        plan, manifest = read_plan(Path(directory)), read_manifest(directory)
        planned = plan.settings.info, [shard.count for shard in plan.shards]
        if planned != (manifest.info, [shard.count for shard in manifest.shards]):
            faults.append(f"{directory}: {MANIFEST_FILE} does not have the shards of {PLAN_FILE}")
    for fault in faults:
        print(printable(fault))
    if faults:
        sys.exit(f"error: {directory}: {len(faults)} faults")
    print(f"{directory}: every shard is as it was written")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: `--verify` checks a directory, otherwise one is written."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    program = "python -m laser_jax.encode_corpus"
    try:
        if any(argument.split("=")[0] == "--verify" for argument in given):
            _verify(parse_command_line(VerifyOptions, program, given).verify)
        else:
            encode_corpus(parse_command_line(CorpusConfig, program, given))
    except (ValueError, OSError, ImportError) as error:
        fail(error)
