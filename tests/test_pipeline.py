"""Batches of training rows: what is drawn, in which order, and what is contrasted."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from laser_jax.alignment import keyframe_positions
from laser_jax.config import DataConfig, PromptConfig
from laser_jax.data.pipeline import Batch, contrast, draw_example, training_batches
from laser_jax.data.schema import DataError, TrainingRow
from laser_jax.data.tokenization import ExplicitTokens, PromptTokenizer, train_tokenizer

ROWS = [
    TrainingRow(
        query=f"query {n}",
        reasoning_query="" if n == 3 else f"first of {n}.\n\nsecond.\n\n" * (n + 1),
        prompt="find it",
        positive_passages=tuple(f"positive {n} {p}" for p in range(1 + n % 3)),
        negative_passages=tuple(f"negative {n} {p}" for p in range(1 + n % 2)),
    )
    for n in range(7)
]
DATA = DataConfig(group_size=3, length_multiple=8)
SETTINGS: dict[str, Any] = {
    "num_steps": 3,
    "keyframes": "paper",
    "batch_size": 3,
    "seed": 5,
    "need_explicit": True,
}


@pytest.fixture(scope="module")
def prompts() -> PromptTokenizer:
    texts = [text for row in ROWS for text in (row.query, row.reasoning_query)]
    return PromptTokenizer(train_tokenizer(texts, 300), PromptConfig())


def take(batches, n: int) -> list[Batch]:
    return list(itertools.islice(batches, n))


def assert_equal(left: Any, right: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


def rows_of(tokens) -> list[list[int]]:
    return [ids[:n].tolist() for ids, n in zip(tokens.ids_BT, tokens.lengths_B, strict=True)]


def queries_of(batches, prompts) -> list[int]:
    known = [prompts.query(row.query, row.prompt) for row in ROWS]
    return [known.index(ids) for batch in batches for ids in rows_of(batch.query)]


# --- what is drawn ---------------------------------------------------------------------------


def draw(row: TrainingRow, data: DataConfig = DATA, **settings: int):
    settings = {"min_reasoning_characters": 5, "seed": 0, "epoch": 0, "row_index": 0, **settings}
    return draw_example(row, data, **settings)


def test_official_selection_takes_positive_epoch_mod_n_and_the_first_negatives() -> None:
    row = replace(ROWS[5], negative_passages=("a", "b", "c"))
    documents = [draw(row, epoch=epoch).documents for epoch in range(4)]
    assert [d[0] for d in documents] == [row.positive_passages[e % 3] for e in range(4)]
    assert all(d[1:] == ("a", "b") for d in documents)


def test_too_few_negatives_repeat_in_turn() -> None:
    row = replace(ROWS[0], negative_passages=("a", "b"))
    example = draw(row, replace(DATA, group_size=6))
    assert example.documents[1:] == ("a", "b", "a", "b", "a")


def test_random_selection_depends_on_seed_epoch_and_row_and_nothing_else() -> None:
    row = replace(ROWS[5], negative_passages=tuple("abcdefgh"))
    data = replace(DATA, selection="random")

    def drawn(**settings: int) -> list[tuple[str, ...]]:
        return [draw(row, data, **{"epoch": e, **settings}).documents for e in range(12)]

    assert drawn() == drawn()
    assert len(set(drawn())) > 6
    assert drawn() != drawn(seed=1)
    assert drawn() != drawn(row_index=1)
    assert {d[0] for d in drawn()} == set(row.positive_passages)
    assert all(len(set(d)) == 3 for d in drawn())


def test_a_short_chain_of_thought_is_replaced_by_the_query() -> None:
    assert draw(replace(ROWS[0], reasoning_query="1234")).reasoning == "query 0"
    assert draw(replace(ROWS[0], reasoning_query="12345")).reasoning == "12345"


def test_a_row_without_negatives_is_refused_before_training(prompts) -> None:
    rows = [*ROWS[:2], replace(ROWS[2], negative_passages=())]
    with pytest.raises(DataError, match=r"row 3 \(query 'query 2'\) has no negative_passages"):
        training_batches(rows, prompts, DATA, **SETTINGS)
    alone = training_batches(rows, prompts, replace(DATA, group_size=1), **SETTINGS)
    assert next(iter(alone)).documents.ids_BT.shape[0] == 3


def test_no_rows_are_refused(prompts) -> None:
    with pytest.raises(DataError, match="no training rows"):
        training_batches([], prompts, DATA, **SETTINGS)


# --- what a batch holds ----------------------------------------------------------------------


def test_a_batch_holds_the_tokens_of_its_rows(prompts) -> None:
    batch = next(iter(training_batches(ROWS, prompts, DATA, **SETTINGS)))
    chosen = [ROWS[i] for i in queries_of([batch], prompts)]
    examples = [draw(row) for row in chosen]
    assert rows_of(batch.documents) == [prompts.document(d) for e in examples for d in e.documents]
    explicit = [prompts.explicit(e.query, e.instruction, e.reasoning) for e in examples]
    assert batch.explicit is not None
    assert batch.keyframes_BK is not None
    assert rows_of(batch.explicit) == [tokens.ids for tokens in explicit]
    assert batch.keyframes_BK.dtype == np.int32
    assert batch.keyframes_BK.tolist() == [
        keyframe_positions(t.segment_ends, len(t.ids) - 1, 3, "paper").tolist() for t in explicit
    ]
    for tokens in (batch.query, batch.documents, batch.explicit):
        assert tokens.ids_BT.shape[1] % 8 == 0
        assert tokens.ids_BT.shape[1] - tokens.lengths_B.max() < 8


def test_padding_holds_the_pad_token(prompts) -> None:
    batch = next(iter(training_batches(ROWS, prompts, DATA, **SETTINGS)))
    assert batch.explicit is not None
    for tokens in (batch.query, batch.documents, batch.explicit):
        beyond_BT = np.arange(tokens.ids_BT.shape[1]) >= tokens.lengths_B[:, None]
        assert (tokens.ids_BT[beyond_BT] == prompts.pad_id).all()


class RecordingTokenizer(PromptTokenizer):
    """Records which documents and explicit inputs are tokenised."""

    def __init__(self, prompts: PromptTokenizer) -> None:
        super().__init__(prompts.tokenizer, prompts.config)
        self.documents: list[str] = []
        self.reasonings: list[str] = []

    def document(self, text: str) -> list[int]:
        self.documents.append(text)
        return super().document(text)

    def explicit(self, text: str, instruction: str, reasoning: str) -> ExplicitTokens:
        self.reasonings.append(reasoning)
        return super().explicit(text, instruction, reasoning)


def test_without_explicit_view_no_chain_of_thought_is_tokenised(prompts) -> None:
    recording = RecordingTokenizer(prompts)
    settings = {**SETTINGS, "need_explicit": False}
    batch = next(iter(training_batches(ROWS, recording, DATA, **settings, num_threads=0)))
    assert batch.explicit is None
    assert batch.keyframes_BK is None
    assert recording.documents
    assert not recording.reasonings


def test_every_text_is_tokenised_once(prompts) -> None:
    recording = RecordingTokenizer(prompts)
    batches = training_batches(ROWS, recording, DATA, **SETTINGS, num_threads=0)
    recording.documents.clear()  # of the check that there is room beside the templates
    recording.reasonings.clear()
    take(batches, 20)
    passages = [text for r in ROWS for text in (*r.positive_passages, *r.negative_passages)]
    assert sorted(recording.documents) == sorted(passages)
    assert len(recording.reasonings) == len(ROWS)


# --- false negatives -------------------------------------------------------------------------


def test_own_positives_are_not_contrasted_except_the_designated_one() -> None:
    shared = replace(ROWS[1], positive_passages=("x", "y"), negative_passages=("n", "y"))
    other = replace(ROWS[2], positive_passages=("y",), negative_passages=("x", "m"))
    examples = [draw(shared), draw(other)]
    assert [e.documents for e in examples] == [("x", "n", "y"), ("y", "x", "m")]
    assert contrast(examples, True).tolist() == [
        [True, True, False, False, False, True],
        [True, True, False, True, True, True],
    ]
    assert contrast(examples, False).all()


def test_a_row_that_meets_itself_in_a_batch_does_not_contrast_its_positive(prompts) -> None:
    batch = next(iter(training_batches(ROWS[:1], prompts, DATA, **SETTINGS)))
    positives_BB = batch.contrast_BC[:, ::3]
    np.testing.assert_array_equal(positives_BB, np.eye(3, dtype=bool))
    off = replace(DATA, mask_false_negatives=False)
    assert next(iter(training_batches(ROWS[:1], prompts, off, **SETTINGS))).contrast_BC.all()


# --- order and resumption --------------------------------------------------------------------


def test_the_same_arguments_give_the_same_batches(prompts) -> None:
    for threads in (0, 2, 4):
        first, second = (
            take(training_batches(ROWS, prompts, DATA, **SETTINGS, num_threads=n), 8)
            for n in (1, threads)
        )
        assert_equal(first, second)


def test_another_seed_gives_another_order(prompts) -> None:
    one, two = (
        queries_of(
            take(training_batches(ROWS, prompts, DATA, **{**SETTINGS, "seed": s}), 7), prompts
        )
        for s in (5, 6)
    )
    assert one != two


def test_every_epoch_has_every_row_once_in_a_new_order(prompts) -> None:
    order = queries_of(take(training_batches(ROWS, prompts, DATA, **SETTINGS), 14), prompts)
    epochs = [tuple(order[i : i + 7]) for i in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 1


def test_epochs_turn_the_positives_although_batches_cross_them(prompts) -> None:
    batches = take(training_batches(ROWS, prompts, DATA, **SETTINGS), 14)
    order = queries_of(batches, prompts)
    positives = [ids for batch in batches for ids in rows_of(batch.documents)[::3]]
    for index, (row, ids) in enumerate(zip(order, positives, strict=True)):
        own = ROWS[row].positive_passages
        assert ids == prompts.document(own[(index // 7) % len(own)])


@pytest.mark.parametrize("selection", ["official", "random"])
def test_a_restored_iterator_goes_on_exactly(prompts, selection) -> None:
    data = replace(DATA, selection=selection)
    iterator = iter(training_batches(ROWS, prompts, data, **SETTINGS))
    take(iterator, 4)
    state = iterator.get_state()
    expected = take(iterator, 6)
    fresh = iter(training_batches(ROWS, prompts, data, **SETTINGS))
    fresh.set_state(state)
    assert_equal(take(fresh, 6), expected)
