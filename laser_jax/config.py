"""Every setting of laser_jax, as frozen dataclasses. No jax in here.

The YAML files under `configs/` and the dotted flags of `python -m laser_jax.train` fill `Config`;
unknown keys and wrong types are refused by jsonargparse, impossible values by `__post_init__`.
`RetrieverConfig` is the part that travels with a trained model, as `laser_config.json`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from laser_jax.files.reading import DataError, parse_number, parse_yaml, read_json, read_yaml

RETRIEVER_CONFIG_FILE = "laser_config.json"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Dtype = Literal["float32", "bfloat16", "float16"]
KeyframeRule = Literal["official", "paper"]
Pooling = Literal["prompt_and_thoughts", "thoughts"]
DevMetric = Literal["nDCG@10", "Recall@100", "Hit@1"]
AttentionKernel = Literal["xla", "cudnn", "splash"]
Remat = Literal["none", "dots", "full"]


C = TypeVar("C")


class ConfigError(ValueError):
    """A setting that cannot work. The message names the key, the value and the way out."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_positive(key: str, value: float) -> None:
    _require(0 < value < float("inf"), f"{key} must be a positive number, got {value}")


def _require_seed(key: str, seed: int) -> None:
    _require(0 <= seed < 2**32, f"{key} must lie in [0, 2^32), got {seed}")


# --- the backbone ----------------------------------------------------------------------------


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling: long wavelengths are divided by `factor`, short ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _require_positive(f"rope_scaling.{f.name}", getattr(self, f.name))


# Far beyond every model, and small enough that a damaged or hostile config.json is refused at once.
_LARGEST_SIZES = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "num_layers": 1000,
    "num_heads": 2**16,
    "num_kv_heads": 2**16,
    "head_dim": 2**16,
    "intermediate_size": 2**24,
    "max_position_embeddings": 2**31 - 1,
}


@dataclass(frozen=True)
class BackboneConfig:
    """One decoder that is Qwen3 or Llama 3.x. Sizes as in a Hugging Face `config.json`."""

    family: Literal["qwen3", "llama"]
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    max_position_embeddings: int

    def __post_init__(self) -> None:
        for name, most in _LARGEST_SIZES.items():
            size = getattr(self, name)
            _require(1 <= size <= most, f"backbone.{name} must lie in 1..{most}, got {size}")
        for name in ("rms_norm_eps", "rope_theta"):
            _require_positive(f"backbone.{name}", getattr(self, name))
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"backbone.num_heads {self.num_heads} must be a multiple of num_kv_heads "
            f"{self.num_kv_heads}",
        )
        _require(self.head_dim % 2 == 0, f"backbone.head_dim {self.head_dim} must be even (RoPE)")

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises every query and key head before RoPE; Llama does not."""
        return self.family == "qwen3"


def _qwen3(hidden: int, layers: int, heads: int, ffn: int, tied: bool) -> BackboneConfig:
    return BackboneConfig(
        family="qwen3",
        vocab_size=151_936,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=ffn,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=None,
        tie_word_embeddings=tied,
        max_position_embeddings=40_960,
    )


def _llama3(
    hidden: int, layers: int, heads: int, head_dim: int, ffn: int, tied: bool, factor: float
) -> BackboneConfig:
    return BackboneConfig(
        family="llama",
        vocab_size=128_256,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=head_dim,
        intermediate_size=ffn,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        rope_scaling=RopeScaling(factor, 1.0, 4.0, 8192),
        tie_word_embeddings=tied,
        max_position_embeddings=131_072,
    )


BackboneName = Literal[
    "qwen3-0.6b", "qwen3-4b", "qwen3-8b", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"
]
BACKBONES: dict[BackboneName, BackboneConfig] = {
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12_288, tied=False),
    "llama-3.2-1b": _llama3(2048, 16, 32, 64, 8192, tied=True, factor=32.0),
    "llama-3.2-3b": _llama3(3072, 28, 24, 128, 8192, tied=True, factor=32.0),
    "llama-3.1-8b": _llama3(4096, 32, 32, 128, 14_336, tied=False, factor=8.0),
}


@dataclass(frozen=True)
class ScratchConfig:
    """A small backbone with random weights and a BPE tokenizer trained on the training texts."""

    family: Literal["qwen3", "llama"] = "qwen3"
    vocab_size: int = 8192
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 768
    rope_theta: float = 1e4
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 4096

    def backbone(self, vocab_size: int) -> BackboneConfig:
        """The backbone over a tokenizer of `vocab_size` tokens."""
        return BackboneConfig(
            family=self.family,
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size,
            rms_norm_eps=1e-6,
            rope_theta=self.rope_theta,
            rope_scaling=None,
            tie_word_embeddings=self.tie_word_embeddings,
            max_position_embeddings=self.max_position_embeddings,
        )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the named projections; y = x W + scale (x A) B."""

    rank: int = 64
    alpha: float = 32.0
    targets: tuple[str, ...] = PROJECTIONS
    rank_stabilised: bool = False

    def __post_init__(self) -> None:
        _require(self.rank >= 1, f"lora.rank must be at least 1, got {self.rank}")
        unknown = sorted(set(self.targets) - set(PROJECTIONS))
        _require(
            not unknown, f"lora.targets holds {unknown}; a subset of {list(PROJECTIONS)} is wanted"
        )
        _require(bool(self.targets), "lora.targets is empty; leave lora out for full fine-tuning")

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) for the rank-stabilised variant."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)


