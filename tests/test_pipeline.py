"""Batches of training rows: what is drawn, in which order, and what is contrasted."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rows_in_memory import RowsSource

from laser_jax.alignment import keyframe_positions
from laser_jax.batch import Batch
from laser_jax.config import (
    Config,
    DataConfig,
    LossWeights,
    MixtureSource,
    ModelConfig,
    ObjectiveConfig,
    PromptConfig,
    TrainConfig,
)
from laser_jax.data.pipeline import (
    SampleOrder,
    contrast,
    draw_example,
    training_batches,
)
from laser_jax.data.schema import DataError, TrainingRow
from laser_jax.data.sources import describe_row
from laser_jax.data.tokenization import (
    ExplicitTokens,
    PromptTokenizer,
    TokenizationError,
    train_tokenizer,
)

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
SOURCE = RowsSource(ROWS)
DATA = DataConfig(train="rows", group_size=3, length_multiple=8)
LATENT_ALONE: dict[str, Any] = {"weights": LossWeights(explicit=0.0, output=0.0, trajectory=0.0)}
SCORED: dict[str, Any] = {"weights": LossWeights(teacher=1.0)}


def config_of(
    data: DataConfig = DATA,
    batch_size: int = 3,
    seed: int = 5,
    micro_batches: int = 1,
    **objective: Any,
) -> Config:
    train = TrainConfig(batch_size, batch_size // micro_batches, seed=seed)
    return Config(ModelConfig(path="x"), data, train=train, objective=ObjectiveConfig(**objective))


@pytest.fixture(scope="module")
def prompts() -> PromptTokenizer:
    texts = [text for row in ROWS for text in (row.query, row.reasoning_query)]
    return PromptTokenizer(train_tokenizer(texts, 300), PromptConfig())


def batches_of(prompts, n: int, sources=(SOURCE,), data: DataConfig = DATA, **settings):
    """The first n batches; `settings` are of `config_of` and of `training_batches`."""
    names = ("first_batch", "part", "shards")
    place = {key: settings.pop(key) for key in names if key in settings}
    config = config_of(data, **settings)
    return list(itertools.islice(training_batches(sources, prompts, config, **place), n))


def assert_equal(left: Any, right: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


def digest(batch: Batch) -> str:
    """Changes with any value, shape or dtype of the batch."""
    sha = hashlib.sha256()
    for array in jax.tree.leaves(batch):
        sha.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return sha.hexdigest()


def rows_of(tokens) -> list[list[int]]:
    return [ids[:n].tolist() for ids, n in zip(tokens.ids_BT, tokens.lengths_B, strict=True)]


def queries_of(batches) -> list[int]:
    return [int(row) for batch in batches for row in batch.rows_B]


# --- packs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("shards", "parts"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_packs_hold_every_micro_batch_of_every_device(prompts, shards: int, parts: int) -> None:
    data = replace(DATA, pack=True)
    settings = {"batch_size": 12, "shards": shards, "micro_batches": parts, "views": "parity"}
    for batch in batches_of(prompts, 3, data=data, **settings):
        assert batch.explicit is not None
        for tokens, group in ((batch.query, 1), (batch.documents, 3), (batch.explicit, 1)):
            assert tokens.packed is not None
            packs, places, of_parts = tokens.packed
            assert (packs, of_parts) == (shards, parts)
            fullest = max(
                sum(
                    int(tokens.lengths_B[q * group + g])
                    for q in range(device * 12 // shards, (device + 1) * 12 // shards)
                    if q % parts == part
                    for g in range(group)
                )
                for device in range(shards)
                for part in range(parts)
            )
            assert fullest <= places < fullest + max(fullest / 4, 8)
    [shared] = batches_of(prompts, 1, data=data)
    assert shared.query.packed is None  # it is read within the explicit input
    part = batches_of(prompts, 1, data=data, part=np.array([0, 2]))[0]
    assert part.documents.packed == shared.documents.packed


# --- what is drawn ---------------------------------------------------------------------------


def draw(row: TrainingRow, data: DataConfig = DATA, **settings: int):
    settings = {"min_reasoning_characters": 5, "seed": 0, "epoch": 0, "row_index": 0, **settings}
    return draw_example(row, data, **settings)


def test_a_pack_of_a_single_token_has_room() -> None:
    prompt = PromptConfig(chat_template=False, query_template="{query}")
    bare = PromptTokenizer(train_tokenizer(["a"], 300), prompt)
    source, data = RowsSource([TrainingRow("a", "", "", ("b",), ())]), replace(DATA, pack=True)
    data = replace(data, group_size=1)
    [batch] = batches_of(bare, 1, (source,), data, batch_size=1, **LATENT_ALONE)
    assert (batch.query.lengths_B.tolist(), batch.query.packed) == ([1], (1, 8, 1))


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
    rows = RowsSource([*ROWS[:2], replace(ROWS[2], negative_passages=())], "my.jsonl")
    with pytest.raises(DataError, match=r"my\.jsonl: row 3 \(query 'query 2'\) has no negative"):
        training_batches([rows], prompts, config_of())
    [alone] = batches_of(prompts, 1, [rows], replace(DATA, group_size=1))
    assert alone.documents.ids_BT.shape[0] == 3


def test_a_row_that_leaves_no_room_is_named_when_it_is_drawn() -> None:
    """The check of every row sees the instructions of the most bytes, not those of the most
    tokens."""
    common = [f"{word} " * 24 for word in ("surroundings", "instructions")]
    rows = [replace(ROWS[1], prompt=common[n % 2] + "a" * n) for n in range(40)]
    rows.append(replace(ROWS[1], prompt="qxzjkv" * 35))
    tokenizer = train_tokenizer([*common * 9, *(row.query for row in ROWS)], 300)
    narrow = PromptConfig(query_max_length=160, explicit_max_length=400)
    source = RowsSource(rows, "rows.jsonl")
    settings = {**LATENT_ALONE, "batch_size": len(rows)}
    with pytest.raises(TokenizationError, match=r"rows\.jsonl: row 41: prompt\.query_max_length"):
        batches_of(PromptTokenizer(tokenizer, narrow), 1, [source], **settings)


def test_a_source_too_many_is_refused(prompts) -> None:
    with pytest.raises(ValueError, match="2 sources, and the config has 1"):
        training_batches([SOURCE, SOURCE], prompts, config_of())


# --- what a batch holds ----------------------------------------------------------------------


def test_a_batch_holds_the_tokens_of_its_rows(prompts) -> None:
    [batch] = batches_of(prompts, 1)
    chosen = [ROWS[i] for i in queries_of([batch])]
    assert batch.rows_B.dtype == np.int32
    examples = [draw(row) for row in chosen]
    assert rows_of(batch.query) == [prompts.query(row.query, row.prompt) for row in chosen]
    assert rows_of(batch.documents) == [prompts.document(d) for e in examples for d in e.documents]
    explicit = [prompts.explicit(e.query, e.instruction, e.reasoning) for e in examples]
    assert rows_of(batch.explicit) == [tokens.ids for tokens in explicit]
    assert batch.keyframes_BK.dtype == np.int32
    assert batch.keyframes_BK.tolist() == [
        keyframe_positions(t.segment_ends, len(t.ids) - 1, 3, "paper").tolist() for t in explicit
    ]
    for tokens in (batch.query, batch.documents, batch.explicit):
        assert tokens.ids_BT.shape[1] % 8 == 0
        assert tokens.ids_BT.shape[1] - tokens.lengths_B.max() < 8


def test_padding_holds_the_pad_token(prompts) -> None:
    [batch] = batches_of(prompts, 1)
    for tokens in (batch.query, batch.documents, batch.explicit):
        beyond_BT = np.arange(tokens.ids_BT.shape[1]) >= tokens.lengths_B[:, None]
        assert (tokens.ids_BT[beyond_BT] == prompts.pad_id).all()


def test_a_batch_holds_the_scores_of_the_passages_that_are_drawn(prompts) -> None:
    rows = [
        replace(
            row,
            teacher_scores=tuple(map(float, range(10 * n, 10 * n + len(passages(row))))),
        )
        for n, row in enumerate(ROWS)
    ]
    rows[2] = replace(rows[2], teacher_scores=None)
    source, data = RowsSource(rows), replace(DATA, selection="random")
    for batch in batches_of(prompts, 5, [source], data, **SCORED):
        assert batch.teacher_scores_BG.shape == (3, 3)
        assert batch.teacher_scores_BG.dtype == np.float32
        documents = rows_of(batch.documents)
        for b, n in enumerate(batch.rows_B):
            for g, tokens in enumerate(documents[3 * b : 3 * b + 3]):
                score = batch.teacher_scores_BG[b, g]
                if n == 2:
                    assert np.isnan(score)
                else:
                    text = passages(ROWS[n])[int(score) - 10 * n]
                    assert tokens == prompts.document(text)
    part = batches_of(prompts, 1, [source], **SCORED, part=np.array([0, 2]))[0]
    [whole] = batches_of(prompts, 1, [source], **SCORED)
    assert_equal(part.teacher_scores_BG, whole.teacher_scores_BG[[0, 2]])
    assert batches_of(prompts, 1, [source])[0].teacher_scores_BG is None


def passages(row: TrainingRow) -> tuple[str, ...]:
    return (*row.positive_passages, *row.negative_passages)


def test_scores_that_are_asked_for_and_in_no_row_are_missed_at_once(prompts) -> None:
    with pytest.raises(DataError, match=r"weights.teacher is above 0, and no row has teacher_sc"):
        training_batches([SOURCE], prompts, config_of(**SCORED))


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
    [batch] = batches_of(recording, 1, **LATENT_ALONE)
    assert batch.explicit is None
    assert batch.keyframes_BK is None
    assert recording.documents
    assert not recording.reasonings


def test_every_text_is_tokenised_once(prompts) -> None:
    recording = RecordingTokenizer(prompts)
    batches = iter(training_batches([SOURCE], recording, config_of(replace(DATA, threads=1))))
    recording.documents.clear()  # of the check that there is room beside the templates
    recording.reasonings.clear()
    list(itertools.islice(batches, 20))
    passages = [text for r in ROWS for text in (*r.positive_passages, *r.negative_passages)]
    assert sorted(recording.documents) == sorted(passages)
    assert len(recording.reasonings) == len(ROWS)


class BrokenPrefix(PromptTokenizer):
    def explicit(self, text: str, instruction: str, reasoning: str) -> ExplicitTokens:
        tokens = super().explicit(text, instruction, reasoning)
        return replace(tokens, ids=tokens.ids[1:])


def test_fast_views_refuse_a_query_that_is_no_prefix_and_name_its_row(prompts) -> None:
    broken = BrokenPrefix(prompts.tokenizer, prompts.config)
    with pytest.raises(DataError, match=r"rows: row \d: the query's tokens are no prefix"):
        batches_of(broken, 1)
    assert batches_of(broken, 1, views="parity")


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


def test_a_duplicate_of_a_positive_is_not_contrasted() -> None:
    row = replace(
        ROWS[0],
        positive_passages=("The ﬁne Straße",),
        negative_passages=("the  FINE\nstrasse ", "the fine street"),
    )
    assert contrast([draw(row)], True).tolist() == [[True, False, True]]


SAME_QUERY = [
    replace(ROWS[0], query="Which?", positive_passages=("a",), negative_passages=("n c d",)),
    replace(ROWS[1], query=" which? ", positive_passages=("b",), negative_passages=("a",)),
    replace(ROWS[2], query="Who?", positive_passages=("b",), negative_passages=("N  C d",)),
    replace(ROWS[4], query="ＷＨＩＣＨ?", positive_passages=("N c D",), negative_passages=("b",)),
]
"""Three rows ask one question, in three spellings."""


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("cut", [0, 1, 3])
def test_positives_of_the_same_query_in_any_row_are_not_contrasted(
    prompts, batch_size, cut
) -> None:
    """Whether that row is in the batch, in another batch, or in another source of a mixture."""
    parts = (SAME_QUERY[:cut], SAME_QUERY[cut:]) if cut else (SAME_QUERY,)
    data = replace(
        DATA,
        group_size=2,
        train="" if cut else "rows",
        mixture=tuple(MixtureSource(str(i), weight=len(p)) for i, p in enumerate(parts) if cut),
    )
    sources = [RowsSource(part) for part in parts]
    positives = {0: {"a", "b", "n c d"}, 1: {"a", "b", "n c d"}, 2: {"b"}, 3: {"a", "b", "n c d"}}
    forms = {tuple(prompts.document(t)): t for t in ("a", "b", "n c d", "N  C d", "N c D")}
    seen = Counter()
    for batch in batches_of(prompts, 8 // batch_size, sources, data, batch_size=batch_size):
        texts = [forms[tuple(ids)].casefold() for ids in rows_of(batch.documents)]
        texts = [" ".join(text.split()) for text in texts]
        for b, row in enumerate(batch.rows_B.tolist()):
            expected = [c == 2 * b or text not in positives[row] for c, text in enumerate(texts)]
            assert batch.contrast_BC[b].tolist() == expected
            seen[row] += 1
    assert set(seen) == {0, 1, 2, 3}
    unmasked = replace(data, mask_false_negatives=False)
    assert batches_of(prompts, 1, sources, unmasked, batch_size=4)[0].contrast_BC.all()


def test_a_row_that_meets_itself_in_a_batch_does_not_contrast_its_positive(prompts) -> None:
    one = [RowsSource(ROWS[:1])]
    [batch] = batches_of(prompts, 1, one)
    np.testing.assert_array_equal(batch.contrast_BC[:, ::3], np.eye(3, dtype=bool))
    [off] = batches_of(prompts, 1, one, replace(DATA, mask_false_negatives=False))
    assert off.contrast_BC.all()


# --- order -----------------------------------------------------------------------------------


def test_another_seed_gives_another_order(prompts) -> None:
    one, two = (queries_of(batches_of(prompts, 7, seed=s)) for s in (5, 6))
    assert one != two


def test_every_epoch_has_every_row_once_in_a_new_order(prompts) -> None:
    order = queries_of(batches_of(prompts, 14))
    epochs = [tuple(order[i : i + 7]) for i in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 1


def test_epochs_turn_the_positives_although_batches_cross_them(prompts) -> None:
    batches = batches_of(prompts, 14)
    positives = [ids for batch in batches for ids in rows_of(batch.documents)[::3]]
    for index, (row, ids) in enumerate(zip(queries_of(batches), positives, strict=True)):
        own = ROWS[row].positive_passages
        assert ids == prompts.document(own[(index // 7) % len(own)])


def test_a_mixture_gives_every_source_its_share_of_any_beginning() -> None:
    lengths, weights = [5, 40, 3], [0.7, 0.2, 0.1]
    order = SampleOrder(lengths, weights, seed=1)
    drawn = [order[i] for i in range(500)]
    for n in range(1, 500, 7):
        counts = Counter(sample.source for sample in drawn[:n])
        for source, weight in enumerate(weights):
            assert abs(counts[source] - n * weight) < 2
    for source, length in enumerate(lengths):
        own = [sample for sample in drawn if sample.source == source]
        for start in range(0, len(own) - length + 1, length):
            once_through = own[start : start + length]
            assert sorted(sample.row for sample in once_through) == list(range(length))
            assert {sample.epoch for sample in once_through} == {start // length}
    assert [order[i] for i in (499, 3, 77)] == [drawn[499], drawn[3], drawn[77]]


def test_a_source_keeps_its_order_in_a_mixture_and_two_equal_ones_differ() -> None:
    alone = SampleOrder([9], [1.0], seed=4)
    mixed = [SampleOrder([9, 9], [1.0, 1.0], seed=4)[i] for i in range(18)]
    by_source = [[s.row for s in mixed if s.source == source] for source in range(2)]
    assert by_source[0] == [alone[i].row for i in range(9)]
    assert by_source[0] != by_source[1]


@pytest.mark.parametrize("window", [1, 3])
def test_homogeneous_batches_have_one_source_each_and_keep_its_share_and_order(
    prompts, window
) -> None:
    half = (MixtureSource("a", 0.5), MixtureSource("b", 0.5))
    data = replace(DATA, train="", mixture=half, bucket_window=window)
    one_source = replace(data, homogeneous_batches=True)
    batches = batches_of(prompts, 30, sources_of(data), one_source)
    sources = [{int(row >= 3) for row in batch.rows_B} for batch in batches]
    assert all(len(found) == 1 for found in sources)
    assert Counter(min(found) for found in sources) == {0: 15, 1: 15}
    mixed = queries_of(batches_of(prompts, 30, sources_of(data), data))
    drawn = queries_of(batches)
    for first, last in ((0, 3), (3, 7)):
        one, other = ([r for r in rows if first <= r < last] for rows in (drawn, mixed))
        assert Counter(one) == Counter(other)
        assert window > 1 or one == other


def test_rows_of_a_mixture_are_described_by_file_and_line(prompts) -> None:
    sources = [RowsSource(ROWS[:3], "a.jsonl"), RowsSource(ROWS[3:], "b.jsonl")]
    data = replace(DATA, train="", mixture=(MixtureSource("a", 0.5), MixtureSource("b", 0.5)))
    batches = batches_of(prompts, 6, sources, data)
    assert Counter(row < 3 for row in queries_of(batches)) == {True: 9, False: 9}
    for batch in batches:
        known = [prompts.query(ROWS[row].query, "find it") for row in batch.rows_B]
        assert rows_of(batch.query) == known
    assert describe_row(sources, 2) == "a.jsonl: row 3"
    assert describe_row(sources, 3) == "b.jsonl: row 1"


# --- bucketing -------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [2, 5])
def test_a_window_holds_the_same_rows_in_batches_of_like_length(prompts, window) -> None:
    plain = batches_of(prompts, 20)
    bucketed = batches_of(prompts, 20, data=replace(DATA, bucket_window=window))
    for start in range(0, 20, window):
        rows = slice(start, start + window)
        assert sorted(queries_of(plain[rows])) == sorted(queries_of(bucketed[rows]))
        spans = sorted(
            (min(widths), max(widths))
            for batch in bucketed[rows]
            for widths in [-(-batch.explicit.lengths_B // 8)]
        )
        for (_, longest), (shortest, _) in itertools.pairwise(spans):
            assert longest <= shortest
    sizes = [sum(b.explicit.size + b.documents.size for b in of) for of in (bucketed, plain)]
    assert sizes[0] < sizes[1]  # of the same rows, so it is padding that is less


def test_the_batches_of_a_window_are_not_in_order_of_length(prompts) -> None:
    batches = batches_of(prompts, 35, data=replace(DATA, bucket_window=5))
    lengths = [int(batch.explicit.lengths_B.max()) for batch in batches]
    windows = [lengths[i : i + 5] for i in range(0, 35, 5)]
    assert any(window != sorted(window) for window in windows)
    longest = {window.index(max(window)) for window in windows}
    assert len(longest) > 1


# --- a batch depends on its number alone -----------------------------------------------------

MIXTURE = (MixtureSource("a", 0.6), MixtureSource("b", 0.4))
VARIANTS = {
    "plain": DATA,
    "random, mixture, bucketed": replace(
        DATA, train="", mixture=MIXTURE, selection="random", bucket_window=4
    ),
    "batches of one source": replace(
        DATA,
        train="",
        mixture=MIXTURE,
        selection="random",
        homogeneous_batches=True,
        bucket_window=2,
    ),
}


def sources_of(data: DataConfig) -> list[RowsSource]:
    return [SOURCE] if data.train else [RowsSource(ROWS[:3], "a"), RowsSource(ROWS[3:], "b")]


@pytest.mark.parametrize("data", VARIANTS.values(), ids=VARIANTS)
def test_threads_and_the_first_batch_change_nothing(prompts, data) -> None:
    sources = sources_of(data)
    expected = [digest(b) for b in batches_of(prompts, 12, sources, data)]
    assert len(set(expected)) > 9
    for threads in (1, 4):
        batches = batches_of(prompts, 12, sources, replace(data, threads=threads))
        assert [digest(b) for b in batches] == expected
    for first in (1, 7):
        batches = batches_of(prompts, 12 - first, sources, data, first_batch=first)
        assert [digest(b) for b in batches] == expected[first:]


@pytest.mark.parametrize(("variant", "num_processes"), [*zip(VARIANTS, (8, 2, 8), strict=True)])
def test_processes_together_make_the_same_batches(prompts, variant, num_processes) -> None:
    data = VARIANTS[variant]
    sources, settings = sources_of(data), {"batch_size": 8}
    expected = batches_of(prompts, 3, sources, data, **settings)
    parts = np.arange(8).reshape(num_processes, -1)
    of_processes = [batches_of(prompts, 3, sources, data, **settings, part=p) for p in parts]
    for whole, *local in zip(expected, *of_processes, strict=True):
        joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *local)
        assert digest(joined) == digest(whole)
    assert of_processes[0][0].query.ids_BT.shape[0] == 8 // num_processes
    assert of_processes[0][0].contrast_BC.shape == (8 // num_processes, 24)


def test_a_part_need_not_be_contiguous(prompts) -> None:
    [whole] = batches_of(prompts, 1, batch_size=8)
    [part] = batches_of(prompts, 1, batch_size=8, part=np.array([1, 4, 7]))
    assert_equal(part.query.ids_BT, whole.query.ids_BT[[1, 4, 7]])
    documents = [3, 4, 5, 12, 13, 14, 21, 22, 23]
    assert_equal(part.documents.lengths_B, whole.documents.lengths_B[documents])
    assert_equal(part.contrast_BC, whole.contrast_BC[[1, 4, 7]])


PROGRAM = """
import json, os, signal, sys
sys.path.insert(0, {tests!r})
from test_pipeline import DATA, config_of, digest
from dataclasses import replace
from laser_jax.config import PromptConfig
from laser_jax.data.pipeline import training_batches
from laser_jax.data.sources import open_source
from laser_jax.data.tokenization import PromptTokenizer, load_tokenizer

if __name__ == "__main__":
    prompts = PromptTokenizer(load_tokenizer({tokenizer!r}), PromptConfig())
    source = open_source({rows!r})
    for workers in (0, 2):
        config = config_of(replace(DATA, workers=workers, bucket_window=2))
        batches = iter(training_batches([source], prompts, config, first_batch=3))
        print(json.dumps([digest(next(batches)) for _ in range(7)]), flush=True)
        if workers:  # they hold the pipes, which are read until the last of them has ended
            os.kill(os.getpid(), signal.SIGKILL)
        batches.close()
"""


def test_worker_processes_change_nothing_and_end_with_a_process_that_is_killed(
    prompts, tmp_path
) -> None:
    prompts.tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(vars(row), default=list) + "\n" for row in ROWS))
    program = tmp_path / "program.py"
    program.write_text(
        PROGRAM.format(
            tests=str(Path(__file__).parent), tokenizer=str(tmp_path / "tokenizer"), rows=str(rows)
        )
    )
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(__file__).parents[1]),
        # a worker that touched a device would have to find this platform
        "JAX_PLATFORMS": "absent",
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    alone, with_workers = map(json.loads, done.stdout.splitlines())
    assert len(set(alone)) == 7
    assert with_workers == alone
