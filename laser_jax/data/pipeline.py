"""Training rows to batches: order, selection of passages, tokenisation, padding.

Batch i is a pure function of the arguments and i, so a run resumes anywhere without any iterator
state, and every process can make its own part of the same batch.

B queries, G documents a query, C = B G documents a batch, K thinking steps, T tokens.
"""

import functools
import json
import math
import multiprocessing
import os
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from laser_jax.alignment import keyframe_positions
from laser_jax.batch import Batch, PackShape, Tokens
from laser_jax.config import Config, DataConfig, as_dict
from laser_jax.data.schema import DataError, TrainingRow, same_text
from laser_jax.data.sources import Source, describe_row, locate, rows_of_same_query
from laser_jax.data.tokenization import PromptTokenizer, TokenizationError, right_pad
from laser_jax.files.durable import digest_of

_ENDLESS = 2**62
_TEXTS_HELD = 32_768
"""Texts of each kind whose tokens are remembered."""


# --- what an epoch draws from a row ----------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """What one epoch draws from one row: texts, not yet in any template."""

    query: str
    instruction: str
    reasoning: str
    documents: tuple[str, ...]  # G passages, the positive first
    positives: frozenset[str]
    """All positives of the row; in a batch, of all rows with the same query."""
    teacher_scores: tuple[float, ...]  # of the documents; NaN in a row without


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
    thought below `min_reasoning_characters` is replaced by the query. Raises a DataError, which
    names the row, counted from 1, where negatives are wanted and it has none.
    """
    num_negatives = data.group_size - 1
    if num_negatives and not row.negative_passages:
        raise _no_negatives(f"row {row_index + 1}", row, data)
    positive = epoch % len(row.positive_passages)
    order = np.arange(len(row.negative_passages))
    if data.selection == "random":
        generator = np.random.default_rng((seed, epoch, row_index))
        positive = int(generator.integers(len(row.positive_passages)))
        order = generator.permutation(order)
    negatives = [int(order[i % len(order)]) for i in range(num_negatives)]
    places = [positive, *(len(row.positive_passages) + n for n in negatives)]
    passages = (*row.positive_passages, *row.negative_passages)
    scores = row.teacher_scores or (math.nan,) * len(passages)
    return Example(
        query=row.query,
        instruction=row.prompt,
        reasoning=settled_reasoning(row, min_reasoning_characters),
        documents=tuple(passages[place] for place in places),
        positives=frozenset(row.positive_passages),
        teacher_scores=tuple(scores[place] for place in places),
    )


def settled_reasoning(row: TrainingRow, min_reasoning_characters: int) -> str:
    """The row's chain of thought; its query where that is too short."""
    long_enough = len(row.reasoning_query) >= min_reasoning_characters
    return row.reasoning_query if long_enough else row.query


def _no_negatives(where: str, row: TrainingRow, data: DataConfig) -> DataError:
    return DataError(
        f"{where} (query {row.query[:60]!r}) has no negative_passages, and data.group_size "
        f"{data.group_size} wants {data.group_size - 1}; set data.group_size: 1, or mine negatives "
        "(laser mine)"
    )


def contrast(examples: Sequence[Example], mask_false_negatives: bool) -> np.ndarray:
    """Which documents of the batch are contrasted with which query: [B, C] bool. All True without
    `mask_false_negatives`; with it, False where document c is one of query b's positives in the
    form of `same_text`, its designated positive (c = b G) excepted."""
    texts = [same_text(text) for example in examples for text in example.documents]
    contrast_BC = np.ones((len(examples), len(texts)), bool)
    if mask_false_negatives:
        columns = defaultdict(list)
        for c, text in enumerate(texts):
            columns[text].append(c)
        for b, example in enumerate(examples):
            for positive in set(map(same_text, example.positives)):
                contrast_BC[b, columns.get(positive, [])] = False
            contrast_BC[b, b * len(example.documents)] = True
    return contrast_BC


# --- the order of rows -----------------------------------------------------------------------


class Sample(NamedTuple):
    """Which row stands at a place of the endless sequence of samples."""

    source: int
    row: int
    epoch: int  # how often the source was gone through before