# --- text to tokens --------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptConfig:
    """How texts become prompts and prompts become tokens (LaSER section 4.1; design section 1)."""

    query_template: str = "Instruct: {instruction}\nQuery: {query}"
    document_template: str = "{document}"
    chat_template: bool = True
    """Wrap the content as a user turn of the tokenizer's chat template, with generation prompt."""
    thinking_suffix: str = "<think>\n\n</think>\n\n"
    """Appended after the generation prompt (only with `chat_template`)."""
    allow_special_tokens: bool = False
    """Whether `<|im_end|>`, `<think>` and the like become control tokens where they stand in a
    text, as in the released code. Otherwise only those of the templates do."""
    append_eos: bool = False
    """End queries and documents with EOS."""
    append_eos_to_reasoning: bool = True
    """End the explicit view's input with EOS."""
    separator: str = "\n\n"
    """Ends a segment of the chain of thought."""
    segmentation: Literal["text", "token"] = "text"
    """`text` cuts the chain of thought at every separator before tokenising; `token` (official)
    finds the separator's last token afterwards and misses merged ones."""
    truncation: Literal["content", "sequence"] = "content"
    """`content` shortens the text inside the template; `sequence` (official) cuts the finished
    token sequence, closing suffix included."""
    min_reasoning_characters: int = 5
    """A shorter chain of thought is replaced by the query text."""
    query_max_length: int = 512
    document_max_length: int = 512
    explicit_max_length: int = 1024

    def __post_init__(self) -> None:
        _require(
            "{query}" in self.query_template,
            f"prompt.query_template {self.query_template!r} has no {{query}} placeholder",
        )
        _require(
            "{document}" in self.document_template,
            f"prompt.document_template {self.document_template!r} has no {{document}} placeholder",
        )
        _require(self.separator != "", "prompt.separator is empty; the default is two newlines")
        for name in ("query_max_length", "document_max_length", "explicit_max_length"):
            _require(getattr(self, name) >= 1, f"prompt.{name} must be at least 1")


@dataclass(frozen=True)
class MixtureSource:
    """One of several sources of training rows."""

    path: str
    weight: float = 1.0
    """Its share of the rows of every epoch, relative to the other sources."""

    def __post_init__(self) -> None:
        _require(
            self.weight > 0 and self.weight != float("inf"),
            f"data.mixture: the weight of {self.path} must be positive, got {self.weight}",
        )


