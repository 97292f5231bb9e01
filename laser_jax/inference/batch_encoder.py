"""Many token rows to vectors: `LatentEncoder` computes what `encode` does, batch by batch.

The programs are compiled ahead of time, one a shape; the batches come from `data.buckets`.
"""

import contextlib
import copy
import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from laser_jax.batch import Tokens
from laser_jax.config import AttentionKernel, Pooling, RetrieverConfig
from laser_jax.data.buckets import Buckets, IndexedRow
from laser_jax.data.tokenization import right_pad
from laser_jax.encoder import backbone_for
from laser_jax.losses import pool
from laser_jax.modeling.attention import choose_kernel
from laser_jax.modeling.backbone import Backbone, Variables, is_stacked, unstack_layers
from laser_jax.sharding import batch_sharding
from laser_jax.views import latent_view


def for_inference(variables: Variables) -> Variables:
    """The weights on the default device, their layers as they run fastest there: unstacked on CPU
    and GPU, scanned on TPU."""
    unstack = is_stacked(variables) and jax.default_backend() != "tpu"
    return jax.device_put(unstack_layers(variables) if unstack else variables)


class NotFiniteError(ValueError):
    """A vector with NaN or Inf, which has no place in any ranking; `place` is that of its
    row, counted from 0."""

    def __init__(self, what: str, dtype: str, place: int = 0) -> None:
        usual = " (float16 ends at 65,504, which is the usual cause)" if dtype == "float16" else ""
        super().__init__(
            f"the vector of {what} is not finite. Look for NaN in the model's weights; where they "
            f"are sound, the model overflows {dtype}{usual}: compute in bfloat16 or float32"
        )
        self.place = place


@functools.cache
def _jitted(backbone: Backbone, pooling: Pooling, everywhere: NamedSharding | None) -> Any:
    """The function (variables, ids_BT, lengths_B, numbers of thinking steps) -> [S, B, D]. All
    encoders of a backbone share it, so that the second one in a process compiles nothing."""

    def embed(
        variables: Variables, ids_BT: jax.Array, lengths_B: jax.Array, Ks: tuple[int, ...]
    ) -> jax.Array:
        hidden_BKD = latent_view(backbone, variables, Tokens(ids_BT, lengths_B), max(Ks), pooling)
        return jnp.stack([pool(hidden_BKD[:, :k]) for k in Ks])

    return jax.jit(embed, static_argnums=3, out_shardings=everywhere)


