"""Checks training rows, reports on them and stores them for fast random access:
`python -m laser_jax.prepare --input train.jsonl --output DIR [--tokenizer MODEL_DIR]`.

DIR, then a `data.train`, is a tfds dataset of ArrayRecord shards. They are written here one at a
time, and not by tfds, so that after an interruption the same command goes on with the rest.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from laser_jax.command_line import Invocation, program, settings_file
from laser_jax.config import Config, ConfigError, PromptConfig, from_dict
from laser_jax.data.pipeline import tokenization_settings
from laser_jax.data.reasoning_retrieval import (
    example_of,
    origin,
    shard_path,
    text_features,
    write_description,
    write_shard,
)
from laser_jax.data.schema import DataError
from laser_jax.data.sources import PREPARED_FILE, changed_shards, open_unchecked
from laser_jax.data.tokenization import PromptTokenizer, TokenizationError, load_tokenizer
from laser_jax.files.claim import WORK_FOLDER, Claim, sweep
from laser_jax.files.durable import checksum_of, json_text, read_state, write_json, written_whole
from laser_jax.files.terminal import printable
from laser_jax.prepare.report import ShardStats, format_report, report_of, stats_of
from laser_jax.settings import Change, changes, kinds_of, require_in

_log = logging.getLogger(__name__)

REPORT_FILE = "report.json"
_ROWS_PER_SHARD = 50_000


@dataclass(frozen=True)
class PrepareConfig:
    """A preparation of training rows."""

    input: str
    """Any source that `data.train` takes."""
    output: str
    """A directory, empty or of the same preparation."""
    tokenizer: str | None = None
    """A directory with a tokenizer, such as the model's: the report counts tokens."""
    train_config: str | None = None
    """A training run's YAML file, or its config.json, whose `prompt` is taken."""
    shards: int | None = None
    """Files to write. None: one for 50,000 rows."""
    on_bad_row: Literal["stop", "reject"] = "stop"
    """A row that is no training row: `stop` before anything is written, or leave it out."""

    def __post_init__(self) -> None:
        require_in("[1, inf)", self, "", "shards")

    def prompt(self) -> PromptConfig:
        """The prompt of `train_config`. Raises a ConfigError that names the file and the key."""
        if self.train_config is None:
            return PromptConfig()
        values = settings_file(kinds_of(Config) | kinds_of(Invocation), Path(self.train_config))
        return from_dict(PromptConfig, values.get("prompt", {}), source=self.train_config)


