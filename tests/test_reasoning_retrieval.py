"""The tfds dataset: prepared and read back without tensorflow, shard by shard or by tfds itself."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from laser_jax.data.reasoning_retrieval import (
    example_of,
    origin,
    shard_path,
    text_features,
    write_description,
    write_shard,
)
from laser_jax.data.schema import DataError, TrainingRow
from laser_jax.data.sources import open_source

ROWS = [
    TrainingRow(f"Frage ü {n}", "a\n\nb" * n, "find", (f"p{n}", "p"), ("n",) * (n % 3))
    for n in range(5)
]


@pytest.fixture
def rows_file(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(vars(row)) + "\n" for row in ROWS))
    return path


def build(rows_file: Path, data_dir: Path) -> Any:
    builder: Any = tfds.builder("reasoning_retrieval", source=rows_file, data_dir=data_dir)
    builder.download_and_prepare()
    return builder


def test_the_registered_builder_is_read_back_by_tfds_and_by_us(rows_file, tmp_path) -> None:
    builder = build(rows_file, tmp_path / "data")
    source: Any = tfds.data_source("reasoning_retrieval", split="train", data_dir=tmp_path / "data")
    assert [example["query"].decode() for example in source] == [row.query for row in ROWS]
    assert source[2]["positive_passages"] == [b"p2", b"p"]
    ours = open_source(str(builder.data_path))
    assert list(ours) == ROWS
    assert ours.where(3) == f"{builder.data_path}: row 4 (rows.jsonl:4)"


def test_slices_of_the_split_are_read(rows_file, tmp_path) -> None:
    path = str(build(rows_file, tmp_path / "data").data_path)
    half: Any = tfds.builder_from_directory(path).as_data_source("train[:40%]")
    assert [example["query"].decode() for example in half] == ["Frage ü 0", "Frage ü 1"]


def test_a_builder_without_a_file_says_how_to_name_one(tmp_path) -> None:
    builder: Any = tfds.builder("reasoning_retrieval", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r'source="train\.jsonl"'):
        builder.download_and_prepare()


def test_a_wrong_row_stops_the_builder_and_leaves_no_dataset(rows_file, tmp_path) -> None:
    rows_file.write_text(rows_file.read_text() + "{}\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:6: field 'query' is missing"):
        build(rows_file, tmp_path / "data")
    assert not list((tmp_path / "data").rglob("dataset_info.json"))


def write(directory: Path, rows: list[TrainingRow], cuts: list[int], features: Any) -> None:
    directory.mkdir()
    bounds = [0, *cuts, len(rows)]
    for shard, (start, stop) in enumerate(itertools.pairwise(bounds)):
        examples = [example_of(row, f"rows.jsonl:{start + i}") for i, row in enumerate(rows)]
        path = shard_path(directory, shard, len(cuts) + 1)
        assert write_shard(path, features, examples[start:stop]) > 0 or start == stop
    write_description(directory, list(np.diff(bounds).tolist()), 1)


def test_our_shards_hold_what_tfds_prepares(rows_file, tmp_path) -> None:
    theirs = Path(str(build(rows_file, tmp_path / "data").data_path))
    write(tmp_path / "ours", ROWS, [2, 2], text_features())  # the second shard is empty
    assert list(open_source(tmp_path / "ours")) == list(open_source(theirs))
    assert (tmp_path / "ours/features.json").read_text() == (theirs / "features.json").read_text()
    ours, other = (
        json.loads((path / "dataset_info.json").read_text()) for path in (tmp_path / "ours", theirs)
    )
    assert ours["splits"][0].pop("shardLengths") == ["2", "0", "3"]
    for info in (ours, other):
        info["splits"][0].pop("numBytes")
    other["splits"][0].pop("shardLengths")
    assert ours == other


def test_the_same_rows_give_the_same_bytes(tmp_path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, ROWS * 200, [300], text_features())
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_an_origin_does_not_depend_on_the_folder(rows_file) -> None:
    assert origin(open_source(rows_file), 1) == "rows.jsonl:2"


PROGRAM = """
import sys
import tensorflow_datasets as tfds
import laser_jax.data.reasoning_retrieval
from laser_jax.data.sources import open_source
builder = tfds.builder("reasoning_retrieval", source=sys.argv[1], data_dir=sys.argv[2])
builder.download_and_prepare()
assert len(open_source(str(builder.data_path))) == 5
assert len(tfds.data_source("reasoning_retrieval", split="train", data_dir=sys.argv[2])) == 5
print([name for name in sys.modules if name.split(".")[0] == "tensorflow"])
"""


def test_no_tensorflow_is_imported(rows_file, tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(rows_file), str(tmp_path / "data")],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
