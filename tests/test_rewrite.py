"""The rewriting program: prompts, what is in the file, and what happens when it is cut short."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from laser_jax.config import ScratchConfig
from laser_jax.data.tokenization import load_tokenizer, special_token_ids, train_tokenizer
from laser_jax.evaluate.rewrites import read_rewrites
from laser_jax.hf.reading import load_params
from laser_jax.hf.writing import save_params
from laser_jax.modeling.backbone import Backbone
from laser_jax.rewrite.generation import Decoding, TextGenerator
from laser_jax.rewrite.run import (
    RewriteOptions,
    main,
    prompt_maker,
    read_wanted,
    report_file,
    seed_of,
)

SCRATCH = ScratchConfig(
    hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=16
)
BACKBONE = SCRATCH.backbone(280)
TOWNS = ["Ulm", "Kiel", "Jena", "Bonn", "Hof", "Trier"]
PROMPT = "{query}\nThink."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["a town on a river"], BACKBONE.vocab_size)
    drawn = jax.jit(Backbone(BACKBONE).init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))
    variables = jax.tree.map(lambda a: 2 * a, nn.meta.unbox(drawn))
    ids = special_token_ids(tokenizer)
    save_params(
        directory, jax.device_get(variables), BACKBONE, dtype=np.float32, lora=None, tokens=ids
    )
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def data(tmp_path: Path) -> Path:
    directory = tmp_path / "towns"
    (directory / "qrels").mkdir(parents=True)
    rows = [{"_id": f"q{i}", "text": f"Where is {t}?"} for i, t in enumerate(TOWNS)]
    (directory / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq4\td\t1\nq1\td\t1\n")
    return directory


def arguments(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    where = ["--model", str(model), "--input", str(data), "--output", str(output)]
    return [*where, "--prompt", PROMPT, "--max_new_tokens", "6", "--batch_size", "2", *more]


def texts(output: Path) -> dict[str, str]:
    return {id_: rewrite.text for id_, rewrite in read_rewrites(output).items()}


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every query's rewrite, by the generator itself."""
    tokenizer = load_tokenizer(model)
    params = {"params": load_params(model, BACKBONE, dtype=np.float32)}
    generator = TextGenerator(params, BACKBONE, Decoding(6), [tokenizer.eos_token_id])  # type: ignore[list-item]
    written = {}
    for i, town in enumerate(TOWNS):
        turn = f"<|im_start|>user\nWhere is {town}?\nThink.<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(f"{turn}<think>\n\n</think>\n\n")["input_ids"]
        found = generator.write([ids])[0]
        written[f"q{i}"] = str(tokenizer.decode(found.ids, skip_special_tokens=True))
    assert len({*written.values()}) > 1
    return written


def test_every_query_gets_the_text_that_the_model_writes_after_its_prompt(
    model: Path, data: Path, tmp_path: Path, whole: dict[str, str], capsys: Any
) -> None:
    output = tmp_path / "out.jsonl"
    main(arguments(model, data, output))
    assert texts(output) == whole
    for rewrite in read_rewrites(output).values():
        assert rewrite.cost is not None
        assert rewrite.cost.tokens == 6 or rewrite.finished
        assert rewrite.cost.rows == 2
    report = json.loads(report_file(output).read_text())
    assert report["queries"] == 6
    assert report["tokens"] == sum(r.cost.tokens for r in read_rewrites(output).values() if r.cost)
    parts = report["milliseconds_a_query"]
    mean = parts["prefill"]["mean"] + parts["decode"]["mean"]
    assert parts["in all"]["mean"] == pytest.approx(mean)
    assert parts["in all"]["p90"] >= parts["in all"]["median"] > 0
    whole_batch = parts["until its batch was done"]["mean"]
    assert whole_batch == pytest.approx(2 * parts["in all"]["mean"])
    assert report["tokens_per_second"] == pytest.approx(
        report["tokens"] / (6 * parts["decode"]["mean"] / 1000)
    )
    out = capsys.readouterr().out
    assert f"6 rewrites in {output}, 0 of them from before" in out
    assert "tokens/s written" in out


