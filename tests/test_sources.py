"""Random access to training rows in every kind of file, and what is said of other files."""

from __future__ import annotations

import gzip
import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rows_in_memory import RowsSource

from laser_jax.config import ConfigError, DataConfig, MixtureSource
from laser_jax.data.reasoning_retrieval import (
    example_of,
    text_features,
    write_description,
    write_shard,
)
from laser_jax.data.schema import DataError, longest_instructions, parse_row
from laser_jax.data.sources import (
    JsonlSource,
    describe_row,
    is_there,
    locate,
    open_source,
    open_sources,
    open_unchecked,
    rows_per_epoch,
)

RECORDS: list[dict[str, Any]] = [
    {
        "query": f"Frage ü {n}",
        "reasoning_query": "a\n\nb" * n,
        "prompt": "find" + " more" * (n % 2),
        "positive_passages": [f"p{n}", "p"],
        "negative_passages": [f"n{n}"] * (n % 3),
    }
    for n in range(7)
]
ROWS = [parse_row(record, "x") for record in RECORDS]
DATA = Path(__file__).parents[1].parent / "shared" / "data"


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_gzip(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    return path


def write_parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=2)
    return path


def write_arrow(path: Path, records: list[dict[str, Any]], *, stream: bool = True) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(records)
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


def write_save_to_disk(path: Path, records: list[dict[str, Any]]) -> Path:
    """As `datasets.Dataset.save_to_disk` lays it out."""
    path.mkdir()
    names = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
    for name, part in zip(names, (records[:4], records[4:]), strict=True):
        write_arrow(path / name, part)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (path / "state.json").write_text(json.dumps(state))
    (path / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return path


def write_parquet_shards(path: Path, records: list[dict[str, Any]]) -> Path:
    path.mkdir()
    write_parquet(path / "b-00001.parquet", records[4:])
    write_parquet(path / "b-00000.parquet", records[:4])
    return path


def write_json_records(path: Path, records: list[dict[str, Any]]) -> Path:
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(json.dumps(record).encode())
    writer.close()
    return path


def write_tf_examples(path: Path, records: list[dict[str, Any]]) -> Path:
    rows = [parse_row(record, "x") for record in records]
    write_shard(path, text_features(), [example_of(row, "") for row in rows])
    return path


def write_tfds(path: Path, records: list[dict[str, Any]]) -> Path:
    path.mkdir()
    name = "reasoning_retrieval-train.array_record-0000{}-of-00002"
    write_tf_examples(path / name.format(0), records[:4])
    write_tf_examples(path / name.format(1), records[4:])
    write_description(path, [4, 3], 1)
    return path


Writer = Callable[[Path, list[dict[str, Any]]], Path]
KINDS: dict[str, tuple[str, Writer]] = {
    "jsonl": ("t.jsonl", write_jsonl),
    "gzip": ("t.jsonl.gz", write_gzip),
    "parquet": ("t.parquet", write_parquet),
    "parquet shards": ("shards", write_parquet_shards),
    "arrow stream": ("t.arrow", write_arrow),
    "save_to_disk": ("saved", write_save_to_disk),
    "array_record of JSON": ("t.array_record", write_json_records),
    "array_record of tf.Example": ("t.array_record-00000-of-00001", write_tf_examples),
    "tfds": ("prepared", write_tfds),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request) -> tuple[str, Writer]:
    return request.param


# --- what is read ----------------------------------------------------------------------------


def test_every_kind_gives_the_same_rows_in_any_order(kind, tmp_path) -> None:
    name, write = kind
    source = open_source(write(tmp_path / name, RECORDS))
    assert len(source) == 7
    assert list(source) == ROWS
    order = np.random.default_rng(0).permutation(7)
    assert [source[i] for i in order] == [ROWS[i] for i in order]
    assert source.facts.row_without_negatives == 0
    assert source.facts.instructions == ("find more", "find")


def test_a_fingerprint_tells_rows_by_their_texts_and_order(kind, tmp_path) -> None:
    name, write = kind
    found = open_source(write(tmp_path / name, RECORDS)).facts.fingerprint
    assert found == RowsSource(ROWS).facts.fingerprint
    assert found != RowsSource([*ROWS[:5], ROWS[6], ROWS[5]]).facts.fingerprint
    assert found != RowsSource([*ROWS[:6], replace(ROWS[6], query="another")]).facts.fingerprint


def test_every_kind_goes_into_another_process(kind, tmp_path) -> None:
    name, write = kind
    source = open_source(write(tmp_path / name, RECORDS))
    assert source[1] == ROWS[1]  # whatever is opened lazily is open
    copy = pickle.loads(pickle.dumps(source))
    assert list(copy) == ROWS
    assert copy.where(5) == source.where(5)


# the writers of tf.Example go through the schema, which takes no wrong row
UNCHECKED_KINDS = {k: v for k, v in KINDS.items() if v[1] not in (write_tf_examples, write_tfds)}


@pytest.mark.parametrize("kind", UNCHECKED_KINDS.values(), ids=UNCHECKED_KINDS)
def test_every_kind_names_the_place_of_a_wrong_row(kind, tmp_path) -> None:
    name, write = kind
    wrong = [*RECORDS[:5], {**RECORDS[5], "query": " "}, RECORDS[6]]
    path = write(tmp_path / name, wrong)
    with pytest.raises(DataError, match=r"(:6|row [26]): 'query' is empty") as caught:
        open_source(path)
    assert str(path) in str(caught.value)
    unchecked = open_unchecked(path)
    assert unchecked[4] == ROWS[4]
    assert f"{unchecked.where(5)}: 'query' is empty" == str(caught.value)


def test_blank_lines_count_as_lines_and_hold_no_rows(tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    lines = ["", json.dumps(RECORDS[0]), "  ", "", json.dumps(RECORDS[1]), " "]
    path.write_text("\n".join(lines))
    source = open_source(path)
    assert list(source) == ROWS[:2]
    assert [source.where(i) for i in range(2)] == [f"{path}:2", f"{path}:5"]


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_byte_order_marks_are_no_part_of_a_row(tmp_path, name) -> None:
    mark = b"\xef\xbb\xbf"
    first, second = (json.dumps(record).encode() for record in RECORDS[:2])
    content = mark + first + b"\n" + mark + b"\n" + mark + second  # of three files put together
    (tmp_path / name).write_bytes(gzip.compress(content) if "gz" in name else content)
    source = open_source(tmp_path / name)
    assert list(source) == ROWS[:2]
    assert source.where(1) == f"{tmp_path / name}:3"


def test_a_jsonl_source_holds_no_texts(tmp_path) -> None:
    source = JsonlSource(write_jsonl(tmp_path / "t.jsonl", RECORDS * 100))
    assert len(pickle.dumps(source)) < 1000
    held = [value for value in vars(source).values() if isinstance(value, str | bytes | list)]
    assert held == []


def test_arrow_files_with_a_footer_are_read_too(tmp_path) -> None:
    path = write_arrow(tmp_path / "t.arrow", RECORDS, stream=False)
    assert list(open_source(path)) == ROWS


def test_scores_of_a_teacher_are_read_from_parquet_too(tmp_path) -> None:
    passages = [len(row.positive_passages) + len(row.negative_passages) for row in ROWS]
    scores = [None, *([0.5] * n for n in passages[1:])]
    records = [{**r, "teacher_scores": s} for r, s in zip(RECORDS, scores, strict=True)]
    source = open_source(write_parquet(tmp_path / "t.parquet", records))
    assert [row.teacher_scores for row in source] == [None, *map(tuple, scores[1:])]
    assert source.facts.scored_rows == len(ROWS) - 1


def test_row_groups_beyond_the_bound_are_decoded_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("laser_jax.data.sources._DECODED_BYTES", 1)
    source = open_source(write_parquet(tmp_path / "t.parquet", RECORDS))
    assert [source[i] for i in (6, 0, 3, 6)] == [ROWS[i] for i in (6, 0, 3, 6)]
    assert len(vars(source)["_decoded"]) == 1


def test_rows_in_shards_are_named_by_their_file(tmp_path) -> None:
    source = open_source(write_parquet_shards(tmp_path / "shards", RECORDS))
    assert source.where(3) == f"{tmp_path}/shards/b-00000.parquet: row 4"
    assert source.where(4) == f"{tmp_path}/shards/b-00001.parquet: row 1"


def test_shared_training_files_are_read() -> None:
    files = sorted(DATA.glob("*/train.jsonl"))
    if not files:
        pytest.skip(f"no training files under {DATA}")
    assert all(len(open_source(path)) for path in files)


# --- several sources -------------------------------------------------------------------------


def test_sources_of_a_config_are_opened_in_its_order(tmp_path) -> None:
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", RECORDS[i:]) for i in range(2)]
    mixture = tuple(MixtureSource(str(path), 0.5) for path in paths)
    sources = open_sources(DataConfig(mixture=mixture))
    assert rows_per_epoch(sources) == 13
    assert [locate(sources, i) for i in (0, 6, 7, 12)] == [(0, 0), (0, 6), (1, 0), (1, 5)]
    assert describe_row(sources, 8) == f"{paths[1]}:2"
    with pytest.raises(IndexError, match="row 13 of 13"):
        locate(sources, 13)


def test_no_training_rows_in_the_config_are_refused() -> None:
    with pytest.raises(DataError, match=r"data\.train is empty"):
        open_sources(DataConfig())


# --- splits ----------------------------------------------------------------------------------

SHARDS: dict[str, tuple[str, Writer]] = {
    "parquet of the hub": ("{}-00000-of-00001.parquet", write_parquet),
    "parquet": ("{}.parquet", write_parquet),
    "cache of datasets": ("my_set-{}-00000-of-00001.arrow", write_arrow),
    "arrow": ("my_set-{}.arrow", write_arrow),
    "array_record": ("rows_{}.array_record", write_json_records),
    "array_record shards": ("rows-{}.array_record-00000-of-00001", write_tf_examples),
}


@pytest.mark.parametrize("shards", SHARDS.values(), ids=SHARDS)
def test_one_of_several_splits_is_named_and_no_other_row_trains(tmp_path, shards) -> None:
    name, write = shards
    write(tmp_path / name.format("train"), RECORDS[:4])
    assert list(open_source(tmp_path)) == ROWS[:4]
    write(tmp_path / name.format("validation"), RECORDS[4:5])
    write(tmp_path / name.format("test"), RECORDS[5:])
    paths = [f"{tmp_path}/{split}" for split in ("test", "train", "validation")]
    refused(tmp_path, f"{tmp_path} holds several splits, name one: {' or '.join(paths)}")
    chosen = open_source(tmp_path / "train")
    assert list(pickle.loads(pickle.dumps(chosen))) == list(chosen) == ROWS[:4]
    assert chosen.where(0).startswith(str(tmp_path / name.format("train")))
    (of_config,) = open_sources(DataConfig(train=str(tmp_path), split="test"))
    assert list(of_config) == ROWS[5:]
    refused(tmp_path / "dev", "dev: no such file or directory; .*train")
    assert is_there(tmp_path / "train")
    assert not is_there(tmp_path / "dev")


def test_splits_of_a_tfds_directory_are_not_merged(tmp_path) -> None:
    path = write_tfds(tmp_path / "prepared", RECORDS)
    write_tf_examples(path / "reasoning_retrieval-test.array_record-00000-of-00001", RECORDS[:1])
    refused(path, f"several splits, name one: {path}/test or {path}/train")
    assert list(open_source(path / "train")) == ROWS


def test_by_products_of_datasets_do_not_train(tmp_path) -> None:
    write_arrow(tmp_path / "cache-0123456789abcdef.arrow", RECORDS[3:])
    refused(tmp_path, "holds no rows of a known kind")
    write_arrow(tmp_path / "my_set-train.arrow", RECORDS[:3])
    assert list(open_source(tmp_path)) == ROWS[:3]


def test_files_of_no_known_split_beside_one_are_refused(tmp_path) -> None:
    write_parquet(tmp_path / "train.parquet", RECORDS[:3])
    write_parquet(tmp_path / "more.parquet", RECORDS[3:])
    refused(tmp_path, rf"name one: {tmp_path}/train \(of more\.parquet the name tells none\)")


def test_files_of_several_kinds_are_refused(tmp_path) -> None:
    write_parquet(tmp_path / "a.parquet", RECORDS[:3])
    write_arrow(tmp_path / "a.arrow", RECORDS[3:])
    refused(tmp_path, r"holds \*\.arrow and \*\.parquet: name one file")


def test_a_missing_shard_is_named(tmp_path) -> None:
    write_parquet(tmp_path / "train-00001-of-00003.parquet", RECORDS)
    write_parquet(tmp_path / "train-00002-of-00003.parquet", RECORDS)
    refused(tmp_path, r"train-00000-of-00003\.parquet is missing")


def test_a_split_belongs_to_one_source() -> None:
    with pytest.raises(ConfigError, match=r"data\.split goes with data\.train"):
        DataConfig(mixture=(MixtureSource("a"),), split="train")


# --- what is refused -------------------------------------------------------------------------


def refused(path: Path, match: str, content: bytes | None = None) -> None:
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=match):
        open_source(path)


def test_nothing_there_is_named(tmp_path) -> None:
    refused(tmp_path / "absent.jsonl", r"absent\.jsonl: no such file or directory")


def test_an_unknown_suffix_says_what_is_wanted(tmp_path) -> None:
    refused(tmp_path / "t.csv", r"t\.csv: unknown suffix; a \.jsonl, \.jsonl\.gz", b"x")


def test_an_unknown_directory_is_refused(tmp_path) -> None:
    write_jsonl(tmp_path / "t.jsonl", RECORDS)
    refused(tmp_path, "holds no rows of a known kind")


def test_a_directory_above_a_prepared_one_points_to_it(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    write_tfds(tmp_path / "a" / "1.0.0", RECORDS)
    refused(tmp_path, rf"Was {tmp_path}/a/1\.0\.0 meant\?")


def test_several_splits_are_named(tmp_path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    refused(tmp_path, rf"several splits, name one: {tmp_path}/train or {tmp_path}/test")


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_an_empty_file_is_refused(tmp_path, name) -> None:
    refused(tmp_path / name, "holds no rows", gzip.compress(b"\n") if "gz" in name else b"")


def test_a_line_that_is_no_json_is_named(tmp_path) -> None:
    content = json.dumps(RECORDS[0]).encode() + b"\n{'query'}\n"
    refused(tmp_path / "t.jsonl", r"t\.jsonl:2: not valid JSON", content)


def test_a_line_that_is_not_utf_8_is_named(tmp_path) -> None:
    content = json.dumps(RECORDS[0], ensure_ascii=False).encode("latin-1")
    refused(tmp_path / "t.jsonl", r"t\.jsonl:1: not UTF-8", content)


@pytest.mark.parametrize(
    "content", [b'{"n": ' + b"1" * 5000 + b"}", b"[" * 100_000], ids=["digits", "nesting"]
)
def test_a_line_that_python_cannot_hold_is_named(tmp_path, content) -> None:
    refused(tmp_path / "t.jsonl", r"t\.jsonl:1: not valid JSON", content)


def test_half_a_gzip_file_is_refused(tmp_path) -> None:
    whole = gzip.compress(json.dumps(RECORDS[0]).encode() * 50)
    refused(tmp_path / "t.jsonl.gz", "not a whole gzip file", whole[:40])
    refused(tmp_path / "u.jsonl.gz", "not a whole gzip file", b"plain text")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("t.parquet", "not a Parquet file"),
        ("t.arrow", "not an Arrow file"),
        ("t.array_record", "not an ArrayRecord file"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, name, match) -> None:
    refused(tmp_path / name, match, b"something else, and long enough to hold a footer" * 9)


def overwrite(path: Path, start: int, length: int) -> None:
    content = bytearray(path.read_bytes())
    content[start : start + length] = b"\xff" * length
    path.write_bytes(content)


def test_a_damaged_footer_of_parquet_is_named(tmp_path) -> None:
    path = write_parquet(tmp_path / "t.parquet", RECORDS)
    size = path.stat().st_size
    footer = int.from_bytes(path.read_bytes()[-8:-4], "little")
    overwrite(path, size - 8 - footer + 2, 28)
    refused(path, r"t\.parquet: not a Parquet file, or a damaged one: (.|\n)*fetch it again")


def test_damaged_values_of_arrow_are_named_by_their_row(tmp_path) -> None:
    path = write_arrow(tmp_path / "t.arrow", RECORDS)
    overwrite(path, path.read_bytes().index("Frage ü 0".encode()), 5)
    refused(path, r"t\.arrow: row 1: its values are damaged: .*fetch it again")


@pytest.mark.parametrize("content", [b"", b'{"splits": ["tr', b"[]", b"{}", b"\xff"])
def test_a_damaged_description_is_named(tmp_path, content) -> None:
    for name in ("dataset_dict.json", "state.json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(content)
        refused(tmp_path / name, rf"{name} is damaged: .*; save the dataset again")


@pytest.mark.parametrize("content", [b"", b'{"facts": ', b"[]"])
def test_a_damaged_description_of_a_preparation_is_named(tmp_path, content) -> None:
    path = write_tfds(tmp_path / "prepared", RECORDS)
    (path / "prepare.json").write_bytes(content)
    refused(path, r"prepare\.json is damaged: .*; delete it, or prepare the rows again")


def test_the_longest_instructions_are_those_of_the_most_bytes() -> None:
    assert longest_instructions(["find it", "查找段落", "find"]) == ("查找段落", "find it", "find")


def test_records_of_another_kind_are_refused(tmp_path) -> None:
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(tmp_path / "t.array_record"), "group_size:1")
    writer.write(b"\xff\xfe\xfd")
    writer.close()
    refused(tmp_path / "t.array_record", r"t\.array_record: row 1: neither a JSON object nor")


def test_a_missing_file_of_save_to_disk_is_named(tmp_path) -> None:
    path = write_save_to_disk(tmp_path / "saved", RECORDS)
    (path / "data-00001-of-00002.arrow").unlink()
    refused(path, r"data-00001-of-00002\.arrow is missing, and .*state\.json names it")


def test_a_missing_shard_of_tfds_is_named(tmp_path) -> None:
    path = write_tfds(tmp_path / "prepared", RECORDS)
    next(path.glob("*00001-of*")).unlink()
    refused(path, r"array_record-00001-of-00002 is missing")


def test_a_preparation_that_was_not_finished_is_refused(tmp_path) -> None:
    path = write_tfds(tmp_path / "prepared", RECORDS)
    (path / "dataset_info.json").unlink()
    refused(path, "its preparation was not finished")
    (path / "features.json").unlink()
    (path / "prepare.json").write_text("{}")
    refused(path, "its preparation was not finished")


def test_a_directory_of_tfds_imports_nothing_that_it_names(tmp_path, monkeypatch) -> None:
    path = write_tfds(tmp_path / "prepared", RECORDS)
    (tmp_path / "imported_by_name.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    features = json.loads((path / "features.json").read_text())
    for place in (features, features["featuresDict"]["features"]["query"]):
        place["pythonClassName"] = "imported_by_name.Text"
    (path / "features.json").write_text(json.dumps(features))
    info = json.loads((path / "dataset_info.json").read_text())
    info["moduleName"] = "imported_by_name"
    (path / "dataset_info.json").write_text(json.dumps(info))
    assert list(open_source(path)) == ROWS


def test_a_damaged_record_is_named(tmp_path) -> None:
    path = write_json_records(tmp_path / "t.array_record", RECORDS * 300)
    overwrite(path, 20_000, 8)
    refused(path, r"t\.array_record: row \d+: the file is damaged: .*fetch it again")


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch, name) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ImportError, match=r"pip install 'laser-jax\[parquet\]'"):
        open_source(tmp_path / name)
