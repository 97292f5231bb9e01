"""Texts and written reasonings as rows of tokens for causal-LM training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.struct
import numpy as np

from laser_jax.data.schema import DataError
from laser_jax.data.tokenization import PromptTokenizer

Array = Any
"""numpy on the host, jax inside a step; no type says both."""


@dataclass(frozen=True)
class WrittenReasoning:
    """A query with the reasoning that the model is to write."""

    instruction: str
    query: str
    reasoning: str


@flax.struct.dataclass
class LanguageRows:
    """Rows of tokens and which of them are predicted."""

    ids_BT: Array
    """int32."""
    predict_BT: Array
    """bool, True at the tokens that count in the loss; never at position 0."""


def read_language_rows(path: str | Path) -> tuple[list[str], list[WrittenReasoning]]:
    """Reads {"text"} and {"prompt", "query", "reasoning" or "reasoning_query"} lines.

    A LaSER training row also gives its passages as plain texts.

    Raises:
        FileNotFoundError, DataError: names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; JSONL texts are wanted")
    texts: dict[str, None] = {}
    reasonings: list[WrittenReasoning] = []
    with path.open() as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not valid JSON: {error}") from error
            match row:
                case {"text": str(text)}:
                    texts[text] = None
                case {"prompt": str(prompt), "query": str(query), "reasoning": str(reasoning)} | {
                    "prompt": str(prompt),
                    "query": str(query),
                    "reasoning_query": str(reasoning),
                }:
                    reasonings.append(WrittenReasoning(prompt, query, reasoning))
                    for key in ("positive_passages", "negative_passages"):
                        texts |= dict.fromkeys(row.get(key, ()))
                case _:
                    raise DataError(
                        f'{path}:{number}: neither a "text" nor "prompt", "query" and "reasoning" '
                        "(all strings) are there"
                    )
    if not texts and not reasonings:
        raise DataError(f"{path} is empty")
    return list(texts), reasonings


def pack_texts(texts: Sequence[str], prompts: PromptTokenizer, length: int) -> LanguageRows:
    """Plain texts, each ended by EOS, end to end in rows of `length` tokens; all are predicted."""
    stream: list[int] = []
    for text in texts:
        stream += [*prompts.tokenizer(text, add_special_tokens=False)["input_ids"], prompts.eos_id]
    stream += [prompts.pad_id] * (-len(stream) % length)
    ids_BT = np.asarray(stream, np.int32).reshape(-1, length)
    predict_BT = np.ones(ids_BT.shape, bool)
    predict_BT[:, 0] = False
    return LanguageRows(ids_BT, predict_BT & (ids_BT != prompts.pad_id))


def reasoning_rows(
    reasonings: Sequence[WrittenReasoning], prompts: PromptTokenizer, length: int
) -> LanguageRows:
    """One [query prompt; reasoning; EOS] a row of `length` tokens; reasoning and EOS are predicted.

    Raises:
        DataError: when one does not fit; gives the length that would.
    """
    inputs = [prompts.explicit(r.query, r.instruction, r.reasoning) for r in reasonings]
    longest = max((len(tokens.ids) for tokens in inputs), default=0)
    if longest > length:
        raise DataError(
            f"row_length {length} cannot hold the longest query with its reasoning: set it to "
            f"{longest} or more, or shorten them with prompt.explicit_max_length"
        )
    ids_BT = np.full((len(reasonings), length), prompts.pad_id, np.int32)
    predict_BT = np.zeros(ids_BT.shape, bool)
    for b, tokens in enumerate(inputs):
        ids_BT[b, : len(tokens.ids)] = tokens.ids
        predict_BT[b, tokens.query_length : len(tokens.ids)] = True
    return LanguageRows(ids_BT, predict_BT)
