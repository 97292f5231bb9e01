"""Checks training rows, reports on them and stores them for fast random access:
`python -m laser_jax.prepare --input train.jsonl --output DIR [--tokenizer MODEL_DIR]`.

DIR can then be `data.train`. It is a tfds dataset of ArrayRecord shards; tfds' own preparation
starts anew after an interruption, so the shards are written here, one at a time: what is finished
stays, and the same command goes on with the rest.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from laser_jax.command_line import parse_command_line
from laser_jax.config import ConfigError, PromptConfig, as_dict, from_dict
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
from laser_jax.data.sources import (
    PREPARED_FILE,
    Source,
    changed_shards,
    checksum_of,
    open_source,
    open_unchecked,
)
from laser_jax.data.tokenization import PromptTokenizer, TokenizationError, load_tokenizer
from laser_jax.files.durable import lock, no_link, parts_of, write_atomically, written_whole
from laser_jax.files.reading import read_json, read_yaml
from laser_jax.files.terminal import fail, printable
from laser_jax.prepare.padding import PaddingConfig, measure_padding, require_negatives
from laser_jax.prepare.report import Tally, format_report, load_tally, report_of
from laser_jax.settings import require, require_in

LOG = logging.getLogger("laser_jax")

REPORT_FILE = "report.json"
_TALLIES, _LOCK = ".tallies", ".lock"
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
    prompt: PromptConfig = field(default_factory=PromptConfig)
    train_config: str | None = None
    """A training run's YAML file, whose `prompt` is taken instead."""
    shards: int | None = None
    """Files to write. None: one for 50,000 rows."""
    on_bad_row: Literal["stop", "reject"] = "stop"
    """A row that is no training row: `stop` before anything is written, or leave it out."""
    workers: int = 0
    """Processes that write shards; 0 writes them in this one."""
    padding: PaddingConfig | None = None
    """Set to have the padding of training batches in the report."""

    def __post_init__(self) -> None:
        counted = self.padding is None or self.tokenizer is not None
        require(counted, "padding counts on tokens: give the directory of a --tokenizer")
        require_in("[1, inf)", self, "", "shards")
        require_in("[0, inf)", self, "", "workers")


