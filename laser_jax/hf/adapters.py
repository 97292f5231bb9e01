"""LoRA adapters: PEFT's settings and spellings, and merging into the weights."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from laser_jax.config import PROJECTIONS, ConfigError, LoraConfig
from laser_jax.hf.directory import CONFIG_FILE, HFError, check_supported, read_object, typed
from laser_jax.hf.layout import Array, Tree, TreePath

MERGED_KEY = "laser_merged_adapters"
"""In config.json, which transformers leaves alone where it does not know a key."""
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
_ADAPTER_INFIX = re.compile(r"\.(lora_[AB])\.default\.weight$")


def plain_name(key: str) -> str:
    """The name of an adapter's tensor in the checkpoint. Keys may begin with
    `base_model.model.model.` or `base_model.model.` (an adapter of a bare AutoModel), with
    `encoder.` before either (as the published LaSER trainer saves), and may carry the adapter name
    `default`."""
    return _ADAPTER_INFIX.sub(r".\1.weight", _ADAPTER_PREFIX.sub("model.", key))


def merge_lora(params: Tree, lora: Tree, scale: float) -> Tree:
    """Adds the adapters to the weights: W + scale A B (Hu et al. 2021, equation 3).

    Kernels are [in, out] or stacked [L-1, in, out], adapters lora_a [..., in, r] and lora_b [...,
    r, out]; `scale` is `LoraConfig.scale`. Returns a tree like `params`, numpy where both trees are
    and jax otherwise. Merged kernels are computed in float32 and keep their dtype; all other leaves
    are the same objects. Raises an HFError where an adapter stands and `params` has no kernel.
    """
    adapters: dict[TreePath, Array] = flatten_dict(lora)
    leaves: dict[TreePath, Array] = flatten_dict(params)
    for *module, leaf in adapters:
        path = (*module, "kernel")
        if path not in leaves:
            raise HFError(f"lora holds {'/'.join(module)}, but params hold no {'/'.join(path)}")
        if leaf == "lora_a":
            kernel, a, b = leaves[path], adapters[*module, "lora_a"], adapters[*module, "lora_b"]
            leaves[path] = merged_kernel(kernel, a, b, scale).astype(kernel.dtype)
    return unflatten_dict(leaves)


def merged_kernel(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    """W + scale A B in float32, over any leading axes."""
    with jax.default_matmul_precision("highest"):  # GPU and TPU multiply float32 at less otherwise
        update = a.astype(np.float32) @ b.astype(np.float32)
    return kernel.astype(np.float32) + scale * update


def merged_adapters(directory: str | Path) -> list[str]:
    """A checksum of every adapter that is merged into an exported model."""
    return read_object(Path(directory) / CONFIG_FILE).get(MERGED_KEY, [])


def rounded_bytes(value: Array) -> bytes:
    """What an adapter is known by: a copy in bfloat16 is the same one."""
    return np.asarray(value, np.float32).astype("bfloat16").tobytes()


def read_lora_config(file: Path) -> LoraConfig:
    values = {"use_rslora": False} | read_object(file)
    check_supported(values, _SUPPORTED_IN_ADAPTER, file)
    # Whatever PEFT has beyond plain LoRA is switched on by a value that is not empty.
    known = {*_SUPPORTED_IN_ADAPTER, *_ADAPTER_KEYS_READ, *_ADAPTER_KEYS_WITHOUT_EFFECT}
    for key in values.keys() - known:
        check_supported({key: values[key] or None}, {key: (None,)}, file)
    targets = values.get("target_modules")
    targets = list(PROJECTIONS) if targets == "all-linear" else targets
    if not isinstance(targets, list) or any(name not in PROJECTIONS for name in targets):
        allowed = f"'all-linear' or a list out of {PROJECTIONS}"
        raise HFError(f"{file}: target_modules = {targets!r} is not supported, only {allowed}")
    try:
        return LoraConfig(
            rank=typed(values, "r", "int", file),
            alpha=typed(values, "lora_alpha", "float", file),
            targets=tuple(name for name in PROJECTIONS if name in targets),
            rank_stabilised=typed(values, "use_rslora", "bool", file),
        )
    except ConfigError as error:
        raise HFError(f"{file}: {error}") from error


def peft_settings(lora: LoraConfig, base_model: str) -> dict[str, Any]:
    """What `adapter_config.json` holds."""
    return {
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
