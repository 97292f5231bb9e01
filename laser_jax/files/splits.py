"""Which files of a directory are of one split, by their names."""

import re
from collections.abc import Sequence
from pathlib import Path

from laser_jax.files.reading import DataError

_SPLIT = re.compile(r"train|training|valid|validation|val|dev|test|testing|eval|evaluation")
_SHARD = re.compile(r"(.+?)(\.array_record)?-(\d+)-of-(\d+)([-.].*)?")


def split_of(name: str) -> str | None:
    """The split that a data file's name tells, or None. Of a shard it is what stands last before
    the numbers, as the hub, datasets and tfds name them: `train-00000-of-00002.parquet`,
    `NAME-train.array_record-00000-of-00002`. Of others it is the last word that is a split's."""
    if shard := _SHARD.fullmatch(name):
        return shard[1].rpartition("-")[2]
    words = re.split(r"[^a-z]+", name.partition(".")[0].lower())
    return next((word for word in reversed(words) if _SPLIT.fullmatch(word)), None)


def one_split(path: Path, files: Sequence[Path]) -> list[Path]:
    """Those of all data `files` of a directory that belong to one split, so that no test rows are
    taken for training rows; `path` is the directory, or `directory/SPLIT` for one of several.
    Raises a DataError where it holds several and `path` names none or another one, or where a shard
    is missing."""
    splits: dict[str | None, list[Path]] = {}
    for file in files:
        splits.setdefault(split_of(file.name), []).append(file)
    named = [str(path / split) for split in splits if split is not None]
    if not path.is_dir():
        if path.name not in splits:
            there = " or ".join(str(path.parent / split) for split in splits if split)
            raise DataError(f"{path}: no such file or directory; {there or 'no split'} is there")
        chosen = splits[path.name]
    elif len(splits) == 1:
        (chosen,) = splits.values()
    else:
        rest = "" if None not in splits else f" (of {splits[None][0].name} the name tells none)"
        raise DataError(f"{path} holds several splits, name one: {' or '.join(named)}{rest}")
    present = {file.name for file in chosen}
    for shard in filter(None, map(_SHARD.fullmatch, present)):
        if shard[5] is None or "-" not in shard[5]:  # no checksum in the names
            start, end = shard.span(3)
            for number in range(int(shard[4])):
                name = f"{shard.string[:start]}{number:0{end - start}d}{shard.string[end:]}"
                if name not in present:
                    raise DataError(
                        f"{chosen[0].parent / name} is missing; fetch or prepare it again, or, if "
                        "the others are all that is meant, rename them"
                    )
    return chosen
