"""What a program is told about the model that it runs, and presets for models of the authors."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import jax
from jax.sharding import Mesh

from laser_jax.config import (
    RETRIEVER_CONFIG_FILE,
    Dtype,
    MeshConfig,
    Pooling,
    PromptConfig,
    RetrieverConfig,
    appended_thoughts,
    load_retriever_config,
)
from laser_jax.hf.directory import read_backbone_config
from laser_jax.models.directory import model_directory
from laser_jax.settings import require, require_in
from laser_jax.sharding import make_mesh

LimitKey = Literal["query_max_length", "document_max_length"]
Preset = Literal["official", "official-bare", "gircse"]

# The prompt of configs/official.yaml.
_OFFICIAL = PromptConfig(allow_special_tokens=True, segmentation="token", truncation="sequence")
_BARE = replace(_OFFICIAL, query_template="{query}", chat_template=False)
_GIRCSE = replace(
    _BARE, query_template="Instruct: {instruction}\nQuery:{query}", add_special_tokens=False
)
_PRESETS: dict[str, tuple[PromptConfig, int, Pooling]] = {
    "official": (_OFFICIAL, 8192, "prompt_and_thoughts"),
    "official-bare": (_BARE, 512, "prompt_and_thoughts"),
    "gircse": (_GIRCSE, 512, "thoughts"),
}
"""The prompt, the most tokens of a query and of a document, and the states that are pooled."""


def read_retriever_config(directory: str | Path, preset: str | None = None) -> RetrieverConfig:
    """How the model of a Hugging Face directory prompts and thinks, by its laser_config.json; or by
    a preset, for a released model, which has no such file: `official` prompts as the evaluator of
    LaSER's authors does, `official-bare` reads the text alone, as their quick start does, and
    `gircse` is for the adapters of GIRCSE (arXiv 2509.24291) over their backbones. All think K = 3
    steps and append no EOS. Raises a FileNotFoundError, and a ConfigError where a file is damaged,
    the preset is unknown, or the model says itself what it is."""
    require_preset(preset)
    if preset is None:
        return load_retriever_config(directory)
    require(
        not (Path(directory) / RETRIEVER_CONFIG_FILE).exists(),
        f"{directory} has a {RETRIEVER_CONFIG_FILE}, which says how the model was trained: leave "
        f"the preset {preset!r} away, or remove that file",
    )
    prompt, limit, pooling = _PRESETS[preset]
    config = RetrieverConfig(read_backbone_config(directory), pooling=pooling, prompt=prompt)
    room = config.backbone.max_position_embeddings - prompt.explicit_max_length
    return with_max_length(config, max(min(limit, room), prompt.query_max_length))


def require_preset(preset: str | None) -> None:
    """Raises a ConfigError that lists the presets where there is none of this name."""
    known = f"preset is one of {', '.join(_PRESETS)}, not {preset!r}"
    require(preset in (None, *_PRESETS), known)


def with_max_length(config: RetrieverConfig, tokens: int) -> RetrieverConfig:
    """The config with `tokens` as the limit of queries and of documents; the explicit view keeps
    its room for the reasoning. Raises a ConfigError where the model has fewer positions."""
    prompt, backbone = config.prompt, config.backbone
    explicit = tokens + max(prompt.explicit_max_length - prompt.query_max_length, 0)
    most = max(config.num_thinking_steps, config.documents_at)
    thoughts = appended_thoughts(most, config.pooling)
    backbone.require_positions(
        max(tokens + thoughts, explicit),
        f"max_length {tokens}, and as much for thinking or reasoning as before, take",
        "take a smaller max_length",
    )
    limits = {"query_max_length": tokens, "document_max_length": tokens}
    return replace(config, prompt=replace(prompt, **limits, explicit_max_length=explicit))


def require_positions(
    config: RetrieverConfig, limit_key: LimitKey, num_thinking_steps: int
) -> None:
    """Raises a ConfigError where the longest prompt and its thoughts outgrow the positions."""
    limit: int = getattr(config.prompt, limit_key)
    config.backbone.require_positions(
        limit + appended_thoughts(num_thinking_steps, config.pooling),
        f"prompt.{limit_key} {limit} and {num_thinking_steps} thinking steps take",
        f"take fewer steps, or lower prompt.{limit_key}",
    )


@dataclass(frozen=True)
class SplitConfig:
    """How devices share the weights of a model; what that leaves of them shares the rows."""

    fsdp: int = 1
    """Splits parameters and batch."""
    tensor: int = 1
    """Splits heads, feed-forward and vocabulary."""

    def __post_init__(self) -> None:
        require_in("[1, inf)", self, "mesh.", "fsdp", "tensor")


def local_mesh(split: SplitConfig, count: int | None = None) -> Mesh | None:
    """A mesh for `LatentRetriever.from_pretrained` over the first `count` devices of this process,
    by default all of them; None where that is a single one. Raises a ConfigError where there are
    fewer, or the split does not divide their number."""
    devices = jax.local_devices()
    fault = f"devices is {count}, and this process has {len(devices)}"
    require(count is None or count <= len(devices), fault)
    if len(devices[:count]) == 1 and split == SplitConfig():
        return None
    return make_mesh(MeshConfig(-1, split.fsdp, split.tensor), devices[:count])


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """A model, and the batches in which it reads texts."""

    model: str
    """A directory as `laser_jax.train` exports it or Hugging Face lays it out, or a name on the
    Hugging Face hub."""
    max_length: int | None = None
    """Tokens of a query and of a document. None: the model's limits."""
    compute_dtype: Dtype | None = None
    """What the model computes in. None: its own."""
    batch_size: int = 64
    """The most rows of a batch; 1 for the latency of a single query."""
    length_multiple: int = 32
    """Widths of batches are multiples of it: fewer of them mean less compilation, more padding."""

    def __post_init__(self) -> None:
        require_in("[1, inf)", self, "", "max_length", "batch_size", "length_multiple")


@dataclass(frozen=True, kw_only=True)
class EncoderOptions(BatchOptions):
    """A retriever and how it is run. The programs that run one inherit these flags."""

    preset: Preset | None = None
    """For a released model, which has no laser_config.json: see `read_retriever_config`."""
    adapter: str | None = None
    """A directory with a PEFT LoRA adapter, merged into the model."""
    num_thinking_steps: int | None = None
    """K; of queries alone where the model has one of its own for documents. None: the model's."""
    batch_tokens: int = 8192
    """The most tokens of a batch, on all devices together."""
    devices: int | None = None
    """Local devices that share every batch. None: all of them."""
    mesh: SplitConfig = field(default_factory=SplitConfig)
    """How those devices share the weights; by default they share rows alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_preset(self.preset)
        require_in("[1, inf)", self, "", "num_thinking_steps", "batch_tokens", "devices")

    def retriever_config(self) -> RetrieverConfig:
        """What the model's directory and these options make together. Raises as
        `read_retriever_config` and `with_max_length`."""
        config = read_retriever_config(model_directory(self.model), self.preset)
        config = replace(
            config,
            dtype=self.compute_dtype or config.dtype,
            num_thinking_steps=self.num_thinking_steps or config.num_thinking_steps,
        )
        return config if self.max_length is None else with_max_length(config, self.max_length)