class SampleOrder:
    """The endless sequence of samples of a mixture, by index: `block` samples of one source, then
    of another. Of any first blocks, every source has given its share by weight, up to rounding. A
    source goes through all of its rows before it repeats one, each time in another order."""

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], seed: int, block: int = 1):
        self._lengths, self._block = lengths, block
        exact = [Fraction(weight) for weight in weights]
        # of what the sources before leave
        self._shares = [weight / sum(exact[i:]) for i, weight in enumerate(exact)]
        self._rows = [
            grain.MapDataset.range(length).seed(_source_seed(seed, i)).shuffle().repeat()
            for i, length in enumerate(lengths)
        ]

    def __getitem__(self, index: int) -> Sample:
        source, blocks = self._source(index // self._block)
        place = blocks * self._block + index % self._block
        row: Any = self._rows[source][place]
        return Sample(source, int(row), place // self._lengths[source])

    def _source(self, index: int) -> tuple[int, int]:
        """The source of block `index`, and how many blocks it gave before."""
        for source, share in enumerate(self._shares):
            before = index * share.numerator // share.denominator
            if (index + 1) * share.numerator // share.denominator > before:
                return source, before
            index -= before
        raise AssertionError("the last source takes all that the others leave")


def _source_seed(seed: int, source: int) -> int:
    """Another order for each source, that of a single source for the first."""
    return seed if source == 0 else int(np.random.SeedSequence((seed, source)).generate_state(1)[0])


# --- batches ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Drawn:
    """A row of a batch, tokenised."""

    row: int  # in the concatenation of the sources
    example: Example
    query: np.ndarray
    documents: tuple[np.ndarray, ...]
    explicit: tuple[np.ndarray, np.ndarray] | None  # its tokens, and where its segments end

    def length(self, multiple: int) -> tuple[int, int]:
        """What rows are sorted by, to be padded together: the width that the explicit input (or
        the query) is padded to, and among those of one width the longest document."""
        first = self.query if self.explicit is None else self.explicit[0]
        return -(-len(first) // multiple), max(map(len, self.documents))


class _BatchBuilder:
    """Makes batch i; the arguments are those of `training_batches`, and `rows_of_same_query` where
    false negatives are masked. Threads may share it."""

    def __init__(
        self,
        sources: Sequence[Source],
        prompts: PromptTokenizer,
        config: Config,
        part: np.ndarray | None,
        shards: int,
        same_query: Mapping[int, np.ndarray],
    ):
        self._arguments = (sources, prompts, config, part, shards, same_query)
        self._sources, self._prompts, self._config = sources, prompts, config
        self._data, self._size, self._shards = config.data, config.train.batch_size, shards
        self._part = np.arange(self._size) if part is None else part
        self._same_query = same_query
        lengths = [len(source) for source in sources]
        self._starts = np.cumsum([0, *lengths])
        weights = [source.weight for source in config.data.sources]
        block = self._size * self._data.bucket_window if self._data.homogeneous_batches else 1
        self._order = SampleOrder(lengths, weights, config.train.seed, block)
        self._lock = threading.Lock()
        self._plan = functools.lru_cache(4)(self._make_plan)
        # Epochs repeat, and a window is read once for its lengths and once for its batches.
        window = config.data.bucket_window * self._size * config.data.group_size
        remembered = functools.lru_cache(max(_TEXTS_HELD, 2 * window))
        self._query = remembered(lambda *q: np.array(prompts.query(*q), np.int32))
        self._document = remembered(lambda text: np.array(prompts.document(text), np.int32))
        self._explicit = remembered(self._tokenise_explicit)
        self._positives = remembered(self._read_positives)

    def __reduce__(self) -> Any:
        # locks and caches stay behind: a worker process makes its own
        return _BatchBuilder, self._arguments

    def __call__(self, index: int) -> Batch:
        rows, part = [self._draw(sample) for sample in self._samples(index)], self._part
        limits, group_size = self._prompts.config, self._data.group_size
        part_C = (part[:, None] * group_size + np.arange(group_size)).ravel()
        documents = [ids for row in rows for ids in row.documents]
        contrast_BC = contrast([row.example for row in rows], self._data.mask_false_negatives)
        batch = Batch(
            query=self._pad([row.query for row in rows], limits.query_max_length, part),
            documents=self._pad(documents, limits.document_max_length, part_C),
            explicit=None,
            keyframes_BK=None,
            contrast_BC=contrast_BC[part],
            rows_B=np.array([rows[b].row for b in part], np.int32),
        )
        if self._config.objective.need_teacher_scores:
            scores = [rows[b].example.teacher_scores for b in part]
            batch = replace(batch, teacher_scores_BG=np.array(scores, np.float32))
        return self._with_explicit(batch, rows) if rows[0].explicit else batch

    def _with_explicit(self, batch: Batch, rows: Sequence[_Drawn]) -> Batch:
        objective, query = self._config.objective, batch.query
        K, rule = objective.num_thinking_steps, objective.keyframes
        ids, ends = zip(*(row.explicit for row in rows if row.explicit), strict=True)
        if self._config.views == "fast" and objective.teacher is None:
            for row, tokens in zip(rows, ids, strict=True):
                if not np.array_equal(tokens[: len(row.query)], row.query):
                    raise DataError(
                        f"{describe_row(self._sources, row.row)}: the query's tokens are no prefix "
                        "of the explicit input's, as the fast views need; set objective.views: "
                        "parity"
                    )
            query = replace(query, packed=None)  # it is not read by itself
        keyframes_BK = np.stack(
            [keyframe_positions(ends[b].tolist(), len(ids[b]) - 1, K, rule) for b in self._part]
        )
        explicit = self._pad(ids, None, self._part)
        return replace(batch, query=query, explicit=explicit, keyframes_BK=keyframes_BK)

    # --- which rows

    def _samples(self, index: int) -> Sequence[int]:
        window, place = divmod(index, self._data.bucket_window)
        if self._data.bucket_window == 1:
            return range(index * self._size, (index + 1) * self._size)
        with self._lock:  # else every thread would make the plan of a new window
            return self._plan(window)[place]

    def _make_plan(self, window: int) -> list[list[int]]:
        """The samples of the window's batches: sorted by length, cut, and the cuts shuffled."""
        batches, size = self._data.bucket_window, self._size
        first, multiple = window * batches * size, self._data.length_multiple
        samples = range(first, first + batches * size)
        by_length = sorted(samples, key=lambda sample: self._draw(sample).length(multiple))
        order = np.random.default_rng((self._config.train.seed, window)).permutation(batches)
        return [by_length[i * size : (i + 1) * size] for i in order]

    def _draw(self, index: int) -> _Drawn:
        sample = self._order[index]
        row_index = int(self._starts[sample.source]) + sample.row
        example = draw_example(
            self._sources[sample.source][sample.row],
            self._data,
            min_reasoning_characters=self._prompts.config.min_reasoning_characters,
            seed=self._config.train.seed,
            epoch=sample.epoch,
            row_index=row_index,
        )
        if row_index in self._same_query:
            positives = self._positives(int(self._same_query[row_index][0]))
            example = replace(example, positives=positives)
        try:
            query = self._query(example.query, example.instruction)
            documents, explicit = tuple(map(self._document, example.documents)), None
            if self._config.objective.need_explicit_view:
                explicit = self._explicit(example.query, example.instruction, example.reasoning)
        except TokenizationError as error:
            where = describe_row(self._sources, row_index)
            raise TokenizationError(f"{where}: {error}") from error
        return _Drawn(row_index, example, query, documents, explicit)

    def _read_positives(self, row_index: int) -> frozenset[str]:
        """Those of all rows with the query of this one."""
        found: set[str] = set()
        for index in self._same_query[row_index]:
            source, row = locate(self._sources, int(index))
            found.update(self._sources[source][row].positive_passages)
        return frozenset(found)

    # --- tokens

    def _tokenise_explicit(self, *texts: str) -> tuple[np.ndarray, np.ndarray]:
        tokens = self._prompts.explicit(*texts)
        return np.array(tokens.ids, np.int32), np.array(tokens.segment_ends, np.int32)

    def _pad(self, rows: Sequence[np.ndarray], max_length: int | None, part: np.ndarray) -> Tokens:
        # the width is that of the whole batch: all processes must agree on it
        multiple = self._data.length_multiple
        ids_BT, lengths_B = right_pad(rows, self._prompts.pad_id, multiple, max_length)
        packed = self._packed(lengths_B, ids_BT.shape[1]) if self._data.pack else None
        return Tokens(ids_BT[part], lengths_B[part], packed)

    def _packed(self, lengths_B: np.ndarray, width: int) -> PackShape:
        """Room for the fullest pack of any micro-batch, in steps of a quarter of an octave."""
        shards, parts = self._shards, self._config.train.num_micro_batches
        # micro-batch i has queries i, i + parts, ...; a device has its own neighbouring ones
        by_pack = lengths_B.reshape(shards, self._size // (shards * parts), parts, -1)
        fullest = int(by_pack.sum(axis=(1, 3)).max())
        step = 1 << max(fullest.bit_length() - 3, 3)
        most = width * len(lengths_B) // (shards * parts)
        return PackShape(shards, min(-(-fullest // step) * step, most), parts)


def training_batches(
    sources: Sequence[Source],
    prompts: PromptTokenizer,
    config: Config,
    *,
    first_batch: int = 0,
    part: np.ndarray | None = None,
    shards: int = 1,
) -> grain.IterDataset[Batch]:
    """Endless batches of `train.batch_size` queries.

    A batch depends on the arguments and its number alone: threads, workers, `first_batch` and
    `part` change nothing in it. Every source goes through all of its rows, in an order of its own,
    before it repeats one; the last batch of an epoch is filled from the next, so no row is dropped.
    With `data.workers` the iterator owns processes: `close()` it.

    Args:
        sources: of the training rows, in the order of `data.sources`, which gives their weights.
        first_batch: number of the first batch, to go on with a stopped run.
        part: increasing indices of the batch's rows that this process holds; None holds all.
            Arrays that have a row a query hold these rows, documents their G each. The widths of
            padding and the columns of `contrast_BC` are those of the whole batch.
        shards: the devices that share a batch's rows.

    Raises:
        DataError: a row without negatives though `data.group_size` is above 1, or no row with
            `teacher_scores` though they are asked for.
        TokenizationError: a limit of the prompts leaves no room for a text. Of the instructions the
            longest are checked now; another is found when its row is drawn, which is named then.
    """
    data, objective = config.data, config.objective
    if len(sources) != len(data.sources):
        raise ValueError(f"{len(sources)} sources, and the config has {len(data.sources)}")
    for source in sources:
        prompts.require_room(source.facts.instructions, explicit=objective.need_explicit_view)
        without = source.facts.row_without_negatives
        if data.group_size > 1 and without is not None:  # now, not hours into the run
            raise _no_negatives(source.where(without), source[without], data)
    if objective.need_teacher_scores and not any(source.facts.scored_rows for source in sources):
        raise DataError(
            "objective.weights.teacher is above 0, and no row has teacher_scores (rows that "
            "laser_jax.prepare wrote never have): add them, or set the weight to 0"
        )
    same_query = rows_of_same_query(sources) if data.mask_false_negatives else {}
    build = _BatchBuilder(sources, prompts, config, part, shards, same_query)
    reading = grain.ReadOptions(data.threads, prefetch_buffer_size=max(4, data.threads))
    batches = grain.MapDataset.range(first_batch, _ENDLESS).map(build).to_iter_dataset(reading)
    if data.workers:
        if not flags.FLAGS.is_parsed():  # grain reads its flags, and this is no absl program
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(num_workers=data.workers)
        batches = batches.mp_prefetch(workers, worker_init_fn=_end_with_parent)
    return batches


def _end_with_parent(*_: int) -> None:
    """A worker whose process was killed has nobody left who would end it."""
    parent = multiprocessing.parent_process()
    if parent is not None:  # it is a process
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def tokenization_settings(prompts: PromptTokenizer) -> dict[str, Any]:
    """All that tokens depend on beside their texts: the prompt settings and the tokenizer's
    fingerprint, in plain JSON types."""
    tokenizer: Any = prompts.tokenizer
    model = json.loads(tokenizer.backend_tokenizer.to_str())
    # a call leaves its own truncation and padding there
    fingerprint = [{k: v for k, v in model.items() if k not in ("truncation", "padding")}]
    fingerprint += [tokenizer.chat_template, tokenizer.bos_token, prompts.eos_id, prompts.pad_id]
    return {"prompt": as_dict(prompts.config), "tokenizer": digest_of(fingerprint)}
