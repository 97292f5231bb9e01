"""Our forward pass against transformers and PEFT on tiny random models."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser_jax.config import BackboneConfig, LoraConfig
from laser_jax.hf.directory import read_backbone_config
from laser_jax.hf.reading import load_adapter, load_params
from laser_jax.hf.writing import save_adapter, save_params
from laser_jax.modeling.backbone import Backbone, Variables, unstack_layers

torch = pytest.importorskip("torch", reason="pip install laser-jax[parity]")
transformers = pytest.importorskip("transformers")

# torch, transformers and peft warn about themselves on import and use.
pytestmark = pytest.mark.filterwarnings("ignore")

# Logits of these models reach 10, where float32 steps by 1e-6; a few layers add up some of those.
# The weights are small enough not to amplify them: with a standard deviation of 0.3 everywhere, one
# row in twenty of either implementation is 1e-4 off float64.
ATOL = 2e-5

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,  # not hidden_size / num_attention_heads
    "intermediate_size": 40,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # shorter than the inputs, so that scaling matters
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "qwen3-tied-3": {"model_type": "qwen3", "num_hidden_layers": 3, "tie_word_embeddings": True},
    "qwen3-untied-1": {"model_type": "qwen3", "num_hidden_layers": 1, "tie_word_embeddings": False},
    "llama-tied-1": {"model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": True},
    "llama3-untied-3": {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "tie_word_embeddings": False,
        "rope_parameters": LLAMA3,
    },
    "qwen2-tied-3": {"model_type": "qwen2", "num_hidden_layers": 3, "tie_word_embeddings": True},
    "mistral-untied-2": {
        "model_type": "mistral",
        "num_hidden_layers": 2,
        "tie_word_embeddings": False,
        "sliding_window": 40,  # as long as the inputs, so that it does not matter
        "rope_parameters": YARN | {"beta_fast": 3.0, "beta_slow": 0.5, "attention_factor": 1.5},
    },
    "qwen3-yarn-2": {
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "tie_word_embeddings": True,
        "rope_parameters": YARN,
    },
}
_DRAWN = {"embedding": (0, 0.5), "kernel": (0, 0.16), "bias": (0.5, 0.3), "scale": (1, 0.3)}
models = pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
IDS = np.random.default_rng(0).integers(0, 61, (2, 40)).astype(np.int32)


def random_torch_model(settings: dict[str, Any]) -> Any:
    config = transformers.AutoConfig.for_model(**(SIZES | settings))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # norms that are not 1, kernels that do something
        norm = parameter.ndim == 1
        torch.nn.init.normal_(parameter, mean=float(norm), std=0.3 if norm else 0.16)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        torch.nn.init.normal_(table.weight, std=0.5)
    return model


def reload(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32")


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(input_ids=torch.asarray(IDS, dtype=torch.long)).logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def forward(backbone: Backbone, variables: Variables) -> jax.Array:
    return backbone.apply(variables, IDS)  # pyright: ignore[reportReturnType]


def our_logits(config: BackboneConfig, variables: Variables, **kwargs: Any) -> jax.Array:
    return forward(Backbone(config, **kwargs), variables)


def our_model(settings: dict[str, Any], directory: Path) -> tuple[BackboneConfig, Variables]:
    """Random weights of our own, with the config that transformers writes."""
    transformers.AutoConfig.for_model(**(SIZES | settings)).save_pretrained(directory)
    config = read_backbone_config(directory)
    boxed = jax.eval_shape(Backbone(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    rng = np.random.default_rng(1)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        mean, std = _DRAWN[path[-1].key]
        return jnp.asarray(rng.normal(mean, std, leaf.shape), jnp.float32)

    return config, jax.tree.map_with_path(draw, nn.meta.unbox(boxed))


def assert_same(got: Any, wanted: Any) -> None:
    assert np.abs(wanted).max() > 1, "logits this small would hide a mistake"
    np.testing.assert_allclose(got, wanted, rtol=0, atol=ATOL)


@models
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_of_their_model(tmp_path: Path, settings: dict[str, Any], dtype: str) -> None:
    random_torch_model(settings).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    config = read_backbone_config(tmp_path)
    variables = {"params": load_params(tmp_path, config, dtype=np.float32)}
    wanted = torch_logits(reload(tmp_path))
    assert_same(our_logits(config, variables), wanted)
    if config.num_layers > 1:
        assert_same(our_logits(config, unstack_layers(variables), scan_layers=False), wanted)


def test_llama3_scaling_matters_here(tmp_path: Path) -> None:
    settings = MODELS["llama3-untied-3"]
    plain = settings | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
    difference = torch_logits(random_torch_model(settings)) - torch_logits(
        random_torch_model(plain)
    )
    assert np.abs(difference).max() > 100 * ATOL


@models
def test_logits_of_our_export(tmp_path: Path, settings: dict[str, Any]) -> None:
    config, variables = our_model(settings, tmp_path / "config")
    save_params(tmp_path / "export", variables, config, dtype="float32", lora=None)
    assert_same(torch_logits(reload(tmp_path / "export")), our_logits(config, variables))


@pytest.mark.parametrize("name", ["qwen3-tied-3", "llama3-untied-3", "llama-tied-1"])
def test_peft_reads_our_adapter_as_we_apply_it(tmp_path: Path, name: str) -> None:
    peft = pytest.importorskip("peft", reason="pip install laser-jax[parity]")
    config, variables = our_model(MODELS[name], tmp_path / "config")
    save_params(tmp_path / "base", variables, config, dtype="float32", lora=None)
    lora = LoraConfig(rank=3, alpha=2.0)
    init = jax.jit(Backbone(config, lora=lora).init)
    fresh = nn.meta.unbox(init(jax.random.key(2), jnp.zeros((1, 2), jnp.int32)))["lora"]
    rng = np.random.default_rng(3)
    trained = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.2, a.shape), jnp.float32), fresh)
    save_adapter(tmp_path / "adapter", trained, lora, config, base_model=str(tmp_path / "base"))

    base = our_logits(config, variables)
    assert_same(our_logits(config, variables | {"lora": fresh}, lora=lora), base)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        theirs = peft.PeftModel.from_pretrained(reload(tmp_path / "base"), tmp_path / "adapter")
    ours = our_logits(config, variables | {"lora": trained}, lora=lora)
    assert_same(torch_logits(theirs), ours)
    assert np.abs(ours - base).max() > 100 * ATOL

    read, read_config = load_adapter(tmp_path / "adapter", config)
    assert_same(our_logits(config, variables | {"lora": read}, lora=read_config), ours)
