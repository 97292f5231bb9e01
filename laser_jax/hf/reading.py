"""Weights and adapters in: safetensors files become parameter trees, one tensor at a time."""

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from laser_jax.config import BackboneConfig, LoraConfig
from laser_jax.files.durable import Digest
from laser_jax.hf.adapters import merged_adapters, plain_name, read_lora_config, rounded_bytes
from laser_jax.hf.directory import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    HFError,
    read_object,
)
from laser_jax.hf.layout import (
    Slot,
    Tree,
    TreePath,
    checked_leaves,
    leaf_shapes,
    lora_slots,
    param_slots,
    refuse,
)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor as the header of a safetensors file describes it; other formats derive from it."""

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

    Every tensor has its place and every place its tensor. Keys may carry the leading `model.` or
    not; `rotary_emb.inv_freq` buffers are skipped; an `lm_head.weight` beside tied embeddings must
    equal them. Sources are float32, float16 or bfloat16. The peak is the model and one tensor.
    `seen` is given every tensor. Returns the tree under `params`, numpy arrays of `dtype`. Raises a
    FileNotFoundError, and an HFError at a broken file or tensors that do not fit; lists all of them
    with their files.
    """
    return _read(find_params(Path(directory), backbone), dtype, seen)


def load_sharded_params(directory: str | Path, backbone: BackboneConfig, like: Tree) -> Tree:
    """Reads the same files as `load_params`, with the same checks, straight into their shards.

    `like` is the tree under `params` of `jax.ShapeDtypeStruct`, each with a NamedSharding; the jax
    arrays that are returned are laid out so. All processes of its mesh call this. Each reads the
    byte ranges of the shards on its own devices, once however many hold them (a spare
    `lm_head.weight` whole, so that all raise); its host holds one tensor and a copy. Raises as
    `load_params`, and an HFError where `like` does not fit `backbone`.
    """
    wanted = checked_leaves(like, param_slots(backbone), "params")
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


def load_adapter(
    directory: str | Path, backbone: BackboneConfig, base: str | Path | None = None
) -> tuple[Tree, LoraConfig]:
    """Reads a PEFT LoRA adapter: `adapter_config.json` and `adapter_model.safetensors`.

    `base` is the model's directory, where the adapter is to be applied. Returns the tree under
    `lora`, float32 numpy arrays, and the adapter's settings. Raises a FileNotFoundError, and an
    HFError at a setting that is not implemented (names key and value), tensors that do not fit
    (lists all of them), or an adapter that is merged into `base` already.
    """
    directory = Path(directory)
    lora = read_lora_config(directory / ADAPTER_CONFIG_FILE)
    by_name: dict[str, list[Stored]] = {}
    for tensor in _headers(directory / ADAPTER_FILE):
        by_name.setdefault(plain_name(tensor.key), []).append(tensor)
    slots = lora_slots(backbone, lora)
    tree = _read(fitting(slots, by_name, directory), np.float32)
    leaves = flatten_dict(tree)
    digest = hashlib.sha256(b"".join(rounded_bytes(s.of(leaves[s.path])) for s in slots))
    if base is not None and digest.hexdigest() in merged_adapters(base):
        raise HFError(
            f"{directory}: this adapter is merged into {base} already, its {CONFIG_FILE} says. "
            "Load the model without it, or it over the model that it was trained on"
        )
    return tree, lora


def _read_shards(slot: Slot, tensor: Stored, leaf: Any) -> jax.Array:
    """One tensor, laid out as (its row of) the leaf; on the devices when this returns."""
    spec = leaf.sharding.spec[0 if slot.row is None else 1 :]
    sharding = jax.NamedSharding(leaf.sharding.mesh, jax.P(*spec))
    pieces: dict[str, np.ndarray] = {}

    def piece(index: Any) -> np.ndarray:
        key = str(index)  # slices have no hash
        if key not in pieces:
            value = tensor.read(*index[:: slot.order])
            pieces[key] = np.ascontiguousarray(slot.transposed(value), leaf.dtype)
        return pieces[key]

    # Waiting bounds the host copies that are on their way.
    return jax.make_array_from_callback(slot.shape, sharding, piece).block_until_ready()


def _with_row(stack: jax.Array, part: jax.Array, row: jax.Array) -> jax.Array:
    # As integers: XLA's CPU backend takes a whole bfloat16 stack to float32 and back for each row.
    bits = np.dtype(f"u{stack.dtype.itemsize}")
    updated = jax.lax.dynamic_update_index_in_dim(stack.view(bits), part.view(bits), row, 0)
    return updated.view(stack.dtype)


def find_params(directory: Path, backbone: BackboneConfig) -> dict[Slot, Stored]:
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
    slots = param_slots(backbone)
    head = param_slots(dataclasses.replace(backbone, tie_word_embeddings=False))[-1]
    has_spare_head = backbone.tie_word_embeddings and head.name in by_name
    found = fitting([*slots, head] if has_spare_head else slots, by_name, directory, problems)
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
    weight_map = read_object(index).get("weight_map")
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


def fitting(
    slots: list[Slot], by_name: dict[str, list[Stored]], where: Path, problems: Iterable[str] = ()
) -> dict[Slot, Stored]:
    """The one tensor of each slot; raises an HFError that names `where` and lists all that are
    missing, unknown, duplicate, mis-shaped or ill-typed."""
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
    refuse(str(where), problems)
    return {slot: by_name[slot.name][0] for slot in slots}


def _read(stored: dict[Slot, Stored], dtype: DTypeLike, seen: Digest | None = None) -> Tree:
    leaves = {path: np.empty(shape, dtype) for path, shape in leaf_shapes(stored).items()}
    for slot, tensor in stored.items():
        value = tensor.read() if seen is None else seen.add(slot.name, tensor.read())
        slot.of(leaves[slot.path])[...] = slot.transposed(value)
    return unflatten_dict(leaves)