@dataclass(frozen=True)
class DataConfig:
    """The training rows and what is drawn from them."""

    train: str = ""
    """LaSER rows: JSONL (plain or .gz), Parquet, a Hugging Face `save_to_disk` directory,
    ArrayRecord files, or a directory that `laser_jax.prepare` wrote."""
    split: str | None = None
    """Which split of the directory `train`, where it holds several: short for `train/SPLIT`."""
    mixture: tuple[MixtureSource, ...] = ()
    """Several such sources with weights, instead of `train`."""
    eval: str | None = None
    """A BEIR directory: corpus.jsonl, queries.jsonl, qrels/<split>.tsv."""
    eval_split: str = "test"
    """Ranked once, when training has ended."""
    dev_split: str = "dev"
    """Ranked every `train.eval_every` steps, to choose a checkpoint by."""
    ignore_identical_ids: bool = True
    """BEIR's rule for both rankings: a query is not given the document that has its own id."""
    group_size: int = 2
    """Documents per query: one positive and group_size - 1 hard negatives."""
    selection: Literal["official", "random"] = "official"
    """Which positive and negatives an epoch uses: `official` takes positive `epoch mod n` and the
    first negatives; `random` draws both by (seed, epoch, row)."""
    mask_false_negatives: bool = True
    """Never contrast a query with a passage of the batch that is one of its own positives."""
    length_multiple: int = 32
    """Batches are padded to a multiple of this, which bounds the number of compiled shapes."""
    bucket_window: int = 1
    """Batches whose rows are sorted together by length before they are cut, so that rows of like
    length meet; their order is shuffled again. 1 leaves the rows in shuffled order."""
    threads: int = 2
    """Threads that read and build batches."""
    workers: int = 0
    """Processes that build batches beside the main one; 0 uses the threads alone."""

    def __post_init__(self) -> None:
        _require(
            not (self.train and self.mixture), "data.train and data.mixture exclude each other"
        )
        _require(
            self.split is None or bool(self.train),
            "data.split goes with data.train; a source of data.mixture names its split in its path",
        )
        for name in ("group_size", "length_multiple", "bucket_window", "threads"):
            value = getattr(self, name)
            _require(value >= 1, f"data.{name} must be at least 1, got {value}")
        _require(self.workers >= 0, f"data.workers must not be negative, got {self.workers}")

    @property
    def sources(self) -> tuple[MixtureSource, ...]:
        split = f"/{self.split}" if self.split else ""
        return self.mixture or (MixtureSource(f"{self.train}{split}"),)


# --- the objective ---------------------------------------------------------------------------


@dataclass(frozen=True)
class LossWeights:
    """L = latent L_latent + explicit L_explicit + output L_output + trajectory L_trajectory
    (LaSER equation 14; the lambdas are 1, 10 and 0.1)."""

    latent: float = 1.0
    explicit: float = 1.0
    output: float = 10.0
    trajectory: float = 0.1

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            _require(value >= 0, f"objective.weights.{f.name} must not be negative, got {value}")

    @property
    def need_explicit_view(self) -> bool:
        return bool(self.explicit or self.output or self.trajectory)