class Preparation:
    """What every shard is written with. Worker processes make their own."""

    def __init__(self, config: PrepareConfig, num_shards: int):
        self.config = config
        self.output = Path(config.output)
        self.num_shards = num_shards
        self.source = open_unchecked(config.input)
        self.prompts = None
        if config.tokenizer:
            self.prompts = PromptTokenizer(load_tokenizer(config.tokenizer), config.prompt)

    def shard_path(self, shard: int) -> Path:
        return shard_path(self.output, shard, self.num_shards)

    def tally_path(self, shard: int) -> Path:
        return self.output / _TALLIES / f"{shard:05d}.json"

    def rows_of(self, shard: int) -> range:
        rows = len(self.source)
        return range(shard * rows // self.num_shards, (shard + 1) * rows // self.num_shards)

    def tally(self, shard: int) -> Tally | None:
        """The tally of a shard that is there as it was written; None where it is to be written."""
        tally, path = load_tally(self.tally_path(shard)), self.shard_path(shard)
        return None if tally is None or changed_shards([path], {path.name: tally.sha256}) else tally

    def write(self, shard: int, advance: Callable[[int], Any]) -> Tally:
        """Writes the shard and its tally; both appear whole or not at all."""
        tally = Tally()
        with written_whole(self.shard_path(shard)) as part:
            tally.bytes = write_shard(part, text_features(), self._examples(shard, tally, advance))
            tally.sha256 = checksum_of(part)
            _write_json(self.tally_path(shard), vars(tally))
        return tally

    def _examples(
        self, shard: int, tally: Tally, advance: Callable[[int], Any]
    ) -> Iterator[dict[str, Any]]:
        for index in self.rows_of(shard):
            advance(1)
            tally.rows += 1
            where = self.source.where(index)
            try:
                row = self.source[index]
                tally.count_row(row, self.config.prompt, self.prompts)
            except (DataError, TokenizationError) as error:
                why = str(error).removeprefix(where).lstrip(": ")
                if self.config.on_bad_row == "stop":
                    raise DataError(f"{where}: {why}") from error
                tally.rejected.append((where, why))
                continue
            tally.written += 1
            yield example_of(row, origin(self.source, index))


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Writes what is missing in the output directory. Returns the report, also in `report.json`.

    Raises:
        ConfigError, FileNotFoundError: a setting that cannot work.
        DataError, TokenizationError: bad input, or an output directory of another preparation.
    """
    if config.train_config is not None:
        config = replace(config, prompt=_prompt_of(config.train_config))
    source = open_unchecked(config.input)
    num_shards = config.shards or math.ceil(len(source) / _ROWS_PER_SHARD)
    if num_shards > len(source):
        raise ConfigError(f"{num_shards} shards are too many for {len(source)} rows")
    preparation = Preparation(config, num_shards)
    made = _settings(preparation)
    finished = _finished_report(preparation, made)
    report = finished or _prepare(preparation, made)
    padding, prompts = config.padding, preparation.prompts
    if padding and prompts and report.get("padding", {}).get("of") != as_dict(padding):
        shares = measure_padding(open_source(preparation.output), prompts, padding)
        report["padding"] = {"of": as_dict(padding), "shares": shares}
        _write_json(preparation.output / REPORT_FILE, report)
    elif finished:
        LOG.info("%s is prepared already: nothing to do", config.output)
    return report


def _prepare(preparation: Preparation, made: dict[str, Any]) -> dict[str, Any]:
    config, output = preparation.config, preparation.output
    if config.on_bad_row == "stop":
        facts = preparation.source.facts  # reads every row: bad input leaves nothing behind
        if preparation.prompts is not None:
            preparation.prompts.require_room(facts.instructions, explicit=True)
        if config.padding is not None:
            require_negatives(preparation.source, config.padding)
    made_here = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    with _locked(output):
        for name in (REPORT_FILE, "dataset_info.json"):  # not finished from now on
            (output / name).unlink(missing_ok=True)
        _write_json(output / PREPARED_FILE, made)
        (output / _TALLIES).mkdir(exist_ok=True)
        tallies = _write_shards(preparation)
        if not any(tally.written for tally in tallies):
            _remove_all(preparation, made_here)
            first = tallies[0].rejected[0]
            raise DataError(f"{config.input}: every row was rejected, such as {first}")
        shards = range(preparation.num_shards)
        names = [preparation.shard_path(shard).name for shard in shards]
        checksums = {n: t.sha256 for n, t in zip(names, tallies, strict=True)}
        _write_json(output / PREPARED_FILE, made | {"checksums": checksums})
        write_description(
            output,
            text_features(),
            [tally.written for tally in tallies],
            sum(tally.bytes for tally in tallies),
        )
        report = report_of(tallies)
        _write_json(output / REPORT_FILE, report)
        _remove_work(output)
    return report


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keeps a second preparation out for as long as this one writes.

    Raises:
        DataError: one is writing.
        OSError: the file system has no locks.
    """
    with open(output / _LOCK, "w", opener=no_link) as file:
        if not lock(file, wait=False):
            raise DataError(
                f"{output}: another laser_jax.prepare is writing there; wait for it, or choose "
                "another output"
            )
        yield


def _remove_work(output: Path) -> None:
    shutil.rmtree(output / _TALLIES)
    for part in parts_of(output):  # of a run that was killed
        part.unlink()
    (output / _LOCK).unlink()


def _remove_all(preparation: Preparation, made_here: bool) -> None:
    """Removes a preparation without a row, so that the same command can be given a better input."""
    output = preparation.output
    _remove_work(output)
    for shard in range(preparation.num_shards):
        preparation.shard_path(shard).unlink()
    (output / PREPARED_FILE).unlink()
    if made_here:
        output.rmdir()


def _prompt_of(train_config: str) -> PromptConfig:
    values = read_yaml(Path(train_config))
    section = values.get("prompt", {}) if isinstance(values, dict) else {}
    return from_dict(PromptConfig, section, source=f"{train_config}: prompt")


def _settings(preparation: Preparation) -> dict[str, Any]:
    """All that the output depends on."""
    config, prompts = preparation.config, preparation.prompts
    return {
        "input": _fingerprint(Path(config.input), preparation.source),
        "shards": preparation.num_shards,
        "on_bad_row": config.on_bad_row,
        "separator": config.prompt.separator,
        "counted_with": tokenization_settings(prompts) if prompts else None,
    }


def _fingerprint(path: Path, source: Source) -> str:
    """Changes with any byte of the input and with the names of a directory's files."""
    named = {".": path} if path.is_file() else {file.name: file for file in source.files}
    if path.is_dir():
        named = {str(p.relative_to(path)): p for p in sorted(path.rglob("*")) if p.is_file()}
    digest = hashlib.sha256()
    for name, file in named.items():
        digest.update(name.encode())
        digest.update(bytes.fromhex(checksum_of(file)))
    return digest.hexdigest()


def _finished_report(preparation: Preparation, made: dict[str, Any]) -> dict[str, Any] | None:
    """The report that is there, None while something is left to do.

    Raises:
        DataError: the directory holds something else.
    """
    output = preparation.output
    if not output.exists():
        return None
    if not (output / PREPARED_FILE).is_file():
        # a run that was killed at once leaves hidden files
        if any(not file.name.startswith(".") for file in output.iterdir()):
            raise DataError(f"{output} holds other files; choose an empty or new directory")
        return None
    try:
        there = read_json(output / PREPARED_FILE)
    except DataError as error:
        raise DataError(f"{error}; delete {output}, or choose another output") from error
    changed = [key for key, value in made.items() if there.get(key) != value]
    if changed:
        raise DataError(
            f"{output} was prepared otherwise (differs in {', '.join(changed)}); choose another "
            "output, or delete that directory"
        )
    shards = map(preparation.shard_path, range(preparation.num_shards))
    if changed_shards(shards, there.get("checksums", {})):
        return None
    try:
        return read_json(output / REPORT_FILE)
    except (FileNotFoundError, DataError):  # it is made again
        return None


def _write_shards(preparation: Preparation) -> list[Tally]:
    """Writes the shards that are missing or damaged. Returns the tallies of all."""
    shards = range(preparation.num_shards)
    there = {shard: preparation.tally(shard) for shard in shards}
    missing = [shard for shard in shards if there[shard] is None]
    rows = {shard: len(preparation.rows_of(shard)) for shard in shards}
    done = sum(rows.values()) - sum(rows[shard] for shard in missing)
    if done:
        LOG.info("%d of %d shards are there already", len(shards) - len(missing), len(shards))
    with tqdm(
        total=sum(rows.values()), initial=done, desc="prepare", unit="row", disable=None
    ) as progress:
        if preparation.config.workers:
            for shard, there[shard] in _by_workers(preparation, missing):
                progress.update(rows[shard])
        else:
            for shard in missing:
                there[shard] = preparation.write(shard, progress.update)
    return [tally for tally in there.values() if tally is not None]


def _by_workers(preparation: Preparation, shards: Sequence[int]) -> Iterator[tuple[int, Tally]]:
    """Writes the shards in processes; yields each with its tally."""
    config = preparation.config
    try:
        write = functools.partial(_write_in_worker, config, preparation.num_shards)
        with ProcessPoolExecutor(config.workers, multiprocessing.get_context("spawn")) as pool:
            yield from zip(shards, pool.map(write, shards), strict=True)
    except BrokenProcessPool as error:
        raise DataError(
            f"{config.output}: a worker process was killed, perhaps for want of memory; the same "
            "command goes on, with fewer --workers if need be"
        ) from error


_in_worker = functools.cache(Preparation)


def _write_in_worker(config: PrepareConfig, num_shards: int, shard: int) -> Tally:
    return _in_worker(config, num_shards).write(shard, lambda rows: None)


def _write_json(path: Path, values: Any) -> None:
    write_atomically(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    try:
        config = parse_command_line(PrepareConfig, "python -m laser_jax.prepare", arguments)
        report = prepare(config)
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    print(printable(format_report(report)))
    print(f"data.train: {config.output}")