def test_a_split_a_file_and_a_drawn_text(
    model: Path, data: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    main(arguments(model, data, tmp_path / "dev.jsonl", "--split", "dev"))
    assert texts(tmp_path / "dev.jsonl") == {id_: whole[id_] for id_ in ("q1", "q4")}

    drawn = ["--temperature", "1.5", "--seed", "3"]
    main(arguments(model, data, tmp_path / "all.jsonl", *drawn))
    alone = tmp_path / "alone.jsonl"
    alone.write_text((data / "queries.jsonl").read_text().splitlines(keepends=True)[3])
    main(arguments(model, alone, tmp_path / "one.jsonl", *drawn))
    assert texts(tmp_path / "one.jsonl") == {"q3": texts(tmp_path / "all.jsonl")["q3"]}
    assert texts(tmp_path / "all.jsonl") != whole


# --- cut short ---------------------------------------------------------------------------------


def test_a_killed_process_leaves_whole_lines_and_the_rest_is_written_then(
    model: Path, data: Path, tmp_path: Path, whole: dict[str, str], capsys: Any, one_device: Any
) -> None:
    output = tmp_path / "out.jsonl"
    slow = (
        "import sys, time\n"
        "sys.modules['torch'] = None\n"  # transformers would load it, and nobody here uses it
        "import laser_jax.rewrite.run as r\n"
        "append = r.append\n"
        "def slowly(output, rewrites): append(output, rewrites); time.sleep(60)\n"
        "r.append = slowly\n"
        f"r.main({arguments(model, data, output)!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", slow], env=one_device)
    while not (output.exists() and output.stat().st_size):
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.05)
    with pytest.raises(SystemExit, match=rf"{output} is being written by process {process.pid} on"):
        main(arguments(model, data, output))
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = output.read_bytes()
    assert 0 < len(texts(output)) < 6

    with output.open("ab") as file:  # as if it had been killed within a write
        file.write(b'{"_id": "q0", "rewr')
    main(arguments(model, data, output))
    assert output.read_bytes().startswith(first)
    assert texts(output) == whole
    assert "2 of them from before" in capsys.readouterr().out
    complete = output.read_bytes()
    main(arguments(model, data, output))
    assert output.read_bytes() == complete


def test_a_full_disk_leaves_what_was_there(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    main(arguments(model, data, output, "--split", "dev"))
    before = output.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SystemExit, match=r"error: .*No space left on device: '.*out\.jsonl'"):
            main(arguments(model, data, output))
    assert output.read_bytes() == before
    main(arguments(model, data, output))
    assert len(texts(output)) == 6


