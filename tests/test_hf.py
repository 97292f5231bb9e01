from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from jax.sharding import AxisType, Mesh
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from laser_jax.config import PROJECTIONS, BackboneConfig, LoraConfig, RopeScaling
from laser_jax.hf.adapters import merge_lora
from laser_jax.hf.directory import HFError, hf_config_dict, read_backbone_config, resolve_directory
from laser_jax.hf.reading import Stored, load_adapter, load_params, load_sharded_params
from laser_jax.hf.writing import save_adapter, save_params
from laser_jax.modeling.backbone import Backbone
from laser_jax.sharding import MESH_AXES, shardings

Tensors = dict[str, np.ndarray]
LORA = LoraConfig(rank=2, alpha=3.0)
LLAMA3 = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
NO_TOKENS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}


def tiny(family: str = "qwen3", *, layers: int = 3, tied: bool = True) -> BackboneConfig:
    return BackboneConfig(
        family=family,  # pyright: ignore[reportArgumentType]
        vocab_size=24,
        hidden_size=8,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,  # not hidden_size / num_heads
        intermediate_size=12,
        rms_norm_eps=1e-5,
        rope_theta=5e4,
        rope_scaling=LLAMA3 if family == "llama" else None,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
    )


def random_tensors(backbone: BackboneConfig, seed: int = 0) -> Tensors:
    """A checkpoint as transformers names and shapes it."""
    d, h, f = backbone.hidden_size, backbone.head_dim, backbone.intermediate_size
    q, kv = backbone.num_heads * h, backbone.num_kv_heads * h
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (backbone.vocab_size, d),
        "model.norm.weight": (d,),
    }
    if not backbone.tie_word_embeddings:
        shapes["lm_head.weight"] = (backbone.vocab_size, d)
    for layer in range(backbone.num_layers):
        inside: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (q, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, q),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
            "input_layernorm": (d,),
            "post_attention_layernorm": (d,),
        }
        if backbone.family == "qwen3":
            inside |= {"self_attn.q_norm": (h,), "self_attn.k_norm": (h,)}
        shapes |= {f"model.layers.{layer}.{name}.weight": s for name, s in inside.items()}
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def random_lora(backbone: BackboneConfig, lora: LoraConfig = LORA, seed: int = 1) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    d, h, f = backbone.hidden_size, backbone.head_dim, backbone.intermediate_size
    q, kv = backbone.num_heads * h, backbone.num_kv_heads * h
    shapes = {
        "self_attn": {"q_proj": (d, q), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (q, d)},
        "mlp": {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)},
    }

    def layer(*stack: int) -> dict[str, Any]:
        return {
            block: {
                name: {
                    "lora_a": rng.normal(size=(*stack, n_in, lora.rank)).astype(np.float32),
                    "lora_b": rng.normal(size=(*stack, lora.rank, n_out)).astype(np.float32),
                }
                for name, (n_in, n_out) in projections.items()
                if name in lora.targets
            }
            for block, projections in shapes.items()
            if set(projections) & set(lora.targets)
        }

    stacked = {"layers": layer(backbone.num_layers - 1)} if backbone.num_layers > 1 else {}
    return stacked | {"last_layer": layer()}


