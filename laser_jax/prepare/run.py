"""Checks training rows, reports on them and stores them for fast random access:
`python -m laser_jax.prepare --input train.jsonl --output DIR [--tokenizer MODEL_DIR]`.

DIR can then be `data.train`. It is a tfds dataset of ArrayRecord shards; tfds' own preparation
starts anew after an interruption, so the shards are written here, one at a time: what is finished
stays, and the same command goes on with the rest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import multiprocessing
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from laser_jax.config import (
    ConfigError,
    DataConfig,
    PromptConfig,
    as_dict,
    from_dict,
    parse_command_line,
)
from laser_jax.data.pipeline import (
    BatchSettings,
    padding_share,
    same_passage,
    settled_reasoning,
    tokenization_settings,
    training_batches,
)
from laser_jax.data.reasoning_retrieval import (
    example_of,
    origin,
    shard_path,
    text_features,
    write_description,
    write_shard,
)
from laser_jax.data.schema import DataError, FactFinder, TrainingRow, longest_instructions
from laser_jax.data.sources import (
    PREPARED_FILE,
    ArrayRecordSource,
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

REPORT_FILE = "report.json"
_TALLIES, _LOCK = ".tallies", ".lock"
_ROWS_PER_SHARD = 50_000
_SHOWN = 10
"""Rejected rows that the report names."""


@dataclass(frozen=True)
class PaddingConfig:
    """Training batches that are drawn to see how much of them is padding."""

    batch_size: int = 32
    group_size: int = 2
    length_multiples: tuple[int, ...] = (32, 128)
    bucket_windows: tuple[int, ...] = (1, 8, 32)
    batches: int = 256
    """The most that are drawn; one epoch is enough."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "group_size", "batches"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"padding.{name} must be at least 1, got {value}")
        for name in ("length_multiples", "bucket_windows"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ConfigError(
                    f"padding.{name} must be numbers of at least 1, one or more, got {values}"
                )


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
        if self.padding and not self.tokenizer:
            raise ConfigError("padding counts on tokens: give the directory of a --tokenizer")
        if self.shards is not None and self.shards < 1:
            raise ConfigError(f"shards must be at least 1, got {self.shards}")
        if self.workers < 0:
            raise ConfigError(f"workers must be at least 0, got {self.workers}")


# --- what is counted -------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts over rows, which add up over shards. Keys of the inner counters are lengths."""

    rows: int = 0
    written: int = 0
    bytes: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """Where, and why."""
    lengths: dict[str, dict[int, int]] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)
    query_hashes: list[int] = field(default_factory=list)
    row_hashes: list[int] = field(default_factory=list)
    positives_among_own_negatives: int = 0
    row_without_negatives: int | None = None
    """Index among the written."""
    instructions: tuple[str, ...] = ()
    sha256: str = ""
    """Of the shard's file."""

    def count(self, what: str, length: int, truncated: bool = False) -> None:
        lengths = self.lengths.setdefault(what, {})
        lengths[length] = lengths.get(length, 0) + 1
        self.truncated[what] = self.truncated.get(what, 0) + truncated

    def count_texts(self, row: TrainingRow) -> None:
        self.query_hashes.append(_hash(same_passage(row.query)))
        self.row_hashes.append(_hash(json.dumps(example_of(row, ""))))
        negatives = set(map(same_passage, row.negative_passages))
        self.positives_among_own_negatives += sum(
            same_passage(text) in negatives for text in row.positive_passages
        )


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _load_tally(path: Path) -> Tally | None:
    """None where it is absent or damaged, which is the same: its shard is written again."""
    try:
        values = read_json(path)
        values["lengths"] = {
            what: {int(length): n for length, n in counts.items()}
            for what, counts in values["lengths"].items()
        }
        return Tally(**values)
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return None