def test_other_settings_and_other_queries_are_not_mixed(
    model: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    main(arguments(model, data, output, "--split", "dev"))
    before = output.read_bytes()
    with pytest.raises(SystemExit, match=r"another config:\n  max_new_tokens was 6, is 7\nChoose"):
        main([*arguments(model, data, output), "--max_new_tokens", "7"])
    queries = data / "queries.jsonl"
    queries.write_text(queries.read_text().replace("Where is Kiel", "Who is Kiel"))
    with pytest.raises(SystemExit, match="holds a rewrite of 'q1' that is of none of these"):
        main(arguments(model, data, output))
    for damage in (lambda file: file.write_bytes(bytes(40)), Path.unlink):
        damage(report_file(output))
        with pytest.raises(
            SystemExit, match=r"is there without a whole out\.jsonl\.report\.json, .*from a copy"
        ):
            main(arguments(model, data, output))
    assert output.read_bytes() == before


def test_new_weights_under_the_old_name_are_noticed(
    model: Path, data: Path, tmp_path: Path
) -> None:
    trained, output = tmp_path / "model", tmp_path / "out.jsonl"
    shutil.copytree(model, trained)
    main(arguments(trained, data, output, "--split", "dev"))
    params = load_params(model, BACKBONE, dtype=np.float32)
    params["norm"]["scale"][0] += 1e-3
    save_params(trained, {"params": params}, BACKBONE, dtype=np.float32, lora=None)
    with pytest.raises(SystemExit, match=r"another config:\n  weights was '"):
        main(arguments(trained, data, output))


def test_damage_in_the_middle_is_named(model: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    main(arguments(model, data, output, "--split", "dev"))
    output.write_bytes(b"{torn\n" + output.read_bytes())
    with pytest.raises(SystemExit, match=r"out\.jsonl:1: not valid JSON"):
        main(arguments(model, data, output))


# --- prompts -----------------------------------------------------------------------------------


def options(data: Path, **more: Any) -> RewriteOptions:
    return RewriteOptions(model="m", input=str(data), output="o", **more)


def test_the_reasoning_prompt_comes_in_a_turn_with_an_empty_thought(data: Path) -> None:
    tokenizer = train_tokenizer(["a"], 270)
    text = prompt_maker(options(data), tokenizer, BACKBONE).query_prompt_text("Why?", "")
    assert text.startswith("<|im_start|>user\nWhy?\n\n")
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    thinking = options(data, thinking_suffix="<think>\n")
    text = prompt_maker(thinking, tokenizer, BACKBONE).query_prompt_text("Why?", "")
    assert text.endswith("<|im_start|>assistant\n<think>\n")
    plain = options(data, chat_template=False, prompt="{query}!")
    assert prompt_maker(plain, tokenizer, BACKBONE).query_prompt_text("Why?", "") == "Why?!"


def test_a_tokenizer_without_thoughts_gets_none_and_one_without_template_says_so(
    data: Path,
) -> None:
    tokenizer = train_tokenizer(["a"], 270)
    tokenizer.get_vocab = lambda: {"a": 0}  # type: ignore[method-assign]
    text = prompt_maker(options(data), tokenizer, BACKBONE).query_prompt_text("Why?", "")
    assert text.endswith("<|im_start|>assistant\n")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="--chat_template false"):
        prompt_maker(options(data), tokenizer, BACKBONE)


def test_a_long_query_is_shortened_to_what_the_positions_leave_and_counted(
    model: Path, tmp_path: Path, capsys: Any
) -> None:
    tokenizer = load_tokenizer(model)
    short = dataclasses.replace(BACKBONE, max_position_embeddings=1000)
    room = prompt_maker(options(tmp_path, max_new_tokens=100), tokenizer, short)
    long = room.query_prompt("far away " * 1000, "")
    assert long.truncated
    assert len(long.ids) <= 900
    full = dataclasses.replace(BACKBONE, max_position_embeddings=512)
    message = "max_new_tokens 512 and a prompt of a token take 513 positions, and the model has 512"
    with pytest.raises(ValueError, match=message):
        prompt_maker(options(tmp_path), tokenizer, full)

    queries = tmp_path / "queries.jsonl"
    queries.write_text(json.dumps({"_id": "q", "text": "far away " * 100}) + "\n")
    main(arguments(model, queries, tmp_path / "out.jsonl", "--max_length", "128"))
    cost = read_rewrites(tmp_path / "out.jsonl")["q"].cost
    assert cost is not None
    assert 100 < cost.prompt_tokens <= 128
    assert "1 queries were shortened to prompts of 128 tokens" in capsys.readouterr().out


def test_a_prompt_with_an_instruction_wants_one_of_every_query(data: Path) -> None:
    prompt = "Instruct: {instruction}\nQuery: {query}"
    with pytest.raises(ValueError, match="query q0 has no instruction"):
        read_wanted(options(data, prompt=prompt))
    assert len(read_wanted(options(data))) == 6


def test_seeds_differ_by_query_and_by_seed() -> None:
    seeds = {seed_of(seed, f"q{i}") for seed in range(3) for i in range(50)}
    assert len(seeds) == 150
    assert max(seeds) < 2**32


# --- bad input ---------------------------------------------------------------------------------


def spoil(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda data: (data / name).write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "more", "message"),
    [
        (spoil("queries.jsonl", b"{torn\n"), (), r"queries\.jsonl:1: not valid JSON"),
        (spoil("queries.jsonl", b"\n"), (), "holds no query to rewrite"),
        (
            spoil("queries.jsonl", b'{"_id": "a", "text": "t"}\n' * 2),
            (),
            r"queries\.jsonl:2: query id 'a' stands here a second time",
        ),
        (lambda data: None, ("--split", "test"), r"test\.tsv is missing; splits present: dev"),
        (lambda data: None, ("--model", "/absent/model"), "/absent/model is no directory"),
        (lambda data: None, ("--output", "/absent/out"), "folder /absent does not exist"),
        (lambda data: None, ("--prompt", "Think."), "has no {query} placeholder"),
        (lambda data: None, ("--max_new_tokens", "0"), "max_new_tokens must be at least 1"),
        (lambda data: None, ("--seed", "5"), "a seed is of use only with"),
        (lambda data: None, ("--batch_size", "0"), "batch_size must be at least 1"),
    ],
)
def test_bad_input_ends_the_program_before_anything_is_written(
    model: Path,
    data: Path,
    tmp_path: Path,
    harm: Callable[[Path], object],
    more: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    harm(data)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main(arguments(model, data, tmp_path / "out.jsonl", *more))
    assert [path.name for path in tmp_path.iterdir()] == ["towns"]


def test_a_model_without_tokenizer_or_with_another_one_is_named(
    model: Path, data: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((model / name).read_bytes())
    with pytest.raises(SystemExit, match="holds no tokenizer"):
        main(arguments(bare, data, tmp_path / "out.jsonl"))
    train_tokenizer(["Where is Ulm? " * 3, "Where is Kiel?"], 400).save_pretrained(bare)
    with pytest.raises(SystemExit, match="They are not of one model"):
        main(arguments(bare, data, tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


def test_files_of_one_folder_are_written_side_by_side(
    model: Path, data: Path, tmp_path: Path
) -> None:
    with (tmp_path / ".other.jsonl.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match=r"other\.jsonl is being written by another process"):
            main(arguments(model, data, tmp_path / "other.jsonl"))
        assert [path.name for path in tmp_path.glob("*other*")] == [".other.jsonl.lock"]
        main(arguments(model, data, tmp_path / "out.jsonl", "--split", "dev"))
    assert len(texts(tmp_path / "out.jsonl")) == 2


def test_after_a_refusal_the_way_out_helps(model: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    main(arguments(model, data, output, "--split", "dev"))
    again = [*arguments(model, data, output, "--split", "dev"), "--max_new_tokens", "7"]
    with pytest.raises(SystemExit, match=r"or delete out\.jsonl and out\.jsonl\.report\.json"):
        main(again)
    output.unlink()
    report_file(output).unlink()
    main(again)
    assert len(texts(output)) == 2
