"""The corpus encoder: what it writes, and that nothing that happens to it changes a byte."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from laser_jax.config import (
    LoraConfig,
    PromptConfig,
    RetrieverConfig,
    ScratchConfig,
    load_retriever_config,
    save_retriever_config,
)
from laser_jax.data.tokenization import PromptTokenizer, load_tokenizer, train_tokenizer
from laser_jax.encode_corpus.directory import CorpusDirectory
from laser_jax.encode_corpus.encoding import CorpusConfig, ShardEncoder, weights_hash
from laser_jax.encode_corpus.on_ray import Worker
from laser_jax.encode_corpus.plan import read_plan
from laser_jax.encode_corpus.run import main
from laser_jax.encoder import load_pretrained
from laser_jax.files import durable as files
from laser_jax.files.durable import Digest
from laser_jax.files.reading import DataError
from laser_jax.hf.directory import read_backbone_config
from laser_jax.hf.reading import Stored, load_params
from laser_jax.hf.writing import save_adapter, save_params
from laser_jax.inference.retriever import LatentRetriever
from laser_jax.modeling.backbone import Backbone
from laser_jax.search import vectors
from laser_jax.search.codes import decode_vectors
from laser_jax.search.vectors import (
    read_ids,
    read_manifest,
    read_shards,
    shard_name,
    verify,
)

pytest.importorskip("pyarrow")
import pyarrow as pa
import pyarrow.parquet as pq

SCRATCH = ScratchConfig(
    hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=16
)
PROMPT = PromptConfig(chat_template=False, query_max_length=64, document_max_length=32)
TOWNS = ["Ulm", "Kiel", "Jena", "Bonn", "Hof", "Trier", "Worms", "Essen", "Halle", "Köln"]
ROWS = [
    {"_id": f"d{n}", "title": town, "text": "lies in a valley. " * (n % 4 + 1)}
    for n, town in enumerate(TOWNS)
]
TEXTS = [f"{row['title']} {row['text']}" for row in ROWS]
SMALL: dict[str, Any] = {"shard_documents": 4, "batch_size": 2, "devices": 1}


def write_model(directory: Path, seed: int) -> Path:
    """A directory as the trainer exports it."""
    directory.mkdir()
    tokenizer = train_tokenizer([*TEXTS, "Instruct: Query:"], 300)
    backbone = SCRATCH.backbone(len(tokenizer))
    drawn = jax.jit(Backbone(backbone).init)(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))
    save_params(directory, nn.meta.unbox(drawn), backbone, dtype=np.float32, lora=None)
    tokenizer.save_pretrained(directory)
    config = RetrieverConfig(backbone, num_thinking_steps=2, prompt=PROMPT)
    save_retriever_config(config, directory)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "model", 0)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "corpus.jsonl", ROWS)


def command(model: Path, corpus: Path, output: Path, **more: Any) -> list[str]:
    values = {"model": model, "input": corpus, "output": output, **SMALL, **more}
    return [f"--{key}={value}" for key, value in values.items()]


def encode(model: Path, corpus: Path, output: Path, **more: Any) -> Path:
    main(command(model, corpus, output, **more))
    return output


def config_of(model: Path, corpus: Path, output: Path) -> CorpusConfig:
    return CorpusConfig(model=str(model), input=str(corpus), output=str(output), **SMALL)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file and folder."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b"folder"
        for path in directory.rglob("*")
    }


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run in this process writes."""
    folder = tmp_path_factory.mktemp("finished")
    return encode(model, write_rows(folder / "corpus.jsonl", ROWS), folder / "out")


def vectors_of(directory: Path) -> np.ndarray:
    manifest = read_manifest(directory)
    rows = np.concatenate([rows for _, rows in read_shards(directory, manifest)])
    return decode_vectors(rows, manifest.info.dtype)


# --- what is written ---------------------------------------------------------------------------


def test_the_vectors_are_those_of_the_retriever(model: Path, finished: Path) -> None:
    manifest = read_manifest(finished)
    assert read_ids(finished, manifest) == [row["_id"] for row in ROWS]
    assert [shard.count for shard in manifest.shards] == [4, 4, 2]
    wanted = LatentRetriever.from_pretrained(model, batch_size=2).encode_document(TEXTS)
    np.testing.assert_allclose(vectors_of(finished), wanted, atol=1e-5)
    assert verify(finished) == []
    assert sorted(contents(finished)) == [
        "manifest.json",
        "plan.json",
        *(shard_name(n) for n in range(3)),
    ]


