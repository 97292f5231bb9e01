"""Hugging Face directories in, parameter trees out, and back.

This is the one place where a safetensors file becomes a parameter. `_param_slots` and `_lora_slots`
say which tensor is which leaf; reading, writing and every check follow from those two tables.
Hugging Face keeps a linear layer as `[out, in]`, the tree as `[in, out]`. Tensors pass through the
host one at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from laser_jax.config import PROJECTIONS, BackboneConfig, ConfigError, LoraConfig, RopeScaling
from laser_jax.files.durable import Digest, folder_written_whole
from laser_jax.files.reading import DataError, read_json

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
# Whatever of these is no weight is small. Subfolders hold other formats and are left out.
_HUB_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "model*.safetensors", ADAPTER_FILE]

Array = Any  # numpy or jax
Tree = dict[str, Any]
TreePath = tuple[str, ...]


class HFError(ValueError):
    """A checkpoint, config or adapter that cannot be used. Names the file and the tensor or key."""


def resolve_directory(name: str | Path) -> Path:
    """The directory `name`, or the downloaded copy of `organisation/name` on the Hugging Face hub.

    A directory of that name wins. Only files that laser_jax reads are downloaded, once, into the
    hub's cache; without a network the cache serves.

    Raises:
        FileNotFoundError: neither is there, or the hub cannot be reached; says what to do.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download  # slow to import, and few runs need it

    try:
        return Path(snapshot_download(str(name), allow_patterns=_HUB_FILES, ignore_patterns="*/*"))
    except (OSError, ValueError) as error:  # no network, no such model, no access; no id at all
        raise FileNotFoundError(
            f"{name} is no directory, and the Hugging Face hub did not give it: {error}\nMend the "
            f"path, or run `hf download {name} --local-dir DIR` with a network, and name that DIR"
        ) from error


# --- config.json -----------------------------------------------------------------------------

_HF_KEYS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}
_SUPPORTED = {
    "model_type": ("llama", "qwen3"),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "is_causal": (True,),
    "use_sliding_window": (False,),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0,),
    "rope_type": ("default", "llama3"),
}


def read_backbone_config(path: str | Path) -> BackboneConfig:
    """Reads the `config.json` (in the directory `path`, or `path` itself) of a Qwen3 or Llama.

    Takes the names of transformers 4.x (`rope_theta`, `rope_scaling`) and 5.x (`rope_parameters`).
    Absent keys have transformers' defaults; an absent `num_key_value_heads` means one a query head.

    Raises:
        FileNotFoundError: no such file.
        HFError: not JSON, a missing or ill-typed key, or a setting that would change the numbers
            and is not implemented; names the file, the key and the value.
    """
    file = Path(path) / CONFIG_FILE if Path(path).is_dir() else Path(path)
    values = _read_json(file)
    family = _value(values, "model_type", "str", file)
    _check_supported(values, _SUPPORTED, file)
    layer_types = values.get("layer_types", [])
    for layer_type in layer_types if isinstance(layer_types, list) else [layer_types]:
        _check_supported({"layer_types": layer_type}, {"layer_types": ("full_attention",)}, file)
    width = _value(values, "hidden_size", "int", file)
    heads = _value(values, _HF_KEYS["num_heads"], "int", file)
    defaults = {
        "num_key_value_heads": heads,
        "head_dim": 128 if family == "qwen3" else width // max(1, heads),
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32_768 if family == "qwen3" else 2048,
    }
    try:
        theta, scaling = _read_rope(values, file)
        rest = {"family": family, "rope_theta": theta, "rope_scaling": scaling}
        return BackboneConfig(**rest, **_fields(BackboneConfig, defaults | values, file, set(rest)))
    except ConfigError as error:
        raise HFError(f"{file}: {error}") from error