def appended_thoughts(num_thinking_steps: int, pooling: Pooling) -> int:
    """The soft tokens that stand behind a prompt when K states are pooled: the first of them is the
    prompt's own with `prompt_and_thoughts`."""
    return num_thinking_steps - (pooling == "prompt_and_thoughts")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is trained. The defaults are the paper's; `configs/official.yaml` holds the code's."""

    method: Literal["laser", "gircse"] = "laser"
    num_thinking_steps: int = 3
    """K, the number of hidden states that are pooled. 1 is a last-token retriever."""
    weights: LossWeights = field(default_factory=LossWeights)
    temperature: float = 0.02
    output_temperature: float = 0.02
    trajectory_temperature: float = 0.02
    """The paper states 0.02, the released code uses 0.05."""
    keyframes: KeyframeRule = "paper"
    distillation_warmup_steps: int = 0
    """The output and trajectory weights grow linearly from 0 over this many steps."""
    views: Literal["auto", "fast", "parity"] = "auto"
    """`fast` reads query and chain of thought in one pass and lets queries and documents think in
    one batch; `parity` makes a pass for each. `auto` is `fast` wherever that is the same function
    (see `Config.views`)."""
    teacher: str | None = None
    """A directory of a trained model that stays frozen and replaces the shared teacher (the
    ablation without co-learning). None: the same weights teach and learn."""

    def __post_init__(self) -> None:
        _require(
            self.num_thinking_steps >= 1,
            f"objective.num_thinking_steps must be at least 1, got {self.num_thinking_steps}",
        )
        for name in ("temperature", "output_temperature", "trajectory_temperature"):
            _require(getattr(self, name) > 0, f"objective.{name} must be positive")
        _require(
            self.distillation_warmup_steps >= 0,
            "objective.distillation_warmup_steps must not be negative, got "
            f"{self.distillation_warmup_steps}; 0 gives the terms their weights from the start",
        )

    @property
    def pooling(self) -> Pooling:
        return "thoughts" if self.method == "gircse" else "prompt_and_thoughts"

    @property
    def need_explicit_view(self) -> bool:
        return self.method == "laser" and self.weights.need_explicit_view


# --- the run ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """Where the backbone comes from: `path` (a Hugging Face directory) or `scratch`."""

    path: str | None = None
    """A Hugging Face directory, or the hub id (`Qwen/Qwen3-0.6B`) to download one from."""
    scratch: ScratchConfig | None = None
    backbone: BackboneName | None = None
    """Which of the paper's backbones `path` must be; `--dry_run` then needs no file of it."""
    dtype: Dtype = "float32"
    """Compute dtype. float32 on most CPUs; bfloat16 on GPU, TPU and CPUs with AMX."""
    param_dtype: Dtype = "float32"
    """Storage dtype of the backbone. Trained parameters are always float32."""
    attention: Literal["auto"] | AttentionKernel = "auto"
    """The kernel that reads prompts. `auto` takes cuDNN or splash where their conditions hold and
    says what it took; a kernel that is named here and cannot run is an error."""
    remat: Remat = "none"
    """What the backward pass recomputes: `none` keeps every activation, `dots` keeps the outputs of
    the weight matmuls, `full` keeps one input per layer and per thinking step."""

    def __post_init__(self) -> None:
        _require(
            (self.path is None) != (self.scratch is None),
            "exactly one of model.path (a Hugging Face directory) and model.scratch is wanted",
        )
        _require(
            self.backbone is None or self.scratch is None,
            "model.backbone says what model.path is; model.scratch has sizes of its own",
        )

    def require_named_backbone(self, found: BackboneConfig) -> None:
        """Raises a ConfigError where the model at `path` is not the one that `backbone` names. The
        positions may differ, as they do between a base and an instruct release."""
        if self.backbone is None:
            return
        named, given = dataclasses.asdict(BACKBONES[self.backbone]), dataclasses.asdict(found)
        differing = [
            f"{key} is {given[key]!r}, not {named[key]!r}"
            for key in named
            if key != "max_position_embeddings" and given[key] != named[key]
        ]
        _require(
            not differing,
            f"model.path {self.path} is no {self.backbone}: {'; '.join(differing)}. Name the "
            "model's own model.backbone, or null for any",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and linear decay to zero."""

    learning_rate: float = 1e-4
    warmup_ratio: float = 0.1
    schedule: Literal["linear", "constant"] = "linear"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        _require(self.learning_rate >= 0, "optimizer.learning_rate must not be negative")
        _require(0 <= self.warmup_ratio <= 1, "optimizer.warmup_ratio must lie in [0, 1]")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name} must lie in [0, 1), got {value}")
        _require(self.eps > 0, f"optimizer.eps must be positive, got {self.eps}")
        _require(
            self.weight_decay >= 0,
            f"optimizer.weight_decay must not be negative, got {self.weight_decay}",
        )
        _require(
            self.clip_norm is None or self.clip_norm > 0,
            f"optimizer.clip_norm must be positive, got {self.clip_norm}; null switches it off",
        )


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and bookkeeping of a run."""

    batch_size: int = 32
    """Queries in an optimizer step, over all devices."""
    micro_batch_size: int | None = None
    """Queries whose activations are held at once, over all devices. None: the whole batch."""
    accumulation: Literal["gradcache", "plain"] = "gradcache"
    """How micro-batches become one step: `gradcache` contrasts every query with the documents of
    the whole batch, at the price of a second forward pass; `plain` only with those of its own
    micro-batch, which is another, weaker loss."""
    epochs: float = 1.0
    steps: int | None = None
    """Overrides `epochs`."""
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    """The newest that are kept."""
    eval_every: int | None = None
    """Steps between rankings of `data.dev_split` at the trained K; None: never."""
    eval_metric: DevMetric = "nDCG@10"
    """What the best checkpoint is best at. It is kept beside the newest."""
    patience: int | None = None
    """Rankings in a row without a better score after which training ends; None: never."""
    export: Literal["last", "best"] = "last"
    """Which parameters become `model/` and are evaluated at the end."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A NaN or Inf in the loss or the gradients: `stop` ends the run and names the rows, `skip`
    leaves the parameters as they were, counts the step and goes on."""
    eval_batch_size: int = 64
    eval_thinking_steps: tuple[int, ...] = (1, 2, 3, 4)
    """The K for which the table at the end is printed."""
    tensorboard: bool = False
    """Also write the metrics to `tensorboard/` (extra `laser-jax[tensorboard]`)."""
    profile_steps: tuple[int, int] | None = None
    """First and last step of an XProf trace, written to `profile/`."""
    peak_tflops: float | None = None
    """Peak of one device at `model.dtype`, for `mfu`; None takes the data sheet of devices that
    are known (`laser_jax/train/throughput.py`)."""

    def __post_init__(self) -> None:
        for name in (
            *("batch_size", "micro_batch_size", "log_every", "checkpoint_every"),
            *("keep_checkpoints", "eval_batch_size", "eval_every", "patience"),
        ):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"train.{name} must be at least 1, got {value}")
        _require(self.steps is None or self.steps >= 0, "train.steps must not be negative")
        _require(
            0 <= self.epochs < float("inf"),
            f"train.epochs must be a number that is not negative, got {self.epochs}",
        )
        _require_seed("train.seed", self.seed)
        _require(
            self.batch_size % (self.micro_batch_size or 1) == 0,
            f"train.batch_size {self.batch_size} must be a multiple of train.micro_batch_size "
            f"{self.micro_batch_size}",
        )
        _require(
            bool(self.eval_thinking_steps),
            "train.eval_thinking_steps is empty; name at least one K, or set data.eval: null for "
            "a run without evaluation",
        )
        _require(
            all(k >= 1 for k in self.eval_thinking_steps),
            f"train.eval_thinking_steps holds a K below 1: {list(self.eval_thinking_steps)}",
        )
        _require(
            self.eval_every is not None or (self.patience is None and self.export == "last"),
            "train.patience and train.export: best choose by the dev split's scores; set "
            "train.eval_every, the steps between its rankings",
        )
        first, last = self.profile_steps or (1, 1)
        _require(
            1 <= first <= last,
            f"train.profile_steps {[first, last]} are no first and last step, counted from 1",
        )

    @property
    def num_micro_batches(self) -> int:
        return self.batch_size // (self.micro_batch_size or self.batch_size)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes what the other axes leave."""

    data: int = -1
    fsdp: int | Literal["auto"] = "auto"
    """Splits parameters and batch. `auto` splits over as few devices as hold the training state in
    half of their memory; 1 where their memory is not known (CPU). With `data` given it takes what
    that leaves."""
    tensor: int = 1
    """Splits heads, feed-forward and vocabulary."""

    def __post_init__(self) -> None:
        sizes = (self.data, 1 if self.fsdp == "auto" else self.fsdp, self.tensor)
        _require(
            all(s == -1 or s >= 1 for s in sizes) and sizes.count(-1) <= 1,
            f"mesh axes must be positive, at most one of them -1; got (data, fsdp, tensor) {sizes}",
        )


