"""Weights and adapters out: parameter trees become a directory, whole or not at all."""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import save_file

from laser_jax.config import BackboneConfig, LoraConfig
from laser_jax.files.durable import flush, folder_written_whole, write_json
from laser_jax.hf.adapters import MERGED_KEY, merged_kernel, peft_settings, rounded_bytes
from laser_jax.hf.directory import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    HFError,
    hf_config_dict,
)
from laser_jax.hf.layout import Array, Slot, Tree, TreePath, checked_leaves, lora_slots, param_slots

NO_TOKENS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}


def save_params(
    directory: str | Path,
    variables: Tree,
    backbone: BackboneConfig,
    *,
    dtype: DTypeLike,
    lora: LoraConfig | None,
    tokens: Mapping[str, Any] = NO_TOKENS,
    merged: Sequence[str] = (),
    max_shard_bytes: float = 5e9,
) -> None:
    """Writes `config.json` and the weights, in `dtype`, as transformers loads them.

    Adapters are merged in float32 before the cast, and `config.json` says so. Files appear under
    their names once all of them are written; weights of an earlier export are removed. Where the
    arrays span several processes all of them call this: each tensor is gathered in turn, and
    process 0 alone writes. It holds one file's tensors at a time, the others one tensor.

    Args:
        variables: the trees `params` and, exactly where there are settings `lora` of adapters,
            `lora`; numpy or jax arrays.
        tokens, max_shard_bytes: as `save_weights` takes them.
        merged: the `merged_adapters` of the model that the weights were trained from.

    Raises an HFError where the tree does not fit `backbone` (lists its leaves) or process 0 failed,
    and an OSError where a file cannot be written; an older export is still whole.
    """
    if ("lora" in variables) != (lora is not None):
        raise HFError(f"adapters need their LoraConfig: got {sorted(variables)} and lora = {lora}")
    slots = param_slots(backbone)
    params = checked_leaves(variables["params"], slots, "params")
    added = [] if lora is None else lora_slots(backbone, lora)
    adapters = checked_leaves(variables.get("lora", {}), added, "lora")
    digest = hashlib.sha256()

    def exported(slot: Slot) -> np.ndarray:
        value, module = _gathered(slot, params), slot.path[:-1]
        if lora is not None and (*module, "lora_a") in adapters:
            parts = (slot._replace(path=(*module, leaf)) for leaf in ("lora_a", "lora_b"))
            a, b = (_gathered(part, adapters) for part in parts)
            digest.update(rounded_bytes(a) + rounded_bytes(b))
            value = merged_kernel(value, a, b, lora.scale)
        return slot.transposed(value)

    def all_merged() -> list[str]:
        return [*merged, *([] if lora is None else [digest.hexdigest()])]

    weights = map(exported, slots)
    save_weights(directory, backbone, weights, dtype, tokens, max_shard_bytes, all_merged)


def save_weights(
    directory: str | Path,
    backbone: BackboneConfig,
    weights: Iterator[np.ndarray],
    dtype: DTypeLike,
    tokens: Mapping[str, Any] = NO_TOKENS,
    max_shard_bytes: float = 5e9,
    merged: Callable[[], Sequence[str]] = tuple,
) -> None:
    """Writes the same as `save_params` from weights that come one at a time, in the order of a
    checkpoint's slots and in Hugging Face's layout, and raises the same. A file's weights are held
    until it is written.

    Args:
        tokens: `eos_token_id`, `bos_token_id` and `pad_token_id` for config.json, some or all.
        max_shard_bytes: above this the weights are split, with `model.safetensors.index.json`.
        merged: gives the checksums of the merged adapters; called when all weights have come.
    """
    directory, dtype = Path(directory), np.dtype(dtype)
    slots = param_slots(backbone)
    sizes = {slot.name: math.prod(slot.shape) * dtype.itemsize for slot in slots}
    shards: list[list[Slot]] = [[]]
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
        config = hf_config_dict(backbone, dtype=dtype.name, **{**NO_TOKENS, **tokens})
        adapters = list(merged())
        write_json(stage / CONFIG_FILE, config | ({MERGED_KEY: adapters} if adapters else {}))
        if count > 1:
            weight_map = {slot.name: name for name, shard in files.items() for slot in shard}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            write_json(stage / INDEX_FILE, index)
        # An older export goes before its successor comes: an interruption from here on leaves a
        # directory that fails to load rather than a mixture of two models.
        shards_there = directory.glob("model-*-of-*.safetensors")
        for older in {directory / WEIGHTS_FILE, directory / INDEX_FILE, *shards_there}:
            if older.name not in files:
                older.unlink(missing_ok=True)


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
    span several processes all of them call this, as with `save_params`. Raises an HFError or
    OSError as `save_params`.
    """
    slots = [s._replace(name=f"base_model.model.{s.name}") for s in lora_slots(backbone, lora)]
    leaves = checked_leaves(lora_tree, slots, "lora")
    tensors = (slot.transposed(_gathered(slot, leaves)) for slot in slots)
    with _staged(Path(directory), tensors) as stage:
        if stage is not None:
            write_json(stage / ADAPTER_CONFIG_FILE, peft_settings(lora, base_model))
            _write_tensors(stage / ADAPTER_FILE, slots, tensors, np.float32)


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


def _gathered(slot: Slot, leaves: dict[TreePath, Array]) -> np.ndarray:
    """The slot's part of its leaf. All processes must ask where the leaf spans several."""
    value = slot.of(leaves[slot.path])
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value.copy())  # a leaf would keep its own host copy as long as it lives


def _write_tensors(file: Path, slots: list[Slot], tensors: Iterator[Any], dtype: Any) -> None:
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
    flush(file)  # a disk may be full as late as that, and an older export goes next
