"""Settings: strict parsing, impossible values, what travels with a model, the named backbones."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from laser_jax.command_line import parse_command_line, parse_train_command
from laser_jax.config import (
    BACKBONES,
    BackboneConfig,
    Config,
    ConfigError,
    DataConfig,
    LoraConfig,
    LossWeights,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PolicyConfig,
    PromptConfig,
    RetrieverConfig,
    RopeScaling,
    ScratchConfig,
    TrainConfig,
    as_dict,
    from_dict,
    load_retriever_config,
    save_retriever_config,
)
from laser_jax.modeling.backbone import Backbone
from laser_jax.pretrain.run import PretrainConfig

NEEDED = ("--model.path", "model", "--data.train", "train.jsonl")


def parse(*arguments: str) -> Config:
    return parse_command_line(Config, "train", [*NEEDED, *arguments])


def test_the_whole_config_survives_json() -> None:
    config = parse("--lora.rank", "3", "--lora.targets", "[q_proj, v_proj]", "--train.steps", "7")
    assert config.lora == LoraConfig(rank=3, targets=("q_proj", "v_proj"))
    assert from_dict(Config, as_dict(config), source="config.json") == config


def test_a_missing_key_is_named() -> None:
    values = {"model": {"path": "model"}, "output": "out"}
    with pytest.raises(ConfigError, match=r"pretrain\.yaml: .*texts"):
        from_dict(PretrainConfig, values, source="pretrain.yaml")


# --- impossible values -------------------------------------------------------------------------


def reinforced(**changes: Any) -> ObjectiveConfig:
    weights = LossWeights(explicit=0.0, output=0.0, trajectory=0.0)
    return ObjectiveConfig(method="latent_rl", weights=weights, **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ObjectiveConfig(num_thinking_steps=0), "objective.num_thinking_steps .* got 0"),
        (lambda: ObjectiveConfig(document_thinking_steps=0), "document_thinking_steps .* got 0"),
        (
            lambda: ObjectiveConfig(method="gircse", document_thinking_steps=1),
            "document_thinking_steps, .* want method: laser",
        ),
        (
            lambda: ObjectiveConfig(method="gircse", weights=LossWeights(teacher=1.0)),
            r"weights\.teacher, .* want method: laser",
        ),
        (
            lambda: ObjectiveConfig(method="gircse", teacher="a_model"),
            r"weights\.teacher, teacher want method: laser",
        ),
        (
            lambda: ObjectiveConfig(teacher="a_model", weights=LossWeights(output=0, trajectory=0)),
            r"objective\.teacher teaches by weights\.output and \.trajectory, both 0",
        ),
        (lambda: LoraConfig(alpha=float("nan")), r"lora\.alpha must be a positive number, got nan"),
        (lambda: TrainConfig(peak_tflops=0.0), "train.peak_tflops must be a positive number"),
        (lambda: TrainConfig(peak_tflops=float("nan")), "train.peak_tflops must be a positive"),
        (
            lambda: ObjectiveConfig(method="latent_rl"),
            r"latent_rl reads neither .* set to 0, .*: objective.weights.explicit \(1.0\), ",
        ),
        (
            lambda: reinforced(teacher="a_model", dimensions=(4,)),
            r"objective.dimensions \(\(4,\)\), objective.teacher \(a_model\)",
        ),
        (lambda: reinforced(num_thinking_steps=1), "num_thinking_steps of at least 2"),
        (
            lambda: ObjectiveConfig(policy=PolicyConfig(draws=2)),
            "objective.policy wants objective.method: latent_rl",
        ),
        (
            lambda: Config(
                ModelConfig(path="a"),
                DataConfig(train="b"),
                objective=reinforced(policy=PolicyConfig(kl=0.1)),
            ),
            "objective.policy.kl .* lora is not set: give lora a rank, or set",
        ),
        (
            lambda: Config(
                ModelConfig(path="a"),
                DataConfig(train="b"),
                objective=reinforced(),
                train=TrainConfig(accumulation="plain"),
            ),
            r"latent_rl ranks in the pool; set train\.accumulation: gradcache",
        ),
        (lambda: PolicyConfig(weight=-1.0), "objective.policy.weight .* got -1.0"),
        (lambda: PolicyConfig(rollouts=1), "objective.policy.rollouts must be at least 2, got 1"),
        (lambda: PolicyConfig(draws=0), "objective.policy.draws .* got 0"),
        (lambda: PolicyConfig(updates=0), "objective.policy.updates .* got 0"),
        (lambda: PolicyConfig(clip=0.0), "objective.policy.clip must be a positive number"),
        (lambda: PolicyConfig(kl=-1.0), "objective.policy.kl .* got -1.0"),
        (
            lambda: ObjectiveConfig(temperature=0.0),
            "objective.temperature must be a positive number, got 0.0",
        ),
        (
            lambda: ObjectiveConfig(distillation_warmup_steps=-5),
            "objective.distillation_warmup_steps must be at least 0, got -5",
        ),
        (
            lambda: ObjectiveConfig(dimensions=(4, 8), dimension_weights=(1.0,)),
            "1 dimension_weights for 2 dimensions: give one each",
        ),
        (lambda: ObjectiveConfig(dimensions=(0, 8)), "objective.dimensions must be at least 1"),
        (lambda: LossWeights(output=-1.0), "objective.weights.output .* got -1.0"),
        (lambda: LoraConfig(rank=0), "lora.rank .* got 0"),
        (lambda: LoraConfig(targets=("q_proj", "lm_head")), r"lora.targets holds \['lm_head'\]"),
        (lambda: LoraConfig(targets=()), "lora.targets is empty"),
        (lambda: DataConfig(group_size=0), "data.group_size .* got 0"),
        (lambda: DataConfig(length_multiple=0), "data.length_multiple"),
        (lambda: PromptConfig(query_template="{text}"), r"prompt.query_template .*\{query\}"),
        (lambda: PromptConfig(document_template=""), r"prompt.document_template .*\{document\}"),
        (lambda: PromptConfig(separator=""), "prompt.separator is empty"),
        (lambda: PromptConfig(query_max_length=0), "prompt.query_max_length"),
        (lambda: ModelConfig(), "model.path .* model.scratch"),
        (lambda: ModelConfig(path="a", scratch=ScratchConfig()), "model.path .* model.scratch"),
        (lambda: OptimizerConfig(learning_rate=-1.0), "optimizer.learning_rate"),
        (lambda: OptimizerConfig(warmup_ratio=1.5), "optimizer.warmup_ratio"),
        (
            lambda: OptimizerConfig(betas=(1.0, 0.9)),
            r"optimizer.betas must lie in \[0, 1\), got \(1.0",
        ),
        (lambda: OptimizerConfig(betas=(0.9, -0.1)), r"optimizer.betas .* got \(0.9, -0.1\)"),
        (lambda: OptimizerConfig(weight_decay=-3.0), "optimizer.weight_decay .* got -3.0"),
        (lambda: OptimizerConfig(clip_norm=-1.0), "optimizer.clip_norm must be a positive .*-1.0"),
        (
            lambda: OptimizerConfig(clip_norm=0.0),
            "optimizer.clip_norm must be a positive .* got 0.0",
        ),
        (lambda: TrainConfig(batch_size=0), "train.batch_size"),
        (lambda: TrainConfig(steps=-1), "train.steps"),
        (lambda: TrainConfig(epochs=-1.0), "train.epochs .* got -1.0"),
        (lambda: TrainConfig(epochs=float("inf")), "train.epochs .* got inf"),
        (lambda: TrainConfig(seed=-1), r"train.seed must lie in \[0, 4294967296\), got -1"),
        (lambda: TrainConfig(seed=2**32), "train.seed .* got 4294967296"),
        (lambda: TrainConfig(eval_thinking_steps=()), "train.eval_thinking_steps is empty"),
        (lambda: TrainConfig(eval_thinking_steps=(2, 0)), r"train.eval_thinking_steps .*\(2, 0\)"),
        (lambda: TrainConfig(eval_every=0), "train.eval_every .* got 0"),
        (lambda: TrainConfig(eval_every=1, patience=0), "train.patience .* got 0"),
        (lambda: TrainConfig(patience=2), "train.patience .* train.eval_every"),
        (lambda: TrainConfig(export="best"), "train.export: best .* train.eval_every"),
        (lambda: TrainConfig(profile_steps=(0, 2)), r"train.profile_steps \[0, 2\]"),
        (lambda: TrainConfig(profile_steps=(3, 2)), r"train.profile_steps \[3, 2\]"),
        (
            lambda: ModelConfig(scratch=ScratchConfig(), backbone="qwen3-8b"),
            "model.adapter and model.backbone go with model.path",
        ),
        (lambda: MeshConfig(fsdp="auto", tensor=-1), r"mesh axes .*\(-1, 1, -1\)"),
        (lambda: MeshConfig(fsdp=0), r"mesh axes .*\(-1, 0, 1\)"),
        (lambda: MeshConfig(data=0), r"mesh axes .*\(0, 1, 1\)"),
        (lambda: MeshConfig(fsdp=-1), r"mesh axes .*\(-1, -1, 1\)"),
        (
            lambda: PretrainConfig(ModelConfig(path="m"), "t", "o", steps=0),
            "steps must be at least 1",
        ),
        (lambda: PretrainConfig(ModelConfig(path="m"), "t", "o", seed=-1), "seed .* got -1"),
        (lambda: RetrieverConfig(BACKBONES["qwen3-0.6b"], num_thinking_steps=0), "got 0"),
        (lambda: ScratchConfig(num_heads=3, num_kv_heads=2).backbone(99), "num_heads 3 .* 2"),
        (lambda: ScratchConfig(head_dim=5).backbone(99), "backbone.head_dim 5 must be even"),
        (
            lambda: ScratchConfig(num_layers=10**7).backbone(99),
            r"num_layers .*\[1, 1000\], got 10000",
        ),
        (lambda: ScratchConfig(hidden_size=2**40).backbone(99), "hidden_size must lie in"),
        (lambda: ScratchConfig().backbone(2**40), "backbone.vocab_size must lie in"),
        (lambda: ScratchConfig(head_dim=0).backbone(99), "backbone.head_dim must lie in"),
        (lambda: ScratchConfig(intermediate_size=-1).backbone(99), "intermediate_size must lie"),
        (
            lambda: dataclasses.replace(BACKBONES["qwen3-8b"], rope_theta=float("nan")),
            "rope_theta must be a positive",
        ),
        (
            lambda: dataclasses.replace(BACKBONES["qwen3-8b"], rope_theta=float("inf")),
            "rope_theta must be a positive",
        ),
        (lambda: RopeScaling(0.0, 1.0, 4.0, 8192), "rope_scaling.factor must be a positive"),
    ],
)
def test_an_impossible_value_is_refused_by_name(make, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_fast_views_want_the_query_to_be_a_prefix_of_the_explicit_input() -> None:
    for broken in ("--prompt.truncation=sequence", "--prompt.append_eos=true"):
        fast = "--objective.views=fast"
        with pytest.raises(ConfigError, match=r"objective\.views: fast .*objective\.views: parity"):
            parse(broken, fast)
        assert parse(broken).views == "parity"
        assert parse(broken, "--objective.method=gircse", fast).views == "fast"


def test_auto_views_are_fast_unless_the_views_must_be_separate_passes() -> None:
    assert parse().views == "fast"
    assert parse("--objective.views=parity").views == "parity"


def test_micro_batches_must_divide_the_batch() -> None:
    assert parse("--train.batch_size=12", "--train.micro_batch_size=4").train.num_micro_batches == 3
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size 5"):
        parse("--train.batch_size=12", "--train.micro_batch_size=5")


def test_train_and_mixture_exclude_each_other() -> None:
    mixture = "--data.mixture=[{path: a, weight: 2}, {path: b}]"
    sources = parse(mixture, "--data.train=").data.sources
    assert [(source.path, source.weight) for source in sources] == [("a", 2.0), ("b", 1.0)]
    with pytest.raises(ConfigError, match=r"data\.train and data\.mixture"):
        parse(mixture, "--data.train=rows.jsonl")


def test_the_model_at_a_path_is_the_one_that_its_name_says() -> None:
    model = ModelConfig(path="there", backbone="qwen3-0.6b")
    named = BACKBONES["qwen3-0.6b"]
    model.require_named_backbone(named)
    model.require_named_backbone(dataclasses.replace(named, max_position_embeddings=32_768))
    ModelConfig(path="there").require_named_backbone(BACKBONES["llama-3.2-1b"])
    with pytest.raises(ConfigError) as caught:
        model.require_named_backbone(dataclasses.replace(named, hidden_size=9, rope_theta=1e4))
    assert str(caught.value).startswith(
        "model.path there is no qwen3-0.6b: hidden_size is 9, not 1024; rope_theta is 10000.0, "
        "not 1000000.0."
    )


# --- what travels with a model -----------------------------------------------------------------

RETRIEVER = RetrieverConfig(
    backbone=BACKBONES["llama-3.2-1b"],
    num_thinking_steps=5,
    document_thinking_steps=1,
    pooling="thoughts",
    prompt=PromptConfig(
        query_template="null: {query}",
        document_template="{document}\n",
        thinking_suffix="",
        separator="1",
    ),
    dtype="bfloat16",
    lora=LoraConfig(rank=4, alpha=1.0, targets=("q_proj",), rank_stabilised=True),
)


def test_the_retriever_config_survives_its_file(tmp_path: Path) -> None:
    for config in (RETRIEVER, RetrieverConfig(BACKBONES["qwen3-8b"])):
        save_retriever_config(config, tmp_path)
        assert load_retriever_config(tmp_path) == config
    file = tmp_path / "laser_config.json"  # as an older release wrote it, without a K of documents
    values = json.loads(file.read_text())
    assert values.pop("document_thinking_steps") is None
    file.write_text(json.dumps(values))
    assert load_retriever_config(tmp_path).documents_at == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "colour"),
        ({"num_thinking_steps": "three"}, "num_thinking_steps must be an integer .*three"),
        ({"num_thinking_steps": 0}, "got 0"),
        ({"dtype": "int8"}, "dtype must be float32 or bfloat16 or float16, got 'int8'"),
        ({"backbone": {"family": "qwen3"}}, "backbone.vocab_size"),
        ({"prompt": {"seperator": "x"}}, "seperator"),
        ({"prompt": []}, r"prompt must be keys and values, got \[\]"),
        ({"prompt": 3}, "prompt must be keys and values"),
        ({"prompt": None}, "prompt must be keys and values, got None"),
        ({"backbone": []}, "backbone must be keys and values"),
        ({"lora": "x"}, "lora must be keys and values or null"),
        ({"document_thinking_steps": 0}, "document_thinking_steps must be at least 1, got 0"),
        ({"num_thinking_steps": None}, "num_thinking_steps must be an integer, got None"),
        ({"dtype": None}, "dtype must be .* got None"),
    ],
)
def test_a_bad_laser_config_names_file_and_key(tmp_path: Path, change, message) -> None:
    file = tmp_path / "laser_config.json"
    file.write_text(json.dumps(as_dict(RETRIEVER) | change))
    with pytest.raises(ConfigError, match=f"{re.escape(str(file))}: (.|\n)*{message}"):
        load_retriever_config(tmp_path)


def test_an_absent_or_broken_laser_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"laser_config\.json is missing"):
        load_retriever_config(tmp_path)
    for content in (b"{", b"\xff\xfe{", b"[" * 100_000):
        (tmp_path / "laser_config.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"laser_config\.json: not (valid JSON|UTF-8)"):
            load_retriever_config(tmp_path)
    (tmp_path / "laser_config.json").write_text("[]")
    with pytest.raises(ConfigError, match="wanted a JSON object"):
        load_retriever_config(tmp_path)


def test_only_the_released_codes_preset_lets_texts_make_control_tokens() -> None:
    configs = Path(__file__).parents[1] / "configs"
    allowing = [f.name for f in configs.rglob("*.yaml") if "allow_special_tokens" in f.read_text()]
    assert allowing == ["official.yaml"]
    config, _ = parse_train_command([f"--config={configs / 'official.yaml'}", "--model.path=m"])
    assert config.prompt.allow_special_tokens
    assert not PromptConfig().allow_special_tokens


# --- named backbones ---------------------------------------------------------------------------


def abstract_params(backbone: BackboneConfig) -> Any:
    ids = jnp.zeros((1, 2), jnp.int32)
    return nn.meta.unbox(jax.eval_shape(Backbone(backbone).init, jax.random.key(0), ids))["params"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-3.1-8b", 8_030_261_248),
    ],
)
def test_named_backbones_have_the_published_parameter_counts(name: Any, count: int) -> None:
    assert sum(a.size for a in jax.tree.leaves(abstract_params(BACKBONES[name]))) == count


def test_every_field_of_a_scratch_backbone_reaches_the_backbone() -> None:
    scratch = ScratchConfig(
        family="llama",
        vocab_size=1,
        hidden_size=24,
        num_layers=5,
        num_heads=6,
        num_kv_heads=3,
        head_dim=8,
        intermediate_size=40,
        max_position_embeddings=99,
    )
    fields = dataclasses.asdict(scratch) | {"vocab_size": 321}
    backbone = dataclasses.asdict(scratch.backbone(321))
    assert {name: backbone[name] for name in fields} == fields


def test_a_key_twice_in_laser_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "laser_config.json").write_text('{"prompt": {}, "dtype": "a", "prompt": {}}')
    with pytest.raises(ConfigError, match=r"laser_config\.json: .*the key 'prompt' stands twice"):
        load_retriever_config(tmp_path)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (PromptConfig, {"truncation": "sequnce"}, "truncation must be content or sequence, got"),
        (PromptConfig, {"segmentation": "tokens"}, "segmentation must be text or token, got"),
        (RetrieverConfig, {"pooling": "thought"}, "pooling must be prompt_and_thoughts or thought"),
        (RetrieverConfig, {"dtype": "float64"}, "dtype must be float32 or bfloat16 or float16"),
        (RetrieverConfig, {"dtype": "bf16"}, "got 'bf16'"),
    ],
)
def test_a_choice_that_is_misspelt_in_python_is_refused(cls, values, message) -> None:
    backbone = {} if cls is PromptConfig else {"backbone": ScratchConfig().backbone(300)}
    with pytest.raises(ConfigError, match=message):
        cls(**backbone, **values)
