"""The model that a training begins from, and the directory that it leaves."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from laser_jax.config import (
    PROJECTIONS,
    BackboneConfig,
    ConfigError,
    LoraConfig,
    ModelConfig,
    RetrieverConfig,
    as_dict,
    save_retriever_config,
)
from laser_jax.data.tokenization import (
    Tokenizer,
    load_tokenizer_for,
    special_token_ids,
    train_tokenizer,
)
from laser_jax.data.tokenizer_files import save_tokenizer
from laser_jax.files.durable import folder_written_whole
from laser_jax.hf.adapters import merged_adapters
from laser_jax.hf.directory import read_backbone_config
from laser_jax.hf.reading import load_adapter
from laser_jax.hf.writing import save_params
from laser_jax.modeling.attention import choose_kernel
from laser_jax.modeling.backbone import Backbone, Variables
from laser_jax.models.directory import model_directory
from laser_jax.settings import changes, listed
from laser_jax.train.processes import is_first


def starting_model(
    model: ModelConfig, texts: Callable[[], Iterable[str]]
) -> tuple[Path | None, Tokenizer, BackboneConfig]:
    """The directory, the tokenizer and the sizes of `model.path`; or those of a model from scratch,
    which has no directory and learns its tokenizer from `texts`."""
    if model.path is not None:
        directory = model_directory(model.path)
        backbone = read_backbone_config(directory)
        model.require_named_backbone(backbone)
        return directory, load_tokenizer_for(directory, backbone), backbone
    assert model.scratch is not None
    tokenizer = train_tokenizer(texts(), model.scratch.vocab_size)
    return None, tokenizer, model.scratch.backbone(len(tokenizer))


def load_starting_adapter(
    model: ModelConfig, lora: LoraConfig, backbone: BackboneConfig, like: Any
) -> Any:
    """The adapter in `model.adapter`, float32, laid out as the arrays of the collection `lora` are.
    Raises a ConfigError where its settings are not `lora`, and as `load_adapter`."""
    assert model.adapter is not None
    tree, found = load_adapter(model.adapter, backbone, base=model_directory(str(model.path)))
    wanted = replace(lora, targets=tuple(name for name in PROJECTIONS if name in lora.targets))
    if different := changes(as_dict(wanted), found, source="lora"):
        other = f"has other settings than lora:\n  {listed(different)}"
        raise ConfigError(f"model.adapter {model.adapter} {other}")
    return jax.tree.map(
        lambda value, leaf: jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: value[index]
        ),
        tree,
        like,
    )


def build_backbone(
    model: ModelConfig, config: BackboneConfig, platform: str, lora: LoraConfig | None = None
) -> tuple[Backbone, str]:
    """The module to be trained on devices of `platform`, and which attention kernel it has, with
    the reason. A ConfigError says that the kernel that was asked for cannot run there."""
    kernel, reason = choose_kernel(model.attention, platform, model.dtype, config.head_dim)
    backbone = Backbone(
        config,
        lora=lora,
        dtype=jnp.dtype(model.dtype),
        param_dtype=jnp.dtype(jnp.float32),
        attention=kernel,
        remat=model.remat,
        reverse_only=True,
    )
    return backbone, f"{kernel} ({reason})"


def save_model(
    directory: Path,
    variables: Variables,
    backbone: Backbone,
    model: ModelConfig,
    tokenizer: Tokenizer,
    retriever: RetrieverConfig | None = None,
) -> None:
    """Writes merged weights, tokenizer and a retriever's config. All processes take part."""
    save_params(
        directory,
        variables,
        backbone.config,
        dtype=model.param_dtype,
        lora=backbone.lora,
        tokens=special_token_ids(tokenizer),
        merged=merged_adapters(model_directory(model.path)) if model.path else (),
    )
    if is_first():
        with folder_written_whole(directory) as folder:
            save_tokenizer(tokenizer, folder)
            if retriever is not None:
                save_retriever_config(retriever, folder)
