"""Training rows to batches: selection of passages, tokenisation, padding, iteration with grain.

B queries, G documents a query, C = B G documents a batch, K thinking steps, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.struct
import grain
import numpy as np

from laser_jax.alignment import keyframe_positions
from laser_jax.config import DataConfig, KeyframeRule
from laser_jax.data.schema import DataError, TrainingRow
from laser_jax.data.tokenization import ExplicitTokens, PromptTokenizer, right_pad

Array = Any
"""numpy on the host, jax inside a step; no type says both."""


@flax.struct.dataclass
class Tokens:
    """Right-padded rows of tokens."""

    ids_BT: Array
    """int32."""
    lengths_B: Array
    """int32, the real tokens of each row."""


@flax.struct.dataclass
class Batch:
    """What one optimizer step reads."""

    query: Tokens
    """B rows."""
    documents: Tokens
    """C = B G rows; row i G is the positive of query i, its hard negatives follow."""
    explicit: Tokens | None
    """B rows; None where the objective has no explicit view."""
    keyframes_BK: Array | None
    """int32 token positions in `explicit` of the states that teach the K thinking steps."""
    contrast_BC: Array
    """bool, True where document c is contrasted with query b. False at a passage that is one of the
    query's own positives, unless c is the query's designated positive b G."""


@dataclass(frozen=True)
class Example:
    """What one epoch draws from one row: texts, not yet in any template."""

    query: str
    instruction: str
    reasoning: str
    documents: tuple[str, ...]
    """G passages, the positive first."""
    positives: frozenset[str]
    """All positives of the row."""


def draw_example(
    row: TrainingRow,
    data: DataConfig,
    *,
    min_reasoning_characters: int,
    seed: int,
    epoch: int,
    row_index: int,
) -> Example:
    """Draws one positive and G - 1 hard negatives and settles the chain of thought.

    `official` takes positive `epoch mod n` and the first negatives; `random` draws both from a
    generator seeded by (seed, epoch, row_index). Too few negatives repeat in turn. A chain of
    thought below `min_reasoning_characters` is replaced by the query.

    Raises:
        DataError: when negatives are wanted and the row has none; names the row, counted from 1.
    """
    num_negatives = data.group_size - 1
    _require_negatives(row, row_index, data)
    positive = epoch % len(row.positive_passages)
    order = np.arange(len(row.negative_passages))
    if data.selection == "random":
        generator = np.random.default_rng((seed, epoch, row_index))
        positive = int(generator.integers(len(row.positive_passages)))
        order = generator.permutation(order)
    negatives = (row.negative_passages[order[i % len(order)]] for i in range(num_negatives))
    long_enough = len(row.reasoning_query) >= min_reasoning_characters
    return Example(
        query=row.query,
        instruction=row.prompt,
        reasoning=row.reasoning_query if long_enough else row.query,
        documents=(row.positive_passages[positive], *negatives),
        positives=frozenset(row.positive_passages),
    )


def _require_negatives(row: TrainingRow, row_index: int, data: DataConfig) -> None:
    if data.group_size > 1 and not row.negative_passages:
        raise DataError(
            f"row {row_index + 1} (query {row.query[:60]!r}) has no negative_passages, and "
            f"data.group_size {data.group_size} wants {data.group_size - 1}; set "
            "data.group_size: 1, or mine negatives"
        )


class _BatchBuilder:
    """Makes a `Batch` of `Example`s. Epochs repeat, so every distinct text is tokenised once."""

    def __init__(
        self,
        prompts: PromptTokenizer,
        data: DataConfig,
        num_steps: int,
        keyframes: KeyframeRule,
        need_explicit: bool,
    ) -> None:
        self._prompts = prompts
        self._data = data
        self._num_steps = num_steps
        self._keyframes: KeyframeRule = keyframes
        self._need_explicit = need_explicit
        # Threads share these; at worst two tokenise the same text to the same tokens.
        self._queries: dict[tuple[str, str], np.ndarray] = {}
        self._documents: dict[str, np.ndarray] = {}
        self._explicit: dict[tuple[str, str, str], tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, examples: Sequence[Example]) -> Batch:
        config = self._prompts.config
        explicit, keyframes_BK = None, None
        if self._need_explicit:
            inputs = [self._explicit_input(example) for example in examples]
            explicit = self._pad([ids for ids, _ in inputs], None)
            keyframes_BK = np.stack([keyframes_K for _, keyframes_K in inputs])
        documents = [text for example in examples for text in example.documents]
        return Batch(
            query=self._pad([self._query(e) for e in examples], config.query_max_length),
            documents=self._pad([self._document(t) for t in documents], config.document_max_length),
            explicit=explicit,
            keyframes_BK=keyframes_BK,
            contrast_BC=contrast(examples, self._data.mask_false_negatives),
        )

    def _query(self, example: Example) -> np.ndarray:
        key = (example.query, example.instruction)
        if key not in self._queries:
            self._queries[key] = np.array(self._prompts.query(*key), np.int32)
        return self._queries[key]

    def _document(self, text: str) -> np.ndarray:
        if text not in self._documents:
            self._documents[text] = np.array(self._prompts.document(text), np.int32)
        return self._documents[text]

    def _explicit_input(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        key = (example.query, example.instruction, example.reasoning)
        if key not in self._explicit:
            tokens: ExplicitTokens = self._prompts.explicit(*key)
            keyframes_K = keyframe_positions(
                tokens.segment_ends, len(tokens.ids) - 1, self._num_steps, self._keyframes
            )
            self._explicit[key] = np.array(tokens.ids, np.int32), keyframes_K
        return self._explicit[key]

    def _pad(self, rows: list[np.ndarray], max_length: int | None) -> Tokens:
        return Tokens(
            *right_pad(rows, self._prompts.pad_id, self._data.length_multiple, max_length)
        )


def contrast(examples: Sequence[Example], mask_false_negatives: bool) -> np.ndarray:
    """Which documents of the batch are contrasted with which query.

    Returns:
        [B, C] bool. All True without `mask_false_negatives`; with it, False where document c is one
        of query b's positives, its designated positive (c = b G) excepted.
    """
    documents = [text for example in examples for text in example.documents]
    contrast_BC = np.ones((len(examples), len(documents)), bool)
    if mask_false_negatives:
        for b, example in enumerate(examples):
            contrast_BC[b] = [text not in example.positives for text in documents]
            contrast_BC[b, b * len(example.documents)] = True
    return contrast_BC


def training_batches(
    rows: Sequence[TrainingRow],
    prompt_tokenizer: PromptTokenizer,
    data: DataConfig,
    *,
    num_steps: int,
    keyframes: KeyframeRule,
    batch_size: int,
    seed: int,
    need_explicit: bool,
    num_threads: int = 2,
    prefetch: int = 4,
) -> grain.IterDataset[Batch]:
    """Endless batches of `batch_size` queries, the same for the same arguments.

    Every epoch goes through all rows in an order of its own; the last batch of an epoch is filled
    from the next, so no row is dropped. The iterator's `get_state` and `set_state` resume exactly.

    Args:
        rows: the training rows, at least one.
        prompt_tokenizer: makes the tokens.
        data: group size, selection, masking, padding.
        num_steps: K of `keyframes_BK`.
        keyframes: which segments teach which step.
        batch_size: B.
        seed: of the order and of random selection, in [0, 2^32).
        need_explicit: False leaves `explicit` and `keyframes_BK` None.
        num_threads, prefetch: threads that build batches, and how many batches ahead.

    Raises:
        DataError: no rows, or a row without negatives though `data.group_size` is above 1.
        TokenizationError: a limit of the prompts leaves no room for a text.
    """
    if not rows:
        raise DataError("there are no training rows")

    def draw(epoch: int, row_index: int) -> Example:
        return draw_example(
            rows[row_index],
            data,
            min_reasoning_characters=prompt_tokenizer.config.min_reasoning_characters,
            seed=seed,
            epoch=epoch,
            row_index=row_index,
        )

    for row_index, row in enumerate(rows):
        _require_negatives(row, row_index, data)  # now, not hours into the run
    prompt_tokenizer.require_room({row.prompt for row in rows}, explicit=need_explicit)
    build = _BatchBuilder(prompt_tokenizer, data, num_steps, keyframes, need_explicit)
    return (
        grain.MapDataset.range(len(rows))
        .seed(seed)
        .shuffle()
        .repeat()
        .map_with_index(lambda index, row_index: draw(index // len(rows), row_index))
        .batch(batch_size, batch_fn=list)
        .map(build)
        .to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch))
    )
