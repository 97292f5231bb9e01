"""A Hugging Face directory: where it is, what its files are called, and its config.json."""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from laser_jax.config import BackboneConfig, ConfigError, Family, RopeScaling
from laser_jax.files import reading

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
RETRIEVER_TYPE = "laser_retriever"
"""The model_type of an export for sentence-transformers, whose config.json holds the backbone's."""
# Whatever of these is no weight is small. Subfolders hold other formats and are left out.
_HUB_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "model*.safetensors", ADAPTER_FILE]
_HF_KEYS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}
_SUPPORTED = {
    "model_type": get_args(Family),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "is_causal": (True,),
    "use_sliding_window": (False,),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0,),
    "rope_type": ("default", "llama3", "yarn"),
    "truncate": (True,),
}
_UNUSED: dict[str, dict[str, Any]] = {
    "qwen3": {"attention_bias": False, "use_sliding_window": False},
    "qwen2": {"use_sliding_window": False},
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"sliding_window": None},
}
"""What a family may have and we have not."""
_YARN = {"low_freq_factor": "beta_slow", "high_freq_factor": "beta_fast"}
"""YaRN's names of the same settings."""


class HFError(ValueError):
    """A checkpoint, config or adapter that cannot be used. Names the file and the tensor or key."""


def resolve_directory(name: str | Path) -> Path:
    """The directory `name`, or the downloaded copy of `organisation/name` on the Hugging Face hub.

    A directory of that name wins. Only files that laser_jax reads are downloaded, once, into the
    hub's cache; without a network the cache serves. Raises a FileNotFoundError, which
    says what to do, where neither is there or the hub cannot be reached.
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


def read_backbone_config(path: str | Path) -> BackboneConfig:
    """Reads the `config.json` (in the directory `path`, or `path` itself) of a decoder.

    Takes the names of transformers 4.x (`rope_theta`, `rope_scaling`) and 5.x (`rope_parameters`),
    and the `backbone` in that of an export for sentence-transformers. Absent keys have
    transformers' defaults; an absent `num_key_value_heads` means one a query head, of a Mistral 8.
    A Mistral has as many positions as its sliding window, within which attention is full. Raises a
    FileNotFoundError, and an HFError, which names the file, the key and the value, where it is not
    JSON, a key is missing or ill-typed, or a setting would change the numbers and is not
    implemented.
    """
    file = Path(path) / CONFIG_FILE if Path(path).is_dir() else Path(path)
    given = read_object(file, nulls=True)
    family = typed(given, "model_type", "str", file)
    if family == RETRIEVER_TYPE:
        family = typed(given, "backbone_type", "str", file)
        given = typed(given, "backbone", "dict", file)
    values = {k: v for k, v in given.items() if v is not None} | {"model_type": family}
    check_supported(values, _SUPPORTED, file)
    layer_types = values.get("layer_types", [])
    for layer_type in layer_types if isinstance(layer_types, list) else [layer_types]:
        check_supported({"layer_types": layer_type}, {"layer_types": ("full_attention",)}, file)
    width = typed(values, "hidden_size", "int", file)
    heads = typed(values, _HF_KEYS["num_heads"], "int", file)
    positions = {"llama": 2048, "mistral": 131_072}
    defaults = {
        "num_key_value_heads": 8 if family == "mistral" else heads,
        "head_dim": 128 if family == "qwen3" else width // max(1, heads),
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": positions.get(family, 32_768),
    }
    values = defaults | values
    windowed = {"sliding_window": 4096} | given  # null is no window
    if family == "mistral" and windowed["sliding_window"] is not None:
        window = typed(windowed, "sliding_window", "int", file)
        most = typed(values, "max_position_embeddings", "int", file)
        values["max_position_embeddings"] = min(window, most)
    try:
        theta, scaling = _read_rope(values, file)
        rest = {"family": family, "rope_theta": theta, "rope_scaling": scaling}
        return BackboneConfig(**rest, **_fields(BackboneConfig, values, file, set(rest)))
    except ConfigError as error:
        raise HFError(f"{file}: {error}") from error


def hf_config_dict(
    backbone: BackboneConfig, *, dtype: str, **tokens: int | list[int] | None
) -> dict[str, Any]:
    """A `config.json` that transformers 4.5x and 5.x read as the same model: RoPE and dtype (of the
    stored weights) are there under the names of either. `tokens` are eos_token_id and the like."""
    values = dataclasses.asdict(backbone)
    family, theta, scaling = (values.pop(key) for key in ("family", "rope_theta", "rope_scaling"))
    if scaling and scaling["rope_type"] == "yarn":
        scaling = {_YARN.get(key, key): value for key, value in scaling.items()}
    elif scaling:
        del scaling["attention_factor"]
    return {_HF_KEYS.get(key, key): value for key, value in values.items()} | {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "hidden_act": "silu",
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": (scaling or {"rope_type": "default"}) | {"rope_theta": theta},
        **_UNUSED[family],
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
    check_supported(block, _SUPPORTED, file)
    theta = typed(block, "rope_theta", "float", file)
    is_yarn = block["rope_type"] == "yarn"
    block = _of_yarn(block, file) if is_yarn else {"attention_factor": 1.0} | block
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor", "truncate"}
    if unknown := block.keys() - known - {field.name for field in dataclasses.fields(RopeScaling)}:
        raise HFError(f"{file}: {sorted(unknown)} among the RoPE settings {block} is unknown")
    if block["rope_type"] == "default":
        return theta, None
    numbers = _fields(RopeScaling, block, file, {"rope_type"})
    return theta, RopeScaling(rope_type=block["rope_type"], **numbers)


def _of_yarn(block: dict[str, Any], file: Path) -> dict[str, Any]:
    """The settings of YaRN under our names, with transformers' defaults."""
    known = {"beta_slow": 1.0, "beta_fast": 32.0}
    factor = typed(block, "factor", "float", file)
    known["attention_factor"] = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    ours = {of: name for name, of in _YARN.items()}
    return {ours.get(key, key): value for key, value in (known | block).items()}


def _fields(
    cls: type, values: dict[str, Any], file: Path, skip: Iterable[str] = ()
) -> dict[str, Any]:
    """The fields of a config dataclass out of `values`, which has Hugging Face's keys."""
    return {
        field.name: typed(values, _HF_KEYS.get(field.name, field.name), str(field.type), file)
        for field in dataclasses.fields(cls)
        if field.name not in skip
    }


def check_supported(
    values: dict[str, Any], supported: dict[str, tuple[Any, ...]], file: Path
) -> None:
    for key, choices in supported.items():
        if key in values and values[key] not in choices:
            allowed = " or ".join(map(repr, choices))
            raise HFError(f"{file}: {key} = {values[key]!r} is not supported, only {allowed}")


def typed(values: dict[str, Any], key: str, kind: str, file: Path) -> Any:
    value = values.get(key)
    if kind == "float" and type(value) is int:
        value = float(value)
    if type(value).__name__ != kind:
        found = "is missing" if value is None else f"= {value!r:.80} has the wrong type"
        raise HFError(f"{file}: {key} {found}; {kind} wanted")
    return value


def read_object(file: Path, *, nulls: bool = False) -> dict[str, Any]:
    """The keys that are not null, or all of them."""
    try:
        values = reading.read_object(file)
    except reading.DataError as error:
        raise HFError(str(error)) from error
    return {key: value for key, value in values.items() if nulls or value is not None}
