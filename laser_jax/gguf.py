"""A llama.cpp model file (GGUF) as a Hugging Face directory: config and weights.

The `gguf` package reads the container and undoes the quantisation; here its names and layouts
become those of `hf`, whose table of tensors decides what a checkpoint must hold. The tokenizer that
such a file carries is rebuilt in `data.gguf_tokenizer`. Facts on the format are those of the public
GGUF specification.
"""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from laser_jax.config import BackboneConfig, ConfigError, RopeScaling
from laser_jax.hf import HFError, Tree, read_tensors
from laser_jax.modeling.rope import inverse_frequencies

if TYPE_CHECKING:
    from gguf import ReaderTensor

ARCHITECTURES = ("llama", "qwen3")
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


class GGUFFile(NamedTuple):
    """The open file: its metadata by key and its tensors by name (memory-mapped)."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, ReaderTensor]

    def value(self, key: str, kind: type, default: Any = None) -> Any:
        """The metadata under `key`.

        Raises:
            HFError: it is missing and has no default, or is of another type; names the file.
        """
        value = self.metadata.get(key, default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            found = "is missing" if value is None else f"is {str(value)[:80]!r}"
            raise HFError(f"{self.path}: the metadata key {key} {found}; {kind.__name__} wanted")
        return value


def open_gguf(path: str | Path) -> GGUFFile:
    """Opens a GGUF file of version 2 or 3.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the extra `gguf` is not installed.
        HFError: not a GGUF file, a damaged or truncated one, or one of several parts.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a model in llama.cpp's GGUF is wanted")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(
            "reading GGUF takes the extra `gguf`: pip install 'laser-jax[gguf]'"
        ) from error
    with path.open("rb") as file:
        head = file.read(8)
    if head[:4] != b"GGUF":
        raise HFError(f"{path} is no GGUF file: it begins with {head[:4]!r} and not with b'GGUF'")
    if len(head) < 8 or struct.unpack("<I", head[4:])[0] not in (2, 3):
        raise HFError(f"{path}: GGUF of version 2 or 3 (little-endian) is read, not {head[4:]!r}")
    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError) as error:
        raise HFError(
            f"{path} is damaged, truncated, or holds what this version of the gguf package does "
            f"not know: {type(error).__name__}: {error}"
        ) from error
    if metadata.get("split.count", 0) > 1:
        raise HFError(f"{path} is one of several parts; join them with `llama-gguf-split --merge`")
    return GGUFFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