@dataclass(frozen=True)
class Config:
    """A retrieval training run."""

    model: ModelConfig
    data: DataConfig
    output: str = "runs/laser"
    lora: LoraConfig | None = None
    prompt: PromptConfig = field(default_factory=PromptConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        _require(
            self.objective.views != "fast" or self._may_share_prefix,
            "objective.views: fast wants the query's tokens to be a prefix of the explicit "
            "input's, which prompt.truncation: sequence and prompt.append_eos: true break; set "
            "objective.views: parity",
        )

    @property
    def views(self) -> Literal["fast", "parity"]:
        """`objective.views` with `auto` decided."""
        if self.objective.views == "auto":
            return "fast" if self._may_share_prefix else "parity"
        return self.objective.views

    @property
    def _may_share_prefix(self) -> bool:
        shared = self.prompt.truncation == "content" and not self.prompt.append_eos
        needless = not self.objective.need_explicit_view
        return shared or needless


@dataclass(frozen=True)
class Invocation:
    """How one process of `python -m laser_jax.train` is started: no part of the run, so that it may
    differ between its processes and when it is resumed."""

    dry_run: bool = False
    topology: str | None = None
    devices: int | None = None
    distributed: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def __post_init__(self) -> None:
        explicit = (self.coordinator, self.num_processes, self.process_id)
        _require(
            explicit.count(None) in (0, 3),
            "--coordinator, --num_processes and --process_id go together; without them the cluster "
            "is found out (Slurm, Cloud TPU, GKE, Open MPI)",
        )
        _require(
            self.distributed or self.coordinator is None, "--coordinator goes with --distributed"
        )
        for name in ("topology", "devices"):
            _require(self.dry_run or getattr(self, name) is None, f"--{name} goes with --dry_run")
        _require(
            self.devices is None or self.devices >= 1,
            f"--devices must be at least 1, got {self.devices}",
        )
        _require(self.topology is None or self.devices is None, "--topology says how many devices")
        _require(
            not (self.dry_run and self.distributed),
            "--dry_run takes one process; --devices or --topology give the devices of all",
        )


_HELP = {
    "dry_run": "compile for the asked mesh, print what it takes, train nothing",
    "topology": "with --dry_run: absent devices to compile for, such as v5e:4x4 or h100:8",
    "devices": "with --dry_run: so many CPU devices instead of those that are there",
    "distributed": "this is one of several processes",
    "coordinator": "with --distributed: HOST:PORT of process 0; found out where it is left out",
    "num_processes": "with --coordinator",
    "process_id": "with --coordinator, counted from 0",
}


@dataclass(frozen=True)
class PretrainConfig:
    """A causal-LM run that teaches a small backbone to reason in words before it retrieves."""

    model: ModelConfig
    texts: str
    """JSONL lines {"text"} or {"prompt", "query", "reasoning"}; LaSER training rows work too."""
    output: str
    eval: str | None = None
    """A BEIR directory whose queries carry a reasoning: the share written right is reported."""
    eval_split: str = "dev"
    prompt: PromptConfig = field(default_factory=PromptConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-3))
    steps: int = 1000
    batch_size: int = 64
    row_length: int = 128
    """Tokens in a row: plain texts are packed into it, a prompt with its reasoning must fit."""
    text_repeats: int = 1
    """How often the plain texts and the documents' reasonings stand in an epoch, beside one copy of
    the queries' reasonings."""
    seed: int = 0
    log_every: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "text_repeats"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1")
        _require(self.row_length >= 2, "row_length must be at least 2")
        _require_seed("seed", self.seed)


