"""From tokens to vectors: the pure `encode`, and `LatentEncoder`, which runs it over many rows."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from laser_jax.config import AttentionKernel, RetrieverConfig, load_retriever_config
from laser_jax.data.tokenization import right_pad
from laser_jax.hf import load_adapter, load_params, merge_lora, read_backbone_config
from laser_jax.losses import pool
from laser_jax.modeling.attention import choose_kernel
from laser_jax.modeling.backbone import Backbone, Variables, is_stacked, unstack_layers
from laser_jax.sharding import batch_sharding
from laser_jax.views import latent_view


def load_pretrained(
    directory: str | Path,
    *,
    config: RetrieverConfig | None = None,
    adapter: str | Path | None = None,
) -> tuple[Variables, RetrieverConfig]:
    """Loads an exported model, or any Hugging Face directory of the two families.

    Args:
        directory: holds config.json, safetensors and, when laser_jax exported it,
            laser_config.json.
        config: how to think and to prompt; wanted for a directory without laser_config.json. Its
            backbone must be the directory's.
        adapter: a directory with a PEFT LoRA adapter, merged into the weights.

    Returns:
        The variables {"params": ...} as host arrays in the config's dtype, and the config that
        `encode` wants.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a config, tensor or adapter is not what it should be; names it.
    """
    if config is None:
        config = load_retriever_config(directory)
    backbone = read_backbone_config(directory)
    if backbone != config.backbone:
        raise ValueError(
            f"{directory}: the backbone of the retriever config differs from config.json; expected "
            f"{backbone}, got {config.backbone}"
        )
    params = load_params(directory, backbone, dtype=jnp.dtype(config.dtype))
    if adapter is not None:
        lora, lora_config = load_adapter(adapter, backbone)
        params = merge_lora(params, lora, lora_config.scale)
    return {"params": params}, config


def backbone_for(
    config: RetrieverConfig, variables: Variables, attention: AttentionKernel = "xla"
) -> Backbone:
    """The Linen module that reads `variables` (scanned or unstacked layers, adapters or none)."""
    return Backbone(
        config.backbone,
        lora=config.lora,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.dtype),
        scan_layers=is_stacked(variables),
        attention=attention,
    )


def right_padded(ids_BT: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Moves the real tokens of each row to its front.

    Returns:
        The ids [B, T] and the number of real tokens [B]; a row without any counts as one token.
    """
    T = ids_BT.shape[1]
    real_BT = mask_BT.astype(jnp.bool_)
    start_B = jnp.argmax(real_BT, axis=1)
    index_BT = (jnp.arange(T)[None, :] + start_B[:, None]) % T
    lengths_B = jnp.maximum(real_BT.sum(axis=1), 1).astype(jnp.int32)
    return jnp.take_along_axis(ids_BT, index_BT, axis=1), lengths_B


def encode(
    params: Variables,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    *,
    config: RetrieverConfig,
    num_thinking_steps: int | None = None,
    attention: AttentionKernel = "xla",
) -> jax.Array:
    """Embeds tokenised prompts. Pure: jittable, differentiable, without hidden state.

    Args:
        params: variables as `load_pretrained` returns them, scanned or unstacked.
        input_ids: [B, T] int.
        attention_mask: [B, T], 1 or True on one contiguous run of real tokens; padding may stand
            on either side and gives the same vectors.
        config: static (hashable), as `load_pretrained` returns it.
        num_thinking_steps: K >= 1, whatever K was trained; None takes the config's.
        attention: the kernel that reads the prompts; `xla` runs everywhere and can be exported.

    Returns:
        [B, D] float32 unit rows (LaSER equation 6).
    """
    steps = config.num_thinking_steps if num_thinking_steps is None else num_thinking_steps
    ids_BT, lengths_B = right_padded(input_ids, attention_mask)
    backbone = backbone_for(config, params, attention)
    return pool(latent_view(backbone, params, ids_BT, lengths_B, steps, config.pooling))


