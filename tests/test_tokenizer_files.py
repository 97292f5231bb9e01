"""What tokenizer_config.json asks for, and exports that two releases of transformers read."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from laser_jax.data.tokenization import TokenizationError, load_tokenizer, train_tokenizer
from laser_jax.data.tokenizer_files import save_tokenizer

TEXTS = ["Ulm lies on the Danube.\n\nKiel's at the sea: Köln, 東京, 🙂 12", "<|im_end|> <think>"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS * 4, 330)


@pytest.fixture
def directory(tokenizer, tmp_path) -> Path:
    save_tokenizer(tokenizer, tmp_path)
    return tmp_path


def change(file: Path, **settings) -> None:
    values = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(values | settings))


# --- settings without effect -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bos", "eos"])
@pytest.mark.parametrize("class_", ["PreTrainedTokenizerFast", "Qwen2Tokenizer", "LlamaTokenizer"])
def test_a_setting_that_the_tokenizer_does_not_follow_is_refused(directory, kind, class_) -> None:
    file = directory / "tokenizer_config.json"
    change(file, bos_token="<|endoftext|>", tokenizer_class=class_)
    change(file, **{f"add_{kind}_token": False})
    before = load_tokenizer(directory)("Ulm")["input_ids"]
    change(file, **{f"add_{kind}_token": True})
    with pytest.raises(TokenizationError, match=f"add_{kind}_token: true, and .* does not add"):
        load_tokenizer(directory)
    # the way out that the message gives
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_bos_token, tokenizer.add_eos_token = kind == "bos", kind == "eos"
    tokenizer.save_pretrained(directory)
    change(file, **{f"add_{kind}_token": True})
    added = {"bos": [0, *before], "eos": [*before, 2]}[kind]
    assert load_tokenizer(directory)("Ulm")["input_ids"] == added
    change(file, **{f"add_{kind}_token": False})
    with pytest.raises(TokenizationError, match=f"add_{kind}_token: false, and .* adds such"):
        load_tokenizer(directory)


# --- code and damage ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("code", [{"AutoTokenizer": ["own.Tokenizer", None]}, ["own.Tokenizer"]])
def test_code_of_the_models_own_is_never_run(directory, monkeypatch, name, code) -> None:
    (directory / "own.py").write_text("raise SystemExit('ran')\n")
    change(directory / name, auto_map=code, tokenizer_class="Own", model_type="own")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(TokenizationError, match=rf"{name}: auto_map names .*remove auto_map"):
        load_tokenizer(directory)


def test_the_code_of_a_model_is_no_matter_for_its_tokenizer(directory, monkeypatch) -> None:
    change(directory / "config.json", auto_map={"AutoConfig": "own.Config"}, model_type="own")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    assert load_tokenizer(directory).eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"version": "1.0"}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", '{"eos_token": 5}'),
        ("tokenizer_config.json", '{"auto_map": 5}'),
    ],
)
def test_a_damaged_file_is_named(directory, name, content) -> None:
    (directory / name).write_text(content)
    with pytest.raises(TokenizationError, match=str(directory)):
        load_tokenizer(directory)


# --- exports -----------------------------------------------------------------------------------

READ = """
import json, sys
from transformers import AutoTokenizer, __version__
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = [tokenizer(text)["input_ids"] for text in json.loads(sys.argv[2])]
turn = [{"role": "user", "content": "Ulm"}]
print(json.dumps([__version__[0], ids, [tokenizer.decode(row) for row in ids],
    tokenizer.pad_token_id, tokenizer.eos_token_id, sorted(tokenizer.all_special_tokens),
    tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)]))
"""


@pytest.mark.parametrize("class_", [None, "Qwen2Tokenizer"])
def test_an_export_names_what_transformers_4_and_5_both_know(tokenizer, tmp_path, class_) -> None:
    tokenizer.save_pretrained(tmp_path)
    if class_:
        change(tmp_path / "tokenizer_config.json", tokenizer_class=class_)
    save_tokenizer(load_tokenizer(tmp_path), tmp_path)
    values = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert values["additional_special_tokens"] == ["<|im_start|>"]
    assert values["clean_up_tokenization_spaces"] is False
    assert values["model_input_names"] == ["input_ids", "attention_mask"]
    assert "extra_special_tokens" not in values


@pytest.mark.skipif(
    "LASER_TRANSFORMERS_4" not in os.environ,
    reason="LASER_TRANSFORMERS_4 names no Python that has transformers 4.57",
)
def test_transformers_4_reads_the_same_tokenizer_from_an_export(tokenizer, directory) -> None:
    python = os.environ["LASER_TRANSFORMERS_4"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-c", READ, str(directory), json.dumps(TEXTS)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    version, ids, decoded, pad, eos, special, turn = json.loads(run.stdout)
    assert version == "4"
    assert ids == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert decoded == [tokenizer.decode(row) for row in ids]
    assert (pad, eos) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert special == sorted(tokenizer.all_special_tokens)
    assert turn == "<|im_start|>user\nUlm<|im_end|>\n<|im_start|>assistant\n"
