"""What a program is told about the model that it runs, and presets for models of the authors."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import jax
from jax.sharding import Mesh

from laser_jax.config import (
    RETRIEVER_CONFIG_FILE,
    ConfigError,
    Dtype,
    MeshConfig,
    PromptConfig,
    RetrieverConfig,
    appended_thoughts,
    load_retriever_config,
)
from laser_jax.hf.directory import read_backbone_config, resolve_directory
from laser_jax.sharding import make_mesh

LimitKey = Literal["query_max_length", "document_max_length"]
Preset = Literal["official", "official-bare"]

# The prompt of configs/official.yaml.
_OFFICIAL = PromptConfig(allow_special_tokens=True, segmentation="token", truncation="sequence")
_BARE = replace(_OFFICIAL, query_template="{query}", chat_template=False)
_PRESETS: dict[str, tuple[PromptConfig, int]] = {
    "official": (_OFFICIAL, 8192),
    "official-bare": (_BARE, 512),
}
"""The prompt, and the most tokens of a query and of a document, of the released evaluator and of
the released quick start."""


def read_retriever_config(directory: str | Path, preset: str | None = None) -> RetrieverConfig:
    """How a model prompts and thinks.

    Args:
        directory: a Hugging Face directory, with laser_config.json where laser_jax exported it.
        preset: for a model that the authors of LaSER released, which has no such file: `official`
            prompts as their evaluator does, `official-bare` reads the text alone, as their quick
            start does. Both think K = 3 steps and append no EOS.

    Raises:
        FileNotFoundError: a file is missing.
        ConfigError: a file is damaged, the preset is unknown, or the model says itself what it is.
    """
    require_preset(preset)
    if preset is None:
        return load_retriever_config(directory)
    if (Path(directory) / RETRIEVER_CONFIG_FILE).exists():
        raise ConfigError(
            f"{directory} has a {RETRIEVER_CONFIG_FILE}, which says how the model was trained: "
            f"leave the preset {preset!r} away, or remove that file"
        )
    prompt, limit = _PRESETS[preset]
    config = RetrieverConfig(read_backbone_config(directory), num_thinking_steps=3, prompt=prompt)
    room = config.backbone.max_position_embeddings - prompt.explicit_max_length
    return with_max_length(config, max(min(limit, room), prompt.query_max_length))


def require_preset(preset: str | None) -> None:
    """Raises a ConfigError that lists the presets where there is none of this name."""
    if preset not in (None, *_PRESETS):
        raise ConfigError(f"preset is one of {', '.join(_PRESETS)}, not {preset!r}")


def with_max_length(config: RetrieverConfig, tokens: int) -> RetrieverConfig:
    """The config with `tokens` as the limit of queries and of documents; the explicit view keeps
    its room for the reasoning.

    Raises:
        ConfigError: the model has fewer positions.
    """
    prompt, positions = config.prompt, config.backbone.max_position_embeddings
    explicit = tokens + max(prompt.explicit_max_length - prompt.query_max_length, 0)
    thoughts = appended_thoughts(config.num_thinking_steps, config.pooling)
    if max(tokens + thoughts, explicit) > positions:
        raise ConfigError(
            f"max_length {tokens}, and as much for thinking or reasoning as before, is more than "
            f"the model's {positions} positions"
        )
    limits = {"query_max_length": tokens, "document_max_length": tokens}
    return replace(config, prompt=replace(prompt, **limits, explicit_max_length=explicit))


def require_positions(
    config: RetrieverConfig, limit_key: LimitKey, num_thinking_steps: int
) -> None:
    """Raises a ConfigError where a prompt of the longest kind and its thinking steps take more
    positions than the model has."""
    limit: int = getattr(config.prompt, limit_key)
    positions = config.backbone.max_position_embeddings
    taken = limit + appended_thoughts(num_thinking_steps, config.pooling)
    if taken > positions:
        raise ConfigError(
            f"prompt.{limit_key} {limit} and {num_thinking_steps} thinking steps take {taken} "
            f"positions, and the model has {positions}: take fewer steps, or lower the limit"
        )


def local_mesh(config: MeshConfig, count: int | None = None) -> Mesh | None:
    """A mesh for `LatentRetriever.from_pretrained` over the first `count` devices of this process,
    by default all of them; None where that is a single one.

    Raises:
        ConfigError: there are fewer, or the axes do not multiply to their number.
    """
    devices = jax.local_devices()
    if count is not None and count > len(devices):
        raise ConfigError(f"devices is {count}, and this process has {len(devices)}")
    devices = devices[:count]
    return make_mesh(config, devices) if len(devices) > 1 or config != MeshConfig() else None


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """A model and how it is run. The programs that run one inherit these flags."""

    model: str
    """A directory as `laser_jax.train` exports it, or a name on the Hugging Face hub."""
    preset: Preset | None = None
    """For a model that the authors released, which has no laser_config.json: `official` prompts as
    their evaluator does, `official-bare` reads the text alone."""
    adapter: str | None = None
    """A directory with a LoRA adapter, merged into the model."""
    num_thinking_steps: int | None = None
    """K. None: the model's."""
    max_length: int | None = None
    """Tokens of a query and of a document. None: the model's limits."""
    compute_dtype: Dtype | None = None
    """What the model computes in. None: its own."""
    batch_size: int = 64
    """The most rows of a batch."""
    batch_tokens: int = 8192
    """The most tokens of a batch, on all devices together."""
    length_multiple: int = 32
    """Widths of batches are multiples of it."""
    devices: int | None = None
    """Local devices that share every batch. None: all of them."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How those devices share weights and rows; by default rows alone."""

    def __post_init__(self) -> None:
        require_preset(self.preset)
        for name in (
            *("num_thinking_steps", "max_length", "batch_size", "batch_tokens"),
            *("length_multiple", "devices"),
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")

    def retriever_config(self) -> RetrieverConfig:
        """What the model's directory and these options make together. Raises as
        `read_retriever_config` and `with_max_length`."""
        config = read_retriever_config(resolve_directory(self.model), self.preset)
        config = replace(
            config,
            dtype=self.compute_dtype or config.dtype,
            num_thinking_steps=self.num_thinking_steps or config.num_thinking_steps,
        )
        return config if self.max_length is None else with_max_length(config, self.max_length)