class Preparation:
    """What every shard is written with. Raises a DataError where the input cannot be read; other
    errors name a setting that cannot work."""

    def __init__(self, config: PrepareConfig):
        self.config = config
        self.output = Path(config.output)
        self.source = open_unchecked(config.input)
        self.prompt, self.prompts = config.prompt(), None
        if config.tokenizer:
            self.prompts = PromptTokenizer(load_tokenizer(config.tokenizer), self.prompt)
        rows = len(self.source)
        self.num_shards = config.shards or math.ceil(rows / _ROWS_PER_SHARD)
        if self.num_shards > rows:
            raise ConfigError(f"{self.num_shards} shards are too many for {rows} rows")
        self.shards = [shard_path(self.output, n, self.num_shards) for n in range(self.num_shards)]

    def settings(self) -> dict[str, Any]:
        """All that the output depends on."""
        return {
            "input": self._fingerprint(),
            "shards": self.num_shards,
            "on_bad_row": self.config.on_bad_row,
            "separator": self.prompt.separator,
            "counted_with": tokenization_settings(self.prompts) if self.prompts else None,
        }

    def _fingerprint(self) -> str:
        """Changes with any byte of the input and with the names of a directory's files."""
        path = Path(self.config.input)
        named = {".": path} if path.is_file() else {file.name: file for file in self.source.files}
        if path.is_dir():
            named = {str(p.relative_to(path)): p for p in sorted(path.rglob("*")) if p.is_file()}
        digest = hashlib.sha256()
        for name, file in named.items():
            digest.update(name.encode())
            digest.update(bytes.fromhex(checksum_of(file)))
        return digest.hexdigest()

    def rows_of(self, shard: int) -> range:
        rows = len(self.source)
        return range(shard * rows // self.num_shards, (shard + 1) * rows // self.num_shards)

    def _stats_file(self, shard: int) -> Path:
        return self.output / WORK_FOLDER / f"{shard:05d}.json"

    def stats(self, shard: int) -> ShardStats | None:
        """The statistics of a shard that is there as it was written; None where it is to be."""
        stats, path = read_state(self._stats_file(shard), stats_of), self.shards[shard]
        return None if stats is None or changed_shards([path], {path.name: stats.sha256}) else stats

    def write(self, shard: int, advance: Callable[[int], Any]) -> ShardStats:
        """Writes the shard and its statistics; both appear whole or not at all."""
        stats = ShardStats()
        with written_whole(self.shards[shard]) as part:
            stats.bytes = write_shard(part, text_features(), self._examples(shard, stats, advance))
            stats.sha256 = checksum_of(part)
            write_json(self._stats_file(shard), vars(stats))
        return stats

    def _examples(
        self, shard: int, stats: ShardStats, advance: Callable[[int], Any]
    ) -> Iterator[dict[str, Any]]:
        for index in self.rows_of(shard):
            advance(1)
            stats.rows += 1
            where = self.source.where(index)
            try:
                row = self.source[index]
                stats.count_row(row, self.prompt, self.prompts)
            except (DataError, TokenizationError) as error:
                why = str(error).removeprefix(where).lstrip(": ")
                if self.config.on_bad_row == "stop":
                    raise DataError(f"{where}: {why}") from error
                stats.rejected.append((where, why))
                continue
            stats.written += 1
            yield example_of(row, origin(self.source, index))


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Writes what is missing in the output directory. Returns the report, also in `report.json`."""
    preparation = Preparation(config)
    output, made = preparation.output, preparation.settings()

    def changed(known: dict[str, Any]) -> list[Change]:
        return changes({key: known.get(key) for key in made}, made, source=PREPARED_FILE)

    with Claim(config.output, PREPARED_FILE, changed, alone=True) as claim:
        known, finished = claim.recorded or {}, None
        described = (output / "dataset_info.json").is_file()
        if described and not changed_shards(preparation.shards, known.get("checksums", {})):
            finished = read_state(output / REPORT_FILE, dict)
        if finished:
            _log.info("%s is prepared already: nothing to do", config.output)
        return finished or _prepare(preparation, made, claim)


def _prepare(preparation: Preparation, made: dict[str, Any], claim: Claim) -> dict[str, Any]:
    config, output = preparation.config, preparation.output
    if config.on_bad_row == "stop":
        facts = preparation.source.facts  # reads every row: bad input leaves nothing behind
        if preparation.prompts is not None:
            preparation.prompts.require_room(facts.instructions, explicit=True)
    for name in (REPORT_FILE, "dataset_info.json"):  # not finished from now on
        (output / name).unlink(missing_ok=True)
    claim.record(json_text(made))
    (output / WORK_FOLDER).mkdir(exist_ok=True)
    found = _write_shards(preparation)
    if not any(stats.written for stats in found):
        # without its record a claim leaves no trace, so the same command can have a better input
        for file in (*preparation.shards, output / PREPARED_FILE):
            file.unlink()
        raise DataError(f"{config.input}: every row was rejected, such as {found[0].rejected[0]}")
    paths = zip(preparation.shards, found, strict=True)
    claim.record(json_text(made | {"checksums": {p.name: stats.sha256 for p, stats in paths}}))
    written, num_bytes = [t.written for t in found], sum(t.bytes for t in found)
    write_description(output, written, num_bytes)
    report = report_of(found)
    write_json(output / REPORT_FILE, report)
    sweep(output)
    return report


def _write_shards(preparation: Preparation) -> list[ShardStats]:
    """Writes the shards that are missing or damaged. Returns the statistics of all."""
    shards = range(preparation.num_shards)
    there = {shard: preparation.stats(shard) for shard in shards}
    missing = [shard for shard in shards if there[shard] is None]
    total = len(preparation.source)
    done = total - sum(len(preparation.rows_of(shard)) for shard in missing)
    if done:
        _log.info("%d of %d shards are there already", len(shards) - len(missing), len(shards))
    with tqdm(total=total, initial=done, desc="prepare", unit="row", disable=None) as progress:
        for shard in missing:
            there[shard] = preparation.write(shard, progress.update)
    return [stats for stats in there.values() if stats is not None]


def _report(config: PrepareConfig) -> None:
    print(printable(format_report(prepare(config))))
    print(f"data.train: {config.output}")


main = program("prepare", PrepareConfig, _report)
