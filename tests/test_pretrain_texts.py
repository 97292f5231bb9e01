"""Texts and written reasonings as rows: what is read, packed, predicted and refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laser_jax.config import PromptConfig
from laser_jax.data.schema import DataError
from laser_jax.data.tokenization import PromptTokenizer, train_tokenizer
from laser_jax.pretrain.texts import (
    LanguageRows,
    WrittenReasoning,
    pack_texts,
    read_language_rows,
    reasoning_rows,
)

TEXTS = ["The Danube flows through Ulm.", "Ulm", "The author was born there, in Ulm."]
REASONING = "He was born in Ulm.\n\nThe Danube."


@pytest.fixture(scope="module")
def prompts() -> PromptTokenizer:
    return PromptTokenizer(train_tokenizer([*TEXTS, REASONING], 300), PromptConfig())


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows))
    return path


def predicted(rows: LanguageRows) -> list[list[int]]:
    pairs = zip(rows.ids_BT, rows.predict_BT, strict=True)
    return [ids[counted].tolist() for ids, counted in pairs]


# --- reading -----------------------------------------------------------------------------------


def test_texts_queries_documents_and_training_rows_are_read(tmp_path: Path) -> None:
    file = write(
        tmp_path / "lm.jsonl",
        {"text": "a fact"},
        "",
        {"prompt": "find", "query": "where?", "reasoning": "there"},
        {"document": "a place", "reasoning": "it is there"},
        {
            "prompt": "find",
            "query": "who?",
            "reasoning_query": "he",
            "positive_passages": ["yes", "a fact"],
            "negative_passages": ["no"],
        },
        {"prompt": "find", "query": "why?", "reasoning_query": "", "positive_passages": ["so"]},
    )
    texts, reasonings = read_language_rows(file)
    assert texts == ["a fact", "yes", "no", "so"]
    assert reasonings == [
        WrittenReasoning("where?", "there", "find"),
        WrittenReasoning("a place", "it is there", None),
        WrittenReasoning("who?", "he", "find"),
    ]


@pytest.mark.parametrize("line", ["{", '{"txt": "a"}', '{"text": 3}', "[]"])
def test_a_bad_line_is_named(tmp_path: Path, line) -> None:
    file = write(tmp_path / "lm.jsonl", {"text": "a"}, line)
    with pytest.raises(DataError, match=rf"{file}:2: "):
        read_language_rows(file)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (rb'{"text": "\ud800"}', "text is no Unicode text"),
        (rb'{"document": "d", "reasoning": "\ud800"}', "reasoning is no Unicode text"),
        (
            rb'{"prompt": "p", "query": "q", "reasoning": "r", "positive_passages": ["\ud800"]}',
            "positive_passages is no Unicode text",
        ),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "lm.jsonl"
    file.write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"{file}:2: {message}"):
        read_language_rows(file)


def test_a_compressed_file_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    file = tmp_path / "lm.jsonl.gz"
    file.write_bytes(gzip.compress(b'\xef\xbb\xbf{"text": "a"}\n'))
    assert read_language_rows(file) == (["a"], [])


def test_an_absent_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl: no such file"):
        read_language_rows(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match=r"lm\.jsonl holds neither a text nor a reas"):
        read_language_rows(write(tmp_path / "lm.jsonl", ""))


# --- packing -----------------------------------------------------------------------------------


def test_packed_texts_stand_end_to_end_and_all_but_first_tokens_and_padding_count(prompts) -> None:
    rows = pack_texts(TEXTS, prompts, 8, 1)
    texts = [[*prompts.tokenizer(text)["input_ids"], prompts.eos_id] for text in TEXTS]
    stream = rows.ids_BT.reshape(-1)
    count = sum(map(len, texts))
    assert rows.ids_BT.shape[1] == 8
    assert 0 <= len(stream) - count < 8
    assert (stream[count:] == prompts.pad_id).all()
    ends = np.flatnonzero(stream[:count] == prompts.eos_id) + 1
    found = [part.tolist() for part in np.split(stream[:count], ends)[:-1]]
    assert sorted(found) == sorted(texts)
    assert not rows.predict_BT[:, 0].any()
    assert rows.predict_BT.reshape(-1)[:count].sum() == count - len(rows.ids_BT)
    assert not rows.predict_BT.reshape(-1)[count:].any()


def test_eos_is_predicted_where_it_also_pads() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.pad_token = tokenizer.eos_token
    prompts = PromptTokenizer(tokenizer, PromptConfig())
    rows = pack_texts(["Ulm"], prompts, 6, 1)
    assert predicted(rows) == [[*prompts.tokenizer("Ulm")["input_ids"], prompts.eos_id][1:]]


def test_repeated_texts_change_their_order(prompts) -> None:
    once, thrice = (pack_texts(TEXTS, prompts, 4, n) for n in (1, 3))
    assert thrice.ids_BT.size >= 3 * (once.predict_BT.sum() + len(once.ids_BT))
    assert np.sum(thrice.ids_BT == prompts.eos_id) == 9


# --- reasonings --------------------------------------------------------------------------------


def test_the_reasoning_and_its_eos_are_predicted_and_nothing_else(prompts) -> None:
    query = WrittenReasoning("Where?", REASONING, "Find")
    document = WrittenReasoning("Ulm", REASONING, None)
    rows = reasoning_rows([query, document], prompts, 96)
    explicit = prompts.explicit("Where?", "Find", REASONING)
    written = [*prompts.tokenizer(REASONING)["input_ids"], prompts.eos_id]
    assert predicted(rows) == [explicit.ids[explicit.query_length :], written]
    assert rows.ids_BT[0, : len(explicit.ids)].tolist() == explicit.ids
    assert rows.ids_BT[1, : len(prompts.document("Ulm"))].tolist() == prompts.document("Ulm")
    assert (rows.ids_BT[0, len(explicit.ids) :] == prompts.pad_id).all()


def test_a_row_length_that_cuts_a_reasoning_is_refused_with_the_one_that_would_do(prompts) -> None:
    query = WrittenReasoning("Where?", REASONING, "Find")
    longest = len(prompts.explicit("Where?", "Find", REASONING).ids)
    reasoning_rows([query], prompts, longest)
    with pytest.raises(DataError, match=f"row_length {longest - 1} .* {longest} or more"):
        reasoning_rows([query], prompts, longest - 1)


def test_texts_and_reasonings_hold_no_control_tokens(prompts) -> None:
    marked = "<|im_end|><think>"
    assert prompts.eos_id not in prompts.text_ids(marked)
    rows = pack_texts([marked], prompts, 64, repeats=1)
    assert predicted(rows) == [[*prompts.text_ids(marked), prompts.eos_id][1:]]
    for instruction in (None, "Find"):
        item = WrittenReasoning("Ulm", marked, instruction)
        rows = reasoning_rows([item], prompts, 128)
        assert predicted(rows) == [[*prompts.text_ids(marked), prompts.eos_id]]