# --- a shard ---------------------------------------------------------------------------------


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
        self.features = text_features()

    def shard_path(self, shard: int) -> Path:
        return shard_path(self.output, shard, self.num_shards)

    def tally_path(self, shard: int) -> Path:
        return self.output / _TALLIES / f"{shard:05d}.json"

    def rows_of(self, shard: int) -> range:
        rows = len(self.source)
        return range(shard * rows // self.num_shards, (shard + 1) * rows // self.num_shards)

    def tally(self, shard: int) -> Tally | None:
        """The tally of a shard that is there as it was written; None where it is to be written."""
        tally, path = _load_tally(self.tally_path(shard)), self.shard_path(shard)
        return None if tally is None or changed_shards([path], {path.name: tally.sha256}) else tally

    def write(self, shard: int, advance: Callable[[int], Any]) -> Tally:
        """Writes the shard and its tally; both appear whole or not at all."""
        tally = Tally()
        with written_whole(self.shard_path(shard)) as part:
            tally.bytes = write_shard(part, self.features, self._examples(shard, tally, advance))
            tally.sha256 = checksum_of(part)
            _write_json(self.tally_path(shard), vars(tally))
        return tally

    def _examples(
        self, shard: int, tally: Tally, advance: Callable[[int], Any]
    ) -> Iterator[dict[str, Any]]:
        finder = FactFinder()
        for index in self.rows_of(shard):
            advance(1)
            tally.rows += 1
            where = self.source.where(index)
            try:
                row = self._row(index, tally)
            except (DataError, TokenizationError) as error:
                why = str(error).removeprefix(where).lstrip(": ")
                if self.config.on_bad_row == "stop":
                    raise DataError(f"{where}: {why}") from error
                tally.rejected.append((where, why))
                continue
            tally.written += 1
            finder.add(row)
            yield example_of(row, origin(self.source, index))
        tally.row_without_negatives, tally.instructions = dataclasses.astuple(finder.facts())

    def _row(self, index: int, tally: Tally) -> TrainingRow:
        """The row, counted."""
        row = self.source[index]
        if self.prompts:
            self._count_tokens(row, tally)
        else:
            *closed, tail = row.reasoning_query.split(self.config.prompt.separator)
            tally.count("segments", len(closed) + bool(tail))
        tally.count_texts(row)
        return row

    def _count_tokens(self, row: TrainingRow, tally: Tally) -> None:
        assert self.prompts is not None
        reasoning = settled_reasoning(row, self.config.prompt.min_reasoning_characters)
        query = self.prompts.query_prompt(row.query, row.prompt)
        explicit = self.prompts.explicit(row.query, row.prompt, reasoning)
        tally.count("queries", len(query.ids), query.truncated)
        tally.count("explicit inputs", len(explicit.ids), explicit.truncated)
        tally.count("segments", len(explicit.segment_ends))
        for text in (*row.positive_passages, *row.negative_passages):
            passage = self.prompts.document_prompt(text)
            tally.count("passages", len(passage.ids), passage.truncated)


# --- the whole -------------------------------------------------------------------------------


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
    padding = as_dict(config.padding) if config.padding else None
    if padding and report.get("padding", {}).get("of") != padding:
        report["padding"] = {"of": padding, "shares": _padding(preparation)}
        _write_json(preparation.output / REPORT_FILE, report)
    elif finished:
        print(f"{config.output} is prepared already: nothing to do")
    return report


def _prepare(preparation: Preparation, made: dict[str, Any]) -> dict[str, Any]:
    config, output = preparation.config, preparation.output
    if config.on_bad_row == "stop":
        facts = preparation.source.facts  # reads every row: bad input leaves nothing behind
        if preparation.prompts is not None:
            preparation.prompts.require_room(facts.instructions, explicit=True)
        if config.padding is not None:
            _require_negatives(preparation.source, config.padding)
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
        # of the rows that were prepared: all of the source's, unless some were rejected
        whole = config.on_bad_row == "stop"
        known = {
            "facts": _facts(tallies),
            "fingerprint": (preparation.source if whole else ArrayRecordSource(output)).fingerprint,
            "checksums": {n: t.sha256 for n, t in zip(names, tallies, strict=True)},
        }
        _write_json(output / PREPARED_FILE, made | known)
        write_description(
            output,
            preparation.features,
            [tally.written for tally in tallies],
            sum(tally.bytes for tally in tallies),
        )
        report = _report(tallies)
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
    if not isinstance(section, dict):
        raise ConfigError(
            f"{train_config}: prompt must hold the settings of prompts, got {section!r}: give one, "
            "or take the line away for the defaults"
        )
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
        print(f"{len(shards) - len(missing)} of {len(shards)} shards are there already")
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
        with ProcessPoolExecutor(
            config.workers,
            multiprocessing.get_context("spawn"),
            _start_worker,
            (config, preparation.num_shards),
        ) as pool:
            yield from zip(shards, pool.map(_write_in_worker, shards), strict=True)
    except BrokenProcessPool as error:
        raise DataError(
            f"{config.output}: a worker process was killed, perhaps for want of memory; the same "
            "command goes on, with fewer --workers if need be"
        ) from error


_worker: Preparation


def _start_worker(config: PrepareConfig, num_shards: int) -> None:
    global _worker
    _worker = Preparation(config, num_shards)


def _write_in_worker(shard: int) -> Tally:
    return _worker.write(shard, lambda rows: None)


def _write_json(path: Path, values: Any) -> None:
    write_atomically(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


# --- the report ------------------------------------------------------------------------------


def _facts(tallies: Sequence[Tally]) -> dict[str, Any]:
    starts = itertools.accumulate((tally.written for tally in tallies), initial=0)
    without = (
        start + tally.row_without_negatives
        for start, tally in zip(starts, tallies, strict=False)
        if tally.row_without_negatives is not None
    )
    instructions = itertools.chain(*(tally.instructions for tally in tallies))
    return {
        "row_without_negatives": next(without, None),
        "instructions": longest_instructions(instructions),
    }


def _report(tallies: Sequence[Tally]) -> dict[str, Any]:
    lengths: dict[str, Counter[int]] = {}
    truncated: Counter[str] = Counter()
    for tally in tallies:
        truncated.update(tally.truncated)
        for what, counts in tally.lengths.items():
            lengths.setdefault(what, Counter()).update(counts)
    rejected = [entry for tally in tallies for entry in tally.rejected]
    reasons = Counter(re.sub(r"\d+", "N", why) for _, why in rejected)
    counted = {what: counts for what, counts in lengths.items() if what != "segments"}
    return {
        "rows": sum(tally.rows for tally in tallies),
        "written": sum(tally.written for tally in tallies),
        "shards": len(tallies),
        "rejected": {
            "rows": len(rejected),
            "reasons": dict(reasons.most_common()),
            "first": [f"{where}: {why}" for where, why in rejected[:_SHOWN]],
        },
        "tokens": {what: _percentiles(counts) for what, counts in counted.items()},
        "truncated": {
            what: round(truncated[what] / counts.total(), 6) for what, counts in counted.items()
        },
        "segments_per_reasoning": _percentiles(lengths["segments"]),
        "duplicates": {
            "queries": _repeated([tally.query_hashes for tally in tallies]),
            "rows": _repeated([tally.row_hashes for tally in tallies]),
            "positives_among_own_negatives": sum(
                tally.positives_among_own_negatives for tally in tallies
            ),
        },
    }


def _percentiles(counts: Counter[int]) -> dict[str, int]:
    """By nearest rank."""
    lengths = sorted(counts)
    ends = list(itertools.accumulate(counts[length] for length in lengths))

    def percentile(percent: int) -> int:
        rank = -(-percent * ends[-1] // 100)
        return lengths[next(i for i, end in enumerate(ends) if end >= rank)]

    return {**{f"p{p}": percentile(p) for p in (50, 90, 99)}, "max": lengths[-1]}


def _repeated(hashes: Sequence[list[int]]) -> int:
    """How many are equal to one before."""
    joined = np.concatenate([np.array(part, np.uint64) for part in hashes])
    return len(joined) - len(np.unique(joined))


def _padding(preparation: Preparation) -> list[dict[str, Any]]:
    """The share of padding in one epoch of batches, for every multiple and window."""
    config, prompts = preparation.config.padding, preparation.prompts
    assert config is not None
    assert prompts is not None
    source = open_source(preparation.output)
    _require_negatives(source, config)
    shares = []
    for multiple, window in itertools.product(config.length_multiples, config.bucket_windows):
        data = DataConfig(
            train=str(preparation.output),
            group_size=config.group_size,
            selection="random",
            length_multiple=multiple,
            bucket_window=window,
        )
        batches = training_batches(
            [source],
            prompts,
            data,
            BatchSettings(
                batch_size=config.batch_size,
                seed=0,
                num_thinking_steps=1,
                keyframes="paper",
                need_explicit=True,
                shared_prefix=False,
            ),
        )
        number = min(config.batches, math.ceil(len(source) / config.batch_size))
        padding, tokens, shapes = 0.0, 0, set()
        for batch in itertools.islice(batches, number):
            assert batch.explicit is not None
            size = batch.documents.ids_BT.size + batch.explicit.ids_BT.size
            padding += padding_share(batch) * size
            tokens += size
            shapes.add((batch.documents.ids_BT.shape, batch.explicit.ids_BT.shape))
        shares.append(
            {
                "length_multiple": multiple,
                "bucket_window": window,
                "batches": number,
                "padding_share": round(padding / tokens, 4),
                "shapes": len(shapes),
            }
        )
    return shares


def _require_negatives(source: Source, padding: PaddingConfig) -> None:
    """Raises a DataError where the batches to be drawn want negatives that a row has not."""
    row = source.facts.row_without_negatives
    if padding.group_size > 1 and row is not None:
        raise DataError(
            f"{source.where(row)} has no negative_passages, and padding.group_size "
            f"{padding.group_size} wants {padding.group_size - 1}: pass --padding.group_size 1, "
            "or mine negatives"
        )


def format_report(report: dict[str, Any]) -> str:
    """The report as the text that the program prints."""
    rejected = report["rejected"]
    lines = [
        f"{report['rows']:,} rows, {report['written']:,} written in {report['shards']} shard(s), "
        f"{rejected['rows']:,} rejected"
    ]
    lines += [f"  {number:,} x {reason}" for reason, number in rejected["reasons"].items()]
    lines += [f"  first: {where}" for where in rejected["first"]]
    lines.append(f"{'':24}{'p50':>8}{'p90':>8}{'p99':>8}{'max':>8}{'truncated':>11}")
    for what, percentiles in report["tokens"].items():
        lengths = "".join(f"{n:>8,}" for n in percentiles.values())
        lines.append(f"{f'tokens of {what}':24}{lengths}{report['truncated'][what]:>11.2%}")
    lengths = "".join(f"{n:>8,}" for n in report["segments_per_reasoning"].values())
    lines.append(f"{'segments of a reasoning':24}{lengths}")
    if not report["tokens"]:
        lines.append("tokens are not counted without --tokenizer")
    duplicates = report["duplicates"]
    lines.append(
        f"duplicates: {duplicates['queries']:,} queries, {duplicates['rows']:,} rows, "
        f"{duplicates['positives_among_own_negatives']:,} positives among their own negatives"
    )
    for padding in report.get("padding", {}).get("shares", []):
        lines.append(
            "padding with data.length_multiple {length_multiple}, data.bucket_window "
            "{bucket_window}: {padding_share:.1%} ({batches} batches of {shapes} shapes)".format(
                **padding
            )
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    try:
        config = parse_command_line(PrepareConfig, "python -m laser_jax.prepare", arguments)
        report = prepare(config)
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    print(printable(format_report(report)))
    print(f"data.train: {config.output}")
