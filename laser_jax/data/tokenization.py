"""Text to tokens: tokenizers, and the input of the explicit view (design section 1).

The only file of a running laser_jax that imports `transformers`. Prompts are made in `prompts`; the
explicit input is `[query prompt ; chain of thought ; EOS]`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import tokenizers
import transformers
from tokenizers import AddedToken, Regex, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from laser_jax.alignment import token_segment_ends
from laser_jax.config import BackboneConfig, ConfigError, PromptConfig
from laser_jax.data.prompts import Prompts, as_read
from laser_jax.data.tokenizer_files import TokenizationError, require_effect, tokenizer_config
from laser_jax.hf.directory import CONFIG_FILE, RETRIEVER_TYPE, read_object

_PAD, _TURN_START, _TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_THINK = ("<think>", "</think>")
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

Tokenizer = PreTrainedTokenizerBase


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory. A missing pad token is replaced by EOS. Raises a
    FileNotFoundError where no directory or no tokenizer file is there, and a TokenizationError
    where the files do not make a tokenizer, or it has neither pad nor EOS."""
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory; a tokenizer's is wanted")
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{directory} holds no tokenizer: none of {', '.join(_TOKENIZER_FILES)} is there. "
            "Copy the tokenizer files of the base model into it"
        )
    config = tokenizer_config(directory)
    file = directory / CONFIG_FILE
    is_export = file.is_file() and read_object(file).get("model_type") == RETRIEVER_TYPE
    # transformers warns of a type that it does not know, though here it does not need it
    known = {"config": transformers.PreTrainedConfig()} if is_export else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, **known
        )
    except Exception as error:  # tokenizers and transformers raise anything on a damaged file
        raise TokenizationError(
            f"{directory}: the tokenizer does not load: {type(error).__name__}: {error}"
        ) from error
    require_effect(config, tokenizer, directory)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise TokenizationError(
                f"{directory}: the tokenizer has neither a pad token nor an EOS token; set one in "
                "tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def require_embedded_tokens(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str = ""
) -> None:
    """Raises a ConfigError, which begins with `where`, at a tokenizer that makes ids which a model
    of `vocab_size` tokens has no embedding for: it would read NaN there."""
    beyond = {id_: token for token, id_ in tokenizer.get_vocab().items() if id_ >= vocab_size}
    if beyond:
        named = ", ".join(f"{token!r} = {id_}" for id_, token in sorted(beyond.items())[:5])
        raise ConfigError(
            f"{where}the tokenizer has {len(beyond)} token(s) without an embedding, {named}: the "
            f"model's vocab_size is {vocab_size}. They are not of one model, or tokens were "
            "added: take those out (of added_tokens in tokenizer.json; a pad token can be the EOS "
            "token: pad_token in tokenizer_config.json), or give the model a larger embedding"
        )


def load_tokenizer_for(directory: str | Path, backbone: BackboneConfig) -> PreTrainedTokenizerBase:
    """As `load_tokenizer`, and raises as `require_embedded_tokens` does for `backbone`."""
    tokenizer = load_tokenizer(directory)
    require_embedded_tokens(tokenizer, backbone.vocab_size, f"{directory}: ")
    return tokenizer


