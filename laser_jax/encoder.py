"""From tokens to vectors: the pure `encode`, and the loading of what it wants."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from laser_jax.batch import Tokens
from laser_jax.config import AttentionKernel, RetrieverConfig, load_retriever_config
from laser_jax.files.durable import Digest
from laser_jax.hf.adapters import merge_lora
from laser_jax.hf.directory import read_backbone_config
from laser_jax.hf.reading import load_adapter, load_params
from laser_jax.losses import pool
from laser_jax.modeling.backbone import Backbone, Variables, is_stacked
from laser_jax.views import latent_view


def load_pretrained(
    directory: str | Path,
    *,
    config: RetrieverConfig | None = None,
    adapter: str | Path | None = None,
    seen: Digest | None = None,
) -> tuple[Variables, RetrieverConfig]:
    """Loads an exported model, or a Hugging Face directory of any family of `BackboneConfig`.

    Args:
        directory: holds config.json, safetensors and, when laser_jax exported it,
            laser_config.json.
        config: how to think and to prompt; wanted for a directory without laser_config.json. Its
            backbone must be the directory's.
        adapter: a directory with a PEFT LoRA adapter, merged into the weights.
        seen: is given all weights that are read.

    Returns:
        The variables {"params": ...} as host arrays in the config's dtype, and the config that
        `encode` wants.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a config, tensor or adapter is not what it should be, or the adapter is merged
            into the model already; names it.
    """
    if config is None:
        config = load_retriever_config(directory)
    backbone = read_backbone_config(directory)
    if backbone != config.backbone:
        raise ValueError(
            f"{directory}: the backbone of the retriever config differs from config.json; expected "
            f"{backbone}, got {config.backbone}"
        )
    params = load_params(directory, backbone, dtype=jnp.dtype(config.dtype), seen=seen)
    if adapter is not None:
        lora, lora_config = load_adapter(adapter, backbone, base=directory)
        if seen is not None:
            seen.add_tree({"scale": lora_config.scale, **lora}, "lora")
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
    """Moves the real tokens of each row to its front; all others become 0, as an id without an
    embedding has NaN for keys, which no mask takes away.

    Returns:
        The ids [B, T] and the number of real tokens [B]; a row without any counts as one token.
    """
    if ids_BT.ndim != 2 or ids_BT.shape != mask_BT.shape:
        raise ValueError(f"wanted [B, T] ids and mask, got {ids_BT.shape} and {mask_BT.shape}")
    T = ids_BT.shape[1]
    real_BT = mask_BT.astype(jnp.bool_)
    ids_BT = jnp.where(real_BT, ids_BT, 0)
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
            on either side and hold any id, and gives the same vectors.
        config: static (hashable), as `load_pretrained` returns it.
        num_thinking_steps: K >= 1, whatever K was trained; None takes the config's of queries
            (`config.documents_at` is that of documents).
        attention: the kernel that reads the prompts; `xla` runs everywhere and can be exported.

    Returns:
        [B, D] float32 unit rows (LaSER equation 6).
    """
    return encode_all_steps(
        params,
        input_ids,
        attention_mask,
        config=config,
        num_thinking_steps=num_thinking_steps,
        attention=attention,
    )[:, -1]


def encode_all_steps(
    params: Variables,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    *,
    config: RetrieverConfig,
    num_thinking_steps: int | None = None,
    attention: AttentionKernel = "xla",
) -> jax.Array:
    """What `encode` returns at every k from 1 to K, from one pass: [B, K, D] float32 unit rows.

    A shorter thought is a prefix of a longer one, so all of them cost as much as the last. The
    arguments are those of `encode`.
    """
    K = config.num_thinking_steps if num_thinking_steps is None else num_thinking_steps
    ids_BT, lengths_B = right_padded(input_ids, attention_mask)
    backbone = backbone_for(config, params, attention)
    hidden_BKD = latent_view(backbone, params, Tokens(ids_BT, lengths_B), K, config.pooling)
    return jnp.stack([pool(hidden_BKD[:, : k + 1]) for k in range(K)], axis=1)