# --- what travels with a model ---------------------------------------------------------------


@dataclass(frozen=True)
class RetrieverConfig:
    """Everything `encode` needs beside the weights; saved as `laser_config.json`."""

    backbone: BackboneConfig
    num_thinking_steps: int = 3
    pooling: Pooling = "prompt_and_thoughts"
    prompt: PromptConfig = field(default_factory=PromptConfig)
    dtype: Dtype = "float32"
    lora: LoraConfig | None = None
    """Set while adapters are kept apart from the base weights; None once merged."""
    prompt_checksum: str | None = None
    """`PromptTokenizer.checksum` in training, which shows a tokenizer or chat template that was
    changed since; None leaves it unchecked."""

    def __post_init__(self) -> None:
        _require(
            self.num_thinking_steps >= 1,
            f"num_thinking_steps must be at least 1, got {self.num_thinking_steps}",
        )


def as_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[C], values: dict[str, Any], *, source: str) -> C:
    """Builds the config dataclass `cls` from plain types, strictly.

    Raises:
        ConfigError: on an unknown key, a missing key or a wrong type; names `source`.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: an object of keys and values is wanted, got {values!r:.60}")
    fault = _fault(get_type_hints(cls), values)
    _require(fault is None, f"{source}: {fault}")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "value")
    try:
        return parser.instantiate(parser.parse_object({"value": values}))["value"]
    except (jsonargparse.ArgumentError, ConfigError) as error:
        raise ConfigError(f"{source}: {error}") from error


@dataclass(frozen=True)
class Change:
    """A setting that a finished or stopped run has and another config has not."""

    key: str
    """Dotted."""
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} was {self.old!r}, is {self.new!r}"


def changes(stored: dict[str, Any], config: Any, *, source: str) -> list[Change]:
    """Where `config` differs from the one of its class that `as_dict` stored. A setting that the
    release which stored it did not have counts as its default.

    Raises:
        ConfigError: `stored` is no such config; names `source`.
    """
    return _changes(as_dict(from_dict(type(config), stored, source=source)), as_dict(config))


def _changes(old: Any, new: Any, prefix: str = "") -> list[Change]:
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))  # one by one
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [Change(prefix, old, new)]
    return [
        change
        for name in sorted({*old, *new})
        for change in _changes(old.get(name), new.get(name), f"{prefix}.{name}".lstrip("."))
    ]


def listed(changed: Sequence[Change], most: int = 10) -> str:
    """A line each for a message, at most `most`."""
    lines = [str(change) for change in changed[:most]]
    if len(changed) > most:
        lines.append(f"... and {len(changed) - most} more")
    return "\n  ".join(lines)


def parse_command_line(cls: type[C], program: str, arguments: Sequence[str] | None) -> C:
    """The config dataclass `cls` from `--config file.yaml` and dotted flags, later ones winning.
    A flag that stands alone is true, where its field is a bool.

    Exits with status 2 and a message on unknown keys, missing keys and wrong types.

    Raises:
        ConfigError: on an impossible value.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = {f"--{name}" for name, kind in get_type_hints(cls).items() if kind is bool}
    spelled = [
        f"{argument}=true" if argument in flags and after.startswith("--") else argument
        for argument, after in pairwise([*arguments, "--"])
    ]
    return _filled(cls, _parsed(_parser(cls, program), get_type_hints(cls), spelled))