def write_checkpoint(directory: Path, backbone: BackboneConfig, tensors: Tensors) -> Path:
    directory.mkdir(exist_ok=True)
    config = hf_config_dict(backbone, dtype="float32", **NO_TOKENS)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def write_shards(directory: Path, shards: dict[str, Tensors], **weight_map: str) -> Path:
    directory.mkdir(exist_ok=True)
    places = {key: name for name, tensors in shards.items() for key in tensors}
    index = {"metadata": {}, "weight_map": places | weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, tensors in shards.items():
        save_file(tensors, directory / name, {"format": "pt"})
    return directory


def assert_trees_equal(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# --- config.json -----------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["model1", "model3"])
def test_three_notations_of_a_config_are_one_backbone(golden_dir: Path, model: str) -> None:
    paths = sorted((golden_dir / model).glob("config*.json"))
    assert len(paths) == 3
    configs = {read_backbone_config(path) for path in paths}
    assert configs == {read_backbone_config(golden_dir / model)}


def test_golden_configs_are_read_field_by_field(golden_dir: Path) -> None:
    common = {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 160,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    }
    qwen3 = {"family": "qwen3", "head_dim": 32, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    llama = {"family": "llama", "head_dim": 16, "rms_norm_eps": 1e-5, "rope_theta": 5e5}
    scaling = RopeScaling(32.0, 1.0, 4.0, 64)
    assert read_backbone_config(golden_dir / "model1") == BackboneConfig(
        **common, **qwen3, rope_scaling=None
    )
    assert read_backbone_config(golden_dir / "model3") == BackboneConfig(
        **common, **llama, rope_scaling=scaling
    )


def written_config(tmp_path: Path, backbone: BackboneConfig, **changes: Any) -> Path:
    values = hf_config_dict(backbone, dtype="float32", **NO_TOKENS) | changes
    kept = {key: value for key, value in values.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    return tmp_path


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_written_config_reads_back_as_the_same_backbone(
    tmp_path: Path, family: str, tied: bool
) -> None:
    backbone = tiny(family, tied=tied)
    assert read_backbone_config(written_config(tmp_path, backbone)) == backbone


def test_absent_keys_have_the_defaults_of_transformers(tmp_path: Path) -> None:
    old_scaling = {"type": "llama3", **dataclasses.asdict(LLAMA3)}
    absent = dict.fromkeys(
        ("head_dim", "num_key_value_heads", "tie_word_embeddings", "rms_norm_eps", "mlp_bias"), ...
    )
    absent |= dict.fromkeys(("rope_theta", "rope_parameters", "max_position_embeddings"), ...)
    path = written_config(tmp_path, tiny("llama"), rope_scaling=old_scaling, **absent)
    wanted = dataclasses.replace(
        tiny("llama", tied=False),
        head_dim=2,
        num_kv_heads=4,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        max_position_embeddings=2048,
    )
    assert read_backbone_config(path) == wanted


def test_absent_head_dim_of_qwen3_is_128_as_in_transformers(tmp_path: Path) -> None:
    assert read_backbone_config(written_config(tmp_path, tiny(), head_dim=...)).head_dim == 128


@pytest.mark.parametrize(("window", "positions"), [(..., 4096), (None, 8192), (64, 64)])
def test_a_mistral_has_the_positions_of_its_window_which_absent_is_4096(
    tmp_path: Path, window: Any, positions: int
) -> None:
    changes = {"sliding_window": window, "max_position_embeddings": 8192}
    path = written_config(tmp_path, tiny("mistral"), **changes)
    assert read_backbone_config(path).max_position_embeddings == positions


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gemma"}, "model_type = 'gemma'"),
        ({"model_type": ...}, "model_type is missing"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": "8"}, "hidden_size = '8'"),
        ({"num_hidden_layers": 0}, "num_layers"),
        ({"num_attention_heads": 3}, "num_heads 3"),
        ({"num_hidden_layers": 10**7}, "num_layers must lie in [1, 1000], got 10000000"),
        ({"vocab_size": 10**12}, "vocab_size must lie in"),
        ({"intermediate_size": -8}, "intermediate_size must lie in"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings must lie in"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"layer_types": 5}, "layer_types = 5"),
        ({"rope_scaling": 5, "rope_parameters": ...}, "rope_scaling = 5 has the wrong type"),
        ({"rope_parameters": ["llama3"]}, "rope_parameters = ['llama3'] has the wrong type"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    **dataclasses.asdict(LLAMA3),
                    "factor": 0.0,
                },
                "rope_parameters": ...,
            },
            "rope_scaling.factor must be a positive number",
        ),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"is_causal": False}, "is_causal = False"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config = "),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": YARN}, "original_max_position_embeddings is missing"),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate = False"),
        ({"rope_scaling": YARN | {"mscale": 0.7}}, "['mscale'] among the RoPE settings"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
        ({"rope_parameters": YARN | {"rope_type": "longrope"}}, "rope_type = 'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
        ({"rope_scaling": {"rope_type": "llama3"}, "rope_parameters": ...}, "factor is missing"),
        ({"rope_theta": 1e4}, "rope_theta and rope_parameters disagree"),
        ({"rope_scaling": {"rope_type": "llama3", **dataclasses.asdict(LLAMA3)}}, "disagree"),
    ],
)
def test_config_that_would_change_the_numbers_is_refused_by_key(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    path = written_config(tmp_path, tiny(), **changes)
    with pytest.raises(HFError, match=r"config\.json") as error:
        read_backbone_config(path)
    assert named in str(error.value)


def test_absent_and_broken_config_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        read_backbone_config(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(HFError, match=r"config\.json"):
            read_backbone_config(tmp_path)


# --- weights in --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_lands_at_its_leaf(
    tmp_path: Path, family: str, layers: int, tied: bool
) -> None:
    backbone = tiny(family, layers=layers, tied=tied)
    tensors = random_tensors(backbone)
    params = load_params(write_checkpoint(tmp_path, backbone, tensors), backbone, dtype="float32")

    assert ("layers" in params) == (layers > 1)
    assert ("lm_head" in params) == (not tied)
    seen = 0
    for name, tensor in tensors.items():
        *modules, _ = name.removeprefix("model.").split(".")
        node, row = params, None
        if modules[0] == "layers":
            layer = int(modules[1])
            row = layer if layer < layers - 1 else None
            modules = ["layers" if row is not None else "last_layer", *modules[2:]]
        for key in modules:
            node = node[key]
        [(leaf_name, leaf)] = node.items()
        value = leaf if row is None else leaf[row]
        np.testing.assert_array_equal(value, tensor.T if leaf_name == "kernel" else tensor)
        seen += value.size
    assert seen == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("model", ["model1", "model3"])
def test_golden_models_load_and_are_written_back_unchanged(
    golden_dir: Path, tmp_path: Path, model: str
) -> None:
    backbone = read_backbone_config(golden_dir / model)
    params = load_params(golden_dir / model, backbone, dtype=np.float32)
    save_params(tmp_path, {"params": params}, backbone, dtype=np.float32, lora=None)
    before = load_file(golden_dir / model / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    assert read_backbone_config(tmp_path) == backbone


@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("target", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtypes_are_cast_on_reading(tmp_path: Path, source: Any, target: Any) -> None:
    backbone = tiny()
    tensors = {name: value.astype(source) for name, value in random_tensors(backbone).items()}
    params = load_params(write_checkpoint(tmp_path, backbone, tensors), backbone, dtype=target)
    wanted = tensors["model.layers.2.mlp.up_proj.weight"].astype(target).T
    got = params["last_layer"]["mlp"]["up_proj"]["kernel"]
    assert got.dtype == np.dtype(target)
    np.testing.assert_array_equal(got, wanted)


def test_a_bare_export_without_the_model_prefix_and_rope_buffers_is_the_same(
    tmp_path: Path,
) -> None:
    backbone = tiny("llama")
    tensors = random_tensors(backbone)
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    assert_trees_equal(
        load_params(write_checkpoint(tmp_path / "a", backbone, bare), backbone, dtype="float32"),
        load_params(write_checkpoint(tmp_path / "b", backbone, tensors), backbone, dtype="float32"),
    )


def test_tied_checkpoint_may_carry_an_equal_head_but_no_other(tmp_path: Path) -> None:
    backbone = tiny()
    tensors = random_tensors(backbone)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    params = load_params(write_checkpoint(tmp_path, backbone, tensors), backbone, dtype="float32")
    assert "lm_head" not in params

    tensors["lm_head.weight"][3, 3] += 1e-3
    write_checkpoint(tmp_path, backbone, tensors)
    with pytest.raises(HFError, match=r"lm_head\.weight in model\.safetensors differs from"):
        load_params(tmp_path, backbone, dtype=ml_dtypes.bfloat16)


def test_all_misfits_are_listed_with_their_tensors_and_files(tmp_path: Path) -> None:
    backbone = tiny(tied=False)
    tensors = random_tensors(backbone)
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(24, np.float32)
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((12, 8), np.float32)
    tensors["model.layers.2.mlp.down_proj.weight"] = np.zeros((12, 8), np.float32)
    tensors["model.norm.weight"] = np.zeros(8, np.int32)
    tensors["norm.weight"] = np.zeros(8, np.float32)
    with pytest.raises(HFError) as error:
        load_params(write_checkpoint(tmp_path, backbone, tensors), backbone, dtype="float32")
    lines = {line.strip() for line in str(error.value).splitlines()[1:]}
    inside = "in model.safetensors"
    assert lines == {
        "missing: model.layers.1.mlp.up_proj.weight",
        'missing: lm_head.weight (for a model without: "tie_word_embeddings": true, config.json)',
        f"unknown: model.layers.0.self_attn.q_proj.bias {inside}",
        f"unknown: model.layers.3.mlp.up_proj.weight {inside}",
        f"mis-shaped: model.layers.2.mlp.down_proj.weight {inside} is [12, 8], not [8, 12]",
        f"dtype: model.norm.weight {inside} is I32, not F32, F16 or BF16",
        f"duplicate: model.norm.weight {inside}, norm.weight {inside}",
    }


def test_a_kernel_of_the_transposed_shape_is_refused(tmp_path: Path) -> None:
    backbone = tiny()
    tensors = random_tensors(backbone)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    with pytest.raises(HFError, match=r"mis-shaped: .*q_proj.weight"):
        load_params(write_checkpoint(tmp_path, backbone, tensors), backbone, dtype="float32")


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    backbone = tiny()
    file = write_checkpoint(tmp_path, backbone, random_tensors(backbone)) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(HFError, match=r"model\.safetensors: not a whole safetensors file"):
        load_params(tmp_path, backbone, dtype="float32")


def test_a_directory_without_weights_or_with_two_sets_is_refused(tmp_path: Path) -> None:
    backbone = tiny()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        load_params(tmp_path, backbone, dtype="float32")
    tensors = random_tensors(backbone)
    write_checkpoint(tmp_path, backbone, tensors)
    write_shards(tmp_path, {"model-00001-of-00001.safetensors": tensors})
    with pytest.raises(HFError, match=r"both model\.safetensors and"):
        load_params(tmp_path, backbone, dtype="float32")


def halves(tensors: Tensors) -> dict[str, Tensors]:
    names = list(tensors)
    return {
        "model-00001-of-00002.safetensors": {name: tensors[name] for name in names[::2]},
        "model-00002-of-00002.safetensors": {name: tensors[name] for name in names[1::2]},
    }


def test_shards_equal_the_single_file(tmp_path: Path) -> None:
    backbone = tiny()
    tensors = random_tensors(backbone)
    single = write_checkpoint(tmp_path / "single", backbone, tensors)
    sharded = write_shards(tmp_path / "sharded", halves(tensors))
    assert_trees_equal(
        load_params(single, backbone, dtype="float32"),
        load_params(sharded, backbone, dtype="float32"),
    )


def test_faults_of_shards_and_index_are_named(tmp_path: Path) -> None:
    backbone = tiny()
    shards = halves(random_tensors(backbone))
    first, second = shards

    def error_of(directory: Path) -> str:
        with pytest.raises((HFError, FileNotFoundError)) as error:
            load_params(directory, backbone, dtype="float32")
        return str(error.value)

    name = next(iter(shards[first]))
    twice = {first: shards[first], second: shards[second] | {name: shards[first][name]}}
    message = error_of(write_shards(tmp_path / "duplicate", twice, **{name: first}))
    assert f"duplicate: {name} in {first}, {name} in {second}" in message

    misplaced = write_shards(tmp_path / "misplaced", shards, **{name: second})
    assert f"index: {name} is not in {second}" in error_of(misplaced)
    assert f"index: {name} in {first} is not listed" in error_of(misplaced)

    absent = write_shards(tmp_path / "absent", shards)
    (absent / second).unlink()
    assert second in error_of(absent)

    cut = write_shards(tmp_path / "cut", shards)
    (cut / second).write_bytes((cut / second).read_bytes()[:-4])
    assert f"{second}: not a whole safetensors file" in error_of(cut)

    empty = write_shards(tmp_path / "empty", {})
    assert "weight_map" in error_of(empty)


@pytest.mark.parametrize(
    "place", [5, None, [], {}, "", "../other.safetensors", "/model.safetensors"]
)
def test_an_index_that_names_no_file_beside_it_is_refused_by_tensor(tmp_path: Path, place) -> None:
    index = {"weight_map": {"model.norm.weight": place}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HFError, match=r"index\.json: weight_map has .* of model\.norm\.weight"):
        load_params(tmp_path, tiny(), dtype="float32")


# --- weights in, straight into their shards ----------------------------------------------------


def mesh_of(data: int, fsdp: int, tensor: int) -> Mesh:
    count = data * fsdp * tensor
    axis_types = (AxisType.Auto,) * 3
    sizes = (data, fsdp, tensor)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=axis_types, devices=jax.devices()[:count])


def layout(
    backbone: BackboneConfig, mesh: Mesh, dtype: Any, collection: str = "params"
) -> dict[str, Any]:
    """Abstract leaves as `train.state.abstract_state` makes them."""
    module = Backbone(backbone, lora=LORA if collection == "lora" else None)
    boxed = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, dtype, sharding=sharding),
        nn.meta.unbox(boxed[collection]),
        shardings(boxed[collection], mesh),
    )


def count_bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all reads from here on."""
    sizes: list[int] = []
    read = Stored.read

    def counted(self: Any, *index: slice) -> np.ndarray:
        value = read(self, *index)
        sizes.append(value.nbytes)
        return value

    monkeypatch.setattr(Stored, "read", counted)
    return sizes


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 8, 1), (1, 1, 8)])
@pytest.mark.parametrize(
    ("family", "tied", "sharded", "dtype"),
    [
        ("qwen3", True, False, ml_dtypes.bfloat16),
        ("qwen3", False, True, np.float32),
        ("llama", True, True, np.float32),
        ("llama", False, False, ml_dtypes.bfloat16),
    ],
)
def test_shards_hold_what_load_params_reads(
    tmp_path: Path, sizes: tuple[int, int, int], family: str, tied: bool, sharded: bool, dtype: Any
) -> None:
    backbone = tiny(family, tied=tied)
    tensors = random_tensors(backbone)
    if sharded:
        write_shards(tmp_path, halves(tensors))
    else:
        write_checkpoint(tmp_path, backbone, tensors)
    like = layout(backbone, mesh_of(*sizes), dtype)
    params = load_sharded_params(tmp_path, backbone, like)
    assert_trees_equal(params, load_params(tmp_path, backbone, dtype=dtype))
    assert jax.tree.map(lambda a: a.sharding, params) == jax.tree.map(lambda a: a.sharding, like)


def test_a_model_of_one_layer_has_no_stack_to_load(tmp_path: Path) -> None:
    backbone = tiny(layers=1)
    source = write_checkpoint(tmp_path, backbone, random_tensors(backbone))
    params = load_sharded_params(source, backbone, layout(backbone, mesh_of(2, 2, 2), np.float32))
    assert_trees_equal(params, load_params(source, backbone, dtype="f4"))


def test_each_byte_is_read_once_however_many_devices_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny()
    tensors = random_tensors(backbone)
    source = write_checkpoint(tmp_path, backbone, tensors)
    read = count_bytes_read(monkeypatch)
    load_sharded_params(source, backbone, layout(backbone, mesh_of(4, 2, 1), ml_dtypes.bfloat16))
    assert sum(read) == sum(tensor.nbytes for tensor in tensors.values())


def test_the_streamed_load_refuses_what_load_params_refuses(tmp_path: Path) -> None:
    backbone = tiny()
    like = layout(backbone, mesh_of(1, 2, 1), np.float32)
    tensors = random_tensors(backbone)
    del tensors["model.norm.weight"]
    with pytest.raises(HFError, match=r"missing: model\.norm\.weight"):
        load_sharded_params(write_checkpoint(tmp_path, backbone, tensors), backbone, like)
    with pytest.raises(HFError, match=r"layers/.* is \(2, .*, not \(3, "):
        load_sharded_params(tmp_path, tiny(layers=4), like)


def test_a_spare_head_is_compared_to_its_last_row_and_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = dataclasses.replace(tiny(), vocab_size=9000)
    tensors = random_tensors(backbone)
    head = tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    like = layout(backbone, mesh_of(1, 8, 1), np.float32)
    source = write_checkpoint(tmp_path, backbone, tensors)
    read = count_bytes_read(monkeypatch)
    assert "lm_head" not in load_sharded_params(source, backbone, like)
    assert max(read) < head.nbytes / 2

    head[-1, -1] += 1e-3
    write_checkpoint(tmp_path, backbone, tensors)
    with pytest.raises(HFError, match=r"lm_head\.weight in model\.safetensors differs from"):
        load_sharded_params(source, backbone, like)


def test_the_host_holds_a_few_tensors_and_never_a_stack(tmp_path: Path) -> None:
    backbone = dataclasses.replace(tiny(layers=13), hidden_size=256, intermediate_size=1024)
    like = layout(backbone, mesh_of(1, 1, 2), np.float32)
    tensors = random_tensors(backbone)
    half = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    source = write_checkpoint(tmp_path / "a", backbone, half)
    largest = 4 * backbone.hidden_size * backbone.intermediate_size
    params = load_sharded_params(source, backbone, like)  # compiles

    def export() -> None:
        limit = 4 * largest
        out = tmp_path / "b"
        save_params(out, {"params": params}, backbone, dtype="f4", lora=None, max_shard_bytes=limit)

    export()  # compiles

    # tracemalloc sees the memory of numpy and safetensors, not that of the devices; but the CPU
    # takes over some of numpy's, which is a part of the result. Python's own objects are about one
    # of the largest tensors (three more in a process that has run other tests), a stack is twelve.
    tracemalloc.start()
    params = load_sharded_params(source, backbone, like)
    taken_over, top = tracemalloc.get_traced_memory()
    assert top - taken_over < 6 * largest
    tracemalloc.reset_peak()
    export()
    after, top = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert top - taken_over < (4 + 3) * largest  # a file's tensors and a few
    assert after - taken_over < largest  # the leaves keep no copy


# --- weights out -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_bytes", [5e9, 600])
@pytest.mark.parametrize("as_jax", [False, True])
def test_load_then_save_then_load_is_the_identity(
    tmp_path: Path, family: str, layers: int, tied: bool, max_shard_bytes: float, as_jax: bool
) -> None:
    backbone = tiny(family, layers=layers, tied=tied)
    source = write_checkpoint(tmp_path / "a", backbone, random_tensors(backbone))
    params = load_params(source, backbone, dtype=ml_dtypes.bfloat16)
    save_params(
        tmp_path / "b",
        {"params": jax.tree.map(jnp.asarray, params) if as_jax else params},
        backbone,
        dtype="bfloat16",
        lora=None,
        max_shard_bytes=max_shard_bytes,
    )
    assert_trees_equal(load_params(tmp_path / "b", backbone, dtype=ml_dtypes.bfloat16), params)
    assert read_backbone_config(tmp_path / "b") == backbone
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_shards_stay_below_the_limit_and_the_index_knows_their_size(tmp_path: Path) -> None:
    backbone = tiny()
    params = load_params(
        write_checkpoint(tmp_path / "a", backbone, random_tensors(backbone)), backbone, dtype="f4"
    )
    save_params(tmp_path, {"params": params}, backbone, dtype="f4", lora=None, max_shard_bytes=2000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    sizes = [sum(tensor.nbytes for tensor in load_file(shard).values()) for shard in shards]
    assert len(shards) > 1
    assert max(sizes) <= 2000
    assert shards[-1].name == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)


def test_an_export_replaces_the_older_one_whatever_its_shards(tmp_path: Path) -> None:
    backbone = tiny()
    for seed, limit in enumerate([5e9, 600, 2000, 5e9, 5e9]):
        source = write_checkpoint(tmp_path / "a", backbone, random_tensors(backbone, seed))
        params = load_params(source, backbone, dtype="float32")
        out = tmp_path / "b"
        save_params(out, {"params": params}, backbone, dtype="f4", lora=None, max_shard_bytes=limit)
        assert_trees_equal(load_params(out, backbone, dtype="float32"), params)
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors"]
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1


def test_a_failed_export_leaves_the_older_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny()
    source = write_checkpoint(tmp_path, backbone, random_tensors(backbone))
    params = load_params(source, backbone, dtype="float32")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full_disk(tensors: Tensors, file: Path, metadata: dict[str, str]) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("laser_jax.hf.writing.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_params(tmp_path, {"params": params}, backbone, dtype="f4", lora=None)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_disk_that_is_full_at_the_last_moment_leaves_the_older_export_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny()
    source = write_checkpoint(tmp_path / "a", backbone, random_tensors(backbone))
    params, out = load_params(source, backbone, dtype="float32"), tmp_path / "b"
    save_params(out, {"params": params}, backbone, dtype="f4", lora=None, max_shard_bytes=2000)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    flush = os.fsync

    def full(descriptor: int) -> None:
        if ".safetensors" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_params(out, {"params": params}, backbone, dtype="f4", lora=None)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_what_a_killed_export_has_left_is_removed_by_the_next(tmp_path: Path) -> None:
    backbone = tiny()
    source = write_checkpoint(tmp_path / "a", backbone, random_tensors(backbone))
    params = load_params(source, backbone, dtype="float32")
    for name in ("model", "adapter"):
        (tmp_path / name / ".partial-killed").mkdir(parents=True)
        (tmp_path / name / ".partial-killed" / "model.safetensors").write_bytes(b"half")
    save_params(tmp_path / "model", {"params": params}, backbone, dtype="f4", lora=None)
    save_adapter(tmp_path / "adapter", random_lora(backbone), LORA, backbone, base_model="")
    assert not list(tmp_path.glob("*/.partial*"))


def test_a_tree_that_does_not_fit_is_not_written(tmp_path: Path) -> None:
    backbone = tiny()
    source = write_checkpoint(tmp_path / "a", backbone, random_tensors(backbone))
    params = load_params(source, backbone, dtype="float32")
    wrong = params | {"norm": {"bias": np.zeros(8)}, "embed_tokens": {"embedding": np.zeros(8)}}
    with pytest.raises(HFError) as error:
        save_params(tmp_path / "b", {"params": wrong}, backbone, dtype="f4", lora=None)
    message = str(error.value)
    assert "norm/scale is None, not (8,)" in message
    assert "norm/bias is (8,), not None" in message
    assert "embed_tokens/embedding is (8,), not (24, 8)" in message
    with pytest.raises(HFError, match="LoraConfig"):
        save_params(tmp_path / "b", {"params": params}, backbone, dtype="f4", lora=LORA)
    variables = {"params": params, "lora": random_lora(backbone)}
    with pytest.raises(HFError, match="LoraConfig"):
        save_params(tmp_path / "b", variables, backbone, dtype="f4", lora=None)
    assert not (tmp_path / "b").exists()


def test_a_full_disk_is_an_error_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    backbone = tiny()
    monkeypatch.setattr("laser_jax.hf.writing.save_file", full_disk)
    with pytest.raises(OSError, match=r"adapter_model\.safetensors cannot be written: .*No space"):
        save_adapter(tmp_path, random_lora(backbone), LORA, backbone, base_model="base")
    assert list(tmp_path.iterdir()) == []


# --- two processes -----------------------------------------------------------------------------


def one_of_two(folder: Path, process: int, port: str) -> None:
    """What each process of `test_two_processes_...` does; prints what it found."""
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    backbone = tiny(layers=2)
    mesh = mesh_of(1, 2, 1)
    like = layout(backbone, mesh, np.float32)
    with pytest.MonkeyPatch.context() as monkeypatch:
        read = count_bytes_read(monkeypatch)
        params = load_sharded_params(folder / "source", backbone, like)
    own = sum(
        4 * int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in jax.tree.leaves(like)
    )
    adapters = jax.tree.map(
        lambda a, leaf: jax.make_array_from_callback(a.shape, leaf.sharding, lambda i: a[i]),
        random_lora(backbone),
        layout(backbone, mesh, np.float32, "lora"),
    )
    variables = {"params": params, "lora": adapters}

    def export(out: Path) -> None:
        save_params(out, variables, backbone, dtype="bfloat16", lora=LORA, max_shard_bytes=2000)

    export(folder / "model")
    save_adapter(folder / "adapter", adapters, LORA, backbone, base_model="base")
    try:
        export(folder / "source" / "config.json" / "model")
    except (OSError, HFError) as error:
        said = f"{type(error).__name__}: {error}"
    else:
        said = "no error"
    print(json.dumps({"read": sum(read), "own": own, "said": said}))


def test_two_processes_read_their_own_ranges_and_export_the_same_bytes(tmp_path: Path) -> None:
    backbone = tiny(layers=2)
    tensors = random_tensors(backbone)
    source = write_checkpoint(tmp_path / "source", backbone, tensors)
    params = load_params(source, backbone, dtype="float32")
    variables = {"params": params, "lora": random_lora(backbone)}
    one = tmp_path / "one process"
    save_params(
        one / "model", variables, backbone, dtype="bfloat16", lora=LORA, max_shard_bytes=2000
    )
    save_adapter(one / "adapter", variables["lora"], LORA, backbone, base_model="base")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = Path(__file__).parent
    program = "import sys, pathlib, test_hf as t; f, i, port = sys.argv[1:]; "
    program += "t.one_of_two(pathlib.Path(f), int(i), port)"
    paths = os.pathsep.join([str(here.parent), str(here)])
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    environment = os.environ | {"PYTHONPATH": paths, "XLA_FLAGS": flags}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), str(process), port],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        said = [process.communicate() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in said)
    for found in (first, second):
        assert found["read"] == found["own"] < sum(tensor.nbytes for tensor in tensors.values())
    assert first["said"].startswith("NotADirectoryError")
    assert second["said"].startswith("HFError: process 0 could not write")

    for name in ("model", "adapter"):
        written = {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        assert written == {file.name: file.read_bytes() for file in (one / name).iterdir()}


# --- hub ids -------------------------------------------------------------------------------------


def test_a_directory_is_itself_and_wins_over_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("Qwen/Qwen3-0.6B").mkdir(parents=True)
    assert resolve_directory("Qwen/Qwen3-0.6B") == Path("Qwen/Qwen3-0.6B")


def test_a_hub_id_is_downloaded_without_what_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = [
        *("config.json", "laser_config.json", "model.safetensors", "model.safetensors.index.json"),
        *("model-00001-of-00002.safetensors", "adapter_config.json", "adapter_model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
        *("vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja"),
    ]
    others = ["README.md", "pytorch_model.bin", "original/params.json", "onnx/model.onnx", "x.gguf"]

    def download(repo_id: str, **patterns: Any) -> str:
        assert repo_id == "Qwen/Qwen3-0.6B"
        assert sorted(filter_repo_objects([*needed, *others], **patterns)) == sorted(needed)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert resolve_directory("Qwen/Qwen3-0.6B") == tmp_path


def test_without_network_the_error_names_the_id_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("check your internet connection")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(FileNotFoundError, match="org/name is no directory") as error:
        resolve_directory("org/name")
    assert "internet connection" in str(error.value)
    assert "hf download org/name --local-dir" in str(error.value)


def test_a_path_that_cannot_be_an_id_is_not_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent is no directory"):
        resolve_directory(tmp_path / "absent")


# --- adapters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("to_array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_merging_adds_the_scaled_product_in_every_layer(
    tmp_path: Path, to_array: Callable[[Any], Any], dtype: Any
) -> None:
    backbone = tiny("llama")
    source = write_checkpoint(tmp_path, backbone, random_tensors(backbone))
    params = jax.tree.map(to_array, load_params(source, backbone, dtype=dtype))
    lora = LoraConfig(rank=2, alpha=3.0, targets=("q_proj", "down_proj"))
    adapters = jax.tree.map(to_array, random_lora(backbone, lora))
    merged = merge_lora(params, adapters, lora.scale)

    assert type(merged["norm"]["scale"]) is type(params["norm"]["scale"])
    assert (
        merged["layers"]["mlp"]["up_proj"]["kernel"] is params["layers"]["mlp"]["up_proj"]["kernel"]
    )
    for group, block, name in [
        ("layers", "self_attn", "q_proj"),
        ("last_layer", "self_attn", "q_proj"),
        ("layers", "mlp", "down_proj"),
    ]:
        pair = adapters[group][block][name]
        kernel = np.asarray(params[group][block][name]["kernel"]).astype(np.float32)
        update = 1.5 * np.einsum("...ir,...ro->...io", pair["lora_a"], pair["lora_b"])
        got = merged[group][block][name]["kernel"]
        assert got.dtype == dtype
        assert type(got) is type(params[group][block][name]["kernel"])
        np.testing.assert_allclose(
            np.asarray(got).astype(np.float32),
            kernel + update,
            rtol=1e-6 if dtype is np.float32 else 8e-3,
            atol=1e-6,
        )
    with pytest.raises(HFError, match="no norm/kernel"):
        merge_lora(params, {"norm": {"lora_a": np.zeros(2), "lora_b": np.zeros(2)}}, 1.0)


def test_merging_under_jit_equals_merging_outside(tmp_path: Path) -> None:
    backbone = tiny()
    source = write_checkpoint(tmp_path, backbone, random_tensors(backbone))
    params = jax.tree.map(jnp.asarray, load_params(source, backbone, dtype="float32"))
    adapters = jax.tree.map(jnp.asarray, random_lora(backbone))
    inside = jax.jit(lambda p, a: merge_lora(p, a, 0.5))(params, adapters)
    outside = merge_lora(params, adapters, 0.5)
    assert jax.tree.structure(inside) == jax.tree.structure(outside)
    for a, b in zip(jax.tree.leaves(inside), jax.tree.leaves(outside), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 3])
def test_exporting_with_adapters_equals_exporting_the_merged_tree(
    tmp_path: Path, layers: int
) -> None:
    backbone = tiny(layers=layers)
    source = write_checkpoint(tmp_path, backbone, random_tensors(backbone))
    params = load_params(source, backbone, dtype="float32")
    adapters = random_lora(backbone)
    save_params(
        tmp_path / "b", {"params": params, "lora": adapters}, backbone, dtype="f4", lora=LORA
    )
    got = load_params(tmp_path / "b", backbone, dtype="float32")
    wanted = merge_lora(params, adapters, LORA.scale)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_golden_adapter_merges_to_the_golden_weights(golden_dir: Path) -> None:
    backbone = read_backbone_config(golden_dir / "model1")
    params = load_params(golden_dir / "model1", backbone, dtype="float32")
    adapters, lora = load_adapter(golden_dir / "adapter_model1", backbone)
    assert lora == LoraConfig(rank=4, alpha=2.0, targets=PROJECTIONS, rank_stabilised=False)
    merged = merge_lora(params, adapters, lora.scale)
    checked = 0
    with np.load(golden_dir / "lora_model1_K3.npz") as golden:
        for name in (key for key in golden.files if key.startswith("merged/")):
            *_, layer, block, projection, _ = name.split(".")
            last = int(layer) == backbone.num_layers - 1
            kernel = merged["last_layer" if last else "layers"][block][projection]["kernel"]
            got = kernel if last else kernel[int(layer)]
            np.testing.assert_allclose(got.T, golden[name], rtol=1e-6, atol=1e-6)
            checked += 1
    assert checked


def test_both_golden_adapter_layouts_are_one_tree(golden_dir: Path) -> None:
    backbone = read_backbone_config(golden_dir / "model1")
    peft = load_adapter(golden_dir / "adapter_model1", backbone)
    trainer = load_adapter(golden_dir / "adapter_model1_encoder_prefix", backbone)
    assert_trees_equal(peft[0], trainer[0])
    assert peft[1] == trainer[1]


def written_adapter(
    directory: Path, backbone: BackboneConfig, lora: LoraConfig = LORA, **changes: Any
) -> Path:
    save_adapter(directory, random_lora(backbone, lora), lora, backbone, base_model="base")
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return directory


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    "lora", [LORA, LoraConfig(3, 0.5, ("v_proj", "q_proj"), rank_stabilised=True)]
)
def test_saved_adapter_reads_back_as_the_same_tree(
    tmp_path: Path, family: str, layers: int, lora: LoraConfig
) -> None:
    backbone = tiny(family, layers=layers)
    tree, read = load_adapter(written_adapter(tmp_path, backbone, lora), backbone)
    assert_trees_equal(tree, random_lora(backbone, lora))
    assert dataclasses.replace(read, targets=lora.targets) == lora
    assert set(read.targets) == set(lora.targets)
    assert read.scale == pytest.approx(lora.scale)


def rename_adapter_tensors(directory: Path, rename: Callable[[str], str]) -> None:
    file = directory / "adapter_model.safetensors"
    save_file({rename(key): value for key, value in load_file(file).items()}, file)


@pytest.mark.parametrize("encoder", ["", "encoder."])
@pytest.mark.parametrize("prefix", ["base_model.model.model.", "base_model.model."])
@pytest.mark.parametrize("infix", ["", ".default"])
def test_every_published_spelling_of_adapter_keys_is_read(
    tmp_path: Path, encoder: str, prefix: str, infix: str
) -> None:
    backbone = tiny()
    directory = written_adapter(tmp_path, backbone, target_modules="all-linear")

    def rename(key: str) -> str:
        stem = key.removeprefix("base_model.model.model.").removesuffix(".weight")
        return f"{encoder}{prefix}{stem}{infix}.weight"

    rename_adapter_tensors(directory, rename)
    assert_trees_equal(load_adapter(directory, backbone)[0], random_lora(backbone))


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"bias": "lora_only"},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [0]},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"init_lora_weights": "pissa"},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": None},
        {"target_modules": [{"q_proj": 4}]},
        {"use_rslora": "yes"},
        {"r": None},
        {"lora_alpha": "16"},
    ],
)
def test_adapter_settings_that_are_not_plain_lora_are_refused_by_key(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    backbone = tiny()
    directory = written_adapter(tmp_path, backbone, **changes)
    [key] = changes
    with pytest.raises(HFError, match=rf"adapter_config.json: {key} "):
        load_adapter(directory, backbone)


def test_adapter_tensors_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    backbone = tiny()
    directory = written_adapter(tmp_path, backbone)
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    stem = "base_model.model.model.layers"
    del tensors[f"{stem}.1.mlp.up_proj.lora_B.weight"]
    tensors[f"{stem}.0.mlp.up_proj.lora_A.weight"] = np.zeros((3, 8), np.float32)
    tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((2, 8), np.float32)
    save_file(tensors, file)
    with pytest.raises(HFError) as error:
        load_adapter(directory, backbone)
    message = str(error.value)
    assert "missing: model.layers.1.mlp.up_proj.lora_B.weight" in message
    assert "unknown: base_model.model.lm_head.lora_A.weight in adapter_model" in message
    assert f"mis-shaped: {stem}.0.mlp.up_proj.lora_A.weight in adapter_model" in message
    assert "[3, 8], not [2, 8]" in message

    with pytest.raises(HFError, match=r"missing: model\.layers\.3\."):
        load_adapter(written_adapter(tmp_path / "b", backbone), tiny(layers=4))


def test_absent_adapter_files_are_named(tmp_path: Path) -> None:
    backbone = tiny()
    directory = written_adapter(tmp_path, backbone)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (directory / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            load_adapter(directory, backbone)


# --- against transformers and peft ---------------------------------------------------------------


def torch_logits(model: Any) -> np.ndarray:
    torch = pytest.importorskip("torch")
    ids = torch.arange(1, 23).reshape(2, 11)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float().numpy()


def random_torch_model(family: str, *, tied: bool) -> Any:
    torch = pytest.importorskip("torch")
    import transformers

    backbone = tiny(family, tied=tied)
    config = transformers.AutoConfig.for_model(
        **hf_config_dict(backbone, dtype="float32", **NO_TOKENS)
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # norms that are not 1, logits that are not tiny
        torch.nn.init.normal_(parameter, mean=0.3 if parameter.ndim == 1 else 0.0, std=0.5)
    return model


def reload(directory: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32")


# torch, transformers and peft warn about themselves on import and use.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("require_torch")
@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_bytes", [5e9, 2000])
def test_transformers_gives_equal_logits_after_import_and_export(
    tmp_path: Path, family: str, tied: bool, max_shard_bytes: float
) -> None:
    model = random_torch_model(family, tied=tied)
    model.save_pretrained(tmp_path / "theirs")
    backbone = read_backbone_config(tmp_path / "theirs")
    assert backbone == tiny(family, tied=tied)
    params = load_params(tmp_path / "theirs", backbone, dtype="float32")
    save_params(
        tmp_path / "ours",
        {"params": params},
        backbone,
        dtype="float32",
        lora=None,
        tokens={"eos_token_id": [1, 2], "pad_token_id": 0},
        max_shard_bytes=max_shard_bytes,
    )
    exported = reload(tmp_path / "ours")
    assert exported.config.eos_token_id == [1, 2]
    np.testing.assert_array_equal(torch_logits(exported), torch_logits(model))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("require_torch")
@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_peft_gives_the_logits_of_the_merged_export(
    tmp_path: Path, family: str, rank_stabilised: bool
) -> None:
    peft = pytest.importorskip("peft")
    random_torch_model(family, tied=False).save_pretrained(tmp_path / "base")
    backbone = read_backbone_config(tmp_path / "base")
    lora = LoraConfig(2, 0.5, ("q_proj", "v_proj", "down_proj"), rank_stabilised)
    params = load_params(tmp_path / "base", backbone, dtype="float32")
    variables = {"params": params, "lora": random_lora(backbone, lora)}
    save_adapter(
        tmp_path / "adapter", variables["lora"], lora, backbone, base_model=str(tmp_path / "base")
    )
    save_params(tmp_path / "merged", variables, backbone, dtype="float32", lora=lora)

    base = reload(tmp_path / "base")
    base_logits = torch_logits(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    logits = torch_logits(adapted)
    np.testing.assert_allclose(torch_logits(reload(tmp_path / "merged")), logits, atol=2e-5)
    assert np.abs(logits - base_logits).max() > 0.01

    adapted.save_pretrained(tmp_path / "theirs")
    tree, read = load_adapter(tmp_path / "theirs", backbone)
    assert_trees_equal(tree, variables["lora"])
    assert read.scale == pytest.approx(lora.scale)
