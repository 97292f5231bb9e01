"""The settings of a training run, and what travels with a model. No jax in here.

`command_line` fills `Config` from the YAML files under `configs/` and from dotted flags.
`RetrieverConfig` is the part that travels with a trained model, as `laser_config.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from laser_jax.model_sizes import BACKBONES, BackboneConfig, BackboneName, LoraConfig, ScratchConfig
from laser_jax.model_sizes import PROJECTIONS as PROJECTIONS
from laser_jax.model_sizes import Family as Family
from laser_jax.model_sizes import RopeScaling as RopeScaling
from laser_jax.objective import KeyframeRule as KeyframeRule
from laser_jax.objective import LossWeights as LossWeights
from laser_jax.objective import ObjectiveConfig as ObjectiveConfig
from laser_jax.objective import PolicyConfig as PolicyConfig
from laser_jax.objective import Pooling as Pooling
from laser_jax.objective import appended_thoughts as appended_thoughts
from laser_jax.objective import pools_prompt as pools_prompt
from laser_jax.settings import ConfigError, as_dict, check, from_dict, kinds_of, require, require_in

RETRIEVER_CONFIG_FILE = "laser_config.json"

Dtype = Literal["float32", "bfloat16", "float16"]
DevMetric = Literal["nDCG@10", "Recall@100", "Hit@1"]
AttentionKernel = Literal["xla", "cudnn", "splash"]
Remat = Literal["none", "dots", "full"]


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
    """`<|im_end|>` and the like are control tokens in texts too, as in the released code."""
    add_special_tokens: bool = True
    """Put tokens around prompts that the tokenizer itself puts there, such as BOS."""
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
        for kind in ("query", "document"):
            template: str = getattr(self, f"{kind}_template")
            fault = f"prompt.{kind}_template {template!r} has no {{{kind}}} placeholder"
            require(f"{{{kind}}}" in template, fault)
        require(self.separator != "", "prompt.separator is empty; the default is two newlines")
        lengths = (n for n in vars(self) if n.endswith("max_length"))
        require_in("[1, inf)", self, "prompt.", *lengths)
        # one that is misspelt in Python would count as the other
        check(kinds_of(PromptConfig), {n: getattr(self, n) for n in ("segmentation", "truncation")})

    @property
    def one_string(self) -> bool:
        """The explicit input is cut as one string (official), and its EOS comes on top."""
        return self.truncation == "sequence" and self.segmentation == "token"


@dataclass(frozen=True)
class MixtureSource:
    """One of several sources of training rows."""

    path: str
    weight: float = 1.0
    """Its share of the rows of every epoch, relative to the other sources."""

    def __post_init__(self) -> None:
        require_in("(0, inf)", self, f"data.mixture: {self.path}: ", "weight")


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
    homogeneous_batches: bool = False
    """Rows of a batch come from one source of the mixture, so that its negatives do too."""
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
    """Never contrast a query with a passage that is one of its positives in any training row."""
    length_multiple: int = 32
    """Batches are padded to a multiple of this, which bounds the number of compiled shapes."""
    bucket_window: int = 1
    """Batches whose rows are sorted together by length before they are cut. 1: none are."""
    pack: bool = False
    """Read rows without their padding (`modeling.packing`), all but attention."""
    threads: int = 2
    """Threads that read and build batches."""
    workers: int = 0
    """Processes that build batches beside the main one; 0 uses the threads alone."""

    def __post_init__(self) -> None:
        require(not (self.train and self.mixture), "data.train and data.mixture exclude each other")
        require(
            self.split is None or bool(self.train),
            "data.split goes with data.train; a source of data.mixture names its split in its path",
        )
        counts = ("group_size", "length_multiple", "bucket_window", "threads")
        require_in("[1, inf)", self, "data.", *counts)
        require_in("[0, inf)", self, "data.", "workers")

    @property
    def sources(self) -> tuple[MixtureSource, ...]:
        split = f"/{self.split}" if self.split else ""
        return self.mixture or (MixtureSource(f"{self.train}{split}"),)


@dataclass(frozen=True)
class ModelConfig:
    """Where the backbone comes from: `path` (a Hugging Face directory) or `scratch`."""

    path: str | None = None
    """A Hugging Face directory, or the hub id (`Qwen/Qwen3-0.6B`) to download one from."""
    adapter: str | None = None
    """A directory with a PEFT adapter over `path` that training goes on from; its settings are
    those of `lora`. None begins with new adapters."""
    adapter_share: float = 0.0
    """The part of what is exported that is `adapter` as it was, against forgetting."""
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
        fault = "exactly one of model.path (a Hugging Face directory) and model.scratch is wanted"
        require((self.path is None) != (self.scratch is None), fault)
        fault = "model.adapter and model.backbone go with model.path; model.scratch has neither"
        require(self.scratch is None or (self.adapter is None and self.backbone is None), fault)
        require_in("[0, 1]", self, "model.", "adapter_share")
        require(bool(self.adapter) or not self.adapter_share, "adapter_share wants model.adapter")

    def require_named_backbone(self, found: BackboneConfig) -> None:
        """Raises a ConfigError where the model at `path` is not the one that `backbone` names. The
        positions may differ, as they do between a base and an instruct release."""
        if self.backbone is None:
            return
        named, given = vars(BACKBONES[self.backbone]), vars(found)
        keys = [k for k in named if k != "max_position_embeddings" and given[k] != named[k]]
        differing = "; ".join(f"{k} is {given[k]!r}, not {named[k]!r}" for k in keys)
        require(
            not differing,
            f"model.path {self.path} is no {self.backbone}: {differing}. Name the model's own "
            "model.backbone, or null for any",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and linear decay to zero."""

    learning_rate: float = 1e-4
    warmup_ratio: float = 0.1
    schedule: Literal["linear", "constant"] = "linear"
    betas: tuple[float, float] = (0.9, 0.999)
    """How much of the running means of the gradient and of its square a step keeps."""
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    """None switches clipping off."""

    def __post_init__(self) -> None:
        require_in("[0, inf)", self, "optimizer.", "learning_rate", "weight_decay")
        require_in("[0, 1]", self, "optimizer.", "warmup_ratio")
        require_in("[0, 1)", self, "optimizer.", "betas")
        require_in("(0, inf)", self, "optimizer.", "clip_norm")


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and bookkeeping of a run."""

    batch_size: int = 32
    """Queries in an optimizer step, over all devices."""
    micro_batch_size: int | None = None
    """Queries whose activations are held at once, over all devices. None: the whole batch."""
    accumulation: Literal["gradcache", "plain"] = "gradcache"
    """`gradcache` contrasts every query with the documents of the whole batch, at the price of a
    second forward pass; `plain` with those of its micro-batch alone: another, weaker loss."""
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
    eval_thinking_steps: tuple[int, ...] = (1, 2, 3, 4)
    """The K for which the table at the end is printed."""
    tensorboard: bool = False
    """Also write the metrics to `tensorboard/` (extra `laser-jax[tensorboard]`)."""
    wandb: str | None = None
    """A project of Weights & Biases for them (extra `laser-jax[wandb]`). None: none."""
    profile_steps: tuple[int, int] | None = None
    """First and last step of an XProf trace, written to `profile/`."""
    peak_tflops: float | None = None
    """Peak of one device at `model.dtype`, for `mfu`; None takes the data sheet of known ones."""

    def __post_init__(self) -> None:
        counts = ("batch_size", "micro_batch_size", "log_every", "checkpoint_every")
        counts += ("keep_checkpoints", "eval_every", "patience")
        require_in("[1, inf)", self, "train.", *counts, "eval_thinking_steps")
        require_in("[0, inf)", self, "train.", "steps", "epochs")
        require_in("(0, inf)", self, "train.", "peak_tflops")
        require_in("[0, 4294967296)", self, "train.", "seed")
        require(
            self.batch_size % (self.micro_batch_size or 1) == 0,
            f"train.batch_size {self.batch_size} must be a multiple of train.micro_batch_size "
            f"{self.micro_batch_size}",
        )
        fault = "train.eval_thinking_steps is empty; name one K at least, or set data.eval: null"
        require(bool(self.eval_thinking_steps), fault)
        require(
            self.eval_every is not None or (self.patience is None and self.export == "last"),
            "train.patience and train.export: best choose by the dev split's scores; set "
            "train.eval_every, the steps between its rankings",
        )
        first, last = self.profile_steps or (1, 1)
        fault = f"train.profile_steps {[first, last]} are no first and last step, counted from 1"
        require(1 <= first <= last, fault)

    @property
    def num_micro_batches(self) -> int:
        return self.batch_size // (self.micro_batch_size or self.batch_size)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes what the other axes leave."""

    data: int = -1
    fsdp: int | Literal["auto"] = "auto"
    """Splits parameters and batch. `auto`: over as few devices as hold the training state in half
    of their memory (on a CPU 1), or with `data` given over what that leaves."""
    tensor: int = 1
    """Splits heads, feed-forward and vocabulary."""

    def __post_init__(self) -> None:
        sizes = (self.data, 1 if self.fsdp == "auto" else self.fsdp, self.tensor)
        require(
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
        require(
            self.model.adapter is None or self.lora is not None,
            "model.adapter is to be trained on and lora is not set: give lora the adapter's "
            "settings, or leave model.adapter out for full fine-tuning",
        )
        require(
            self.objective.views != "fast" or self._may_share_prefix,
            "objective.views: fast wants the query's tokens to be a prefix of the explicit "
            "input's, which prompt.truncation: sequence and prompt.append_eos: true break; set "
            "objective.views: parity",
        )
        require(
            self.objective.policy.kl == 0 or self.lora is not None,
            "objective.policy.kl is the distance to the backbone without its adapters, and lora is "
            "not set: give lora a rank, or set objective.policy.kl: 0",
        )
        require(
            self.objective.method != "latent_rl" or self.train.accumulation == "gradcache",
            "objective.method: latent_rl ranks in the pool; set train.accumulation: gradcache",
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
        return shared or not self.objective.need_explicit_view


# --- what travels with a model ---------------------------------------------------------------


@dataclass(frozen=True)
class RetrieverConfig:
    """Everything `encode` needs beside the weights; saved as `laser_config.json`."""

    backbone: BackboneConfig
    num_thinking_steps: int = 3
    document_thinking_steps: int | None = None
    """K of documents (`ObjectiveConfig.document_thinking_steps`). None: the queries'."""
    pooling: Pooling = "prompt_and_thoughts"
    prompt: PromptConfig = field(default_factory=PromptConfig)
    dtype: Dtype = "float32"
    lora: LoraConfig | None = None
    """Set while adapters are kept apart from the base weights; None once merged."""
    dimensions: tuple[int, ...] = ()
    """Shorter vectors that the model was trained for too (`ObjectiveConfig.dimensions`)."""
    prompt_checksum: str | None = None
    """`PromptTokenizer.checksum` in training, which shows a tokenizer or chat template that was
    changed since; None leaves it unchecked."""

    def __post_init__(self) -> None:
        require_in("[1, inf)", self, "", "num_thinking_steps", "document_thinking_steps")
        check(kinds_of(RetrieverConfig), {"pooling": self.pooling, "dtype": self.dtype})

    @property
    def documents_at(self) -> int:
        """K of documents."""
        return self.document_thinking_steps or self.num_thinking_steps


def load_retriever_config(directory: str | Path) -> RetrieverConfig:
    """Reads `laser_config.json` of an exported model.

    Raises:
        FileNotFoundError: when the directory holds none.
        ConfigError: when it is not valid.
    """
    path = Path(directory) / RETRIEVER_CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: {directory} is no export of laser_jax.train. For a model of the "
            'LaSER authors pass preset="official", otherwise pass a RetrieverConfig of your own'
        )
    from laser_jax.files.reading import DataError, read_object  # which imports yaml

    try:
        values = read_object(path)
    except DataError as error:
        raise ConfigError(str(error)) from error
    if "prompt" not in values:
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