def read_gguf_config(file: GGUFFile) -> BackboneConfig:
    """The backbone that the metadata describe.

    Raises:
        HFError: another architecture, a missing key, or a setting that would change the numbers
            and is not implemented.
    """
    family = file.value("general.architecture", str)
    if family not in ARCHITECTURES:
        raise HFError(
            f"{file.path}: general.architecture = {family!r} is not supported, only "
            f"{' and '.join(ARCHITECTURES)}"
        )
    if (experts := file.metadata.get(f"{family}.expert_count", 0)) > 0:
        raise HFError(f"{file.path}: {family}.expert_count = {experts}: no mixture of experts")
    width = file.value(f"{family}.embedding_length", int)
    heads = file.value(f"{family}.attention.head_count", int)
    head_dim = file.value(f"{family}.attention.key_length", int, width // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := file.metadata.get(f"{family}.{key}", head_dim)) != head_dim:
            raise HFError(f"{file.path}: {family}.{key} = {size}, and a head is {head_dim} wide")
    if (scaling := file.metadata.get(f"{family}.rope.scaling.type", "none")) != "none":
        raise HFError(f"{file.path}: {family}.rope.scaling.type = {scaling!r} is not supported")
    try:
        config = BackboneConfig(
            family=family,
            vocab_size=len(file.value("tokenizer.ggml.tokens", list)),
            hidden_size=width,
            num_layers=file.value(f"{family}.block_count", int),
            num_heads=heads,
            num_kv_heads=file.value(f"{family}.attention.head_count_kv", int, heads),
            head_dim=head_dim,
            intermediate_size=file.value(f"{family}.feed_forward_length", int),
            rms_norm_eps=_decimal(file.value(f"{family}.attention.layer_norm_rms_epsilon", float)),
            rope_theta=_decimal(file.value(f"{family}.rope.freq_base", float, 10_000.0)),
            rope_scaling=None,
            tie_word_embeddings="output.weight" not in file.tensors,
            max_position_embeddings=file.value(f"{family}.context_length", int),
        )
    except ConfigError as error:
        raise HFError(f"{file.path}: {error}") from error
    return dataclasses.replace(config, rope_scaling=_rope_scaling(file, config))


def _decimal(value: float) -> float:
    """A float32 of the file as the decimal that it was written from: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(file: GGUFFile, plain: BackboneConfig) -> RopeScaling | None:
    """Llama 3's scaling, which GGUF stores as what each frequency is divided by.

    The file keeps the divisors alone, so the published settings of Llama 3.1 to 3.3 are tried, and
    taken where they give these divisors.
    """
    if _ROPE_FACTORS not in file.tensors:
        return None
    stored = np.array(file.tensors[_ROPE_FACTORS].data, np.float64)
    scaling = RopeScaling(float(stored.max()), 1.0, 4.0, 8192)
    scaled = dataclasses.replace(plain, rope_scaling=scaling)
    divisors = inverse_frequencies(plain) / inverse_frequencies(scaled)
    if stored.shape != divisors.shape or not np.allclose(stored, divisors, rtol=1e-4):
        raise HFError(f"{file.path}: {_ROPE_FACTORS} is not the RoPE scaling of Llama 3")
    return scaling


class _Quantised(NamedTuple):
    """A tensor of the file as `hf.read_tensors` takes it."""

    key: str
    tensor: ReaderTensor
    file: GGUFFile
    backbone: BackboneConfig
    dtype: str = "F32"

    @property
    def shape(self) -> list[int]:
        return [int(size) for size in self.tensor.shape[::-1]]

    def __str__(self) -> str:
        return f"{self.tensor.name} ({self.tensor.tensor_type.name})"

    def read(self) -> np.ndarray:
        """The weight in float32, in Hugging Face's order of rows."""
        from gguf.quants import dequantize

        try:
            weight = dequantize(self.tensor.data, self.tensor.tensor_type)
        except NotImplementedError as error:
            raise HFError(
                f"{self.file.path}: {self} is of a quantisation that the gguf package does not "
                "undo; take a file of another one"
            ) from error
        if self.backbone.family == "llama":
            if self.key.endswith("q_proj.weight"):
                return _unpermuted(weight, self.backbone.num_heads)
            if self.key.endswith("k_proj.weight"):
                return _unpermuted(weight, self.backbone.num_kv_heads)
        return weight


def read_gguf_params(file: GGUFFile, backbone: BackboneConfig, *, dtype: DTypeLike) -> Tree:
    """The weights, dequantised in float32 and stored in `dtype`, as a tree like `hf.load_params`.

    Raises:
        HFError: missing, unknown or mis-shaped tensors (lists all of them), or a quantisation that
            the gguf package does not know.
    """
    weights = [
        _Quantised(_hf_name(name), tensor, file, backbone)
        for name, tensor in file.tensors.items()
        if name != _ROPE_FACTORS
    ]
    return read_tensors(weights, backbone, where=file.path, dtype=dtype)


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` as `model.layers.3.self_attn.q_proj.weight`; an unknown name as it is,
    for the check of the whole checkpoint to refuse."""
    *block, module, kind = name.split(".") if name.count(".") in (1, 3) else ["", name, ""]
    if module not in _TENSORS or kind != "weight":
        return name
    layer = [f"model.layers.{block[1]}"] if block else []
    return ".".join([*layer, _TENSORS[module], kind])


def _unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in Hugging Face's order. llama.cpp rotates neighbouring
    pairs of a head where Hugging Face rotates its halves, so its converter interleaves them."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
