"""Preparation: what is written, counted and refused, and that it goes on after a kill."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from laser_jax.config import ConfigError, PromptConfig
from laser_jax.data.schema import DataError
from laser_jax.data.sources import open_source
from laser_jax.data.tokenization import PromptTokenizer, load_tokenizer, train_tokenizer
from laser_jax.files.claim import OutputError
from laser_jax.prepare.run import PrepareConfig, format_report, main, prepare

PROMPT = PromptConfig(query_max_length=40, document_max_length=30, explicit_max_length=64)


def record(n: int, **changes: Any) -> dict[str, Any]:
    return {
        "query": f"query {n} " + "word " * (n % 5),
        "reasoning_query": f"step {n}.\n\n" * (n % 4) + "end",
        "prompt": "find it",
        "positive_passages": [f"positive {n} {p}" for p in range(1 + n % 2)],
        "negative_passages": [f"negative {n} " * (1 + n % 6), f"other {n}"],
        **changes,
    }


def write_rows(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*")}


def with_prompt(path: Path, prompt: PromptConfig) -> Path:
    """The config of a training run, in JSON, which is YAML."""
    path.write_text(json.dumps({"model": {"path": "x"}, "prompt": asdict(prompt)}))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["query positive negative step word find it"] * 9, 300).save_pretrained(path)
    return path


@pytest.fixture
def config(tmp_path, caplog) -> PrepareConfig:
    caplog.set_level(logging.INFO, "laser_jax")
    rows = write_rows(tmp_path / "rows.jsonl", [record(n) for n in range(20)])
    return PrepareConfig(input=str(rows), output=str(tmp_path / "out"), shards=3)


@pytest.fixture
def with_tokens(config, tokenizer, tmp_path) -> PrepareConfig:
    train = with_prompt(tmp_path / "train.yaml", PROMPT)
    return replace(config, tokenizer=str(tokenizer), train_config=str(train))


# --- what is written -------------------------------------------------------------------------


def test_the_rows_come_back_in_order_from_shards_that_tfds_reads(config) -> None:
    report = prepare(config)
    assert list(open_source(config.output)) == list(open_source(config.input))
    theirs: Any = tfds.builder_from_directory(config.output).as_data_source("train")
    assert len(theirs) == report["written"] == 20
    shards = sorted(path.name for path in Path(config.output).glob("*.array_record*"))
    assert shards == [f"reasoning_retrieval-train.array_record-0000{i}-of-00003" for i in range(3)]
    assert open_source(config.output).where(7) == f"{config.output}: row 8 (rows.jsonl:8)"
    assert not [path for path in Path(config.output).iterdir() if path.is_dir()]


def test_the_facts_are_those_of_the_source(config) -> None:
    rows = [record(n, negative_passages=[] if n == 11 else ["n"]) for n in range(20)]
    write_rows(Path(config.input), rows)
    prepare(config)
    assert open_source(config.output).facts == open_source(config.input).facts
    assert open_source(config.output).facts.row_without_negatives == 11


def test_prepared_rows_are_told_apart_by_content_not_by_shards(config, tmp_path) -> None:
    prepare(config)
    again = replace(config, output=str(tmp_path / "again"), shards=1)
    prepare(again)
    found = open_source(config.output)
    assert found.facts.fingerprint == open_source(again.output).facts.fingerprint
    write_rows(Path(config.input), [record(n + 1) for n in range(20)])
    other = replace(config, output=str(tmp_path / "other"))
    prepare(other)
    assert open_source(other.output).facts.fingerprint != found.facts.fingerprint


def test_another_run_writes_the_same_bytes(with_tokens, tmp_path) -> None:
    first = prepare(with_tokens)
    assert prepare(replace(with_tokens, output=str(tmp_path / "again"))) == first
    assert files(tmp_path / "again") == files(Path(with_tokens.output))


def test_any_source_can_be_prepared(config, tmp_path) -> None:
    prepare(config)
    again = replace(config, input=config.output, output=str(tmp_path / "again"), shards=1)
    prepare(again)
    assert list(open_source(again.output)) == list(open_source(config.input))


# --- the report ------------------------------------------------------------------------------


def test_token_lengths_and_truncation_are_those_of_the_prompts(with_tokens, tokenizer) -> None:
    report = prepare(with_tokens)
    assert report == json.loads((Path(with_tokens.output) / "report.json").read_text())
    prompts = PromptTokenizer(load_tokenizer(tokenizer), PROMPT)
    rows = list(open_source(with_tokens.input))
    queries = [prompts.query_prompt(row.query, row.prompt) for row in rows]
    passages = [
        prompts.document_prompt(text)
        for row in rows
        for text in (*row.positive_passages, *row.negative_passages)
    ]
    explicit = [
        prompts.explicit(
            row.query,
            row.prompt,
            row.reasoning_query if len(row.reasoning_query) >= 5 else row.query,
        )
        for row in rows
    ]
    for what, tokens in (
        ("queries", queries),
        ("passages", passages),
        ("explicit inputs", explicit),
    ):
        lengths = [len(t.ids) for t in tokens]
        expected = {
            f"p{p}": int(np.percentile(lengths, p, method="inverted_cdf")) for p in (50, 90, 99)
        }
        assert report["tokens"][what] == {**expected, "max": max(lengths)}
        share = np.mean([t.truncated for t in tokens])
        assert report["truncated"][what] == pytest.approx(share, abs=1e-6)
    assert 0 < report["truncated"]["passages"] < 1
    assert report["segments_per_reasoning"]["max"] == max(len(t.segment_ends) for t in explicit)


def test_duplicates_are_counted(config) -> None:
    rows = [
        *(record(n) for n in range(4)),
        record(0),  # a whole row
        record(1, query="QUERY  1 word"),  # a query, but for case and blanks
        record(9, positive_passages=["Same", "x"], negative_passages=["same ", "y"]),
    ]
    write_rows(Path(config.input), rows)
    assert prepare(config)["duplicates"] == {
        "queries": 2,
        "rows": 1,
        "positives_among_own_negatives": 1,
    }


def test_without_a_tokenizer_segments_are_counted_and_tokens_are_not(config) -> None:
    report = prepare(config)
    assert report["tokens"] == {}
    assert report["segments_per_reasoning"] == {"p50": 2, "p90": 4, "p99": 4, "max": 4}
    assert "tokens are not counted without --tokenizer" in format_report(report)


def test_rejected_rows_are_named_and_the_rest_is_written(with_tokens) -> None:
    rows = [record(n) for n in range(20)]
    rows[3] = record(3, query=" ")
    rows[8] = record(8, negative_passages=["n", 1])
    rows[9] = record(9, negative_passages=["n", "n", 1])
    rows[15] = record(15, prompt="a long instruction " * 20)  # no room for the query
    write_rows(Path(with_tokens.input), rows)
    report = prepare(replace(with_tokens, on_bad_row="reject"))
    assert (report["rows"], report["written"], report["rejected"]["rows"]) == (20, 16, 4)
    first = report["rejected"]["first"]
    assert first[0] == f"{with_tokens.input}:4: 'query' is empty"
    assert f"{with_tokens.input}:16: prompt.query_max_length leaves" in first[3]
    assert list(report["rejected"]["reasons"].values()) == [2, 1, 1]
    kept = open_source(with_tokens.output)
    assert [row.query.split()[1] for row in kept] == [
        str(n) for n in range(20) if n not in (3, 8, 9, 15)
    ]
    assert kept.where(3) == f"{with_tokens.output}: row 4 (rows.jsonl:5)"
    text = format_report(report)
    assert "20 rows, 16 written in 3 shard(s), 4 rejected" in text
    assert "2 x 'negative_passages' must be a list of strings, got a list whose item N" in text


# --- again and on ----------------------------------------------------------------------------


def test_a_second_run_does_nothing_and_says_so(config, caplog) -> None:
    first = prepare(config)
    before = {path: path.stat().st_mtime_ns for path in Path(config.output).iterdir()}
    assert prepare(config) == first
    assert "is prepared already: nothing to do" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in Path(config.output).iterdir()} == before


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"shards": 2}, "shards was 3, is 2"),
        ({"on_bad_row": "reject"}, "on_bad_row was 'stop', is 'reject'"),
        (
            {"train_config": "other.yaml"},
            r"counted_with\.prompt\.document_max_length was 30",
        ),
    ],
)
def test_other_settings_in_the_same_directory_are_refused(
    with_tokens, tmp_path, monkeypatch, change, differs
) -> None:
    monkeypatch.chdir(tmp_path)
    with_prompt(tmp_path / "other.yaml", replace(PROMPT, document_max_length=29))
    prepare(with_tokens)
    before = files(Path(with_tokens.output))
    with pytest.raises(OutputError, match=rf"another config:\n  {differs}"):
        prepare(replace(with_tokens, **change))
    assert files(Path(with_tokens.output)) == before


def test_a_changed_input_in_the_same_directory_is_refused(config) -> None:
    prepare(config)
    with Path(config.input).open("a") as file:
        file.write(json.dumps(record(20)) + "\n")
    with pytest.raises(OutputError, match=r"another config:\n  input was '.*', is '.*'\nChoose"):
        prepare(config)


def test_a_directory_with_other_files_is_refused(config) -> None:
    Path(config.output).mkdir()
    (Path(config.output) / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"holds 'thesis\.tex' and no whole prepare\.json"):
        prepare(config)


def spoil(output: Path, how: str) -> None:
    first, second = sorted(output.glob("*.array_record-*"))[:2]
    if how == "lost":
        second.unlink()
    elif how == "cut short":
        second.write_bytes(second.read_bytes()[:-100])
    elif how == "swapped":
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    elif how == "description":
        (output / "dataset_info.json").unlink()
    elif how == "report":
        (output / "report.json").write_text('{"rows":')


@pytest.mark.parametrize("how", ["lost", "cut short", "swapped", "description", "report"])
def test_what_is_lost_or_damaged_is_written_again(config, how) -> None:
    prepare(config)
    before = files(Path(config.output))
    spoil(Path(config.output), how)
    prepare(config)
    assert files(Path(config.output)) == before


def test_swapped_shards_are_no_rows_to_train_on(config) -> None:
    prepare(config)
    spoil(Path(config.output), "swapped")
    with pytest.raises(DataError, match=r"00000-of-00003 is not as it was prepared: .*writes it"):
        open_source(config.output)


@pytest.mark.parametrize("left", [".lock", ".prepare.json.0.part", ".work/"])
def test_a_run_that_was_killed_before_its_first_file_goes_on(config, left) -> None:
    output = Path(config.output)
    output.mkdir()
    (output / left).mkdir() if left.endswith("/") else (output / left).touch()
    assert prepare(config)["written"] == 20
    assert not list(output.glob(".*"))


def test_damaged_statistics_of_a_stopped_run_is_made_again(config, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("laser_jax.prepare.run.write_description", lambda *_: 1 / 0)  # stopped there
        with pytest.raises(ZeroDivisionError):
            prepare(config)
    (Path(config.output) / ".work" / "00001.json").write_bytes(b"{\0")
    assert prepare(config)["written"] == 20
    assert len(open_source(config.output)) == 20


def test_a_second_preparation_at_once_is_refused(config) -> None:
    Path(config.output).mkdir()
    with (Path(config.output) / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match=r"^error: .*out is being written by another process"):
            main([f"--input={config.input}", f"--output={config.output}"])
    assert prepare(config)["written"] == 20


def test_a_full_disk_ends_with_one_line_and_the_run_goes_on(config, monkeypatch) -> None:
    records = [record(n, prompt=os.urandom(40_000).hex()) for n in range(9)]
    write_rows(Path(config.input), records)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    try:
        with pytest.raises(SystemExit, match=r"^error: .*cannot be written: .*File too large"):
            main([f"--input={config.input}", f"--output={config.output}", "--shards=3"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(Path(config.output).glob("*array_record*"))
    assert not list(Path(config.output).glob(".*.part"))
    assert prepare(config)["written"] == 9


def test_prepared_rows_are_the_rows_they_were_made_from(config, tmp_path) -> None:
    prepare(config)
    assert (
        open_source(config.output).facts.fingerprint == open_source(config.input).facts.fingerprint
    )
    good = write_rows(tmp_path / "good.jsonl", [record(n) for n in range(4)])
    write_rows(Path(config.input), [record(0), {}, *(record(n) for n in range(1, 4))])
    rest = replace(config, output=str(tmp_path / "rest"), on_bad_row="reject")
    prepare(rest)
    assert open_source(rest.output).facts.fingerprint == open_source(good).facts.fingerprint


def test_one_split_is_prepared(config, tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "hub").mkdir()
    for n, split in enumerate(("train", "test")):
        table = pyarrow.Table.from_pylist([record(n)])
        parquet.write_table(table, tmp_path / "hub" / f"{split}-00000-of-00001.parquet")
    with pytest.raises(DataError, match="holds several splits"):
        prepare(replace(config, input=str(tmp_path / "hub"), shards=1))
    prepare(replace(config, input=str(tmp_path / "hub" / "test"), shards=1))
    assert [row.query for row in open_source(config.output)] == [record(1)["query"]]


def test_a_killed_run_goes_on_and_keeps_what_is_finished(with_tokens, tmp_path, caplog) -> None:
    write_rows(Path(with_tokens.input), [record(n) for n in range(1200)])
    config = replace(with_tokens, shards=24)
    out = Path(config.output)
    yaml = tmp_path / "prepare.json"  # JSON is YAML
    yaml.write_text(json.dumps(asdict(config)))
    running = subprocess.Popen(
        [sys.executable, "-m", "laser_jax.prepare", "--config", str(yaml)],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "JAX_PLATFORMS": "cpu",
            "HOME": str(tmp_path),
        },
        stdout=subprocess.DEVNULL,
    )
    while not (shards := list(out.glob("reasoning*"))):
        assert running.poll() is None
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.wait()
    shards = list(out.glob("reasoning*"))
    assert 0 < len(shards) < 24
    with pytest.raises(DataError, match="preparation was not finished"):
        open_source(out)
    written = {path: path.stat().st_mtime_ns for path in shards}

    report = prepare(config)
    assert f"{len(shards)} of 24 shards are there already" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in shards} == written
    whole = replace(config, output=str(tmp_path / "whole"))
    assert prepare(whole) == report
    assert files(out) == files(tmp_path / "whole")


# --- what is refused -------------------------------------------------------------------------


def test_a_bad_row_stops_before_anything_is_written(config) -> None:
    write_rows(Path(config.input), [record(0), record(1, positive_passages=["  "]), record(2)])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: item 0 of 'positive_passages' is empty"):
        prepare(config)
    assert not Path(config.output).exists()


def test_an_instruction_without_room_stops_before_anything_is_written(with_tokens) -> None:
    write_rows(Path(with_tokens.input), [record(n, prompt="very " * 60) for n in range(5)])
    with pytest.raises(ValueError, match=r"prompt\.query_max_length leaves"):
        prepare(with_tokens)
    assert not Path(with_tokens.output).exists()


def test_nothing_but_bad_rows_is_refused(config) -> None:
    write_rows(Path(config.input), [{}] * 5)
    with pytest.raises(DataError, match=r"every row was rejected, such as .*'query' is missing"):
        prepare(replace(config, on_bad_row="reject"))
    assert not Path(config.output).exists()
    Path(config.output).mkdir()
    with pytest.raises(DataError, match="every row was rejected"):
        prepare(replace(config, on_bad_row="reject"))
    assert files(Path(config.output)) == {}
    write_rows(Path(config.input), [record(n) for n in range(5)])
    assert prepare(replace(config, on_bad_row="reject"))["written"] == 5


def test_impossible_settings_are_refused(config) -> None:
    with pytest.raises(ConfigError, match="shards must be at least 1"):
        replace(config, shards=0)
    with pytest.raises(ConfigError, match="21 shards are too many for 20 rows"):
        prepare(replace(config, shards=21))


# --- the command line ------------------------------------------------------------------------


def test_the_prompt_of_a_training_config_is_taken(config, tokenizer, tmp_path, capsys) -> None:
    train = tmp_path / "train.yaml"
    train.write_text("model: {path: x}\nprompt.query_max_length: 40\nprompt: {separator: ';'}\n")
    flags = [f"--input={config.input}", f"--output={config.output}", f"--tokenizer={tokenizer}"]
    main([*flags, f"--train_config={train}"])
    out = capsys.readouterr().out
    assert "20 rows, 20 written in 1 shard(s), 0 rejected" in out
    assert f"data.train: {config.output}" in out
    made = json.loads((Path(config.output) / "prepare.json").read_text())
    assert made["counted_with"]["prompt"]["query_max_length"] == 40
    assert made["separator"] == ";"


def test_a_wrong_key_of_a_training_config_is_named(config, tmp_path) -> None:
    train = tmp_path / "train.yaml"
    train.write_text("prompt: {query_length: 40}\n")
    with pytest.raises(SystemExit, match=r"train\.yaml: unknown key prompt\.query_length"):
        main([f"--input={config.input}", f"--output={config.output}", f"--train_config={train}"])


@pytest.mark.parametrize("section", ["", " 3", " [a]"])
def test_a_training_config_whose_prompt_is_no_section_is_named(config, tmp_path, section) -> None:
    train = tmp_path / "train.yaml"
    train.write_text(f"prompt:{section}\n")
    with pytest.raises(SystemExit, match=r"train\.yaml: prompt must be keys and values, got"):
        main([f"--input={config.input}", f"--output={config.output}", f"--train_config={train}"])


def test_bad_input_ends_with_one_line(config) -> None:
    with pytest.raises(SystemExit, match=r"^error: .*absent\.jsonl: no such file"):
        main(["--input=absent.jsonl", f"--output={config.output}"])