def _parser(cls: type, program: str) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(prog=program, description=cls.__doc__)
    parser.add_argument("--config", action="config", help="a YAML file of the keys below")
    add_settings(parser, cls)
    return parser


def add_settings(parser: jsonargparse.ArgumentParser, cls: type) -> None:
    """Adds a flag for every field of a config dataclass."""
    kinds = get_type_hints(cls)
    texts = {f.name: f for f in dataclasses.fields(cls) if kinds[f.name] == str | None}
    parser.add_class_arguments(cls, skip=set(texts))
    for f in texts.values():
        _add_text(parser, f, f"(type: str | null, default: {f.default})")


def _add_text(parser: jsonargparse.ArgumentParser, f: dataclasses.Field[Any], help: str) -> None:
    """A flag of a `str | None`, as it is written: a plain `str` is not read as YAML."""
    parser.add_argument(f"--{f.name}", type=str, default=f.default, help=help)


def _flag_value(text: str) -> Any:
    """The value of a flag that is no plain text, or the text itself where YAML finds nothing in it,
    such as `# heading`, `&x` or `~`. Only the word null is no value."""
    value = parse_yaml(text)
    return text if value is None and text.strip() != "null" else value


jsonargparse.set_loader("yaml", _flag_value, (yaml.YAMLError,))


def _parsed(
    parser: jsonargparse.ArgumentParser, kinds: dict[str, Any], arguments: Sequence[str] | None
) -> dict[str, Any]:
    arguments = sys.argv[1:] if arguments is None else arguments
    kinds = kinds | dict.fromkeys(("config", "help", "print_config"), str)
    for name, text in _flags(arguments):
        try:
            value = _flag_value(text)
        except yaml.YAMLError:
            value = text
        if fault := _fault(kinds, {name: value}):
            parser.error(fault)
        if name == "config" and Path(text).is_file():
            try:
                fault = _fault(kinds, read_yaml(Path(text)))
            except DataError as error:
                parser.error(str(error))
            if fault:
                parser.error(f"{text}: {fault}")
    return vars(parser.instantiate(parser.parse_args(arguments)))


