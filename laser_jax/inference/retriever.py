"""Texts in, vectors out: `LatentRetriever`, as users of sentence-transformers know it."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypedDict, Unpack

import jax
import numpy as np
from jax.sharding import Mesh

from laser_jax.config import AttentionKernel, ConfigError, Dtype, RetrieverConfig
from laser_jax.data.buckets import IndexedRow
from laser_jax.data.prompts import PromptTokens
from laser_jax.data.schema import as_strings
from laser_jax.data.tokenization import PromptTokenizer, load_tokenizer, require_embedded_tokens
from laser_jax.encoder import backbone_for, load_pretrained
from laser_jax.files.durable import Digest
from laser_jax.inference.batch_encoder import LatentEncoder
from laser_jax.inference.options import (
    EncoderOptions,
    LimitKey,
    local_mesh,
    read_retriever_config,
    require_positions,
    require_preset,
)
from laser_jax.modeling.backbone import Variables
from laser_jax.models.directory import model_directory
from laser_jax.sharding import shardings

# A block of texts is tokenised while the one before it is on the device; a few batches each.
_BATCHES_PER_BLOCK = 4
_BLOCKS_AHEAD = 2
# A single query is not computed as a full batch, nor are the rows that are left over.
_SHORT_BATCHES = (1, 8)

Overflow = Literal["truncate", "error"]


class OverlongTextError(ValueError):
    """A text that does not fit, under `on_overflow="error"`."""


@dataclass
class EncodingStats:
    """Counts what the calls that are given it embed, batch by batch."""

    texts: int = 0
    tokens: int = 0
    """As read by the model, without padding."""
    truncated: int = 0
    """Texts that were shortened."""
    watch: Callable[[EncodingStats], object] | None = None
    """Called after every batch."""

    def add(self, batch: Sequence[IndexedRow], truncated: set[int]) -> None:
        """Counts a batch, of whose places some were `truncated`."""
        self.texts += len(batch)
        self.tokens += sum(len(row) for _, row in batch)
        self.truncated += sum(place in truncated for place, _ in batch)
        if self.watch is not None:
            self.watch(self)


@dataclass(frozen=True)
class _Request:
    """The arguments that `encode_query` and `encode_document` share, described there."""

    batch_size: int | None
    show_progress_bar: bool
    truncate_dim: int | None
    num_thinking_steps: int | None
    on_overflow: Overflow
    stats: EncodingStats | None

    def __post_init__(self) -> None:
        if self.on_overflow not in ("truncate", "error"):
            raise ValueError(f'on_overflow is "truncate" or "error", not {self.on_overflow!r}')


class BatchSettings(TypedDict, total=False):
    """Keywords that `LatentRetriever.from_pretrained` passes on to `LatentEncoder`."""

    batch_size: int
    batch_tokens: int
    length_multiple: int
    attention: Literal["auto"] | AttentionKernel


class LatentRetriever:
    """Embeds queries and documents as they were embedded in training.

    Vectors are float32 numpy arrays of length 1: [N, D] for N texts, [D] for a single string.
    `prompts` turns texts into rows of tokens, which `encoder` runs the model over.
    """

    def __init__(self, encoder: LatentEncoder, prompts: PromptTokenizer) -> None:
        """Raises a ConfigError where model and tokenizer do not belong together."""
        require_matching(encoder.config, prompts)
        self.encoder = encoder
        self.prompts = prompts

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        config: RetrieverConfig | None = None,
        preset: str | None = None,
        adapter: str | Path | None = None,
        dtype: Dtype | None = None,
        mesh: Mesh | None = None,
        seen: Digest | None = None,
        **batches: Unpack[BatchSettings],
    ) -> LatentRetriever:
        """Loads a model with its tokenizer and prompt settings.

        Args:
            model: a directory as `laser_jax.train` exports it (config.json, safetensors, tokenizer
                files and laser_config.json), or `organisation/name` on the Hugging Face hub.
            config: for a model without laser_config.json: how to prompt and to think.
            preset: instead of `config`, for a released model: `official`, `official-bare` or
                `gircse`, see `read_retriever_config`.
            adapter: a directory with a PEFT LoRA adapter, merged into the weights.
            dtype: computes in another dtype than the model's own; float32 is the fastest on CPU.
            mesh: devices that share every batch, and the weights along `fsdp` and `tensor`. All
                processes of it make the same calls.
            seen: is given all weights that are read.
            batches: batch_size, batch_tokens, length_multiple, attention: see `LatentEncoder`.

        Raises:
            FileNotFoundError: a file is missing; of laser_config.json it says what to pass instead.
            ValueError: a config, tensor, adapter or tokenizer is not what it should be, or the
                preset is unknown; names it.
        """
        require_preset(preset)
        directory = model_directory(model)
        if config is None:
            config = read_retriever_config(directory, preset)
        elif preset is not None:
            raise ConfigError(f"give a config or the preset {preset!r}, not both")
        if dtype is not None:
            config = replace(config, dtype=dtype)
        prompts = PromptTokenizer(load_tokenizer(directory), config.prompt)
        variables, config = load_pretrained(directory, config=config, adapter=adapter, seen=seen)
        if mesh is not None:
            variables = _on_mesh(variables, config, mesh)
        encoder = LatentEncoder(
            variables, config, mesh=mesh, short_batches=_SHORT_BATCHES, **batches
        )
        return cls(encoder, prompts)

    @classmethod
    def from_options(
        cls, options: EncoderOptions, *, seen: Digest | None = None
    ) -> LatentRetriever:
        """The model that a program was told to run, on the devices that it was told to take. Raises
        as `from_pretrained` and `local_mesh`."""
        return cls.from_pretrained(
            options.model,
            config=options.retriever_config(),
            adapter=options.adapter,
            mesh=local_mesh(options.mesh, options.devices),
            seen=seen,
            batch_size=options.batch_size,
            batch_tokens=options.batch_tokens,
            length_multiple=options.length_multiple,
        )

    def encode_query(
        self,
        texts: str | Sequence[str],
        *,
        instruction: str | Sequence[str] | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        truncate_dim: int | None = None,
        num_thinking_steps: int | None = None,
        on_overflow: Overflow = "truncate",
        stats: EncodingStats | None = None,
    ) -> np.ndarray:
        """Embeds queries.

        Args:
            texts: one query, or several in a list, tuple or Series.
            instruction: the task, for all queries or one each; "" for none. Wanted wherever the
                model's query template has a place for it, as a forgotten one only shows in the
                scores.
            batch_size: the most rows of a batch; None takes the retriever's.
            show_progress_bar: shows one on a terminal.
            truncate_dim: keeps the first dimensions, and makes the vectors unit length again.
            num_thinking_steps: K; None takes the model's.
            on_overflow: `truncate` shortens a text that does not fit (its content, never the
                closing part of the prompt) and warns once a call; `error` refuses it.
            stats: counts what is embedded. Then nothing is warned of, as it has the number.

        Returns:
            [N, D] float32 unit rows in the order given, [0, D] for no texts; [D] for a string.

        Raises:
            OverlongTextError: a text does not fit, under `on_overflow="error"`; names its place.
            TokenizationError: the instruction leaves no room for the text.
            NotFiniteError: a vector is not finite; names the text.
            ValueError: an argument that cannot be.
        """
        listed = as_strings("text", [texts] if isinstance(texts, str) else texts)
        instructions = self._instructions(instruction, len(listed))
        request = _Request(
            batch_size, show_progress_bar, truncate_dim, num_thinking_steps, on_overflow, stats
        )
        vectors = self._encode(
            listed,
            lambda place, text: self.prompts.query_prompt(text, instructions[place]),
            "query_max_length",
            request,
        )
        return vectors[0] if isinstance(texts, str) else vectors

    def encode_document(
        self,
        texts: str | Sequence[str],
        *,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        truncate_dim: int | None = None,
        num_thinking_steps: int | None = None,
        on_overflow: Overflow = "truncate",
        stats: EncodingStats | None = None,
    ) -> np.ndarray:
        """Embeds documents, by default at the model's K of documents. Arguments, result and errors
        as for `encode_query`."""
        if num_thinking_steps is None:
            num_thinking_steps = self.encoder.config.documents_at
        vectors = self._encode(
            as_strings("text", [texts] if isinstance(texts, str) else texts),
            lambda _, text: self.prompts.document_prompt(text),
            "document_max_length",
            _Request(
                batch_size, show_progress_bar, truncate_dim, num_thinking_steps, on_overflow, stats
            ),
        )
        return vectors[0] if isinstance(texts, str) else vectors

    @staticmethod
    def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The cosine of every row of a [N, D] with every row of b [M, D]: [N, M] float32. A single
        vector counts as one row."""
        return shortened(np.atleast_2d(a)) @ shortened(np.atleast_2d(b)).T

    @staticmethod
    def similarity_pairwise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The cosine of each row of a [N, D] with the same row of b [N, D]: [N] float32."""
        return (shortened(np.atleast_2d(a)) * shortened(np.atleast_2d(b))).sum(axis=-1)

    def warm_up(
        self,
        *,
        longest: int | None = None,
        num_thinking_steps: int | None = None,
        show_progress_bar: bool = False,
    ) -> None:
        """Compiles every program that prompts need, so that no later call waits for one.

        Args:
            longest: tokens of the longest prompt to be ready for; None takes the model's limits.
            num_thinking_steps: K; None takes the model's, of queries and of documents. Each K has
                programs of its own. A ValueError refuses either below 1.
        """
        limits = self.prompts.config
        if longest is None:
            longest = max(limits.query_max_length, limits.document_max_length)
        config = self.encoder.config
        own = {config.num_thinking_steps, config.documents_at}
        Ks = sorted(own if num_thinking_steps is None else {num_thinking_steps})
        if min(longest, *Ks) < 1:
            got = f"got {longest} and {num_thinking_steps}"
            raise ValueError(f"longest and num_thinking_steps must be at least 1, {got}")
        shortest = min(len(self.prompts.document("")), len(self.prompts.query("", "")), longest)
        label = "compile" if show_progress_bar else None
        for K in Ks:
            self.encoder.warm_up(longest, [K], shortest=shortest, progress=label)

    def _instructions(self, given: str | Sequence[str] | None, count: int) -> list[str]:
        """One instruction for each of `count` queries."""
        template = self.prompts.config.query_template
        if given is None and "{instruction}" in template:
            raise ValueError(
                f"the query template {template!r} wants an instruction: pass instruction=..., the "
                'task in words, or "" for none'
            )
        if given is None or isinstance(given, str):
            return as_strings("instruction", [given or ""]) * count
        instructions = as_strings("instruction", given)
        if len(instructions) != count:
            raise ValueError(f"{len(instructions)} instructions for {count} queries")
        return instructions

    def _encode(
        self,
        listed: list[str],
        tokenise: Callable[[int, str], PromptTokens],
        limit_key: LimitKey,
        request: _Request,
    ) -> np.ndarray:
        config, stats, size = self.encoder.config, request.stats, request.truncate_dim
        width = config.backbone.hidden_size
        if size is not None and not 1 <= size <= width:
            raise ValueError(f"truncate_dim must lie in 1..{width}, got {size}")
        K = request.num_thinking_steps
        K = config.num_thinking_steps if K is None else K
        require_positions(config, limit_key, K)
        limit: int = getattr(config.prompt, limit_key)
        truncated: set[int] = set()

        def tokenise_block(places: Sequence[int]) -> list[IndexedRow]:
            block = [(place, tokenise(place, listed[place])) for place in places]
            for place, tokens in block:
                if tokens.truncated and request.on_overflow == "error":
                    raise OverlongTextError(
                        f"text {place} takes {tokens.whole_length} tokens, and "
                        f"prompt.{limit_key} is {limit}: shorten it, raise the limit, or pass "
                        'on_overflow="truncate"'
                    )
            truncated.update(place for place, tokens in block if tokens.truncated)
            return [(place, tokens.ids) for place, tokens in block]

        encoder = self.encoder
        if request.batch_size is not None:
            encoder = encoder.with_shapes(batch_size=request.batch_size)
        vectors = encoder.encode_blocks(
            _ahead(tokenise_block, _blocks(listed, encoder.buckets.batch_size)),
            len(listed),
            [K],
            progress="encode" if request.show_progress_bar else None,
            describe=lambda place: f"text {place}, {listed[place]!r:.60},",
            advance=None if stats is None else lambda batch: stats.add(batch, truncated),
        )[0]
        if truncated and stats is None:
            warnings.warn(
                f"{len(truncated)} of {len(listed)} texts ({len(truncated) / len(listed):.1%}) are "
                f"longer than prompt.{limit_key} {limit} and were shortened",
                stacklevel=3,
            )
        return vectors if size is None else shortened(vectors, size)


def require_matching(config: RetrieverConfig, prompts: PromptTokenizer) -> None:
    """Raises a ConfigError where model and tokenizer do not belong together."""
    if prompts.config != config.prompt:
        raise ConfigError(
            f"the prompt settings differ from the model's; expected {config.prompt}, got "
            f"{prompts.config}"
        )
    require_embedded_tokens(prompts.tokenizer, config.backbone.vocab_size)
    if config.prompt_checksum not in (None, prompts.checksum()):
        raise ConfigError(
            "tokenizer and chat template do not make the prompts of training: their checksum "
            f"is {prompts.checksum()}, and laser_config.json has {config.prompt_checksum}. "
            "Restore the tokenizer files of the training run, or, if the change is meant, "
            "remove prompt_checksum there"
        )


def _on_mesh(variables: Variables, config: RetrieverConfig, mesh: Mesh) -> Variables:
    """The weights, split by their logical axes; every process has all of them on its host."""
    init = backbone_for(config, variables).init
    layout = shardings(jax.eval_shape(init, jax.random.key(0), np.zeros((1, 1), np.int32)), mesh)
    return jax.tree.map(
        lambda array, sharding: jax.make_array_from_callback(
            array.shape, sharding, array.__getitem__
        ),
        variables,
        layout,
    )


def _blocks(listed: Sequence[str], batch_size: int) -> list[list[int]]:
    """The places of texts, long ones first, by characters: a block holds rows of like length."""
    places = sorted(range(len(listed)), key=lambda place: len(listed[place]), reverse=True)
    size = _BATCHES_PER_BLOCK * batch_size
    return [places[start : start + size] for start in range(0, len(places), size)]


def _ahead(
    tokenise: Callable[[Sequence[int]], list[IndexedRow]], blocks: Sequence[Sequence[int]]
) -> Iterator[list[IndexedRow]]:
    """The tokenised blocks, each made in a thread while those before it are used. No more than
    `_BLOCKS_AHEAD` wait."""
    with ThreadPoolExecutor(1, "tokenise") as thread:
        waiting: deque[Future[list[IndexedRow]]] = deque()
        for block in blocks:
            waiting.append(thread.submit(tokenise, block))
            if len(waiting) > _BLOCKS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def shortened(vectors: np.ndarray, size: int | None = None) -> np.ndarray:
    """The first `size` dimensions of vectors, by default all, in float32 and of length 1 again;
    what is all zero stays zero."""
    vectors = np.asarray(vectors[..., :size], np.float32)
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