def test_array_tasks_in_any_order_write_what_one_process_writes(
    model: Path,
    corpus: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, parts = encode(model, corpus, tmp_path / "whole", store_dtype="int8"), tmp_path / "parts"
    for task in (2, 0):
        encode(model, corpus, parts, store_dtype="int8", shard=f"{task}/3")
    assert "1 shards of 3 are still to come" in capsys.readouterr().out
    assert not (parts / "manifest.json").exists()
    encode(model, corpus, parts, store_dtype="int8", shard="1/3")
    encode(model, corpus, parts, store_dtype="int8", shard="9/50")  # has nothing to do
    assert contents(parts) == contents(whole)
    assert (vectors_of(whole) * vectors_of(finished)).sum(axis=1).min() > 0.999


def test_the_form_of_the_input_does_not_matter(model: Path, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for n, rows in enumerate((ROWS[:5], ROWS[5:6], ROWS[6:])):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{n}.parquet", row_group_size=2)
    out = encode(model, folder, tmp_path / "out")
    shards = [shard_name(n) for n in range(3)]
    assert [(out / s).read_bytes() for s in shards] == [(finished / s).read_bytes() for s in shards]


def test_the_summary_counts_tokens_and_shortened_texts(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*ROWS[:3], {"_id": "long", "text": "valley " * 99}]
    encode(model, write_rows(tmp_path / "corpus.jsonl", rows), tmp_path / "out")
    prompts = PromptTokenizer(load_tokenizer(model), PROMPT)
    tokens = sum(len(prompts.document(text)) for text in [*TEXTS[:3], rows[3]["text"]])
    out, err = capsys.readouterr()
    assert re.search(r"shard-00000\.parquet: 4 documents in .* docs/s, .* tokens/s, ETA 00:00", err)
    assert f"4 documents, {tokens / 4:.1f} tokens each, 1 shortened (25.00%)" in out
    (shard,) = read_manifest(tmp_path / "out").shards
    assert (shard.tokens, shard.truncated) == (tokens, 1)


def test_queries_are_encoded_for_the_search(model: Path, finished: Path, tmp_path: Path) -> None:
    from laser_jax.search.run import main as search
    from laser_jax.search.trec import read_trec_run

    rows = [{"_id": f"q{n}", "text": text, "instruction": "Find"} for n, text in enumerate(TEXTS)]
    queries = write_rows(tmp_path / "queries.jsonl", rows)
    out = encode(model, queries, tmp_path / "out", texts="queries")
    vectors = ["--corpus_vectors", str(finished), "--query_vectors", str(out)]
    search([*vectors, "--output", str(tmp_path / "run.trec")])
    retriever = LatentRetriever.from_pretrained(model, batch_size=2)
    wanted = retriever.encode_query(TEXTS, instruction="Find")
    np.testing.assert_allclose(vectors_of(out), wanted, atol=1e-5)
    scores = wanted @ vectors_of(finished).T
    for n, ranking in enumerate(read_trec_run(tmp_path / "run.trec").values()):
        assert list(ranking.values()) == pytest.approx(sorted(scores[n], reverse=True), abs=1e-5)


def test_a_query_without_instruction_is_named(model: Path, tmp_path: Path) -> None:
    queries = write_rows(tmp_path / "queries.jsonl", [{"_id": "q0", "text": "Ulm?"}])
    with pytest.raises(SystemExit, match=r"queries\.jsonl:1: query 'q0' has no instruction"):
        encode(model, queries, tmp_path / "out", texts="queries")
    assert not (tmp_path / "out").exists()
    encode(model, queries, tmp_path / "out", texts="queries", instruction="")


def test_memory_does_not_grow_with_the_corpus(model: Path, tmp_path: Path) -> None:
    def peak(shards: int) -> int:
        """Bytes at most, while `shards` shards of 4 x 28,000 characters are encoded."""
        rows = [{"_id": f"d{n}", "text": "valley " * 4000} for n in range(4 * shards)]
        path = write_rows(tmp_path / f"{shards}.jsonl", rows)
        arguments = config_of(model, path, tmp_path / f"out{shards}")
        main(command(model, path, tmp_path / f"out{shards}", shard="none"))
        directory = CorpusDirectory(arguments.output)
        with ShardEncoder(arguments, read_plan(directory.path), directory) as encoder:
            encoder.encode(0)  # compiles
            tracemalloc.start()
            for number in range(shards):
                encoder.encode(number)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    few, many = peak(2), peak(8)
    assert few > 4 * 28_000  # the texts of a shard are counted
    assert many < few + 50_000, (few, many)


# --- what must not be mixed --------------------------------------------------------------------


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A finished directory to be hurt."""
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_thinking_steps": 3}, r"info\.num_thinking_steps was 2, is 3"),
        ({"store_dtype": "float16"}, r"info\.dtype was 'float32', is 'float16'"),
        ({"compute_dtype": "bfloat16"}, r"info\.model_hash was '.*', is "),
        ({"shard_documents": 5}, "shard_documents was 4, is 5"),
        ({"batch_size": 3}, "batch_size was 2, is 3"),
        ({"fields": "[_id, text, name]"}, r"fields\.title was 'title', is 'name'"),
    ],
)
def test_a_directory_made_in_another_way_is_refused(
    model: Path, corpus: Path, copy: Path, more: dict[str, Any], message: str
) -> None:
    before = contents(copy)
    with pytest.raises(SystemExit, match=f"(?s)another config:\n  {message}.*another --output"):
        encode(model, corpus, copy, **more)
    assert contents(copy) == before


def test_documents_are_encoded_at_the_models_own_k_of_them(
    model: Path, corpus: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(model, tmp_path / "own")
    config = replace(load_retriever_config(model), document_thinking_steps=1)
    save_retriever_config(config, own)
    made, asked = encode(own, corpus, tmp_path / "made"), tmp_path / "asked"
    assert read_manifest(made).info.num_thinking_steps == 1
    encode(model, corpus, asked, num_thinking_steps=1)
    assert {k: v for k, v in contents(made).items() if k.startswith("shard")} == {
        k: v for k, v in contents(asked).items() if k.startswith("shard")
    }
    with pytest.raises(SystemExit, match=r"info\.num_thinking_steps was 1, is 3"):
        encode(own, corpus, made, num_thinking_steps=3)
    rows = [{"_id": "q", "text": "Where is Ulm?"}]
    queries = write_rows(tmp_path / "queries.jsonl", rows)
    options = {"texts": "queries", "instruction": "Find"}
    found = encode(own, queries, tmp_path / "queries", **options)
    assert read_manifest(found).info.num_thinking_steps == 2


def test_another_model_or_template_is_refused(
    model: Path, corpus: Path, copy: Path, tmp_path: Path
) -> None:
    other = write_model(tmp_path / "other", 1)
    with pytest.raises(SystemExit, match=r"\n  info\.model_hash was '.*', is '.*'\nChoose"):
        encode(other, corpus, copy)
    changed = shutil.copytree(model, tmp_path / "changed")
    config = json.loads((changed / "laser_config.json").read_text())
    config["prompt"]["document_template"] = "passage: {document}"
    (changed / "laser_config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=r"\n  info\.prompt_hash was '.*', is '.*'\nChoose"):
        encode(changed, corpus, copy)


@pytest.mark.parametrize("done", [True, False])
def test_another_corpus_is_noticed(
    model: Path, corpus: Path, copy: Path, tmp_path: Path, done: bool
) -> None:
    output = copy
    if not done:
        output = tmp_path / "out"
        encode(model, corpus, output, shard="0/3")
    before = contents(output)
    for rows, what in (
        ([*ROWS[:6], ROWS[6] | {"text": "x" + str(ROWS[6]["text"])[1:]}, *ROWS[7:]], "shard 1"),
        ([*ROWS[:8], ROWS[9], ROWS[8]], "shard 2"),
        (ROWS[:8], "shard 2"),
        ([*ROWS, {"_id": "new", "text": ""}], "shard 2"),
        ([*ROWS[:7], *ROWS[8:]], "shard 1"),
    ):
        write_rows(corpus, rows)
        with pytest.raises(SystemExit, match=f"not the one that the shards are cut from: {what}"):
            encode(model, corpus, output, shard="0/3")
        assert contents(output) == before
    write_rows(corpus, ROWS)  # as it was, but for the time of its change
    encode(model, corpus, output, shard="0/3")


def test_documents_after_the_last_shard_are_noticed(model: Path, tmp_path: Path) -> None:
    corpus = write_rows(tmp_path / "corpus.jsonl", ROWS[:8])
    output = encode(model, corpus, tmp_path / "out")
    write_rows(corpus, ROWS)
    with pytest.raises(SystemExit, match="what follows the last shard has other documents"):
        encode(model, corpus, output)


def test_a_change_that_keeps_size_and_time_is_noticed_when_its_shard_comes(
    model: Path, corpus: Path, tmp_path: Path
) -> None:
    output = encode(model, corpus, tmp_path / "out", shard="0/3")
    stat = corpus.stat()
    corpus.write_text(corpus.read_text().replace("Hof", "Hog"))
    os.utime(corpus, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(SystemExit, match=r"cut from: shard-00001\.parquet has other documents"):
        encode(model, corpus, output)


@pytest.fixture
def own_model(model: Path, tmp_path: Path) -> Path:
    """A copy of the model, whose weights may be exchanged."""
    return shutil.copytree(model, tmp_path / "own")


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("others") / "model", 1) / "model.safetensors"


def test_a_model_that_was_changed_since_the_plan_is_refused_by_whoever_loads_it(
    own_model: Path, other_weights: Path, corpus: Path, tmp_path: Path
) -> None:
    output = encode(own_model, corpus, tmp_path / "out", shard="none")
    before = contents(output)
    shutil.copy(other_weights, own_model)
    config = config_of(own_model, corpus, output)
    message = r"is not the model that .*out was begun with:\n  model_hash was '.*', is '"
    with pytest.raises(DataError, match=message):
        ShardEncoder(config, read_plan(output), CorpusDirectory(output))
    with pytest.raises(DataError, match=message):
        Worker(config)  # a Ray actor
    assert contents(output) == before


def test_a_model_that_changes_while_it_is_read_is_refused(
    own_model: Path,
    other_weights: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The swap comes after the first tensor, and the old file is back before anybody could compare
    it: only what was read tells."""
    output = encode(own_model, corpus, tmp_path / "out", shard="none")
    weights = own_model / "model.safetensors"
    own, reads, read = weights.read_bytes(), 0, Stored.read

    def swapped(self: Stored, *index: slice) -> np.ndarray:
        nonlocal reads
        reads += 1
        weights.unlink()
        weights.write_bytes(other_weights.read_bytes() if reads == 2 else own)
        return read(self, *index)

    config = config_of(own_model, corpus, output)
    monkeypatch.setattr(Stored, "read", swapped)
    with pytest.raises(DataError, match="is not the model that"):
        ShardEncoder(config, read_plan(output), CorpusDirectory(output))
    assert weights.read_bytes() == own


def test_an_adapter_and_its_settings_are_part_of_the_model(model: Path, tmp_path: Path) -> None:
    backbone = read_backbone_config(model)
    hashes = set()
    for alpha, value in ((4.0, 1.0), (8.0, 1.0), (4.0, 2.0)):
        lora = LoraConfig(rank=1, alpha=alpha, targets=("q_proj",))
        tree = {
            "last_layer": {
                "self_attn": {
                    "q_proj": {
                        "lora_a": np.full((16, 1), value, np.float32),
                        "lora_b": np.ones((1, 16), np.float32),
                    }
                }
            }
        }
        save_adapter(tmp_path / "adapter", tree, lora, backbone, base_model="")
        found, loaded = weights_hash(model, tmp_path / "adapter"), Digest()
        load_pretrained(model, adapter=tmp_path / "adapter", seen=loaded)
        assert loaded.hexdigest() == found
        hashes.add(found)
    assert len(hashes) == 3


# --- damage ------------------------------------------------------------------------------------


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_damaged_and_missing_shards_are_made_again(
    model: Path, corpus: Path, finished: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(copy / shard_name(0))
    (copy / shard_name(2)).unlink()
    with pytest.raises(SystemExit, match=r"error: .*: 2 faults"):
        main(["--verify", str(copy)])
    assert "shard-00000.parquet: damaged: its sha256" in capsys.readouterr().out
    encode(model, corpus, copy)
    err = capsys.readouterr().err
    assert "1 of 3 shards are there already" in err
    assert "shard-00000.parquet is missing or damaged and is encoded again" in err
    assert contents(copy) == contents(finished)
    main(["--verify", str(copy)])


def test_a_shard_that_comes_out_otherwise_gets_its_own_checksum(
    model: Path, corpus: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another kind of device: the manifest must not keep the old one."""
    spoil(copy / shard_name(1))
    whole = LatentRetriever.encode_document

    def rounded(self: LatentRetriever, texts: list[str], **more: Any) -> np.ndarray:
        return np.float32(1 + 2e-7) * whole(self, texts, **more)

    monkeypatch.setattr(LatentRetriever, "encode_document", rounded)
    encode(model, corpus, copy)
    assert verify(copy) == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def emptied(path: Path) -> None:
    path.write_text("{}")


def without_last_shard(path: Path) -> None:
    values = json.loads(path.read_text())
    values["count"] -= values["shards"].pop()["count"]
    path.write_text(json.dumps(values))


DAMAGES = (cut, zeroed, emptied, Path.unlink)


@pytest.fixture
def encodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardEncoder, "__init__", lambda *_: pytest.fail("a shard was made again"))


@pytest.mark.parametrize("damage", [*DAMAGES, without_last_shard])
@pytest.mark.usefixtures("encodes_nothing")
def test_a_lost_manifest_is_made_again_of_the_shards(
    model: Path, corpus: Path, finished: Path, copy: Path, damage: Any
) -> None:
    damage(copy / "manifest.json")
    encode(model, corpus, copy)
    assert contents(copy) == contents(finished)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.usefixtures("encodes_nothing")
def test_lost_records_are_made_again_of_the_shards(
    model: Path, corpus: Path, finished: Path, copy: Path, damage: Any
) -> None:
    """As a run leaves it that was killed before the end."""
    (copy / ".work").mkdir()
    for number, shard in enumerate(read_manifest(copy).shards):
        (copy / ".work" / f"{shard_name(number)}.json").write_text(json.dumps(vars(shard)))
    (copy / ".work" / "corpus.json").write_text("[]")
    (copy / "manifest.json").unlink()
    for file in (copy / ".work").iterdir():
        damage(file)
    encode(model, corpus, copy)
    assert contents(copy) == contents(finished)


def test_a_shard_of_another_corpus_is_not_taken_for_one_that_lost_its_record(
    model: Path, finished: Path, copy: Path, tmp_path: Path
) -> None:
    other = write_rows(tmp_path / "other.jsonl", [*ROWS[:3], ROWS[3] | {"text": "elsewhere"}])
    output = encode(model, other, tmp_path / "out", shard="none")
    shutil.copy(finished / shard_name(0), output)
    directory, plan = CorpusDirectory(output), read_plan(output)
    assert not directory.recover(0, plan)
    copied = CorpusDirectory(copy)
    (copy / "manifest.json").unlink()
    (copy / ".work").mkdir()
    assert copied.recover(0, read_plan(copy))
    content = (copy / shard_name(1)).read_bytes()
    for place in range(0, len(content), 61):
        changed = bytearray(content)
        changed[place] ^= 1
        (copy / shard_name(1)).write_bytes(changed)
        assert not copied.recover(1, read_plan(copy)), place


def test_who_is_overtaken_at_the_very_end_is_finished_too(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finishes the directory while this one writes the manifest, and removes its
    part."""
    manifest, plan = (copy / "manifest.json").read_bytes(), read_plan(copy)
    (copy / "manifest.json").unlink()
    (copy / ".work").mkdir()
    directory = CorpusDirectory(copy)
    for number in range(len(plan.shards)):
        assert directory.recover(number, plan)
    write = vectors.write_atomically

    def overtaken(path: Path, text: str) -> None:
        (copy / "manifest.json").write_bytes(manifest)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "flush", lambda part: part.unlink())
            write(path, text)

    monkeypatch.setattr(vectors, "write_atomically", overtaken)
    assert directory.finish(plan)
    assert verify(copy) == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_lost_plan_is_named_with_the_way_out(
    model: Path, corpus: Path, copy: Path, tmp_path: Path, damage: Any
) -> None:
    damage(copy / "plan.json")
    before = contents(copy)
    with pytest.raises(SystemExit, match=r"plan\.json.*back from a copy"):
        encode(model, corpus, copy)
    assert contents(copy) == before
    alone = encode(model, corpus, tmp_path / "alone", shard="none")
    whole = (alone / "plan.json").read_bytes()
    damage(alone / "plan.json")
    encode(model, corpus, alone, shard="none")
    assert (alone / "plan.json").read_bytes() == whole


def test_an_unfinished_directory_is_checked_as_well(
    model: Path, corpus: Path, finished: Path, tmp_path: Path
) -> None:
    output = encode(model, corpus, tmp_path / "out", shard="0/2")
    spoil(output / shard_name(2))
    with pytest.raises(SystemExit, match="is no finished directory"):
        main(["--verify", str(output)])
    encode(model, corpus, output)
    assert contents(output) == contents(finished)


# --- killed, at once, and without room ---------------------------------------------------------

# Imports once, and forks a process for every entry: it is killed at that point, or runs to its end.
PROCESSES = """
import json, os, resource, signal, sys, time
from pathlib import Path
import laser_jax.encode_corpus.run as program
import laser_jax.encode_corpus.encoding as encoding

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def arm(when, name):
    replace, write_bytes = Path.replace, Path.write_bytes
    def replacing(part, target):
        if when == "before" and target.name == name: die()
        replace(part, target)
        if when == "after" and target.name == name: die()
    def writing(path, content):
        if when == "half" and name in path.name:
            write_bytes(path, content[: len(content) // 2])
            die()
        return write_bytes(path, content)
    Path.replace, Path.write_bytes = replacing, writing
    if when == "batch":
        batches = []
        def third(stats):
            batches.append(1)
            if len(batches) == 3: die()
        def watched(encoder, number, watch=None, encode=encoding.ShardEncoder.encode):
            return encode(encoder, number, third)
        encoding.ShardEncoder.encode = watched
    if when == "slowly":
        Path.replace = lambda part, target: (time.sleep(0.05), replace(part, target))
    if when == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(name), int(name)))

def start(point, arguments):
    if pid := os.fork():
        return pid
    if point:
        arm(*point)
    try:
        program.main(arguments)
        sys.stdout.flush()
        os._exit(0)
    except SystemExit as error:
        print(error, flush=True)
        os._exit(1)

for arguments, points in json.load(sys.stdin):
    running = [start(point, arguments) for point in points]
    print("status", *[os.waitpid(pid, 0)[1] for pid in running], flush=True)
"""

KILLED = [
    ["before", "plan.json"],
    ["after", "plan.json"],
    ["half", "shard-00000.parquet"],
    ["batch", ""],
    ["after", "shard-00001.parquet"],  # its record is still to be written
    ["after", "shard-00001.parquet.json"],
    ["before", "manifest.json"],
    ["after", "manifest.json"],
]
LARGE_IDS = [*ROWS[:4], *({**row, "_id": 20_000 * row["_id"]} for row in ROWS[4:8]), *ROWS[8:]]


@pytest.fixture(scope="module")
def hurt(
    model: Path, tmp_path_factory: pytest.TempPathFactory, one_device: dict[str, str]
) -> tuple[Path, list[str]]:
    """A folder with what processes have written that were hurt, and what they said of it: a
    paragraph for each that ran to its end, or for those that ran at once."""
    folder = tmp_path_factory.mktemp("hurt")
    corpus = write_rows(folder / "corpus.jsonl", ROWS)
    large = write_rows(folder / "large.jsonl", LARGE_IDS)
    killed, both, full = (
        command(model, source, folder / name)
        for source, name in ((corpus, "killed"), (corpus, "both"), (large, "full"))
    )
    groups = [
        *((killed, [point]) for point in KILLED),
        (killed, [None]),
        (both, [["slowly", ""], None]),
        (full, [["full", 50_000]]),
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROCESSES],
        input=json.dumps(groups),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=one_device,
    )
    assert done.returncode == 0, done.stdout
    said = re.split(r"(?<=status )(.*)\n", done.stdout)
    return folder, [text + status for text, status in zip(said[::2], said[1::2], strict=False)]


def test_a_run_that_is_killed_anywhere_goes_on_to_the_same_bytes(
    hurt: tuple[Path, list[str]], finished: Path
) -> None:
    folder, said = hurt
    statuses = [text.rpartition("status ")[2] for text in said[: len(KILLED) + 1]]
    assert statuses == [str(int(signal.SIGKILL))] * len(KILLED) + ["0"], said
    assert contents(folder / "killed") == contents(finished)


def test_processes_that_write_one_directory_at_once_do_not_harm_it(
    hurt: tuple[Path, list[str]], finished: Path
) -> None:
    folder, said = hurt
    assert said[-2].endswith("status 0 0"), said[-2]
    assert contents(folder / "both") == contents(finished)


def test_a_full_disk_is_an_error_that_keeps_the_finished_shards(
    model: Path, hurt: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, said = hurt
    assert re.search(r"error: .*File too large: '.*shard-00001\.parquet'", said[-1])
    assert "1 of 3 shards are finished; the same command goes on with the others" in said[-1]
    output = shutil.copytree(folder / "full", tmp_path / "full")
    assert sorted(contents(output)) == [
        ".work",
        ".work/corpus.json",
        ".work/shard-00000.parquet.json",
        "plan.json",
        "shard-00000.parquet",
    ]
    first = (output / shard_name(0)).stat().st_mtime_ns
    encode(model, folder / "large.jsonl", output)  # with room again
    assert (output / shard_name(0)).stat().st_mtime_ns == first
    assert verify(output) == []
    assert read_ids(output, read_manifest(output)) == [row["_id"] for row in LARGE_IDS]


# --- bad input ---------------------------------------------------------------------------------


def harmed(*changed: tuple[int, Any]) -> str:
    lines = [json.dumps(row) for row in ROWS]
    for number, line in changed:
        lines[number] = line if isinstance(line, str) else json.dumps(line)
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (harmed((2, "{broken")), r"corpus\.jsonl:3: not valid JSON"),
        (harmed((2, "[1]")), r"corpus\.jsonl:3: wanted a JSON object"),
        (harmed((2, {"_id": "x"})), r"corpus\.jsonl:3: no field 'text'; the fields are \['_id'\]"),
        (harmed((2, {"_id": 7, "text": ""})), r"corpus\.jsonl:3: field '_id' must be a string"),
        (harmed((2, {"_id": "a\tb", "text": ""})), r"corpus\.jsonl:3: .*'a\\tb' holds a tab"),
        (harmed((2, '{"_id": "x", "text": "\\ud800"}')), r"corpus\.jsonl:3: .*no Unicode text"),
        (harmed((9, ROWS[1])), r"corpus\.jsonl:10: id 'd1' stands here a second time.*jsonl:2"),
        (harmed((1, ROWS[0])), r"corpus\.jsonl:2: id 'd0' stands here a second time.*jsonl:1"),
        ("", r"corpus\.jsonl: holds no documents"),
        ("\n \n", r"corpus\.jsonl: holds no documents"),
    ],
)
def test_a_bad_corpus_is_refused_before_anything_is_encoded(
    model: Path, corpus: Path, tmp_path: Path, text: str, message: str
) -> None:
    corpus.write_text(text)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        encode(model, corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_lines_can_be_skipped_and_are_counted(
    model: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [(n, "{broken") for n in (0, 4, 5)] + [(9, {"_id": "x\ty", "text": ""})]
    corpus.write_bytes(harmed(*bad).encode() + b'{"_id": "\xff", "text": ""}\n')
    output = encode(model, corpus, tmp_path / "out", skip_bad_lines=True)
    said = capsys.readouterr().err
    assert "6 documents in 2 shards, 5 bad lines left out" in said
    assert "skipped: " + f"{corpus}:1: not valid JSON" in said
    ids = [row["_id"] for n, row in enumerate(ROWS) if n not in (0, 4, 5, 9)]
    assert read_ids(output, read_manifest(output)) == ids
    encode(model, corpus, output, skip_bad_lines=True)  # and noticed as the same
    with pytest.raises(SystemExit, match="skip_bad_lines was True, is False"):
        encode(model, corpus, output)


def test_a_vector_that_is_not_a_number_names_its_document(
    model: Path, corpus: Path, tmp_path: Path
) -> None:
    """The embedding of one token is broken, so at K = 1 only the text that has it is."""
    config = json.loads((model / "laser_config.json").read_text())
    backbone = SCRATCH.backbone(config["backbone"]["vocab_size"])
    params = load_params(model, backbone, dtype=np.float32)
    tokenizer = load_tokenizer(model)
    rare = set(tokenizer(TEXTS[6])["input_ids"])
    rare -= {i for n, text in enumerate(TEXTS) if n != 6 for i in tokenizer(text)["input_ids"]}
    table = np.array(params["embed_tokens"]["embedding"])
    table[rare.pop()] = np.nan
    params["embed_tokens"]["embedding"] = table
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    save_params(broken, {"params": params}, backbone, dtype=np.float32, lora=None)
    for dtype in ("float32", "int8"):
        output = tmp_path / dtype
        with pytest.raises(
            SystemExit, match=r"corpus\.jsonl:7, id 'd6': the vector of text .* is not finite"
        ):
            encode(broken, corpus, output, store_dtype=dtype, num_thinking_steps=1)
        assert [path.name for path in output.glob("*.parquet")] == [shard_name(0)]


def test_other_inputs_and_outputs_are_refused(model: Path, corpus: Path, tmp_path: Path) -> None:
    def refused(message: str, **more: Any) -> None:
        values: dict[str, Any] = {"model": model, "corpus": corpus, "output": tmp_path / "out"}
        values |= {key: more.pop(key) for key in list(more) if key in values}
        with pytest.raises(SystemExit, match=message):
            encode(values["model"], values["corpus"], values["output"], **more)
        assert not (tmp_path / "out").exists()

    bare = shutil.copytree(model, tmp_path / "bare")
    config = json.loads((bare / "laser_config.json").read_text())
    config.pop("prompt")
    (bare / "laser_config.json").write_text(json.dumps(config))
    refused("laser_config.json: the prompt settings are missing", model=bare)
    (bare / "laser_config.json").unlink()
    refused(r"laser_config\.json is missing", model=bare)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "results.json").write_text("{}")
    refused(r"holds 'results\.json' and no whole plan\.json: it is no directory", output=foreign)
    refused("is no directory", output=corpus)
    assert [path.name for path in foreign.iterdir()] == ["results.json"]
    refused("nowhere is neither a file nor a directory", corpus=tmp_path / "nowhere")
    refused("wanted", corpus=model / "config.json")
    refused(r"shard must be none, or i/n with 0 <= i < n, such as 0/8, got '3/3'", shard="3/3")
    refused("shard_documents must be at least 1", shard_documents=0)
    refused("an instruction goes with queries", instruction="Find")
    refused("prompt.document_max_length 32 and 4066 .* model has 4096", num_thinking_steps=4066)
    queries = write_rows(tmp_path / "q.jsonl", [{"_id": "q", "text": "Ulm?", "instruction": ""}])
    of_queries = {"corpus": queries, "texts": "queries"}
    refused("prompt.query_max_length 64 and 4034", num_thinking_steps=4034, **of_queries)
    retold = shutil.copytree(model, tmp_path / "retold")
    config = json.loads((retold / "laser_config.json").read_text())
    (retold / "laser_config.json").write_text(json.dumps(config | {"prompt_checksum": "other"}))
    refused("do not make the prompts of training", model=retold)
    table = tmp_path / "t.parquet"
    pq.write_table(pa.table({"id": ["a"], "body": ["b"]}), table)
    with pytest.raises(
        SystemExit, match=r"t\.parquet: no column '_id'; the columns are \['body', 'id'\]"
    ):
        encode(model, table, tmp_path / "other")
    encode(model, table, tmp_path / "other", fields="[id, body, title]")


# --- Ray ---------------------------------------------------------------------------------------


def test_on_ray_a_killed_worker_changes_no_byte(
    model: Path, tmp_path: Path, one_device: dict[str, str]
) -> None:
    pytest.importorskip("ray", reason="ray absent: pip install laser-jax[ray]")
    rows = [{**ROWS[n % 10], "_id": f"d{n}"} for n in range(40)]
    corpus = write_rows(tmp_path / "corpus.jsonl", rows)
    small = {"shard_documents": 1, "batch_size": 1}
    wanted = encode(model, corpus, tmp_path / "wanted", **small)
    output = tmp_path / "out"
    arguments = command(model, corpus, output, **small, **{"ray.workers": 2})
    said: list[str] = []
    threads: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-m", "laser_jax.encode_corpus", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=one_device,
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            said.append(line)
            found = re.search(r"worker: process (\d+) on .*: 1 x cpu", line)
            if found and not threads:
                tasks = Path("/proc", found[1], "task").iterdir()
                threads = [(task / "comm").read_text().strip() for task in tasks]
                os.kill(int(found[1]), signal.SIGKILL)
    assert running.returncode == 0, "".join(said)
    assert sum("a worker died and was started again" in line for line in said) == 1, "".join(said)
    assert threads.count("tf_XLAEigen") == 1  # it keeps to its core
    assert contents(output) == contents(wanted)
