"""Queries and documents as prompts, and prompts as tokens.

A prompt is the filled template, wrapped as a user turn of the tokenizer's chat template and
followed by the thinking suffix. `laser_jax.export` copies this file into models that others load,
so that they read what was read in training.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from laser_jax.config import PromptConfig
from laser_jax.data.control_tokens import TextTokenizer
from laser_jax.data.tokenizer_files import TokenizationError


@dataclass(frozen=True)
class PromptTokens:
    """The tokens of a query or document prompt."""

    ids: list[int]
    whole_length: int
    """How many tokens there were before a text that did not fit was shortened."""

    @property
    def truncated(self) -> bool:
        return self.whole_length > len(self.ids)


class Prompts:
    """Turns queries and documents into tokens of a tokenizer of transformers, as `PromptConfig`
    says. BOS is added where the tokenizer adds it, and not again when the chat template renders it.
    Raises a TokenizationError where the tokenizer lacks what the config asks of it."""

    def __init__(self, tokenizer: Any, config: PromptConfig) -> None:
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
        self.tokenizer, self.config = tokenizer, config
        self.eos_id: int = tokenizer.eos_token_id
        allow = config.allow_special_tokens
        self._texts = TextTokenizer(tokenizer.backend_tokenizer, allow_special_tokens=allow)
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
        turn = functools.partial(self._query_turn, instruction=instruction)
        return self._prompt(turn, text, "query_max_length")

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
        text, eos = as_read(text), self.config.append_eos
        max_length: int = getattr(self.config, limit_key)
        if self.config.truncation == "sequence":
            return self._cut_sequence(render(text), max_length, eos)
        limit = max_length - eos
        ids, _ = self._whole(render(text))
        whole_length = len(self._end(ids, eos))
        if len(ids) > limit:
            ids = self._shorten(render, text, limit, limit_key)
        return PromptTokens(self._end(ids, eos), whole_length)

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
        bos = self._texts.control(self.tokenizer.bos_token or "")
        whole = self.config.add_special_tokens and not (bos and text.startswith(bos))
        encoding = self._texts.encode(text, whole=whole)
        special = encoding.special_tokens_mask
        return encoding.ids, special[::-1].index(0) if 0 in special else 0


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