class LatentEncoder:
    """Embeds many token rows, in batches of few shapes (`buckets`), each compiled once ahead of
    time. `variables` are placed; `attention` is the kernel in use, and `attention_reason` why."""

    def __init__(
        self,
        variables: Variables,
        config: RetrieverConfig,
        *,
        batch_size: int = 64,
        batch_tokens: int = 8192,
        length_multiple: int = 32,
        short_batches: Sequence[int] = (),
        mesh: Mesh | None = None,
        attention: Literal["auto"] | AttentionKernel = "auto",
    ):
        """Places the weights; compiles nothing.

        Args:
            variables: as `load_pretrained` returns them. With a mesh they are arrays that lie on
                it, and stay as they lie; without one they go to the default device.
            batch_size, batch_tokens, length_multiple, short_batches: see `Buckets`. Numbers of rows
                are rounded to what the mesh divides.
            mesh: splits the rows of every batch. All processes of it make the same calls.
            attention: the kernel; `auto` takes the fastest that can run there. Another that cannot
                is a ConfigError.
        """
        self.config, self.mesh = config, mesh
        self._rows, self._everywhere, share = None, None, 1
        if mesh is not None:
            self._rows = batch_sharding(mesh)
            self._everywhere = NamedSharding(mesh, PartitionSpec())
            share = mesh.shape["data"] * mesh.shape["fsdp"]
        short = tuple(short_batches)
        self.buckets = Buckets(batch_size, batch_tokens, length_multiple, short, share)
        self.variables = variables if mesh is not None else for_inference(variables)
        self.attention, self.attention_reason = choose_kernel(
            attention, jax.default_backend(), config.dtype, config.backbone.head_dim
        )
        self._backbone = backbone_for(config, self.variables, self.attention)
        self._programs: dict[Any, jax.stages.Compiled] = {}

    def with_shapes(self, **changes: Any) -> Self:
        """The same encoder with other fields of `buckets`, which is another set of shapes."""
        other = copy.copy(self)
        other.buckets = dataclasses.replace(self.buckets, **changes)
        return other

    def _program(self, rows: int, width: int, Ks: tuple[int, ...]) -> jax.stages.Compiled:
        """The program for batches of this shape."""
        key = (rows, width, Ks)
        if key not in self._programs:
            ids_BT, lengths_B = (
                jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._rows)
                for shape in ((rows, width), (rows,))
            )
            backbone: Any = self._backbone  # flax gives modules a hash, which their type hides
            jitted = _jitted(backbone, self.config.pooling, self._everywhere)
            # `constrain` looks for the mesh while the program is traced
            with jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext():
                lowered = jitted.lower(self.variables, ids_BT, lengths_B, Ks)
            self._programs[key] = lowered.compile()
        return self._programs[key]

    def warm_up(
        self,
        longest: int,
        num_thinking_steps: Sequence[int],
        *,
        shortest: int = 1,
        progress: str | None = None,
    ) -> None:
        """Compiles every program that rows of `shortest` to `longest` tokens can need, so that
        `encode_tokens` with the same `num_thinking_steps` compiles nothing. With jax's compilation
        cache (JAX_COMPILATION_CACHE_DIR) only the first process on a machine waits for it."""
        shapes = self.buckets.shapes(shortest, longest)
        for shape in tqdm(shapes, progress, disable=None if progress else True, leave=False):
            self._program(*shape, tuple(num_thinking_steps))

    def overhead(self, width: int, Ks: tuple[int, ...]) -> int:
        """What a batch of this width takes beyond its tokens, in tokens of the same time: by the
        seconds of its smallest and its largest number of rows. 0 where there is but one."""
        sizes, seconds = self.buckets.sizes(width), []
        if len(sizes) == 1:
            return 0
        for size in (sizes[0], sizes[-1]):
            rows, times = [[0] * width] * size, []
            for _ in range(2):
                begun = time.perf_counter()
                jax.block_until_ready(self.start(rows, Ks))
                times.append(time.perf_counter() - begun)
            seconds.append(min(times))
        fewer, more = seconds
        tokens = (sizes[-1] - sizes[0]) * width
        if fewer >= more:  # a batch costs the same however large it is
            return sizes[-1] * width
        return max(round(fewer / (more - fewer) * tokens) - sizes[0] * width, 0)

    def start(self, rows: Sequence[Sequence[int]], Ks: tuple[int, ...]) -> jax.Array:
        """Begins one batch, as `buckets` cut it: its embeddings at every K, [S, B, D] float32 and
        perhaps still being computed. Rows beyond those given only fill the batch up."""
        size, width = self.buckets.shape(rows)
        # the spare rows of a batch that is not full are dropped by `encode_blocks`
        batch = right_pad([*rows, *[rows[-1]] * (size - len(rows))], 0, width)
        if self._rows is not None:
            placed = jax.make_array_from_callback
            batch = [placed(array.shape, self._rows, array.__getitem__) for array in batch]
        return self._program(size, width, Ks)(self.variables, *batch)

    def encode_tokens(
        self,
        rows: Sequence[Sequence[int]],
        num_thinking_steps: Sequence[int],
        *,
        progress: str | None = None,
        describe: Callable[[int], str] = "row {}".format,
    ) -> np.ndarray:
        """The embeddings of `rows` at every K that is named, from one pass with the largest.

        Args:
            rows: token ids, unpadded; on a mesh the same in every process.
            num_thinking_steps: values of K, each at least 1.
            progress: label of a progress bar; None for silence.
            describe: names the row at a place, for an error.

        Returns:
            [len(num_thinking_steps), len(rows), D] float32, in the order given, in every process.

        Raises:
            NotFiniteError: a vector is not finite; names the row.
            ValueError: a K below 1.
        """
        blocks, Ks = [list(enumerate(rows))], num_thinking_steps
        return self.encode_blocks(blocks, len(rows), Ks, progress=progress, describe=describe)

    def encode_blocks(
        self,
        blocks: Iterable[Sequence[IndexedRow]],
        count: int,
        num_thinking_steps: Sequence[int],
        *,
        progress: str | None = None,
        describe: Callable[[int], str] = "row {}".format,
        advance: Callable[[Sequence[IndexedRow]], object] | None = None,
    ) -> np.ndarray:
        """`encode_tokens` for `count` rows that arrive in blocks, each with its place in the
        result: a block can be tokenised while the one before it is on the device. `advance` is
        called with every batch whose vectors have come."""
        Ks = tuple(num_thinking_steps)
        if not Ks or min(Ks) < 1:
            raise ValueError(f"every number of thinking steps must be at least 1, got {Ks}")
        out = np.empty((len(Ks), count, self.config.backbone.hidden_size), np.float32)
        # The device computes the next batch while one is copied to the host. Processes on a mesh
        # wait for each: two programs with collectives in flight were seen to hang on CPU (gloo).
        ahead = 1 if jax.process_count() == 1 else 0
        started: deque[tuple[list[IndexedRow], jax.Array]] = deque()
        bar = tqdm(total=count, desc=progress, disable=None if progress else True, leave=False)
        with bar:

            def finish() -> None:
                batch, embeddings = started.popleft()
                vectors_SBD = np.asarray(embeddings)[:, : len(batch)]
                broken = np.flatnonzero(~np.isfinite(vectors_SBD).all(axis=(0, 2)))
                if len(broken):
                    first = min(batch[row][0] for row in broken)
                    raise NotFiniteError(describe(first), self.config.dtype, first)
                out[:, [place for place, _ in batch]] = vectors_SBD
                bar.update(len(batch))
                if advance is not None:
                    advance(batch)

            for batch in self.buckets.batches(blocks):
                started.append((batch, self.start([row for _, row in batch], Ks)))
                if len(started) > ahead:
                    finish()
            while started:
                finish()
        return out