class LatentEncoder:
    """Embeds many token rows: sorted by length, in batches of few shapes, each compiled once.

    Attributes:
        config: as given.
        batch_size: rows of a batch; with a mesh a multiple of the devices that share the batch.
        length_multiple: batches are padded to a multiple of this.
        attention: the kernel in use, and `attention_reason` why.
    """

    def __init__(
        self,
        variables: Variables,
        config: RetrieverConfig,
        *,
        batch_size: int = 64,
        length_multiple: int = 32,
        mesh: Mesh | None = None,
        attention: Literal["auto"] | AttentionKernel = "auto",
    ):
        """Places the weights; compiles nothing.

        Args:
            variables: as `load_pretrained` returns them. With a mesh they are arrays that lie on
                it, and stay as they lie; without one they go to the default device.
            batch_size: rows of a batch, rounded up to what the mesh divides.
            mesh: splits the rows of every batch. All processes of it make the same calls.
            attention: the kernel; `auto` takes the fastest that can run there.

        Raises:
            ConfigError: the kernel cannot run there.
        """
        self.config = config
        self.length_multiple = length_multiple
        self._mesh = mesh
        share = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch_size = -(-batch_size // share) * share
        self._variables = self._placed(variables)
        self.attention, self.attention_reason = choose_kernel(
            attention, jax.default_backend(), config.dtype, config.backbone.head_dim
        )
        self._backbone = backbone_for(config, self._variables, self.attention)
        self._programs: dict[tuple[int, int, tuple[int, ...]], jax.stages.Compiled] = {}

    def with_variables(self, variables: Variables) -> LatentEncoder:
        """The same encoder with other weights of the same shapes, dtypes and places: it shares the
        compiled programs."""
        other = copy.copy(self)
        other._variables = self._placed(variables)
        return other

    def _placed(self, variables: Variables) -> Variables:
        if self._mesh is not None:
            return variables
        unstack = is_stacked(variables) and jax.default_backend() != "tpu"
        return jax.device_put(unstack_layers(variables) if unstack else variables)

    def _embed(
        self, variables: Variables, ids_BT: jax.Array, lengths_B: jax.Array, steps: tuple[int, ...]
    ) -> jax.Array:
        hidden_BKD = latent_view(
            self._backbone, variables, ids_BT, lengths_B, max(steps), self.config.pooling
        )
        return jnp.stack([pool(hidden_BKD[:, :k]) for k in steps])

    def _program(self, ids_BT: jax.Array, lengths_B: jax.Array, steps: tuple[int, ...]) -> Any:
        """The compiled program for batches of this shape."""
        key = (*ids_BT.shape, steps)
        if key not in self._programs:
            everywhere = self._mesh and NamedSharding(self._mesh, PartitionSpec())
            jitted = jax.jit(self._embed, static_argnums=3, out_shardings=everywhere)
            with jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext():
                lowered = jitted.lower(self._variables, ids_BT, lengths_B, steps)
            self._programs[key] = lowered.compile()
        return self._programs[key]

    def _on_devices(self, array: np.ndarray) -> jax.Array:
        """A batch on the device, or its rows split over the mesh; every process has all of them."""
        if self._mesh is None:
            return jax.device_put(array)
        return jax.make_array_from_callback(
            array.shape, batch_sharding(self._mesh), lambda index: array[index]
        )

    def encode_tokens(
        self, rows: Sequence[Sequence[int]], steps: Sequence[int], *, progress: str | None = None
    ) -> np.ndarray:
        """The embeddings of `rows` at every K of `steps`, from one pass with the largest K.

        Args:
            rows: token ids, unpadded; on a mesh the same in every process.
            steps: values of K, each at least 1.
            progress: label of a progress bar; None for silence.

        Returns:
            [len(steps), len(rows), D] float32, in the order given, in every process.
        """
        steps = tuple(steps)
        if not steps or min(steps) < 1:
            raise ValueError(f"every number of thinking steps must be at least 1, got {steps}")
        out = np.empty((len(steps), len(rows), self.config.backbone.hidden_size), np.float32)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        starts = range(0, len(order), self.batch_size)
        for start in tqdm(starts, desc=progress, disable=None if progress else True, leave=False):
            chosen = order[start : start + self.batch_size]
            batch = [rows[i] for i in chosen]
            # a last, short batch keeps the shape of the others: its spare rows are dropped below
            batch += [batch[0]] * (self.batch_size - len(batch))
            ids_BT, lengths_B = map(self._on_devices, right_pad(batch, 0, self.length_multiple))
            embeddings = self._program(ids_BT, lengths_B, steps)(self._variables, ids_BT, lengths_B)
            out[:, chosen] = np.asarray(embeddings)[:, : len(chosen)]
        return out
