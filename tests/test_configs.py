"""The files under configs/: every composition parses, an overlay changes what it names alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from laser_jax.command_line import parse_train_command
from laser_jax.config import BACKBONES, PROJECTIONS, Config, ConfigError, as_dict

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RECIPES = ("paper", "official")
NEEDED = ("--model.path", "model", "--data.train", "train.jsonl")


def names(folder: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.yaml"))


def overlays() -> list[str]:
    folders = ("backbones", "batch", "hardware", "ablation")
    return [f"{folder}/{name}" for folder in folders for name in names(folder)]


@cache
def compose(*files: str, model: tuple[str, ...] = ()) -> Config:
    layers = [
        argument for file in files for argument in ("--config", str(CONFIGS / f"{file}.yaml"))
    ]
    config, _ = parse_train_command([*layers, *model, "--data.train", "train.jsonl"])
    return config


def leaves(values: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of everything in a nested dict that is no dict."""
    if not isinstance(values, dict):
        yield prefix, values
        return
    for key, value in values.items():
        yield from leaves(value, (*prefix, key))


def set_by(file: str) -> dict[tuple[str, ...], Any]:
    return dict(leaves(yaml.safe_load((CONFIGS / f"{file}.yaml").read_text())))


def changed(before: Config, after: Config) -> dict[tuple[str, ...], Any]:
    old = dict(leaves(as_dict(before)))
    return {path: value for path, value in leaves(as_dict(after)) if old.get(path) != value}


def test_there_is_a_config_for_every_backbone_of_the_paper() -> None:
    assert names("backbones") == sorted(BACKBONES)


def test_there_is_a_config_for_every_kind_of_machine() -> None:
    assert {name.split("-")[0] for name in names("hardware")} == {
        *("v4", "v5e", "v6e"),
        *("a100", "h100", "h200"),
    }


def test_there_is_an_overlay_for_every_ablation_and_baseline() -> None:
    assert names("ablation") == [
        "contrastive",
        "documents_once",
        "gircse",
        "latent_rl",
        "teacher",
        "without_colearning",
        "without_distillation",
        "without_explicit_view",
        "without_latent_view",
        "without_output",
        "without_trajectory",
    ]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_composition_parses_and_keeps_what_each_layer_set(backbone: str) -> None:
    for recipe, hardware in product(RECIPES, names("hardware")):
        config = compose(recipe, f"backbones/{backbone}", f"hardware/{hardware}")
        assert config.model.backbone == backbone
        assert config.model.dtype == config.model.param_dtype == "bfloat16"
        assert config.model.remat == set_by(f"hardware/{hardware}")["model", "remat"]
        assert config.lora is not None
        assert (config.lora.rank, config.lora.targets) == (64, PROJECTIONS)
        assert config.train.batch_size == 64
        assert config.train.accumulation == "gradcache"


@pytest.mark.parametrize("overlay", overlays())
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_overlay_changes_exactly_the_keys_it_names(recipe: str, overlay: str) -> None:
    """A key that repeats the recipe's value, or the default's, would be missing here."""
    model = () if overlay.startswith("backbones") else NEEDED[:2]
    before = compose(recipe, model=NEEDED[:2])
    assert changed(before, compose(recipe, overlay, model=model)) == set_by(overlay)


@pytest.mark.parametrize("ablation", names("ablation"))
def test_an_ablation_is_applied_over_backbone_machine_and_batch(ablation: str) -> None:
    layers = ("paper", "backbones/llama-3.1-8b", "hardware/h100", "batch/released")
    if ablation == "latent_rl":
        with pytest.raises(ConfigError, match=r"set train\.accumulation: gradcache"):
            compose(*layers, f"ablation/{ablation}")
        layers = layers[:-1]
    before, after = compose(*layers), compose(*layers, f"ablation/{ablation}")
    assert changed(before, after) == set_by(f"ablation/{ablation}")


@pytest.mark.parametrize("base", ["local", "quickstart"])
@pytest.mark.parametrize("ablation", names("ablation"))
def test_an_ablation_keeps_the_other_weights_of_a_small_config(base: str, ablation: str) -> None:
    wanted = set_by(f"ablation/{ablation}")
    before, after = compose(base), compose(base, f"ablation/{ablation}")
    assert changed(before, after).items() <= wanted.items()
    assert {path: dict(leaves(as_dict(after)))[path] for path in wanted} == wanted


@pytest.mark.parametrize(("batch", "documents"), [("paper", 16), ("released", 64)])
def test_a_batch_overlay_contrasts_within_its_micro_batches(batch: str, documents: int) -> None:
    config = compose("paper", "backbones/qwen3-0.6b", "hardware/v5e", f"batch/{batch}")
    assert config.train.accumulation == "plain"
    queries = config.train.batch_size // config.train.num_micro_batches
    assert queries * config.data.group_size == documents


def test_a_base_llama_reads_bare_texts_and_qwen_its_chat_template() -> None:
    templates = {
        name: compose("paper", f"backbones/{name}").prompt.chat_template for name in BACKBONES
    }
    assert templates == {name: name.startswith("qwen3") for name in BACKBONES}


def test_the_recipes_compile_few_shapes() -> None:
    for recipe in RECIPES:
        config = compose(recipe, model=NEEDED[:2])
        widths = [
            -(-limit // config.data.length_multiple)
            for limit in (
                config.prompt.query_max_length,
                config.prompt.document_max_length,
                config.prompt.explicit_max_length,
            )
        ]
        assert widths[0] * widths[1] * widths[2] == 16