def _flags(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The flags of a command line and their values, "" for one that stands alone."""
    for argument, after in pairwise([*arguments, "--"]):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            yield name, value if equals or after.startswith("--") else after


def _keys(kinds: Mapping[str, Any]) -> Iterator[str]:
    """The dotted names of settings and of those in their groups."""
    for name, kind in kinds.items():
        yield name
        for group in (kind, *get_args(kind)):
            if isinstance(group, type) and dataclasses.is_dataclass(group):
                yield from (f"{name}.{key}" for key in _keys(get_type_hints(group)))


def _fault(kinds: Mapping[str, Any], values: Any) -> str | None:
    """What is wrong with plain values that are to become settings, or None.

    An unknown key; something else where a group of settings belongs, since jsonargparse takes a
    string there for a class and imports its module; a number that is not in ASCII digits.

    Args:
        kinds: the types of the settings by their names.
        values: by name, dotted or nested. What is no dict is left to jsonargparse.
    """
    return _fault_in(values, kinds, list(_keys(kinds)), "") if isinstance(values, dict) else None


def _fault_in(
    values: dict[Any, Any], kinds: Mapping[str, Any], known: list[str], prefix: str
) -> str | None:
    for name, value in values.items():
        head, _, rest = str(name).partition(".")
        if head not in kinds:
            key = f"{prefix}{name}"
            near = difflib.get_close_matches(key, known, n=1)
            return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")
        below = {rest: value} if rest else value
        if fault := _fault_of(below, kinds[head], known, prefix + head):
            return fault
    return None


def _fault_of(value: Any, kind: Any, known: list[str], key: str) -> str | None:
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if value is None and not {type(None), Any}.intersection(members):
        return f"{key} must not be null; leave it out for its default"
    for member in members:
        origin, inner = get_origin(member), get_args(member)
        if dataclasses.is_dataclass(member) and value is not None:
            if isinstance(value, dict):
                return _fault_in(value, get_type_hints(member), known, f"{key}.")
            return f"{key} must hold settings of its own, got {value!r:.80}"
        items: Iterable[tuple[Any, Any]] = ()
        if origin in (tuple, list) and isinstance(value, list | tuple):
            items = ((item, inner[0]) for item in value)
        elif origin is dict and isinstance(value, dict):
            items = ((item, inner[1]) for item in value.values())
        for item, of in items:
            if fault := _fault_of(item, of, known, key):
                return fault
    numbers = not {int, float}.isdisjoint(members) and str not in members
    text = value if numbers and isinstance(value, str) else ""
    if re.match(r"\W*\d", text) and parse_number(text) is None:
        return f"{key} must be a number in ASCII digits, got {value!r}"
    return None


def _filled(cls: type[C], values: dict[str, Any]) -> C:
    return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)})  # type: ignore


def parse_train_command(arguments: Sequence[str] | None) -> tuple[Config, Invocation]:
    """The command line of `python -m laser_jax.train`; errors as those of `parse_command_line`."""
    parser = _parser(Config, "python -m laser_jax.train")
    for f in dataclasses.fields(Invocation):
        kind = get_type_hints(Invocation)[f.name]
        if kind == str | None:
            _add_text(parser, f, _HELP[f.name])
            continue
        bare: dict[str, Any] = {"nargs": "?", "const": True} if kind is bool else {}
        parser.add_argument(f"--{f.name}", type=kind, default=f.default, help=_HELP[f.name], **bare)
    kinds = get_type_hints(Config) | get_type_hints(Invocation)
    values = _parsed(parser, kinds, arguments)
    return _filled(Config, values), _filled(Invocation, values)


def load_retriever_config(directory: str | Path) -> RetrieverConfig:
    """Reads `laser_config.json` of an exported model.

    Raises:
        FileNotFoundError: when the directory holds none.
        ConfigError: when it is not valid.
    """
    path = Path(directory) / RETRIEVER_CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: {directory} is not a model exported by laser_jax.train. For a "
            "plain Hugging Face directory pass a RetrieverConfig of your own"
        )
    try:
        values = read_json(path)
    except DataError as error:
        raise ConfigError(str(error)) from error
    if isinstance(values, dict) and "prompt" not in values:
        raise ConfigError(
            f"{path}: the prompt settings are missing, and other prompts than those of training "
            'give worse vectors without a sign. Add "prompt": {...} with the fields of '
            "laser_jax.config.PromptConfig, or pass config=RetrieverConfig(..., prompt=...)"
        )
    return from_dict(RetrieverConfig, values, source=str(path))


def save_retriever_config(config: RetrieverConfig, directory: str | Path) -> None:
    """Writes `laser_config.json` into an existing directory."""
    path = Path(directory) / RETRIEVER_CONFIG_FILE
    path.write_text(json.dumps(as_dict(config), indent=2) + "\n")
