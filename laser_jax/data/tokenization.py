"""Text to tokens: tokenizers, prompts and the input of the explicit view (design section 1).

The only file that imports `transformers`. A prompt is the filled template, wrapped as a user turn
of the tokenizer's chat template and followed by the thinking suffix. The explicit input is
`[query prompt ; chain of thought ; EOS]`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from laser_jax.alignment import token_segment_ends
from laser_jax.config import BackboneConfig, ConfigError, PromptConfig
from laser_jax.data.control_tokens import TextTokenizer
from laser_jax.data.tokenizer_files import TokenizationError, require_effect, tokenizer_config

_PAD, _TURN_START, _TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_THINK = ("<think>", "</think>")
# Contractions, words with at most one leading sign, single digits, signs with their line ends
# (so ".\n\n" may become one token), line ends, other blanks.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

Tokenizer = PreTrainedTokenizerBase


# --- tokenizers ------------------------------------------------------------------------------


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory. A missing pad token is replaced by EOS.

    Raises:
        FileNotFoundError: no such directory, or no tokenizer file in it.
        TokenizationError: the files do not make a tokenizer, or it has neither pad nor EOS.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory; a tokenizer's is wanted")
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{directory} holds no tokenizer: none of {', '.join(_TOKENIZER_FILES)} is there. "
            "Copy the tokenizer files of the base model into it"
        )
    config = tokenizer_config(directory)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
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


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`, in the manner of Qwen3.

    Its tokens include <|endoftext|> (pad), <|im_start|>, <|im_end|> (EOS), <think> and </think>;
    it has a ChatML chat template. The same texts give the same tokenizer.

    Args:
        texts: few give fewer tokens than asked for. The role names of the chat template are
            counted once for each, since each will be a turn.
        vocab_size: the most tokens it may have, all included.

    Raises:
        TokenizationError: when `vocab_size` cannot hold the 256 bytes and the special tokens.
    """
    special = [_PAD, _TURN_START, _TURN_END]
    smallest = 256 + len(special) + len(_THINK)
    if vocab_size < smallest:
        raise TokenizationError(
            f"a vocabulary of {vocab_size} tokens is too small: the bytes and the special tokens "
            f"take {smallest}"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (part for text in texts for part in (text, "user\n", "assistant\n")),
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(_THINK),
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
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


# --- prompts ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptTokens:
    """The tokens of a query or document prompt."""

    ids: list[int]
    whole_length: int
    """How many tokens there were before a text that did not fit was shortened."""

    @property
    def truncated(self) -> bool:
        return self.whole_length > len(self.ids)


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


class PromptTokenizer:
    """Turns queries, documents and chains of thought into tokens, as `PromptConfig` says.

    BOS is added where the tokenizer adds it, and not again when the chat template renders it.

    Attributes:
        tokenizer, config: as given.
        pad_id, eos_id: the tokenizer's; EOS pads when there is no pad token.

    Raises:
        TokenizationError: when the tokenizer lacks what the config asks of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> None:
        if config.chat_template and not tokenizer.chat_template:
            raise TokenizationError(
                "the tokenizer has no chat template, and base checkpoints often have none: set "
                "prompt.chat_template: false, or give the tokenizer a template"
            )
        if tokenizer.eos_token_id is None:
            raise TokenizationError("the tokenizer has no EOS token; set its eos_token")
        if not tokenizer.is_fast:
            raise TokenizationError(
                f"{type(tokenizer).__name__} is not a fast tokenizer, and the character positions "
                "of tokens are needed; save it with a tokenizer.json"
            )
        self.tokenizer = tokenizer
        self.config = config
        self.eos_id = cast(int, tokenizer.eos_token_id)
        pad_id = cast("int | None", tokenizer.pad_token_id)
        self.pad_id = self.eos_id if pad_id is None else pad_id
        backend: Any = tokenizer.backend_tokenizer
        self._texts = TextTokenizer(backend, allow_special_tokens=config.allow_special_tokens)
        self._separator = self._texts.control(config.separator)
        # under `segmentation: token` it ends a segment, as in the released code
        self._separator_id = next(reversed(self.text_ids(self._separator)), None)
        self._one_string = config.truncation == "sequence" and config.segmentation == "token"
        if config.chat_template:
            self._require_texts_unchanged()

    def query_prompt_text(self, text: str, instruction: str) -> str:
        """The whole query prompt as a string, before any truncation."""
        return self._wrap(query_content(as_read(text), instruction, self.config))

    def document_prompt_text(self, text: str) -> str:
        """The whole document prompt as a string, before any truncation."""
        return self._wrap(_fill(self.config.document_template, {"document": as_read(text)}))

    def query_prompt(self, text: str, instruction: str) -> PromptTokens:
        """The query prompt, at most `query_max_length` tokens. Raises a TokenizationError when the
        templates and the instruction leave no room for the text."""
        return self._prompt(
            lambda shorter: self._query_turn(shorter, instruction), text, "query_max_length"
        )

    def document_prompt(self, text: str) -> PromptTokens:
        """The document prompt, at most `document_max_length` tokens. Raises as `query_prompt`."""
        return self._prompt(self._document_turn, text, "document_max_length")

    def query(self, text: str, instruction: str) -> list[int]:
        """The token ids of `query_prompt`."""
        return self.query_prompt(text, instruction).ids

    def document(self, text: str) -> list[int]:
        """The token ids of `document_prompt`."""
        return self.document_prompt(text).ids

    def text_ids(self, text: str) -> list[int]:
        """The token ids of a text that stands in no prompt; nothing is added to them."""
        return self._texts.encode(text, whole=False).ids

    def explicit(self, text: str, instruction: str, reasoning: str) -> ExplicitTokens:
        """The explicit view's input, at most `explicit_max_length` tokens.

        The query prompt's tokens come first, unchanged; the segments of `reasoning`, cut at the
        separators and each tokenised on its own, follow; EOS (no part of a segment) ends it. With
        `segmentation: token` the reasoning is tokenised whole and cut at separator tokens.

        With `truncation: sequence` as well it is as in the released code: untruncated prompt and
        reasoning are one string, which is cut, and the chain of thought is taken to start at the
        *truncated* query's length, so a long query's tail counts as reasoning. `append_eos` ends
        the cut string; the EOS of `append_eos_to_reasoning`, which the model appends, comes on top.

        Raises:
            TokenizationError: when the query prompt and EOS alone exceed `explicit_max_length`.
        """
        limit, eos = self.config.explicit_max_length, self.config.append_eos_to_reasoning
        query_ids = self.query(text, instruction)
        start = len(query_ids)
        reasoning = reasoning.replace(self.config.separator, self._separator)
        if self._one_string:
            whole = self._cut_sequence(
                self._query_turn(as_read(text), instruction) + reasoning,
                limit,
                self.config.append_eos,
            )
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

    def checksum(self) -> str:
        """A hash of the tokens that this makes of a sample, before any truncation: tells another
        tokenizer, chat template or prompt template from the same one."""
        sample = [
            self._whole(self._query_turn("Öl, 2 μm?", "Find"))[0],
            self._whole(self._document_turn("A"))[0],
            self.text_ids("B.\n\nC"),
            self.eos_id,
        ]
        return hashlib.sha256(repr(sample).encode()).hexdigest()[:16]

    def require_room(self, instructions: Iterable[str], *, explicit: bool) -> None:
        """Checks that a text of any length fits beside the templates, which otherwise shows only
        when the first long text comes.

        Raises:
            TokenizationError: names the limit that is too low.
        """
        endless = "word " * max(self.config.query_max_length, self.config.document_max_length)
        self.document(endless)
        for instruction in instructions:
            self.query(endless, instruction)
            if explicit:
                self.explicit(endless, instruction, endless)

    def _query_turn(self, text: str, instruction: str) -> str:
        return self._filled(self.config.query_template, instruction=instruction, query=text)

    def _document_turn(self, text: str) -> str:
        return self._filled(self.config.document_template, document=text)

    def _filled(self, template: str, **texts: str) -> str:
        """A prompt in which the control tokens that are not of the texts stand under aliases."""
        return self._texts.prompt(lambda values: self._wrap(_fill(template, values)), texts)

    def _wrap(self, content: str) -> str:
        if not self.config.chat_template:
            return content
        try:
            turn = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program of somebody else
            raise TokenizationError(
                f"the tokenizer's chat template fails on a user's turn: {type(error).__name__}: "
                f"{error}. Mend it in chat_template.jinja or tokenizer_config.json, or set "
                "prompt.chat_template: false"
            ) from error
        return f"{turn}{self.config.thinking_suffix}"

    def _require_texts_unchanged(self) -> None:
        """Renders the chat template once. Raises a TokenizationError where it fails, or changes the
        texts, which it is given only as placeholders unless they may hold control tokens."""
        text = ' "It\'s" <b>1 & 2</b>\\\n\nÉa {0}  '
        if self._texts.shown(self._document_turn(as_read(text))) != self.document_prompt_text(text):
            raise TokenizationError(
                "the tokenizer's chat template changes the text of a user's turn, which cannot be "
                "kept apart from control tokens then: set prompt.allow_special_tokens: true, or "
                "prompt.chat_template: false"
            )

    def _prompt(self, render: Callable[[str], str], text: str, limit_key: str) -> PromptTokens:
        text = as_read(text)
        max_length: int = getattr(self.config, limit_key)
        if self.config.truncation == "sequence":
            return self._cut_sequence(render(text), max_length, self.config.append_eos)
        limit = max_length - self.config.append_eos
        ids, _ = self._whole(render(text))
        whole_length = len(self._end(ids, self.config.append_eos))
        if len(ids) > limit:
            ids = self._shorten(render, text, limit, limit_key)
        return PromptTokens(self._end(ids, self.config.append_eos), whole_length)

    def _shorten(
        self, render: Callable[[str], str], text: str, limit: int, limit_key: str
    ) -> list[int]:
        """The prompt of the longest start of `text`, cut between tokens, within `limit` tokens."""
        offsets = self._texts.encode(text, whole=False).offsets
        template_length = len(self._whole(render(""))[0])
        keep = min(limit - template_length, len(offsets))
        while (end := _character_end(offsets, keep)) > 0:
            ids, _ = self._whole(render(text[:end]))
            if len(ids) <= limit:
                return ids
            # Tokens merge differently beside the template; what is over comes off the text.
            keep -= len(ids) - limit
        raise TokenizationError(
            f"prompt.{limit_key} leaves {limit} tokens, and the template (with the instruction) "
            f"alone takes {template_length}: no room for the text {text[:40]!r}"
        )

    def _cut_sequence(self, text: str, max_length: int, eos: bool) -> PromptTokens:
        """Tokenises a finished prompt and cuts its right end off; tokens that the tokenizer itself
        puts at the end stay, as in its own truncation."""
        ids, closing = self._whole(text)
        limit = max_length - eos
        whole_length = len(self._end(ids, eos))
        if len(ids) > limit:
            closing = min(closing, limit)
            ids = ids[: limit - closing] + ids[len(ids) - closing :]
        return PromptTokens(self._end(ids, eos), whole_length)

    def _end(self, ids: list[int], eos: bool) -> list[int]:
        # An empty text without template and BOS has no token whose state could be read: EOS is.
        return [*ids, self.eos_id] if eos or not ids else ids

    def _whole(self, text: str) -> tuple[list[int], int]:
        """The ids of a finished prompt and how many the tokenizer itself put at the end."""
        bos = self._texts.control(cast("str | None", self.tokenizer.bos_token) or "")
        encoding = self._texts.encode(text, whole=not (bos and text.startswith(bos)))
        content = np.flatnonzero(np.equal(encoding.special_tokens_mask, 0))
        ids = encoding.ids
        return ids, len(ids) - 1 - int(content[-1]) if len(content) else 0


def as_read(text: str) -> str:
    """A query or a document as every prompt holds it, whatever file or call it came from: without
    the white space around it, as mteb reads documents. A chain of thought and an instruction stay
    as they are."""
    return text.strip()


def query_content(text: str, instruction: str, config: PromptConfig) -> str:
    """The filled query template, before the chat template."""
    return _fill(config.query_template, {"instruction": instruction, "query": text})


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Fills the known placeholders in one pass: braces elsewhere, texts' own included, stay."""
    return re.sub(
        "|".join(re.escape(f"{{{name}}}") for name in values),
        lambda match: values[match[0][1:-1]],
        template,
    )


def _character_end(offsets: Sequence[tuple[int, int]], keep: int) -> int:
    """Where the first `keep` tokens end in the text; a character of several tokens is not split."""
    while 0 < keep < len(offsets) and offsets[keep][0] < offsets[keep - 1][1]:
        keep -= 1
    return offsets[keep - 1][1] if keep > 0 else 0


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
