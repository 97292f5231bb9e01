"""Texts and written reasonings as rows of tokens for causal-LM training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.struct
import numpy as np

from laser_jax.data.schema import FIELDS
from laser_jax.data.tokenization import PromptTokenizer
from laser_jax.files.reading import DataError, json_lines, json_object, require_unicode

_TEXTS = {*FIELDS, "text", "document", "reasoning"}

Array = Any
"""numpy on the host, jax inside a step; no type says both."""


@dataclass(frozen=True)
class WrittenReasoning:
    """A query or document with the reasoning that the model is to write."""

    text: str
    reasoning: str
    instruction: str | None
    """The query's; None for a document."""


@flax.struct.dataclass
class LanguageRows:
    """Rows of tokens and which of them are predicted."""

    ids_BT: Array
    """int32."""
    predict_BT: Array
    """bool, True at the tokens that count in the loss; never at position 0."""


def read_language_rows(path: str | Path) -> tuple[list[str], list[WrittenReasoning]]:
    """Reads {"text"}, {"prompt", "query", "reasoning" or "reasoning_query"} and
    {"document", "reasoning"} lines; a LaSER training row also gives its passages as plain texts.
    Raises a FileNotFoundError, or a DataError that names file and line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; JSONL texts are wanted")
    texts: dict[str, None] = {}
    reasonings: list[WrittenReasoning] = []
    for where, line in json_lines(path):
        row = json_object(line, where)
        for key in _TEXTS & row.keys():
            _require_unicode_in(row[key], f"{where}: {key}")
        match row:
            case {"text": str(text)}:
                texts[text] = None
            case {"prompt": str(prompt), "query": str(query), "reasoning": str(reasoning)} | {
                "prompt": str(prompt),
                "query": str(query),
                "reasoning_query": str(reasoning),
            }:
                if reasoning.strip():  # some training rows have none, which teaches nothing
                    reasonings.append(WrittenReasoning(query, reasoning, prompt))
                for key in ("positive_passages", "negative_passages"):
                    passages = row.get(key, [])
                    if not isinstance(passages, list) or {*map(type, passages)} - {str}:
                        raise DataError(f"{where}: {key} must be a list of strings")
                    texts |= dict.fromkeys(passages)
            case {"document": str(document), "reasoning": str(reasoning)}:
                reasonings.append(WrittenReasoning(document, reasoning, None))
            case _:
                raise DataError(
                    f'{where}: wanted "text", or "prompt", "query" and "reasoning", or '
                    '"document" and "reasoning" (all strings)'
                )
    if not texts and not reasonings:
        raise DataError(f"{path} holds neither a text nor a reasoning")
    return list(texts), reasonings


def _require_unicode_in(value: Any, what: str) -> None:
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str):
            require_unicode(text, what)


def pack_texts(
    texts: Sequence[str], prompts: PromptTokenizer, length: int, repeats: int
) -> LanguageRows:
    """Plain texts, each ended by EOS, end to end in rows of `length` tokens; all are predicted.
    They stand there `repeats` times, every time in another order."""
    ids = [[*prompts.text_ids(text), prompts.eos_id] for text in texts]
    rng = np.random.default_rng(0)
    stream = [i for _ in range(repeats) for t in rng.permutation(len(ids)) for i in ids[t]]
    padding = -len(stream) % length
    ids_BT = np.asarray(stream + [prompts.pad_id] * padding, np.int32).reshape(-1, length)
    # by count, not by id: EOS is the pad token of some tokenizers
    predict_BT = (np.arange(ids_BT.size) < len(stream)).reshape(ids_BT.shape)
    predict_BT[:, 0] = False
    return LanguageRows(ids_BT, predict_BT)


def reasoning_rows(
    reasonings: Sequence[WrittenReasoning], prompts: PromptTokenizer, length: int
) -> LanguageRows:
    """One [prompt; reasoning; EOS] a row of `length` tokens; reasoning and EOS are predicted.
    Raises a DataError, with the length that would do, where one does not fit."""
    inputs = [_input(item, prompts) for item in reasonings]
    longest = max((len(ids) for ids, _ in inputs), default=0)
    if longest > length:
        raise DataError(
            f"row_length {length} cannot hold the longest prompt with its reasoning: set it to "
            f"{longest} or more, or shorten them with prompt.explicit_max_length"
        )
    ids_BT = np.full((len(reasonings), length), prompts.pad_id, np.int32)
    predict_BT = np.zeros(ids_BT.shape, bool)
    for b, (ids, start) in enumerate(inputs):
        ids_BT[b, : len(ids)] = ids
        predict_BT[b, start : len(ids)] = True
    return LanguageRows(ids_BT, predict_BT)


def _input(item: WrittenReasoning, prompts: PromptTokenizer) -> tuple[list[int], int]:
    """The tokens of prompt, reasoning and EOS, and where the reasoning starts."""
    if item.instruction is not None:
        tokens = prompts.explicit(item.text, item.instruction, item.reasoning)
        return tokens.ids, tokens.query_length
    prompt = prompts.document(item.text)
    return [*prompt, *prompts.text_ids(item.reasoning), prompts.eos_id], len(prompt)