def hf_config_dict(
    backbone: BackboneConfig, *, dtype: str, **tokens: int | list[int] | None
) -> dict[str, Any]:
    """A `config.json` that transformers 4.5x and 5.x read as the same model.

    RoPE and dtype (of the stored weights, by name) are written twice, under the names of either.
    `tokens` are eos_token_id, bos_token_id and pad_token_id.
    """
    values = dataclasses.asdict(backbone)
    family, theta, scaling = (values.pop(key) for key in ("family", "rope_theta", "rope_scaling"))
    scaling = scaling and {"rope_type": "llama3", **scaling}
    return {_HF_KEYS.get(key, key): value for key, value in values.items()} | {
        "architectures": [{"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[family]],
        "model_type": family,
        "hidden_act": "silu",
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": (scaling or {"rope_type": "default"}) | {"rope_theta": theta},
        "attention_bias": False,
        ("use_sliding_window" if family == "qwen3" else "mlp_bias"): False,
        "dtype": dtype,
        "torch_dtype": dtype,
        **tokens,
    }


def _read_rope(values: dict[str, Any], file: Path) -> tuple[float, RopeScaling | None]:
    """(rope_theta, scaling) in whichever notation; where there are several they must agree."""
    keys = [key for key in ("rope_theta", "rope_scaling", "rope_parameters") if values.get(key)]
    given = {key: values[key] for key in keys}
    theta = given.pop("rope_theta", 1e4)
    for key, block in given.items():
        if not isinstance(block, dict):
            raise HFError(f"{file}: {key} = {block!r} has the wrong type; an object is wanted")
    blocks = [{"rope_theta": theta} | block for block in given.values()]
    found = {_read_rope_block(block, file) for block in blocks or [{"rope_theta": theta}]}
    rope_theta, scaling = next(iter(found))
    if len(found) > 1 or ("rope_theta" in keys and rope_theta != theta):
        raise HFError(f"{file}: {' and '.join(keys)} disagree: {[values[key] for key in keys]}")
    return rope_theta, scaling


def _read_rope_block(block: dict[str, Any], file: Path) -> tuple[float, RopeScaling | None]:
    block = {"rope_type": block.get("type", "default"), **block}
    _check_supported(block, _SUPPORTED, file)
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    if unknown := block.keys() - known - {field.name for field in dataclasses.fields(RopeScaling)}:
        raise HFError(f"{file}: {sorted(unknown)} among the RoPE settings {block} is unknown")
    theta = _value(block, "rope_theta", "float", file)
    if block["rope_type"] == "default":
        return theta, None
    return theta, RopeScaling(**_fields(RopeScaling, block, file))


def _fields(
    cls: type, values: dict[str, Any], file: Path, skip: Iterable[str] = ()
) -> dict[str, Any]:
    """The fields of a config dataclass out of `values`, which has Hugging Face's keys."""
    return {
        field.name: _value(values, _HF_KEYS.get(field.name, field.name), str(field.type), file)
        for field in dataclasses.fields(cls)
        if field.name not in skip
    }


def _check_supported(
    values: dict[str, Any], supported: dict[str, tuple[Any, ...]], file: Path
) -> None:
    for key, choices in supported.items():
        if key in values and values[key] not in choices:
            allowed = " or ".join(map(repr, choices))
            raise HFError(f"{file}: {key} = {values[key]!r} is not supported, only {allowed}")


def _value(values: dict[str, Any], key: str, kind: str, file: Path) -> Any:
    value = values.get(key)
    if kind == "float" and type(value) is int:
        value = float(value)
    if type(value).__name__ != kind:
        found = "is missing" if value is None else f"= {value!r} has the wrong type"
        raise HFError(f"{file}: {key} {found}; {kind} wanted")
    return value


def _read_json(file: Path) -> dict[str, Any]:
    """The keys that are not null."""
    try:
        items = read_json(file).items()
    except (DataError, AttributeError) as error:
        raise HFError(f"{file}: not a JSON object: {error}") from error
    return {key: value for key, value in items if value is not None}


# --- the layout: which tensor is which leaf ----------------------------------------------------


class _Slot(NamedTuple):
    """One tensor of a checkpoint and its place in the tree."""

    name: str
    path: TreePath
    row: int | None  # on the stacked leading axis; None where the leaf is this tensor alone
    shape: tuple[int, ...]  # in the tree, without the leading axis

    def of(self, leaf: Array) -> Array:
        """This tensor's part of its leaf, in numpy a view."""
        return leaf if self.row is None else leaf[self.row]

    def turned(self, value: np.ndarray) -> np.ndarray:
        """From the tree's axes to Hugging Face's, or back; a view."""
        return value.T if self.order < 0 else value

    @property
    def order(self) -> int:
        """The step through the tree's axes that gives Hugging Face's: -1 where it transposes."""
        return -1 if self.path[-1] in ("kernel", "lora_a", "lora_b") else 1


def _kernel_shapes(backbone: BackboneConfig) -> dict[str, tuple[int, int]]:
    """[in, out] of the seven projections of a layer."""
    d, f = backbone.hidden_size, backbone.intermediate_size
    q = backbone.num_heads * backbone.head_dim
    kv = backbone.num_kv_heads * backbone.head_dim
    return {
        "self_attn.q_proj": (d, q),
        "self_attn.k_proj": (d, kv),
        "self_attn.v_proj": (d, kv),
        "self_attn.o_proj": (q, d),
        "mlp.gate_proj": (d, f),
        "mlp.up_proj": (d, f),
        "mlp.down_proj": (f, d),
    }


def _layer_slots(
    backbone: BackboneConfig, tensors: list[tuple[str, str, str, tuple[int, ...]]]
) -> list[_Slot]:
    """The same `(module, tensor name, leaf name, shape)` in every layer."""
    slots = []
    for layer in range(backbone.num_layers):
        is_last = layer == backbone.num_layers - 1
        group, row = ("last_layer", None) if is_last else ("layers", layer)
        for module, tensor, leaf, shape in tensors:
            path = (group, *module.split("."), leaf)
            slots.append(_Slot(f"model.layers.{layer}.{module}.{tensor}", path, row, shape))
    return slots


def _param_slots(backbone: BackboneConfig) -> list[_Slot]:
    """Every tensor of a checkpoint, the LM head last unless it is tied."""
    d, h, v = backbone.hidden_size, backbone.head_dim, backbone.vocab_size
    norms = {"input_layernorm": d, "post_attention_layernorm": d}
    if backbone.qk_norm:
        norms |= {"self_attn.q_norm": h, "self_attn.k_norm": h}
    kernels = _kernel_shapes(backbone).items()
    layer = [(module, "weight", "kernel", shape) for module, shape in kernels]
    layer += [(module, "weight", "scale", (size,)) for module, size in norms.items()]
    embedding = _Slot("model.embed_tokens.weight", ("embed_tokens", "embedding"), None, (v, d))
    norm = _Slot("model.norm.weight", ("norm", "scale"), None, (d,))
    head = _Slot("lm_head.weight", ("lm_head", "embedding"), None, (v, d))
    slots = [embedding, *_layer_slots(backbone, layer), norm]
    return slots if backbone.tie_word_embeddings else [*slots, head]


def _lora_slots(backbone: BackboneConfig, lora: LoraConfig) -> list[_Slot]:
    """Every tensor of an adapter."""
    layer = []
    for module, (fan_in, fan_out) in _kernel_shapes(backbone).items():
        if module.rpartition(".")[2] in lora.targets:
            layer.append((module, "lora_A.weight", "lora_a", (fan_in, lora.rank)))
            layer.append((module, "lora_B.weight", "lora_b", (lora.rank, fan_out)))
    return _layer_slots(backbone, layer)


def _leaf_shapes(slots: Iterable[_Slot]) -> dict[TreePath, tuple[int, ...]]:
    # Rows come in order, so the last slot of a leaf tells the length of its stack.
    return {s.path: s.shape if s.row is None else (s.row + 1, *s.shape) for s in slots}


# --- reading -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor as the header of a safetensors file describes it; `gguf` derives its own from it."""

    key: str
    file: Path
    shape: list[int]
    dtype: str

    def __str__(self) -> str:
        return f"{self.key} in {self.file.name}"

    def read(self, *index: slice) -> np.ndarray:
        """The tensor, or a slice of it; no other bytes are copied."""
        with _open(self.file) as opened:
            return opened.get_slice(self.key)[index or ...]


def load_params(
    directory: str | Path, backbone: BackboneConfig, *, dtype: DTypeLike, seen: Digest | None = None
) -> Tree:
    """Reads `model.safetensors`, or the shards of `model.safetensors.index.json`.

    The import is total: every tensor has its place and every place its tensor. Keys may carry the
    leading `model.` or not; `rotary_emb.inv_freq` buffers are skipped; an `lm_head.weight` beside
    tied embeddings must equal them. Sources are float32, float16 or bfloat16. Tensors are read one
    at a time into preallocated arrays, so the peak is the model and one tensor.

    Args:
        seen: is given every tensor that is read.

    Returns:
        The tree under `params`, numpy arrays of `dtype` on the host.

    Raises:
        FileNotFoundError: no weights, or a shard of the index is missing.
        HFError: a broken file, or missing, unknown, duplicate, mis-shaped or ill-typed tensors;
            lists all of them with their files.
    """
    return _read(find_params(Path(directory), backbone), dtype, seen)


def fitting_tensors(
    by_name: dict[str, list[Stored]], backbone: BackboneConfig, where: Path
) -> list[Stored]:
    """The tensors of another kind of file, by Hugging Face's names, as `save_weights` wants them.

    Raises:
        HFError: missing, unknown, duplicate or mis-shaped tensors; lists all of them, and names
            the file `where`.
    """
    return list(_fitting(_param_slots(backbone), by_name, where).values())


def load_sharded_params(directory: str | Path, backbone: BackboneConfig, like: Tree) -> Tree:
    """Reads the same files as `load_params`, with the same checks, straight into their shards.

    A process reads the byte ranges of the shards on its own devices, each of them once however many
    devices hold it. (A spare `lm_head.weight` is compared whole in every process, in chunks, so
    that all of them raise.) Layers are written one by one into their stack on the devices: the host
    holds a tensor and its cast and transposed copy at a time.

    Args:
        like: the tree under `params` of `jax.ShapeDtypeStruct`, each with a NamedSharding, as
            `step.abstract_state` makes it; the mesh may span several processes, which then all
            call this.

    Returns:
        jax arrays of the shapes, dtypes and shardings of `like`.

    Raises:
        FileNotFoundError, HFError: as `load_params`; also where `like` does not fit `backbone`.
    """
    wanted = _checked_leaves(like, _param_slots(backbone), "params")
    leaves: dict[TreePath, jax.Array] = {}
    for slot, tensor in find_params(Path(directory), backbone).items():
        leaf = wanted[slot.path]
        part = _read_shards(slot, tensor, leaf)
        if slot.row is not None:
            if slot.row == 0:
                leaves[slot.path] = jax.numpy.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
            write = jax.jit(_with_row, donate_argnums=0, out_shardings=leaf.sharding)
            part = write(leaves[slot.path], part, slot.row)
        leaves[slot.path] = part
    return unflatten_dict(leaves)


def _read_shards(slot: _Slot, tensor: Stored, leaf: Any) -> jax.Array:
    """One tensor, laid out as (its row of) the leaf; on the devices when this returns."""
    spec = leaf.sharding.spec[0 if slot.row is None else 1 :]
    sharding = jax.NamedSharding(leaf.sharding.mesh, jax.P(*spec))
    pieces: dict[str, np.ndarray] = {}

    def piece(index: Any) -> np.ndarray:
        key = str(index)  # slices have no hash
        if key not in pieces:
            value = tensor.read(*index[:: slot.order])
            pieces[key] = np.ascontiguousarray(slot.turned(value), leaf.dtype)
        return pieces[key]

    # Waiting bounds the host copies that are on their way.
    return jax.make_array_from_callback(slot.shape, sharding, piece).block_until_ready()


def _with_row(stack: jax.Array, part: jax.Array, row: jax.Array) -> jax.Array:
    # As integers: XLA's CPU backend takes a whole bfloat16 stack to float32 and back for each row.
    bits = np.dtype(f"u{stack.dtype.itemsize}")
    updated = jax.lax.dynamic_update_index_in_dim(stack.view(bits), part.view(bits), row, 0)
    return updated.view(stack.dtype)


def find_params(directory: Path, backbone: BackboneConfig) -> dict[_Slot, Stored]:
    """Where the tensor of each slot is stored, once all are known to fit."""
    single, index = directory / WEIGHTS_FILE, directory / INDEX_FILE
    if single.is_file() and index.is_file():
        raise HFError(f"{directory} holds both {single.name} and {index.name}; remove a stale one")
    if not single.is_file() and not index.is_file():
        raise FileNotFoundError(f"{directory} holds neither {single.name} nor {index.name}")
    stored, problems = (_headers(single), []) if single.is_file() else _shard_headers(index)
    by_name: dict[str, list[Stored]] = {}
    for tensor in stored:
        if not tensor.key.endswith("rotary_emb.inv_freq"):
            has_prefix = tensor.key.startswith(("model.", "lm_head."))
            name = tensor.key if has_prefix else f"model.{tensor.key}"
            by_name.setdefault(name, []).append(tensor)
    slots = _param_slots(backbone)
    head = _param_slots(dataclasses.replace(backbone, tie_word_embeddings=False))[-1]
    has_spare_head = backbone.tie_word_embeddings and head.name in by_name
    found = _fitting([*slots, head] if has_spare_head else slots, by_name, directory, problems)
    if has_spare_head:
        spare, embedding = found.pop(head), found[slots[0]]
        starts = range(0, backbone.vocab_size, 4096)
        chunks = [slice(i, min(i + 4096, backbone.vocab_size)) for i in starts]
        if not all(np.array_equal(spare.read(rows), embedding.read(rows)) for rows in chunks):
            raise HFError(
                f"{directory}: {spare} differs from {embedding}, although {CONFIG_FILE} ties them. "
                "Set tie_word_embeddings to false there, or remove the tensor"
            )
    return found


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as error:
        size = file.stat().st_size
        raise HFError(
            f"{file}: not a whole safetensors file, {size} bytes ({error}). Copy or download it "
            "again; a file of about 130 bytes is a Git LFS pointer"
        ) from error


def _headers(file: Path) -> list[Stored]:
    with _open(file) as opened:
        views = [(key, opened.get_slice(key)) for key in opened.keys()]  # noqa: SIM118  (no mapping)
        return [Stored(key, file, view.get_shape(), view.get_dtype()) for key, view in views]


def _shard_headers(index: Path) -> tuple[list[Stored], list[str]]:
    """The tensors of every shard, and where the index is wrong about them."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HFError(f"{index}: weight_map, tensor -> file, is missing or empty")
    for key, name in weight_map.items():
        if not isinstance(name, str) or not name or name != Path(name).name:
            wanted = "the name of a file beside the index is wanted"
            raise HFError(f"{index}: weight_map has {name!r} as the file of {key}; {wanted}")
    files = [index.with_name(name) for name in sorted(set(weight_map.values()))]
    if absent := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{index} names shards that are missing: {absent}")
    stored = [tensor for file in files for tensor in _headers(file)]
    listed, held = set(weight_map.items()), {(tensor.key, tensor.file.name) for tensor in stored}
    wrong = [f"index: {key} is not in {file}" for key, file in sorted(listed - held)]
    return stored, wrong + [f"index: {k} in {f} is not listed" for k, f in sorted(held - listed)]


def _fitting(
    slots: list[_Slot], by_name: dict[str, list[Stored]], where: Path, problems: Iterable[str] = ()
) -> dict[_Slot, Stored]:
    """The one tensor of each slot; raises an error that lists all that do not fit."""
    shapes = {slot.name: list(slot.shape[:: slot.order]) for slot in slots}
    hint = {"lm_head.weight": f' (for a model without: "tie_word_embeddings": true, {CONFIG_FILE})'}
    problems = [*problems, *(f"missing: {n}{hint.get(n, '')}" for n in shapes if n not in by_name)]
    for name, tensors in by_name.items():
        if len(tensors) > 1:
            problems.append(f"duplicate: {', '.join(map(str, tensors))}")
        for tensor in tensors:
            if name not in shapes:
                problems.append(f"unknown: {tensor}")
            elif tensor.shape != shapes[name]:
                problems.append(f"mis-shaped: {tensor} is {tensor.shape}, not {shapes[name]}")
            elif tensor.dtype not in ("F32", "F16", "BF16"):
                problems.append(f"dtype: {tensor} is {tensor.dtype}, not F32, F16 or BF16")
    _refuse(str(where), problems)
    return {slot: by_name[slot.name][0] for slot in slots}


def _refuse(where: str, problems: list[str]) -> None:
    """Raises an error that lists the problems, if there are any."""
    if problems:
        more = ["..."] if len(problems) > 50 else []
        lines = "\n  ".join([*problems[:50], *more])
        raise HFError(f"{where} does not fit its config, {len(problems)} problem(s):\n  {lines}")


def _read(stored: dict[_Slot, Stored], dtype: DTypeLike, seen: Digest | None = None) -> Tree:
    leaves = {path: np.empty(shape, dtype) for path, shape in _leaf_shapes(stored).items()}
    for slot, tensor in stored.items():
        value = tensor.read() if seen is None else seen.add(slot.name, tensor.read())
        slot.of(leaves[slot.path])[...] = slot.turned(value)
    return unflatten_dict(leaves)


# --- writing -----------------------------------------------------------------------------------


def save_params(
    directory: str | Path,
    variables: Tree,
    backbone: BackboneConfig,
    *,
    dtype: DTypeLike,
    lora: LoraConfig | None,
    eos_token_id: int | list[int] | None = None,
    bos_token_id: int | None = None,
    pad_token_id: int | None = None,
    merged: Sequence[str] = (),
    max_shard_bytes: float = 5e9,
) -> None:
    """Writes `config.json` and the weights, in `dtype`, as transformers loads them.

    Adapters are merged in float32 before the cast, and `config.json` says so. Files appear under
    their names only once all of them are written; weights of an earlier export in the directory are
    removed.

    Where the arrays span several processes all of them call this: each tensor is gathered in turn,
    and process 0 alone writes. Its host holds one file's tensors at a time, that of the others one
    tensor. They return when the files are in place.

    Args:
        variables: `{"params": tree}`, or `{"params": tree, "lora": tree}`; numpy or jax arrays.
        lora: the adapters' settings, exactly when `variables` holds "lora".
        merged: the `merged_adapters` of the model that the weights were trained from.
        max_shard_bytes: above this the weights are split, with `model.safetensors.index.json`.

    Raises:
        HFError: the tree does not fit `backbone` (lists its leaves), or process 0 could not write
            (in the others).
        OSError: a file cannot be written; an older export is still whole.
    """
    if ("lora" in variables) != (lora is not None):
        raise HFError(f"adapters need their LoraConfig: got {sorted(variables)} and lora = {lora}")
    slots = _param_slots(backbone)
    params = _checked_leaves(variables["params"], slots, "params")
    lora_slots = [] if lora is None else _lora_slots(backbone, lora)
    adapters = _checked_leaves(variables.get("lora", {}), lora_slots, "lora")
    digest = hashlib.sha256()

    def exported(slot: _Slot) -> np.ndarray:
        value, module = _gathered(slot, params), slot.path[:-1]
        if lora is not None and (*module, "lora_a") in adapters:
            parts = (slot._replace(path=(*module, leaf)) for leaf in ("lora_a", "lora_b"))
            a, b = (_gathered(part, adapters) for part in parts)
            digest.update(_rounded_bytes(a) + _rounded_bytes(b))
            value = _merged(value, a, b, lora.scale)
        return slot.turned(value)

    tokens = {"eos_token_id": eos_token_id, "bos_token_id": bos_token_id}
    tokens["pad_token_id"] = pad_token_id

    def all_merged() -> list[str]:
        return [*merged, *([] if lora is None else [digest.hexdigest()])]

    weights = map(exported, slots)
    save_weights(directory, backbone, weights, dtype, tokens, max_shard_bytes, all_merged)


def save_weights(
    directory: str | Path,
    backbone: BackboneConfig,
    weights: Iterator[np.ndarray],
    dtype: DTypeLike,
    tokens: dict[str, Any],
    max_shard_bytes: float = 5e9,
    merged: Callable[[], Sequence[str]] = tuple,
) -> None:
    """Writes the same as `save_params` from weights that come one at a time, in the order of a
    checkpoint's slots and in Hugging Face's layout. A file's weights are held until it is written.

    Args:
        tokens: `eos_token_id`, `bos_token_id` and `pad_token_id` for config.json.
        merged: gives the checksums of the merged adapters; called when all weights have come.

    Raises:
        HFError, OSError: as `save_params`.
    """
    directory, dtype = Path(directory), np.dtype(dtype)
    slots = _param_slots(backbone)
    sizes = {slot.name: math.prod(slot.shape) * dtype.itemsize for slot in slots}
    shards: list[list[_Slot]] = [[]]
    for slot in slots:
        if shards[-1] and sum(sizes[s.name] for s in (*shards[-1], slot)) > max_shard_bytes:
            shards.append([])
        shards[-1].append(slot)
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    files = dict(zip(names if count > 1 else [WEIGHTS_FILE], shards, strict=True))
    with _staged(directory, weights) as stage:
        if stage is None:
            return
        for name, shard in files.items():
            _write_tensors(stage / name, shard, weights, dtype)
        config = hf_config_dict(backbone, dtype=dtype.name, **tokens)
        adapters = list(merged())
        _write_json(stage / CONFIG_FILE, config | ({_MERGED_KEY: adapters} if adapters else {}))
        if count > 1:
            weight_map = {slot.name: name for name, shard in files.items() for slot in shard}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            _write_json(stage / INDEX_FILE, index)
        # An older export goes before its successor comes: an interruption from here on leaves a
        # directory that fails to load rather than a mixture of two models.
        shards_there = directory.glob("model-*-of-*.safetensors")
        for older in {directory / WEIGHTS_FILE, directory / INDEX_FILE, *shards_there}:
            if older.name not in files:
                older.unlink(missing_ok=True)


@contextlib.contextmanager
def _staged(directory: Path, tensors: Iterator[Any]) -> Iterator[Path | None]:
    """A folder whose files move into `directory` when the block ends, and vanish if it fails.

    Of several processes only the first gets it, the others None. Each item of `tensors` is gathered
    from all of them, so they go through it together, also when the first has failed to write.
    """
    failed = True
    try:
        if jax.process_index() > 0:
            yield None
        else:
            with folder_written_whole(directory) as stage:  # an index sorts behind its shards
                yield stage
        failed = False
    finally:
        if jax.process_count() > 1:
            for _ in tensors:
                pass
            failed = bool(multihost_utils.broadcast_one_to_all(np.int32(failed)))
    if failed:
        raise HFError(f"process 0 could not write {directory}; its own message says why")


def _checked_leaves(tree: Tree, slots: list[_Slot], root: str) -> dict[TreePath, Array]:
    """The leaves, once they are known to be exactly those that `slots` name."""
    leaves: dict[TreePath, Array] = flatten_dict(tree)
    wanted, got = _leaf_shapes(slots), {path: leaf.shape for path, leaf in leaves.items()}
    paths = [path for path in wanted | got if wanted.get(path) != got.get(path)]
    states = [f"{'/'.join(path)} is {got.get(path)}, not {wanted.get(path)}" for path in paths]
    _refuse(f"the {root} tree (None: no such leaf)", states)
    return leaves


def _gathered(slot: _Slot, leaves: dict[TreePath, Array]) -> np.ndarray:
    """The slot's part of its leaf. All processes must ask where the leaf spans several."""
    value = slot.of(leaves[slot.path])
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value.copy())  # a leaf would keep its own host copy as long as it lives


def _write_tensors(file: Path, slots: list[_Slot], tensors: Iterator[Any], dtype: Any) -> None:
    """Writes the next of `tensors` under the names of `slots`."""
    # safetensors writes the buffer as it lies in memory: a transposed view would be scrambled.
    named = {slot.name: np.ascontiguousarray(next(tensors), dtype) for slot in slots}
    file.touch()
    mode = file.stat().st_mode
    try:
        save_file(named, file, {"format": "pt"})  # transformers wants this metadata
    except SafetensorError as error:  # a full disk, for one
        raise OSError(f"{file} cannot be written: {error}") from error
    file.chmod(mode)  # save_file leaves a file that only its owner reads


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")


# --- adapters ----------------------------------------------------------------------------------

_SUPPORTED_IN_ADAPTER = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # The other initialisations, such as PiSSA and OLoRA, also change the base weights.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
_ADAPTER_KEYS_READ = {"r", "lora_alpha", "target_modules", "use_rslora"}
_ADAPTER_KEYS_WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "lora_dropout"),
    *("megatron_core", "peft_version", "qalora_group_size", "revision", "task_type"),
}
_ADAPTER_PREFIX = re.compile(r"^(encoder\.)?base_model\.model\.(model\.)?")
_MERGED_KEY = "laser_merged_adapters"
"""In config.json, which transformers leaves alone where it does not know a key."""
_ADAPTER_INFIX = re.compile(r"\.(lora_[AB])\.default\.weight$")


