"""Text from a causal language model: prompts of token ids in, written token ids out.

The rewriter of rewrite-then-retrieve. It is the latent loop with words: a prompt is read once, and
each further token is one `Backbone.think`, whose input is the embedding of the token just chosen
instead of the expected one. One device.

Dimension letters: B batch, T tokens of a prompt, W written tokens, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from tqdm import tqdm

from laser_jax.batch import Tokens
from laser_jax.config import BackboneConfig
from laser_jax.data.buckets import Buckets
from laser_jax.data.tokenization import Tokenizer, right_pad
from laser_jax.hf.directory import CONFIG_FILE, HFError, read_object
from laser_jax.inference.batch_encoder import for_inference
from laser_jax.modeling.attention import KeyValues, choose_kernel
from laser_jax.modeling.backbone import Backbone, Cache, Variables, apply, empty_suffix, is_stacked
from laser_jax.settings import require, require_in
from laser_jax.thinking import Prefix
from laser_jax.views import read_prompts

GENERATION_CONFIG_FILE = "generation_config.json"
# One prompt alone is not computed as a full batch.
_SHORT_BATCHES = (1,)
_NOT_WRITTEN = -1
# Tokens are written into a small cache of so many slots, and moved to the prompt's when it is full:
# what a loop itself writes, XLA on CPU copies and transposes at every token.
_BLOCK = 32


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen and how many there may be."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    """0 takes the likeliest token, always the same; otherwise tokens are drawn, their logits
    divided by this."""

    def __post_init__(self) -> None:
        require_in("[1, inf)", self, "", "max_new_tokens")
        require_in("[0, inf)", self, "", "temperature")


@dataclass(frozen=True)
class Written:
    """What follows one prompt, and how long its batch took."""

    ids: list[int]
    """Without the stop token."""
    finished: bool
    """A stop token ended it; otherwise the limit did."""
    rows: int
    """Prompts in its batch."""
    prefill_seconds: float
    """Until the first token of every row of the batch; then decoding goes on until the last row is
    finished."""
    decode_seconds: float

    @property
    def tokens(self) -> int:
        """How many were written, the stop token included."""
        return len(self.ids) + self.finished


def stop_ids(directory: str | Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every token that ends a text, as generation_config.json, config.json or the tokenizer says:
    they differ where one names the end of a turn and another that of a document. Raises an HFError
    where a file is no JSON object, or its `eos_token_id` no token id or list of them."""
    found = {int(tokenizer.eos_token_id)} if tokenizer.eos_token_id is not None else set()  # type: ignore[arg-type]
    for name in (GENERATION_CONFIG_FILE, CONFIG_FILE):
        file = Path(directory) / name
        named = read_object(file).get("eos_token_id") if file.is_file() else None
        ids = named if isinstance(named, list) else [] if named is None else [named]
        if not all(type(id_) is int and id_ >= 0 for id_ in ids):
            raise HFError(f"{file}: eos_token_id must be a token id or a list, got {named!r}")
        found |= set(ids)
    return tuple(sorted(found))


def choose_tokens(logits_BV: jax.Array, keys_B: jax.Array, decoding: Decoding) -> jax.Array:
    """The next token of every row, [B] int32. A row is drawn by its own key alone."""
    if decoding.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV / decoding.temperature)
    return drawn_B.astype(jnp.int32)


class _Text(NamedTuple):
    """What has been written so far, `written` tokens in every row."""

    written: jax.Array
    token_B: jax.Array
    stopped_B: jax.Array
    ids_BW: jax.Array


_Programs = tuple[jax.stages.Compiled, jax.stages.Compiled]
_Block = tuple[jax.Array, _Text, Cache]
"""(slot, text, cache of the block) while a block is written."""


# --- the cache ---------------------------------------------------------------------------------
# It is kept as attention multiplies it, keys [.., B, G, T, H] and values [.., B, G, H, T], since
# the loop would otherwise transpose all of it at every token. Leading axis: stacked layers.


def _each(cache: Cache, keys: Callable[..., Any], values: Callable[..., Any], *more: Cache) -> Any:
    """`keys` of all keys and `values` of all values in a cache, or in several of one structure."""
    return jax.tree.map(
        lambda kv, *others: KeyValues(
            keys(kv.k, *(o.k for o in others)), values(kv.v, *(o.v for o in others))
        ),
        cache,
        *more,
        is_leaf=lambda leaf: isinstance(leaf, KeyValues),
    )


