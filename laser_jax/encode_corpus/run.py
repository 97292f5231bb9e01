"""Encodes a corpus of any size into a directory of vectors, which `laser_jax.search` reads:
`python -m laser_jax.encode_corpus --model DIR --input corpus.jsonl --output DIR`.

The input is read once and cut into shards; each is encoded and written by itself. The same command
goes on where an earlier one was stopped, makes damaged shards again, and refuses another model, K,
prompt or corpus. See docs/corpus.md.
"""

import logging
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from laser_jax.command_line import program
from laser_jax.encode_corpus.directory import CorpusDirectory, fault_of_manifest
from laser_jax.encode_corpus.encoding import CorpusConfig, ShardEncoder, open_corpus, settings_of
from laser_jax.encode_corpus.plan import PLAN_FILE, Plan, read_plan
from laser_jax.files.terminal import configure_logging, printable
from laser_jax.inference.retriever import EncodingStats
from laser_jax.search.vectors import Shard, is_intact, verify

_SHOWN_BAD_LINES = 5
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VerifyOptions:
    """Checks a finished directory of vectors, every byte and all ids. Status 1 on any fault."""

    verify: str
    """The directory."""


class Progress:
    """Documents and tokens by the clock, model loading and compilation included: a bar on a
    terminal, a line for each shard in a log."""

    def __init__(self, done: int, left: int):
        """So many of this run's documents were there before, and are left."""
        self._bar = tqdm(total=done + left, initial=done, desc="encode", unit="doc", disable=None)
        self._done, self._left = done, left
        self._began = time.monotonic()
        self._tokens = self._documents = 0  # in shards that this run has finished

    def close(self) -> None:
        self._bar.close()

    def batch(self, stats: EncodingStats) -> None:
        """Shows what the shard that is being encoded has come to."""
        rate = (self._tokens + stats.tokens) / self._seconds
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update(self._done + self._documents + stats.texts - self._bar.n)

    def shard(self, shard: Shard) -> None:
        """Counts a finished shard."""
        self._tokens += shard.tokens or 0
        self._documents += shard.count
        self.batch(EncodingStats())
        if self._bar.disable:
            left = (self._left - self._documents) * self._seconds / self._documents
            _log.info("%s: %s, ETA %s", shard.file, self, tqdm.format_interval(left))

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def __str__(self) -> str:
        seconds, documents, tokens = self._seconds, self._documents, self._tokens
        rates = f"{documents / seconds:,.1f} docs/s, {tokens / seconds:,.0f} tokens/s"
        return f"{documents:,} documents in {seconds:,.1f} s, {rates}"


def encode_corpus(config: CorpusConfig) -> bool:
    """Encodes the shards that `config` asks for and that are not there yet. Returns whether the
    directory is finished: all shards are there, whoever made them. Raises a ValueError, OSError or
    ImportError on bad input, a directory of another model, K, prompt or corpus, or a full disk."""
    settings, directory = settings_of(config), CorpusDirectory(config.output)
    with open_corpus(config, _SHOWN_BAD_LINES) as corpus:
        plan = directory.open_plan(corpus, settings)
    bad_lines = f", {plan.skipped:,} bad lines left out" if plan.skipped else ""
    cut = f"{plan.count:,} {config.texts} in {len(plan.shards):,} shards{bad_lines}"
    _log.info("%s: %s", config.output, cut)
    mine = config.part_of(len(plan.shards))
    if missing := _missing(directory, plan, mine):
        _encode(config, plan, directory, mine, missing)
    finished = directory.finish(plan)
    _print_end(directory, plan, range(len(plan.shards)) if finished else mine)
    return finished


def _missing(directory: CorpusDirectory, plan: Plan, numbers: Sequence[int]) -> list[int]:
    """Those of the shards `numbers` that are to be encoded: absent or damaged ones."""
    for number in set(numbers) - directory.finished_shards(numbers).keys():
        directory.recover(number, plan)
    shards = directory.finished_shards(numbers)
    intact = set()
    for number, shard in tqdm(shards.items(), "check", unit="shard", disable=None, leave=False):
        if is_intact(directory.path, shard):
            intact.add(number)
        else:
            _log.warning("%s is missing or damaged and is encoded again", shard.file)
    if intact:
        _log.info(f"{len(intact):,} of {len(numbers):,} shards are there already")
    return [number for number in numbers if number not in intact]


def _encode(
    config: CorpusConfig,
    plan: Plan,
    directory: CorpusDirectory,
    mine: Sequence[int],
    missing: Sequence[int],
) -> None:
    """Encodes the shards `missing` of those that are this run's."""
    total, left = (sum(plan.shards[n].count for n in numbers) for numbers in (mine, missing))
    with closing(Progress(total - left, left)) as progress:
        try:
            if config.ray is not None:
                from laser_jax.encode_corpus.on_ray import encode_on_ray

                encode_on_ray(config, config.ray, missing, progress.shard)
            else:
                with ShardEncoder(config, plan, directory) as encoder:
                    attention = encoder.retriever.encoder.attention
                    _log.info("device: %s, attention: %s", encoder.device, attention)
                    for number in missing:
                        progress.shard(encoder.encode(number, progress.batch))
        except BaseException:
            finished = f"{directory.count_finished(plan):,} of {len(plan.shards):,} shards"
            way_on = "the same command goes on with the others"
            _log.info("stopped: %s are finished; %s", finished, way_on)
            raise
    _log.info("encoded %s", progress)


def _print_end(directory: CorpusDirectory, plan: Plan, numbers: Sequence[int]) -> None:
    shards = directory.finished_shards(numbers).values()
    if count := sum(shard.count for shard in shards):
        tokens = sum(shard.tokens or 0 for shard in shards)
        truncated = sum(shard.truncated or 0 for shard in shards)
        each = f"{count:,} {plan.settings.info.role}, {tokens / count:.1f} tokens each"
        print(f"{each}, {truncated:,} shortened ({truncated / count:.2%})")
    if directory.is_finished:
        print(f"{directory.path} is finished")
    else:
        left = len(plan.shards) - directory.count_finished(plan)
        print(f"{directory.path}: {left:,} shards of {len(plan.shards):,} are still to come")


def _encode_part(config: CorpusConfig) -> None:
    configure_logging(config.part_of(1).start)
    encode_corpus(config)


def _verify(options: VerifyOptions) -> None:
    directory = Path(options.verify)
    faults = verify(directory)
    if (directory / PLAN_FILE).is_file():
        fault = fault_of_manifest(directory, read_plan(directory))
        faults += [fault] if fault else []
    for fault in faults:
        print(printable(fault))
    if faults:
        sys.exit(f"error: {directory}: {len(faults)} faults")
    print(f"{directory}: every shard is as it was written")


_encode_main = program("encode_corpus", CorpusConfig, _encode_part)
_verify_main = program("encode_corpus", VerifyOptions, _verify)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: `--verify` checks a directory, otherwise one is written."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    verifies = any(argument.split("=")[0] == "--verify" for argument in given)
    (_verify_main if verifies else _encode_main)(given)
