"""The tokenizer of a GGUF file, rebuilt with the rules of the model that it belongs to.

A GGUF file keeps tokens, merges and a name of the rule that cuts a text into words before the
merges ("pre"). The rules below are those of the models' own tokenizer.json files. Where llama.cpp
does otherwise (it does not normalise Qwen's texts to NFC), the model's own rule is taken, since
that is what it was trained with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from laser_jax.data.tokenization import PreTrainedTokenizerFast, TokenizationError
from laser_jax.gguf import GGUFFile

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # values of tokenizer.ggml.token_type

_NUMBERS = {"qwen2": r"\p{N}", "llama-bpe": r"\p{N}{1,3}"}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_gguf_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer of the file, with its special tokens and chat template.

    Raises:
        HFError: a missing or ill-typed key.
        TokenizationError: another kind of tokenizer, or word rules that are not known here.
    """
    kind = file.value("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise TokenizationError(
            f"{file.path}: tokenizer.ggml.model = {kind!r} is not supported, only byte-level BPE "
            "('gpt2'); copy the tokenizer files of the model's Hugging Face directory instead"
        )
    tokens = file.value("tokenizer.ggml.tokens", list)
    kinds = file.value("tokenizer.ggml.token_type", list, [1] * len(tokens))
    merges = [tuple(pair.split(" ")) for pair in file.value("tokenizer.ggml.merges", list)]
    rule = file.value("tokenizer.ggml.pre", str, "default")

    vocabulary = {
        token: id_
        for id_, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind != _UNUSED
    }
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule == "llama-bpe")
    )
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _word_rule(rule, file.path)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == _CONTROL)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    special = _special_tokens(file, tokens)
    tokenizer.post_processor = _post_processor(file, vocabulary, special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_chat_template(file),
        padding_side="left",
        **special,
    )


def _word_rule(rule: str, path: Path) -> Any:
    """What cuts a text into words, by the name that llama.cpp gave the rule."""
    if rule in ("default", "gpt-2"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if rule == "smollm":  # every digit is a word of its own
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if rule in _NUMBERS:
        words = Regex(_WORDS % _NUMBERS[rule])
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(words, behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    known = ["default", "gpt-2", "smollm", *_NUMBERS]
    raise TokenizationError(
        f"{path}: tokenizer.ggml.pre = {rule!r} is not known, only {', '.join(known)}; copy the "
        "tokenizer files of the model's Hugging Face directory instead"
    )


def _special_tokens(file: GGUFFile, tokens: list[str]) -> dict[str, str]:
    """BOS, EOS, padding and unknown token, those that the file names."""
    named = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    special = {}
    for name, key in named.items():
        id_ = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if id_ is not None and not (type(id_) is int and 0 <= id_ < len(tokens)):
            raise TokenizationError(
                f"{file.path}: tokenizer.ggml.{key}_token_id = {id_!r} is none of {len(tokens)} "
                "tokens"
            )
        if id_ is not None:
            special[f"{name}_token"] = tokens[id_]
    return special


def _post_processor(file: GGUFFile, vocabulary: dict[str, int], special: dict[str, str]) -> Any:
    """Adds BOS and EOS where the file says so."""
    wanted = {
        name: special.get(f"{name}_token")
        for name in ("bos", "eos")
        if file.value(f"tokenizer.ggml.add_{name}_token", bool, False)
    }
    if missing := [name for name, token in wanted.items() if token is None]:
        raise TokenizationError(
            f"{file.path}: tokenizer.ggml.add_{missing[0]}_token is set, and "
            f"tokenizer.ggml.{missing[0]}_token_id is missing"
        )
    byte_level = processors.ByteLevel(trim_offsets=False)
    if not wanted:
        return byte_level
    parts = [*([wanted["bos"]] if "bos" in wanted else []), "$A"]
    parts += [wanted["eos"]] if "eos" in wanted else []
    ids = [(token, vocabulary[token]) for token in wanted.values()]
    template = processors.TemplateProcessing(single=parts, special_tokens=ids)
    return processors.Sequence([byte_level, template])


def _chat_template(file: GGUFFile) -> str | None:
    template = file.metadata.get("tokenizer.chat_template")
    return None if template is None else file.value("tokenizer.chat_template", str)