def merge_lora(params: Tree, lora: Tree, scale: float) -> Tree:
    """Adds the adapters to the weights: W + scale A B (Hu et al. 2021, equation 3).

    Args:
        params: the tree under `params`; kernels [in, out] or stacked [L-1, in, out].
        lora: the tree under `lora`; lora_a [..., in, r] and lora_b [..., r, out].
        scale: `LoraConfig.scale`.

    Returns:
        A tree like `params`, numpy where both trees are and jax otherwise. Merged kernels are
        computed in float32 and have the dtype they had; all other leaves are the same objects.

    Raises:
        HFError: an adapter stands where `params` has no kernel.
    """
    adapters: dict[TreePath, Array] = flatten_dict(lora)
    leaves: dict[TreePath, Array] = flatten_dict(params)
    for *module, leaf in adapters:
        path = (*module, "kernel")
        if path not in leaves:
            raise HFError(f"lora holds {'/'.join(module)}, but params hold no {'/'.join(path)}")
        if leaf == "lora_a":
            kernel, a, b = leaves[path], adapters[*module, "lora_a"], adapters[*module, "lora_b"]
            leaves[path] = _merged(kernel, a, b, scale).astype(kernel.dtype)
    return unflatten_dict(leaves)


def _merged(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    """W + scale A B in float32, over any leading axes."""
    with jax.default_matmul_precision("highest"):  # GPU and TPU multiply float32 at less otherwise
        update = a.astype(np.float32) @ b.astype(np.float32)
    return kernel.astype(np.float32) + scale * update


def merged_adapters(directory: str | Path) -> list[str]:
    """A checksum of every adapter that is merged into an exported model."""
    return _read_json(Path(directory) / CONFIG_FILE).get(_MERGED_KEY, [])


def _rounded_bytes(value: Array) -> bytes:
    """What an adapter is known by: a copy in bfloat16 is the same one."""
    return np.asarray(value, np.float32).astype("bfloat16").tobytes()


def load_adapter(
    directory: str | Path, backbone: BackboneConfig, base: str | Path | None = None
) -> tuple[Tree, LoraConfig]:
    """Reads a PEFT LoRA adapter: `adapter_config.json` and `adapter_model.safetensors`.

    Keys may begin with `base_model.model.model.` or `base_model.model.` (an adapter of a bare
    AutoModel), with `encoder.` before either (as the published LaSER trainer saves), and may carry
    the adapter name `default`.

    Args:
        base: the model's directory, where the adapter is to be applied.

    Returns:
        The tree under `lora`, float32 numpy arrays, and the adapter's settings.

    Raises:
        FileNotFoundError: one of the two files is missing.
        HFError: a setting that is not implemented (names key and value), or missing, unknown,
            duplicate, mis-shaped or ill-typed tensors (lists all of them); the adapter is merged
            into `base` already.
    """
    directory = Path(directory)
    lora = _read_lora_config(directory / ADAPTER_CONFIG_FILE)
    by_name: dict[str, list[Stored]] = {}
    for tensor in _headers(directory / ADAPTER_FILE):
        name = _ADAPTER_INFIX.sub(r".\1.weight", _ADAPTER_PREFIX.sub("model.", tensor.key))
        by_name.setdefault(name, []).append(tensor)
    slots = _lora_slots(backbone, lora)
    tree = _read(_fitting(slots, by_name, directory), np.float32)
    leaves = flatten_dict(tree)
    digest = hashlib.sha256(b"".join(_rounded_bytes(s.of(leaves[s.path])) for s in slots))
    if base is not None and digest.hexdigest() in merged_adapters(base):
        raise HFError(
            f"{directory}: this adapter is merged into {base} already, its {CONFIG_FILE} says. "
            "Load the model without it, or it over the model that it was trained on"
        )
    return tree, lora


def _read_lora_config(file: Path) -> LoraConfig:
    values = {"use_rslora": False} | _read_json(file)
    _check_supported(values, _SUPPORTED_IN_ADAPTER, file)
    # Whatever PEFT has beyond plain LoRA is switched on by a value that is not empty.
    known = {*_SUPPORTED_IN_ADAPTER, *_ADAPTER_KEYS_READ, *_ADAPTER_KEYS_WITHOUT_EFFECT}
    for key in values.keys() - known:
        _check_supported({key: values[key] or None}, {key: (None,)}, file)
    targets = values.get("target_modules")
    targets = list(PROJECTIONS) if targets == "all-linear" else targets
    if not isinstance(targets, list) or not set(targets) <= set(PROJECTIONS):
        allowed = f"'all-linear' or a list out of {PROJECTIONS}"
        raise HFError(f"{file}: target_modules = {targets!r} is not supported, only {allowed}")
    try:
        return LoraConfig(
            rank=_value(values, "r", "int", file),
            alpha=_value(values, "lora_alpha", "float", file),
            targets=tuple(name for name in PROJECTIONS if name in targets),
            rank_stabilised=_value(values, "use_rslora", "bool", file),
        )
    except ConfigError as error:
        raise HFError(f"{file}: {error}") from error


def save_adapter(
    directory: str | Path,
    lora_tree: Tree,
    lora: LoraConfig,
    backbone: BackboneConfig,
    *,
    base_model: str,
) -> None:
    """Writes the tree under `lora` as `peft.PeftModel.from_pretrained` loads it, in float32.

    `base_model` is the path or hub name of the model that the adapter belongs to. Where the arrays
    span several processes all of them call this, as with `save_params`.

    Raises:
        HFError, OSError: as `save_params`.
    """
    slots = [s._replace(name=f"base_model.model.{s.name}") for s in _lora_slots(backbone, lora)]
    leaves = _checked_leaves(lora_tree, slots, "lora")
    tensors = (slot.turned(_gathered(slot, leaves)) for slot in slots)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        # PEFT declares an integer, which 32.0 is not.
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "target_modules": list(lora.targets),
        "use_rslora": lora.rank_stabilised,
        "bias": "none",
    }
    with _staged(Path(directory), tensors) as stage:
        if stage is not None:
            _write_json(stage / ADAPTER_CONFIG_FILE, config)
            _write_tensors(stage / ADAPTER_FILE, slots, tensors, np.float32)
