"""The sizes of decoders (the paper's backbones, and small ones from scratch) and of adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from laser_jax.settings import require, require_in

Family = Literal["qwen3", "llama", "qwen2", "mistral"]
"""As `model_type` in config.json: Qwen2 is Qwen2.5 too, and Llama is SmolLM2 too."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling: long wavelengths are divided by `factor`, short ones kept, and those
    between blended, by Llama 3's rule or by YaRN's (arXiv 2309.00071)."""

    factor: float
    low_freq_factor: float
    """Turns over the original positions at which a wavelength is long (YaRN's beta_slow)."""
    high_freq_factor: float
    """At which it is short (YaRN's beta_fast)."""
    original_max_position_embeddings: int
    rope_type: Literal["llama3", "yarn"] = "llama3"
    attention_factor: float = 1.0
    """Multiplies cosines and sines (YaRN)."""

    def __post_init__(self) -> None:
        numbers = ("factor", "low_freq_factor", "high_freq_factor", "attention_factor")
        positions = "original_max_position_embeddings"
        require_in("(0, inf)", self, "rope_scaling.", *numbers, positions)


@dataclass(frozen=True)
class BackboneConfig:
    """One decoder. Sizes as in a Hugging Face `config.json`."""

    family: Family
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
        # far beyond every model, and so small that a damaged config.json is refused at once
        sizes = ("vocab_size", "hidden_size", "num_heads", "num_kv_heads", "head_dim")
        require_in("[1, 16777216]", self, "backbone.", *sizes, "intermediate_size")
        require_in("[1, 1000]", self, "backbone.", "num_layers")
        require_in("[1, 2147483647]", self, "backbone.", "max_position_embeddings")
        require_in("(0, inf)", self, "backbone.", "rms_norm_eps", "rope_theta")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"backbone.num_heads {self.num_heads} must be a multiple of num_kv_heads "
            f"{self.num_kv_heads}",
        )
        require(self.head_dim % 2 == 0, f"backbone.head_dim {self.head_dim} must be even (RoPE)")

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises every query and key head before RoPE."""
        return self.family == "qwen3"

    @property
    def qkv_bias(self) -> bool:
        """Qwen2 and 2.5 add a bias to queries, keys and values."""
        return self.family == "qwen2"

    def require_positions(self, taken: int, what: str, way_out: str) -> None:
        """Raises a ConfigError where more positions are taken than the model has: `what`, such as
        "row_length takes", stands before the number, and `way_out` says how to mend it."""
        positions = self.max_position_embeddings
        fault = f"{what} {taken} positions, and the model has {positions}: {way_out}"
        require(taken <= positions, fault)


_QWEN3: dict[str, Any] = {
    "family": "qwen3",
    "vocab_size": 151_936,
    "num_kv_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "max_position_embeddings": 40_960,
}
_LLAMA3: dict[str, Any] = {
    "family": "llama",
    "vocab_size": 128_256,
    "num_kv_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "max_position_embeddings": 131_072,
}
BackboneName = Literal[
    "qwen3-0.6b", "qwen3-4b", "qwen3-8b", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"
]
_SIZES = ("hidden_size", "num_layers", "num_heads", "intermediate_size", "tie_word_embeddings")


def _backbone(shared: dict[str, Any], *sizes: int, **more: Any) -> BackboneConfig:
    return BackboneConfig(**shared, **dict(zip(_SIZES, sizes, strict=True)), **more)


_SCALED_8, _SCALED_32 = (RopeScaling(factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0))
BACKBONES: dict[BackboneName, BackboneConfig] = {
    "qwen3-0.6b": _backbone(_QWEN3, 1024, 28, 16, 3072, True),
    "qwen3-4b": _backbone(_QWEN3, 2560, 36, 32, 9728, True),
    "qwen3-8b": _backbone(_QWEN3, 4096, 36, 32, 12_288, False),
    "llama-3.2-1b": _backbone(
        _LLAMA3, 2048, 16, 32, 8192, True, head_dim=64, rope_scaling=_SCALED_32
    ),
    "llama-3.2-3b": _backbone(
        _LLAMA3, 3072, 28, 24, 8192, True, head_dim=128, rope_scaling=_SCALED_32
    ),
    "llama-3.1-8b": _backbone(
        _LLAMA3, 4096, 32, 32, 14_336, False, head_dim=128, rope_scaling=_SCALED_8
    ),
}


@dataclass(frozen=True)
class ScratchConfig:
    """A small backbone with random weights and a BPE tokenizer trained on the training texts."""

    family: Family = "qwen3"
    vocab_size: int = 8192
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 768
    max_position_embeddings: int = 4096

    def backbone(self, vocab_size: int) -> BackboneConfig:
        """The backbone over a tokenizer of `vocab_size` tokens."""
        sizes: dict[str, Any] = vars(self) | {"vocab_size": vocab_size}
        return BackboneConfig(
            **sizes, rms_norm_eps=1e-6, rope_theta=1e4, rope_scaling=None, tie_word_embeddings=True
        )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the named projections; y = x W + scale (x A) B."""

    rank: int = 64
    alpha: float = 32.0
    targets: tuple[str, ...] = PROJECTIONS
    rank_stabilised: bool = False

    def __post_init__(self) -> None:
        require_in("[1, inf)", self, "lora.", "rank")
        require_in("(0, inf)", self, "lora.", "alpha")
        unknown = sorted(set(self.targets) - set(PROJECTIONS))
        fault = f"lora.targets holds {unknown}; a subset of {list(PROJECTIONS)} is wanted"
        require(not unknown, fault)
        require(bool(self.targets), "lora.targets is empty; leave lora out for full fine-tuning")

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) for the rank-stabilised variant."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)
