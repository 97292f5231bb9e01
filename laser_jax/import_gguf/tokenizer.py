"""The tokenizer of a GGUF file, rebuilt with the rules of the model that it belongs to.

A GGUF file keeps tokens, merges and a name of the rule that cuts a text into words before the
merges ("pre"). The rules below are those of the models' own tokenizer.json files, also where
llama.cpp does otherwise (it does not normalise Qwen's texts to NFC).
"""

from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from laser_jax.data.tokenization import PreTrainedTokenizerFast, TokenizationError, word_rule
from laser_jax.import_gguf.file import GGUFFile

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # tokenizer.ggml.token_type

_GPT2_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
_DIGITS = pre_tokenizers.Digits(individual_digits=True)
# By llama.cpp's name. "default", and no name at all, say that its converter did not know the model.
_WORD_RULES = {
    "gpt-2": _GPT2_WORDS,
    "smollm": pre_tokenizers.Sequence([_DIGITS, _GPT2_WORDS]),
    "qwen2": word_rule(r"\p{N}"),
    "llama-bpe": word_rule(r"\p{N}{1,3}"),
}


def read_gguf_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer of the file, with its special tokens and chat template. Raises
    an HFError at a missing or ill-typed key, and a TokenizationError at another kind of tokenizer,
    word rules that are not known here, or tokens and merges that do not belong together."""
    kind = file.value("tokenizer.ggml.model", str)
    rule = file.value("tokenizer.ggml.pre", str, "default")
    for key, value, known in (("model", kind, ["gpt2"]), ("pre", rule, [*_WORD_RULES])):
        if value not in known:
            raise TokenizationError(
                f"{file.path}: tokenizer.ggml.{key} = {value!r} is not supported, only byte-level "
                f"BPE with rules that are known exactly: {', '.join(known)}. Take a file of "
                "another model, or the model's Hugging Face directory"
            )
    tokens, kinds, vocabulary = _vocabulary(file)
    is_llama3 = rule == "llama-bpe"
    model = models.BPE(vocabulary, _merges(file, vocabulary), ignore_merges=is_llama3)
    tokenizer = tokenizers.Tokenizer(model)
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _WORD_RULES[rule]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    special = _special_tokens(file, tokens)
    tokenizer.post_processor = _post_processor(file, vocabulary, special, is_llama3)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=file.value("tokenizer.chat_template", str, "") or None,
        padding_side="left",
        **special,
    )


def _vocabulary(file: GGUFFile) -> tuple[list[str], list[int], dict[str, int]]:
    """All tokens, their kinds, and the ids of those that are used."""
    tokens = file.values("tokenizer.ggml.tokens", str)
    kinds = file.values("tokenizer.ggml.token_type", int, [_NORMAL] * len(tokens))
    if len(kinds) != len(tokens):
        raise TokenizationError(
            f"{file.path}: {len(tokens)} tokenizer.ggml.tokens, and {len(kinds)} of their "
            "tokenizer.ggml.token_type"
        )
    vocabulary: dict[str, int] = {}
    for id_, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind != _UNUSED and vocabulary.setdefault(token, id_) != id_:
            raise TokenizationError(
                f"{file.path}: tokenizer.ggml.tokens {vocabulary[token]} and {id_} are both "
                f"{token!r}"
            )
    return tokens, kinds, vocabulary


def _merges(file: GGUFFile, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of tokens that become one, the first ones first."""
    merges = []
    for number, line in enumerate(file.values("tokenizer.ggml.merges", str)):
        left, _, right = line.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise TokenizationError(
                f"{file.path}: tokenizer.ggml.merges {number}, {line!r}, is no pair of tokens that "
                "make a third"
            )
        merges.append((left, right))
    return merges


def _special_tokens(file: GGUFFile, tokens: list[str]) -> dict[str, str]:
    """BOS, EOS, padding and unknown token, those that the file names."""
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        key = f"tokenizer.ggml.{key}_token_id"
        if key not in file.metadata:
            continue
        id_ = file.value(key, int)
        if not 0 <= id_ < len(tokens):
            raise TokenizationError(f"{file.path}: {key} = {id_} is none of {len(tokens)} tokens")
        special[f"{name}_token"] = tokens[id_]
    return special


def _post_processor(
    file: GGUFFile, vocabulary: dict[str, int], special: dict[str, str], is_llama3: bool
) -> Any:
    """Puts BOS and EOS around a text; by llama.cpp's default, BOS where it is a Llama 3."""
    parts, ids = ["$A"], []
    for name, default in (("bos", is_llama3), ("eos", False)):
        if not file.value(f"tokenizer.ggml.add_{name}_token", bool, default):
            continue
        token = special.get(f"{name}_token")
        if token not in vocabulary:
            raise TokenizationError(
                f"{file.path}: every text gets a token in tokenizer.ggml.add_{name}_token, and "
                f"tokenizer.ggml.{name}_token_id names none that is used"
            )
        parts.insert(0 if name == "bos" else len(parts), token)
        ids.append((token, vocabulary[token]))
    byte_level = processors.ByteLevel(trim_offsets=False)
    if not ids:
        return byte_level
    template = processors.TemplateProcessing(single=parts, special_tokens=ids)
    return processors.Sequence([byte_level, template])