def word_rule(numbers: str) -> pre_tokenizers.Sequence:
    """How Qwen and Llama 3, which differ in `numbers`, cut a text before merges: contractions,
    words with at most one leading sign, numbers, signs with their line ends (so a full stop and a
    blank line may become one token), line ends, other blanks."""
    words = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), in_bytes])


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`, in the manner of Qwen3.

    Its tokens, at most `vocab_size` in all, include <|endoftext|> (pad), <|im_start|>, <|im_end|>
    (EOS), <think> and </think>; it has a ChatML chat template. The same texts give the same
    tokenizer. The role names of the template are counted once a text, since each will be a turn.
    Raises a TokenizationError when `vocab_size` cannot hold the 256 bytes and the special tokens.
    """
    special = [_PAD, _TURN_START, _TURN_END]
    smallest = 256 + len(special) + len(_THINK)
    if vocab_size < smallest:
        raise TokenizationError(
            f"a vocabulary of {vocab_size} tokens is too small: the bytes and the special tokens "
            f"take {smallest}"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = word_rule(r"\p{N}")
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(_THINK),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    turns = (part for text in texts for part in (text, "user\n", "assistant\n"))
    tokenizer.train_from_iterator(turns, trainer)
    # As in Qwen3: one token each, yet not special, so that decoding shows them.
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in _THINK])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_TURN_END,
        additional_special_tokens=[_TURN_START],
        chat_template=_CHATML,
        padding_side="left",
    )


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a model's config.json repeats of its tokenizer: int ids, None where there is none."""
    names = ("eos_token_id", "bos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name) for name in names}


@dataclass(frozen=True)
class ExplicitTokens:
    """The tokens of an explicit input: query prompt, chain of thought, perhaps EOS."""

    ids: list[int]
    segment_ends: list[int]
    """Positions in `ids` of the last token of every segment; empty for an empty CoT."""
    query_length: int
    """Tokens of the query prompt, which is where the chain of thought starts. In the official mode
    it may lie beyond the end of `ids`."""
    truncated: bool
    """The chain of thought did not fit and was cut."""


class PromptTokenizer(Prompts):
    """Turns chains of thought into tokens too. EOS pads where there is no pad token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> None:
        super().__init__(tokenizer, config)
        pad_id = cast("int | None", tokenizer.pad_token_id)
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self._separator = self._texts.control(config.separator)
        # under `segmentation: token` it ends a segment, as in the released code
        self._separator_id = next(reversed(self.text_ids(self._separator)), None)

    def explicit(self, text: str, instruction: str, reasoning: str) -> ExplicitTokens:
        """The explicit view's input, at most `explicit_max_length` tokens.

        The query prompt's tokens come first, unchanged; the segments of `reasoning`, cut at the
        separators and each tokenised on its own, follow; EOS (no part of a segment) ends it. With
        `segmentation: token` the reasoning is tokenised whole and cut at separator tokens.

        With `truncation: sequence` as well it is as in the released code: untruncated prompt and
        reasoning are one string, which is cut, and the chain of thought is taken to start at the
        *truncated* query's length, so a long query's tail counts as reasoning. `append_eos` ends
        the cut string; the EOS of `append_eos_to_reasoning`, which the model appends, comes on top.
        Raises a TokenizationError when the query prompt and EOS alone exceed `explicit_max_length`.
        """
        limit, eos = self.config.explicit_max_length, self.config.append_eos_to_reasoning
        query_ids = self.query(text, instruction)
        start = len(query_ids)
        reasoning = reasoning.replace(self.config.separator, self._separator)
        if self.config.one_string:
            one = self._query_turn(as_read(text), instruction) + reasoning
            whole = self._cut_sequence(one, limit, self.config.append_eos)
            ends = token_segment_ends(whole.ids, start, self._separator_id)
            ids = whole.ids + [self.eos_id] * eos
            return ExplicitTokens(ids, ends, start, whole.truncated)

        room = limit - start - eos
        if room < 0:
            raise TokenizationError(
                f"prompt.explicit_max_length {limit} cannot hold a query of {start} tokens"
                f"{' and EOS' if eos else ''}; raise it, or lower prompt.query_max_length"
            )
        by_text = self.config.segmentation == "text"
        ids, ends, truncated = list(query_ids), [], False
        *closed, tail = reasoning.split(self._separator) if by_text else [reasoning]
        for segment in [*(part + self._separator for part in closed), tail]:
            segment_ids = self.text_ids(segment)
            kept = segment_ids[: room - (len(ids) - start)]
            truncated |= len(kept) < len(segment_ids)
            ids += kept
            if kept:
                ends.append(len(ids) - 1)
        if not by_text:
            ends = token_segment_ends(ids, start, self._separator_id)
        return ExplicitTokens(ids + [self.eos_id] * eos, ends, start, truncated)

    def require_room(self, instructions: Iterable[str], *, explicit: bool) -> None:
        """Raises a TokenizationError that names a limit too low for a text of any length beside the
        templates, which otherwise shows only when the first long text comes."""
        endless = "word " * max(self.config.query_max_length, self.config.document_max_length)
        self.document(endless)
        for instruction in instructions:
            self.query(endless, instruction)
            if explicit:
                self.explicit(endless, instruction, endless)


def right_pad(
    rows: Sequence[Sequence[int] | np.ndarray],
    pad_id: int,
    multiple: int,
    max_length: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """B rows of tokens as one right-padded array: ids_BT int32 and lengths_B int32.

    T is the longest row's length rounded up to a multiple of `multiple`, but not beyond
    `max_length`. Raises a ValueError for no rows, an empty row, or one longer than `max_length`.
    """
    lengths_B = np.array([len(row) for row in rows], np.int32)
    if not rows or lengths_B.min() == 0:
        raise ValueError("at least one row is wanted, and at least one token in each")
    longest = int(lengths_B.max())
    width = -(-longest // multiple) * multiple
    if max_length is not None:
        if longest > max_length:
            raise ValueError(f"a row has {longest} tokens, more than the limit {max_length}")
        width = min(width, max_length)
    ids_BT = np.full((len(rows), width), pad_id, np.int32)
    for row, ids in enumerate(rows):
        ids_BT[row, : len(ids)] = ids
    return ids_BT, lengths_B