def _as_kept(cache: Cache, room: int = 0) -> Cache:
    """A cache as the backbone leaves it, with `room` empty slots behind its last position."""
    spare = [(0, room), (0, 0), (0, 0)]
    cache = jax.tree.map(lambda a: jnp.pad(a, [*[(0, 0)] * (a.ndim - 3), *spare]), cache)
    return _each(cache, lambda k: jnp.swapaxes(k, -3, -2), lambda v: jnp.moveaxis(v, -3, -1))


def _as_read(kept: Cache) -> Cache:
    """The view that `Backbone.think` wants; XLA cancels its transposition with attention's own."""
    return _each(kept, lambda k: jnp.swapaxes(k, -3, -2), lambda v: jnp.moveaxis(v, -1, -3))


def _appended(kept: Cache, block: Cache, lengths_B: jax.Array) -> Cache:
    """Writes a block behind the `lengths` positions that each row holds."""

    def along(axis: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
        def row(whole: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis + whole.ndim)

        return lambda whole, part: jax.vmap(row, (-4, -4, 0), -4)(whole, part, lengths_B)

    return _each(kept, along(-2), along(-1), block)


class TextGenerator:
    """Continues prompts, in batches of few shapes, each compiled once ahead of time.

    What a row says depends on its prompt and its seed alone, whatever stands beside it in the
    batch; as between any two shapes, float rounding may decide where two tokens are equally likely.
    """

    def __init__(
        self,
        variables: Variables,
        backbone: BackboneConfig,
        decoding: Decoding,
        stop_ids: Sequence[int],
        *,
        dtype: DTypeLike = jnp.float32,
        batch_size: int = 8,
        batch_tokens: int = 8192,
        length_multiple: int = 32,
    ):
        """Places the weights, {"params": ...} stored in `dtype`, on the default device; compiles
        nothing. `stop_ids` end a row; without any all rows are full. The batches of prompts are
        those of `Buckets`."""
        self.decoding, self.stop_ids = decoding, tuple(stop_ids)
        self.buckets = Buckets(batch_size, batch_tokens, length_multiple, _SHORT_BATCHES)
        self._variables = for_inference(variables)
        kernel, _ = choose_kernel("auto", jax.default_backend(), dtype, backbone.head_dim)
        how = {"scan_layers": is_stacked(self._variables), "attention": kernel}
        self._backbone = Backbone(backbone, dtype=dtype, param_dtype=dtype, **how)
        self._programs: dict[tuple[int, int], _Programs] = {}

    def _next(
        self, variables: Variables, h_BD: jax.Array, seeds_B: jax.Array, place: Any
    ) -> jax.Array:
        """The token at `place` of every row, from the state before it."""
        logits_BV = apply(Backbone.logits, self._backbone, variables, h_BD)
        keys_B = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), place))(seeds_B)
        return choose_tokens(logits_BV, keys_B, self.decoding)

    def _prefill(
        self, variables: Variables, ids_BT: jax.Array, lengths_B: jax.Array, seeds_B: jax.Array
    ) -> tuple[Prefix, jax.Array]:
        """Reads the prompts and chooses their first tokens."""
        prefix = read_prompts(self._backbone, variables, Tokens(ids_BT, lengths_B))
        return prefix, self._next(variables, prefix.h_BD, seeds_B, 0)

    def _stops(self, token_B: jax.Array) -> jax.Array:
        return (token_B[:, None] == jnp.asarray(self.stop_ids, jnp.int32)[None, :]).any(axis=1)

    def _write_token(
        self, variables: Variables, seeds_B: jax.Array, read: Prefix, state: _Block
    ) -> _Block:
        """One more token of every row, behind what was `read` and the block's earlier tokens."""
        slot, text, suffix = state
        x_B1D = apply(Backbone.embed, self._backbone, variables, text.token_B[:, None])
        past = ((_as_read(read.cache),), suffix, read.lengths_B, slot)
        h_BD, suffix = apply(Backbone.think, self._backbone, variables, x_B1D[:, 0], *past)
        token_B = self._next(variables, h_BD, seeds_B, text.written)
        shown_B = jnp.where(text.stopped_B, _NOT_WRITTEN, token_B)
        ids_BW = text.ids_BW.at[:, text.written].set(shown_B)
        stopped_B = text.stopped_B | self._stops(token_B)
        return slot + 1, _Text(text.written + 1, token_B, stopped_B, ids_BW), suffix

    def _decode(
        self, variables: Variables, prefix: Prefix, token_B: jax.Array, seeds_B: jax.Array
    ) -> jax.Array:
        """All tokens [B, max_new_tokens], stop tokens included, `_NOT_WRITTEN` behind them."""
        W = self.decoding.max_new_tokens

        def unfinished(text: _Text) -> jax.Array:
            return (text.written < W) & ~text.stopped_B.all()

        def write_block(state: tuple[_Text, Prefix]) -> tuple[_Text, Prefix]:
            text, read = state
            _, text, suffix = jax.lax.while_loop(
                lambda block: (block[0] < _BLOCK) & unfinished(block[1]),
                lambda block: self._write_token(variables, seeds_B, read, block),
                (jnp.zeros((), jnp.int32), text, empty_suffix((prefix.cache,), _BLOCK)),
            )
            cache = _appended(read.cache, _as_kept(suffix), read.lengths_B)
            return text, Prefix(read.h_BD, cache, read.lengths_B + _BLOCK)

        ids_BW = jnp.full((token_B.shape[0], W), _NOT_WRITTEN, jnp.int32).at[:, 0].set(token_B)
        text = _Text(jnp.ones((), jnp.int32), token_B, self._stops(token_B), ids_BW)
        kept = _as_kept(prefix.cache, room=-(-W // _BLOCK) * _BLOCK)
        read = Prefix(prefix.h_BD, kept, prefix.lengths_B)
        text, _ = jax.lax.while_loop(lambda s: unfinished(s[0]), write_block, (text, read))
        return text.ids_BW

    def _programs_of(self, rows: int, width: int) -> _Programs:
        if (rows, width) not in self._programs:
            ids_BT = jax.ShapeDtypeStruct((rows, width), jnp.int32)
            lengths_B = jax.ShapeDtypeStruct((rows,), jnp.int32)
            seeds_B = jax.ShapeDtypeStruct((rows,), jnp.uint32)
            prefill = jax.jit(self._prefill).lower(self._variables, ids_BT, lengths_B, seeds_B)
            decode = jax.jit(self._decode).lower(self._variables, *prefill.out_info, seeds_B)
            self._programs[rows, width] = prefill.compile(), decode.compile()
        return self._programs[rows, width]

    def warm_up(self, prompts: Sequence[Sequence[int]], *, progress: str | None = None) -> None:
        """Compiles all that these prompts, or others of the same lengths, need."""
        shapes = {self.buckets.shape([row for _, row in b]) for b in self._batches(prompts)}
        hidden = None if progress else True
        for shape in tqdm(sorted(shapes), progress, disable=hidden, leave=False):
            self._programs_of(*shape)

    def _batches(
        self, prompts: Sequence[Sequence[int]]
    ) -> Iterator[list[tuple[int, Sequence[int]]]]:
        most = self.decoding.max_new_tokens
        for place, prompt in enumerate(prompts):
            what = f"prompt {place} of {len(prompt)} tokens and max_new_tokens {most} take"
            self._backbone.config.require_positions(len(prompt) + most, what, "lower one of them")
            require(len(prompt) >= 1, f"prompt {place} is empty; a token at least is wanted")
        return self.buckets.batches([list(enumerate(prompts))])

    def write_batches(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Written]]]:
        """What follows each prompt of token ids, a batch at a time, each row with the prompt's
        place. Drawn tokens take a seed a prompt, in 0..2^32-1; None takes the place. Raises a
        ValueError where a prompt is empty or leaves no room, or there are more or fewer seeds."""
        seeds = range(len(prompts)) if seeds is None else seeds
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
        for batch in self._batches(prompts):
            places, rows = zip(*batch, strict=True)
            written = self._write(rows, [seeds[place] for place in places])
            yield list(zip(places, written, strict=True))

    def write(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None = None
    ) -> list[Written]:
        """`write_batches`, in the order of the prompts."""
        written = sorted(chain(*self.write_batches(prompts, seeds)), key=lambda pair: pair[0])
        return [text for _, text in written]

    def _write(self, rows: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Written]:
        size, width = self.buckets.shape(rows)
        spare = size - len(rows)  # copies of the last row, which finish when it does
        ids_BT, lengths_B = right_pad([*rows, *[rows[-1]] * spare], 0, width)
        seeds_B = np.array([*seeds, *[seeds[-1]] * spare], np.uint32)
        prefill, decode = self._programs_of(size, width)
        began = time.perf_counter()
        read = jax.block_until_ready(prefill(self._variables, ids_BT, lengths_B, seeds_B))
        prefill_seconds = time.perf_counter() - began
        ids_BW = np.asarray(decode(self._variables, *read, seeds_B))
        seconds = (prefill_seconds, time.perf_counter() - began - prefill_seconds)
        written = []
        for row in ids_BW[: len(rows)].tolist():
            ids = row[: row.index(_NOT_WRITTEN)] if _NOT_WRITTEN in row else row
            finished = ids[-1] in self.stop_ids
            written.append(Written(ids[:-1] if finished else ids, finished, len(rows), *seconds))
        return written
