"""Tokenizers, prompts and explicit inputs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from laser_jax.config import ConfigError, PromptConfig, ScratchConfig
from laser_jax.data.tokenization import (
    PromptTokenizer,
    TokenizationError,
    load_tokenizer,
    load_tokenizer_for,
    right_pad,
    train_tokenizer,
)
from laser_jax.data.tokenizer_files import save_tokenizer

TEXTS = [
    "Which river flows through the city where the author was born? It ends there.\n\nNext",
    "The author was born in Ulm.\n\nThe Danube flows through Ulm.\n\nSo the answer is the Danube.",
    "A long passage about rivers, cities and 1234 other things: Köln, Straße, 東京, 🙂🙂.",
] * 4
QUERY, INSTRUCTION, REASONING = "Which river flows there?", "Find rivers", TEXTS[1]
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 360)


@pytest.fixture
def prompts(tokenizer) -> Callable[..., PromptTokenizer]:
    def make(**settings) -> PromptTokenizer:
        return PromptTokenizer(tokenizer, PromptConfig(**settings))

    return make


# --- tokenizers ------------------------------------------------------------------------------


def test_training_is_deterministic(tokenizer) -> None:
    again = train_tokenizer(iter(TEXTS), 360)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_vocabulary_stays_within_the_size_asked_for(tokenizer) -> None:
    assert len(tokenizer) == 360
    assert len(train_tokenizer(["ab ab"], 1000)) < 280


def test_a_vocabulary_that_cannot_hold_the_bytes_is_refused() -> None:
    assert len(train_tokenizer(TEXTS, 261)) == 261
    with pytest.raises(TokenizationError, match="take 261"):
        train_tokenizer(TEXTS, 260)


def test_any_text_survives_encoding_and_decoding(tokenizer) -> None:
    for text in [*TEXTS, "unseen: Ωmega \t\r\n 🚀", "<think>\n\n</think>"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_control_tokens_are_single_tokens(tokenizer) -> None:
    for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"):
        assert len(tokenizer(text)["input_ids"]) == 1
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("model_type", [None, "qwen3", "llama"])
def test_saving_and_loading_keeps_ids_template_and_padding_side(
    tokenizer, tmp_path, model_type
) -> None:
    save_tokenizer(tokenizer, tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = load_tokenizer(tmp_path)
    before, after = (PromptTokenizer(t, PromptConfig()) for t in (tokenizer, loaded))
    for text in TEXTS:
        assert after.query(text, "x") == before.query(text, "x")
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (after.pad_id, after.eos_id) == (before.pad_id, before.eos_id)
    assert loaded.padding_side == tokenizer.padding_side
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert loaded.all_special_tokens == tokenizer.all_special_tokens


def test_a_directory_without_tokenizer_files_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        load_tokenizer(tmp_path / "absent")


def test_a_missing_pad_token_is_replaced_by_eos(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"]
    path.write_text(json.dumps(settings))
    assert load_tokenizer(tmp_path).pad_token == "<|im_end|>"
    del settings["eos_token"]
    path.write_text(json.dumps(settings))
    with pytest.raises(TokenizationError, match="neither a pad token nor an EOS token"):
        load_tokenizer(tmp_path)


def test_a_pad_token_without_an_embedding_is_named_with_the_way_out(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"pad_token": "<pad>"}))
    backbone = ScratchConfig().backbone(len(tokenizer))
    message = r"1 token\(s\) without an embedding, '<pad>' = 360: the model's vocab_size is 360.*"
    with pytest.raises(ConfigError, match=message + "pad token can be the EOS token: pad_token in"):
        load_tokenizer_for(tmp_path, backbone)
    path.write_text(json.dumps(settings | {"pad_token": settings["eos_token"]}))
    assert load_tokenizer_for(tmp_path, backbone).pad_token_id == tokenizer.eos_token_id


def test_a_tokenizer_without_chat_template_is_refused(tokenizer) -> None:
    bare = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>"
    )
    with pytest.raises(TokenizationError, match=r"prompt\.chat_template: false"):
        PromptTokenizer(bare, PromptConfig())
    without = PromptTokenizer(bare, PromptConfig(chat_template=False))
    assert without.pad_id == without.eos_id


# --- prompts ---------------------------------------------------------------------------------


def test_query_prompt_is_template_in_a_user_turn_with_thinking_suffix(prompts, tokenizer) -> None:
    expected = f"<|im_start|>user\nInstruct: {INSTRUCTION}\nQuery: {QUERY}{SUFFIX}"
    assert prompts().query_prompt_text(QUERY, INSTRUCTION) == expected
    assert prompts().query(QUERY, INSTRUCTION) == tokenizer(expected)["input_ids"]


def test_document_prompt_is_the_bare_document_in_a_user_turn(prompts, tokenizer) -> None:
    expected = f"<|im_start|>user\n{TEXTS[2]}{SUFFIX}"
    assert prompts().document(TEXTS[2]) == tokenizer(expected)["input_ids"]


def test_without_chat_template_there_is_no_suffix(prompts, tokenizer) -> None:
    assert prompts(chat_template=False).document("rivers") == tokenizer("rivers")["input_ids"]


def test_braces_in_texts_and_templates_are_left_alone(prompts) -> None:
    p = prompts(query_template="{x} {instruction}: {query}", chat_template=False)
    assert p.query_prompt_text("{instruction} {0}", "{query}") == "{x} {query}: {instruction} {0}"


def test_an_empty_text_without_template_becomes_eos(prompts) -> None:
    p = prompts(chat_template=False)
    assert p.document("") == [p.eos_id]


@pytest.mark.parametrize("append_eos", [False, True])
@pytest.mark.parametrize("text", TEXTS[:3])
def test_content_truncation_keeps_the_suffix_and_fills_the_room(
    prompts, tokenizer, text, append_eos
) -> None:
    full = len(prompts(append_eos=append_eos).document(text))
    shortest = len(prompts(append_eos=append_eos).document("")) + 5
    for max_length in range(shortest, full + 2):
        p = prompts(document_max_length=max_length, append_eos=append_eos)
        tokens = p.document_prompt(text)
        assert tokens.truncated == (max_length < full)
        assert max_length - 4 <= len(tokens.ids) <= max_length or not tokens.truncated
        ids = tokens.ids[:-1] if append_eos else tokens.ids
        decoded = tokenizer.decode(ids)
        assert decoded.endswith(SUFFIX)
        assert text.startswith(decoded.removeprefix("<|im_start|>user\n").removesuffix(SUFFIX))
        assert (tokens.ids[-1] == p.eos_id) == append_eos


@pytest.mark.parametrize("settings", [{}, {"truncation": "sequence"}, {"append_eos": True}])
def test_the_length_before_truncation_is_reported(prompts, settings) -> None:
    whole = prompts(document_max_length=4096, **settings).document_prompt(TEXTS[0])
    assert whole.whole_length == len(whole.ids)
    cut = prompts(document_max_length=len(whole.ids) - 3, **settings).document_prompt(TEXTS[0])
    assert cut.whole_length == len(whole.ids) > len(cut.ids)
    assert cut.truncated
    assert not whole.truncated


def test_the_checksum_tells_other_prompts_apart_but_not_other_lengths(prompts) -> None:
    own = prompts().checksum()
    assert prompts(query_max_length=4, document_max_length=8192).checksum() == own
    assert prompts(thinking_suffix="").checksum() != own
    assert prompts(query_template="{query} {instruction}").checksum() != own


def test_content_truncation_keeps_what_follows_the_query_in_the_template(
    prompts, tokenizer
) -> None:
    p = prompts(query_template="Q: {query}\nTask: {instruction}", query_max_length=60)
    tokens = p.query_prompt(TEXTS[0] * 3, INSTRUCTION)
    assert tokens.truncated
    assert tokenizer.decode(tokens.ids).endswith(f"\nTask: {INSTRUCTION}{SUFFIX}")


def test_content_truncation_never_splits_a_character(prompts, tokenizer) -> None:
    text = "🙂東🚀京" * 20
    for max_length in range(25, 60):
        ids = prompts(document_max_length=max_length).document(text)
        assert "\ufffd" not in tokenizer.decode(ids)


def test_no_room_for_the_text_is_an_error_that_names_the_setting(prompts) -> None:
    with pytest.raises(TokenizationError, match=r"prompt.query_max_length leaves 12 tokens"):
        prompts(query_max_length=12).query(QUERY, INSTRUCTION)


def test_sequence_truncation_cuts_the_suffix(prompts) -> None:
    whole = prompts().query(QUERY, INSTRUCTION)
    cut = prompts(truncation="sequence", query_max_length=20)
    assert cut.query_prompt(QUERY, INSTRUCTION).truncated
    assert cut.query(QUERY, INSTRUCTION) == whole[:20]
    with_eos = prompts(truncation="sequence", query_max_length=20, append_eos=True)
    assert with_eos.query(QUERY, INSTRUCTION) == [*whole[:19], cut.eos_id]


def with_special_tokens(tokenizer, prefix: str, suffix: str, **settings) -> PreTrainedTokenizerFast:
    """A copy that adds tokens around every sequence, as Llama's and embedding models' do."""
    processors = pytest.importorskip("tokenizers.processors")
    backend = tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    ids = [(text, backend.token_to_id(text)) for text in (prefix, suffix) if text]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{prefix} $A {suffix}".strip(), special_tokens=ids
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", **settings
    )


@pytest.mark.parametrize("bos_in_template", [False, True])
@pytest.mark.parametrize("truncation", ["content", "sequence"])
def test_bos_comes_once_whoever_adds_it(tokenizer, bos_in_template, truncation) -> None:
    template = tokenizer.chat_template
    if bos_in_template:
        template = "{{ bos_token }}" + template
    with_bos = with_special_tokens(
        tokenizer, "<|endoftext|>", "", bos_token="<|endoftext|>", chat_template=template
    )
    plain = PromptTokenizer(tokenizer, PromptConfig()).query(QUERY, INSTRUCTION)
    p = PromptTokenizer(with_bos, PromptConfig(truncation=truncation))
    assert p.query(QUERY, INSTRUCTION) == [with_bos.bos_token_id, *plain]
    ids = p.explicit(QUERY, INSTRUCTION, REASONING).ids
    assert [i for i, token in enumerate(ids) if token == with_bos.bos_token_id] == [0]


@pytest.mark.parametrize("truncation", ["content", "sequence"])
def test_a_token_that_the_tokenizer_puts_last_survives_truncation(tokenizer, truncation) -> None:
    closing = with_special_tokens(tokenizer, "", "<|endoftext|>")
    config = PromptConfig(chat_template=False, truncation=truncation, document_max_length=9)
    ids = PromptTokenizer(closing, config).document(TEXTS[2])
    assert ids[:-1] == tokenizer(TEXTS[2])["input_ids"][:8]
    assert ids[-1] == closing.pad_token_id


# --- the explicit input ----------------------------------------------------------------------


@pytest.mark.parametrize("append_eos", [False, True])
@pytest.mark.parametrize("chat_template", [False, True])
@pytest.mark.parametrize("query_max_length", [60, 512])
@pytest.mark.parametrize(
    ("segmentation", "truncation"),
    [("text", "content"), ("text", "sequence"), ("token", "content")],
)
def test_query_ids_are_a_prefix_of_explicit_ids(
    prompts, append_eos, chat_template, query_max_length, segmentation, truncation
) -> None:
    p = prompts(
        append_eos=append_eos,
        chat_template=chat_template,
        query_max_length=query_max_length,
        segmentation=segmentation,
        truncation=truncation,
    )
    for text in (QUERY, TEXTS[0] * 5, "ends in a blank "):
        query_ids = p.query(text, INSTRUCTION)
        tokens = p.explicit(text, INSTRUCTION, REASONING)
        assert tokens.ids[: tokens.query_length] == query_ids
        assert tokens.ids[-1] == p.eos_id


def test_every_paragraph_is_a_segment_although_bpe_merges_its_end(prompts, tokenizer) -> None:
    assert any(".\n\n" in tokenizer.decode([i]) for i in tokenizer(REASONING)["input_ids"])
    p = prompts()
    tokens = p.explicit(QUERY, INSTRUCTION, REASONING)
    starts = [tokens.query_length, *(end + 1 for end in tokens.segment_ends)]
    segments = [
        tokenizer.decode(tokens.ids[start : end + 1])
        for start, end in zip(starts, tokens.segment_ends, strict=False)
    ]
    assert segments == re.findall(r".+?(?:\n\n|$)", REASONING)
    assert len(segments) == 3
    assert tokens.segment_ends[-1] == len(tokens.ids) - 2
    assert not tokens.truncated


def test_token_segmentation_misses_merged_separators(prompts) -> None:
    p = prompts(segmentation="token")
    tokens = p.explicit(QUERY, INSTRUCTION, REASONING)
    assert len(tokens.segment_ends) == 1


def test_the_last_token_of_a_long_separator_ends_a_segment(prompts, tokenizer) -> None:
    """The released code takes the last token of what the tokenizer makes of the separator, and cuts
    wherever it stands."""
    separator = " ###"
    *others, last = tokenizer(separator, add_special_tokens=False)["input_ids"]
    assert others
    p = prompts(segmentation="token", separator=separator, append_eos_to_reasoning=False)
    tokens = p.explicit(QUERY, INSTRUCTION, "one ### two ### three")
    reasoning = range(tokens.query_length, len(tokens.ids))
    ends = [i for i in reasoning if tokens.ids[i] == last]
    assert len(ends) >= 2
    assert tokens.segment_ends == [*ends, len(tokens.ids) - 1]


def test_the_last_separator_ends_the_last_segment(prompts) -> None:
    p = prompts(append_eos_to_reasoning=False)
    tokens = p.explicit(QUERY, INSTRUCTION, "one\n\ntwo\n\n")
    assert len(tokens.segment_ends) == 2
    assert tokens.segment_ends[-1] == len(tokens.ids) - 1


@pytest.mark.parametrize("eos", [False, True])
def test_an_empty_chain_of_thought_has_no_segments(prompts, eos) -> None:
    p = prompts(append_eos_to_reasoning=eos)
    tokens = p.explicit(QUERY, INSTRUCTION, "")
    assert tokens.segment_ends == []
    assert tokens.ids == p.query(QUERY, INSTRUCTION) + [p.eos_id] * eos


def test_reasoning_is_cut_at_the_room_that_query_and_eos_leave(prompts) -> None:
    whole = prompts().explicit(QUERY, INSTRUCTION, REASONING)
    for limit in range(whole.query_length + 1, len(whole.ids) + 1):
        p = prompts(explicit_max_length=limit)
        tokens = p.explicit(QUERY, INSTRUCTION, REASONING)
        assert tokens.ids == [*whole.ids[: limit - 1], p.eos_id]
        assert tokens.truncated == (limit < len(whole.ids))
        kept = [end for end in whole.segment_ends if end < limit - 1]
        if limit - 2 not in kept and limit - 1 > whole.query_length:
            kept.append(limit - 2)
        assert tokens.segment_ends == kept


def test_a_query_longer_than_the_explicit_limit_is_an_error(prompts) -> None:
    with pytest.raises(TokenizationError, match=r"prompt\.explicit_max_length 10 cannot hold"):
        prompts(explicit_max_length=10).explicit(QUERY, INSTRUCTION, REASONING)


def test_official_input_is_one_string_and_its_query_is_not_truncated(prompts, tokenizer) -> None:
    p = prompts(
        truncation="sequence",
        segmentation="token",
        query_max_length=20,
        append_eos_to_reasoning=False,
    )
    tokens = p.explicit(QUERY, INSTRUCTION, REASONING)
    whole = tokenizer(p.query_prompt_text(QUERY, INSTRUCTION) + REASONING)["input_ids"]
    assert tokens.ids == whole
    assert tokens.query_length == 20
    assert tokens.segment_ends[-1] == len(whole) - 1


def test_official_chain_of_thought_beyond_the_cut_is_empty(prompts) -> None:
    p = prompts(
        truncation="sequence",
        segmentation="token",
        query_max_length=20,
        explicit_max_length=10,
        append_eos_to_reasoning=False,
    )
    tokens = p.explicit(QUERY, INSTRUCTION, REASONING)
    assert len(tokens.ids) == 10
    assert tokens.query_length == 20
    assert tokens.segment_ends == []
    assert tokens.truncated


# --- padding ---------------------------------------------------------------------------------


def test_rows_are_padded_right_to_a_multiple() -> None:
    ids_BT, lengths_B = right_pad([[1, 2, 3], [4], [5] * 5], 9, 4)
    assert ids_BT.dtype == lengths_B.dtype == np.int32
    assert ids_BT.tolist() == [
        [1, 2, 3, 9, 9, 9, 9, 9],
        [4, 9, 9, 9, 9, 9, 9, 9],
        [5, 5, 5, 5, 5, 9, 9, 9],
    ]
    assert lengths_B.tolist() == [3, 1, 5]


def test_padding_stops_at_the_limit() -> None:
    assert right_pad([[1] * 5], 0, 4, max_length=6)[0].shape == (1, 6)
    with pytest.raises(ValueError, match="7 tokens, more than the limit 6"):
        right_pad([[1] * 7], 0, 4, max_length=6)


@pytest.mark.parametrize("rows", [[], [[1], []]])
def test_nothing_to_pad_is_refused(rows) -> None:
    with pytest.raises(ValueError, match="at least one"):
        right_pad(rows, 0, 4)


@pytest.mark.parametrize("truncation", ["content", "sequence"])
def test_a_text_is_read_without_the_white_space_around_it(prompts, truncation) -> None:
    p = prompts(truncation=truncation)
    for text in (QUERY, "word " * 600):
        padded = f" \n\t{text.strip()}\u3000\n\n"
        text = text.strip()
        assert p.query(padded, INSTRUCTION) == p.query(text, INSTRUCTION)
        assert p.document(padded) == p.document(text)
        assert p.document_prompt(padded) == p.document_prompt(text)
        assert p.explicit(padded, INSTRUCTION, REASONING) == p.explicit(
            text, INSTRUCTION, REASONING
        )
    # a chain of thought stays as it is: its line ends close segments
    longer = p.explicit(QUERY, INSTRUCTION, f"{REASONING}\n\n\n\n").ids
    assert len(longer) > len(p.explicit(QUERY, INSTRUCTION, REASONING).ids)
