"""From a config to a mesh, a model and the shapes of a state, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laser_jax.train.layout as layout_module
from laser_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    LoraConfig,
    LossWeights,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    PromptConfig,
    RetrieverConfig,
    ScratchConfig,
    TrainConfig,
    save_retriever_config,
)
from laser_jax.train.layout import (
    Layout,
    describe_mesh,
    device_state_bytes,
    lay_out,
    number_of_steps,
)
from laser_jax.train.state import init_state

SCRATCH = ScratchConfig(
    hidden_size=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=24,
    max_position_embeddings=40,
)
BACKBONE = SCRATCH.backbone(vocab_size=32)
SHORT = PromptConfig(query_max_length=16, document_max_length=16, explicit_max_length=32)
STEPS = 10
CONTRASTIVE = ObjectiveConfig(
    num_thinking_steps=1, weights=LossWeights(explicit=0.0, output=0.0, trajectory=0.0)
)


def config(**changes: Any) -> Config:
    settings = {
        "model": ModelConfig(scratch=SCRATCH),
        "data": DataConfig(),
        "prompt": SHORT,
        "train": TrainConfig(batch_size=8),
    }
    return Config(**(settings | changes))


def lay(**changes: Any) -> Layout:
    return lay_out(config(**changes), BACKBONE, STEPS)


# --- the state ---------------------------------------------------------------------------------


def bytes_on(device: Any, tree: Any) -> int:
    """Of the arrays' parts that lie on one device."""
    shards = [s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["full", "lora"])
def test_a_real_state_is_as_large_as_it_was_laid_out(lora: LoraConfig | None) -> None:
    settings = {"lora": lora, "model": ModelConfig(scratch=SCRATCH, param_dtype="bfloat16")}
    laid = lay(mesh=MeshConfig(2, 2, 2), **settings)
    with jax.numpy_dtype_promotion("standard"):
        state = init_state(laid.backbone, laid.optimizer, laid.abstract, 0, None)
    for abstract, leaf in zip(jax.tree.leaves(laid.abstract), jax.tree.leaves(state), strict=True):
        assert (abstract.shape, abstract.dtype) == (leaf.shape, leaf.dtype)
        assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)
    gradient = state.trained
    whole = sum(a.nbytes for a in jax.tree.leaves((state, gradient)))
    one = lay_out(config(**settings), BACKBONE, STEPS, jax.devices()[:1])
    assert device_state_bytes(one.abstract) == whole
    shares = {device_state_bytes(laid.abstract)} | {
        bytes_on(device, (state, gradient)) for device in jax.devices()
    }
    assert len(shares) == 1
    assert shares.pop() < whole / 2
    trained = sum(a.size for a in jax.tree.leaves(state.trained))
    frozen = sum(a.size for a in jax.tree.leaves(state.frozen))
    assert laid.parameters == (trained, trained + frozen)
    assert {a.dtype for a in jax.tree.leaves(state.trained)} == {jnp.dtype(jnp.float32)}
    assert {a.dtype for a in jax.tree.leaves(state.frozen)} <= {jnp.dtype(jnp.bfloat16)}


def test_the_devices_may_be_given() -> None:
    laid = lay_out(config(), BACKBONE, STEPS, jax.devices()[2:4])
    assert list(laid.mesh.devices.flat) == jax.devices()[2:4]
    assert describe_mesh(laid.mesh) == "data 2, fsdp 1, tensor 1"
    assert laid.platform == "cpu"
    assert laid.attention == "xla (cuDNN runs on NVIDIA GPUs)"


def test_the_settings_reach_the_model() -> None:
    lora = LoraConfig(rank=3)
    model = ModelConfig(scratch=SCRATCH, dtype="bfloat16", remat="full", attention="xla")
    with jax.numpy_dtype_promotion("standard"):  # jax's own attention promotes bfloat16
        laid = lay(lora=lora, model=model)
    assert laid.backbone.config == BACKBONE
    assert (laid.backbone.lora, laid.backbone.remat) == (lora, "full")
    assert laid.backbone.dtype == jnp.bfloat16
    assert laid.attention == "xla (as asked)"
    with pytest.raises(ConfigError, match=r"model\.attention: cudnn cannot run here"):
        lay(model=dataclasses.replace(model, attention="cudnn"))


def test_the_k_of_documents_reaches_the_model_and_a_teacher_keeps_its_own(tmp_path: Path) -> None:
    objective = ObjectiveConfig(document_thinking_steps=1, teacher=str(tmp_path))
    save_retriever_config(RetrieverConfig(BACKBONE, document_thinking_steps=2), tmp_path)
    laid = lay(objective=objective)
    assert (laid.retriever.num_thinking_steps, laid.retriever.documents_at) == (3, 1)
    assert laid.teacher is not None
    assert laid.teacher.num_thinking_steps == 2
    with pytest.raises(ConfigError, match=r"prompt\.document_max_length 16 and 30 thinking steps"):
        lay(objective=ObjectiveConfig(document_thinking_steps=30))


@pytest.mark.parametrize("dimensions", [(8, 4), (4, 4), (4, BACKBONE.hidden_size)])
def test_dimensions_ascend_and_are_shorter_than_the_vectors(dimensions: tuple[int, ...]) -> None:
    objective = ObjectiveConfig(dimensions=dimensions)
    with pytest.raises(ConfigError, match=r"objective\.dimensions .* must ascend and stay below"):
        lay(objective=objective)
    assert lay(objective=ObjectiveConfig(dimensions=(4, 8))).retriever.dimensions == (4, 8)


# --- fsdp: auto --------------------------------------------------------------------------------


def test_auto_splits_over_as_few_devices_as_hold_the_state(monkeypatch) -> None:
    assert lay().mesh.shape["fsdp"] == 1  # a CPU's memory is not known
    one = lay_out(config(), BACKBONE, STEPS, jax.devices()[:1])
    state = device_state_bytes(one.abstract)
    for room, fsdp in ((2 * state, 1), (state, 2), (state // 2, 4), (state // 100, 8)):
        monkeypatch.setattr(layout_module, "device_bytes", lambda device, room=room: room)
        assert dict(lay().mesh.shape) == {"data": 8 // fsdp, "fsdp": fsdp, "tensor": 1}


def test_processes_agree_on_the_memory_that_process_0_finds(monkeypatch) -> None:
    """Else each lays the run out on a mesh of its own."""
    sent = []

    def broadcast(value: np.ndarray) -> np.ndarray:
        sent.append(int(value))
        return np.int32(1)  # process 0 found 1 MiB

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        layout_module, "multihost_utils", SimpleNamespace(broadcast_one_to_all=broadcast)
    )
    for room in (None, 80 * 2**30):
        monkeypatch.setattr(layout_module, "device_bytes", lambda device, room=room: room)
        assert layout_module._agreed_device_bytes(jax.devices()[0]) == 2**20
    assert sent == [0, 80 * 2**10]


# --- length and refusals -----------------------------------------------------------------------


def test_steps_are_counted_from_epochs_unless_given() -> None:
    assert number_of_steps(config(train=TrainConfig(batch_size=8, epochs=2)), 12) == 3
    assert number_of_steps(config(train=TrainConfig(batch_size=8, epochs=1)), 12) == 2
    assert number_of_steps(config(train=TrainConfig(batch_size=8, steps=7)), 12) == 7
    assert number_of_steps(config(train=TrainConfig(batch_size=8, steps=0)), 12) == 0


def test_a_share_of_an_epoch_is_as_many_rows_as_its_decimals_say() -> None:
    train = TrainConfig(batch_size=10, epochs=1.1)
    assert number_of_steps(config(train=train), 100) == 11


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": TrainConfig(batch_size=12)}, "train.batch_size 12 must be a multiple of the 8"),
        (
            {"train": TrainConfig(batch_size=16, micro_batch_size=4)},
            "train.micro_batch_size 4 must be a multiple of the 8 devices",
        ),
        ({"mesh": MeshConfig(fsdp=3)}, "does not multiply to the 8 devices"),
        (
            {"prompt": dataclasses.replace(SHORT, query_max_length=39)},
            "prompt.query_max_length 39 and 3 thinking steps take 41 positions, .* model has 40",
        ),
        (
            {"prompt": dataclasses.replace(SHORT, document_max_length=41)},
            "prompt.document_max_length",
        ),
        (
            {"prompt": dataclasses.replace(SHORT, explicit_max_length=41)},
            "prompt.explicit_max_length takes 41 positions, and the model has 40",
        ),
        (
            {"objective": ObjectiveConfig(num_thinking_steps=30)},
            "prompt.query_max_length 16 and 30 thinking steps take 45",
        ),
        (
            {"objective": ObjectiveConfig(method="gircse", num_thinking_steps=30)},
            "prompt.query_max_length 16 and 30 thinking steps take 46",
        ),
        (
            {
                "prompt": dataclasses.replace(SHORT, explicit_max_length=41),
                "objective": CONTRASTIVE,
                "data": DataConfig(eval="world"),
            },
            "prompt.explicit_max_length takes 41",
        ),
    ],
)
def test_what_cannot_be_laid_out_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lay(**changes)


def test_every_position_of_the_model_may_be_taken() -> None:
    """K states append K - 1 thoughts to a prompt, and none to an explicit input."""
    widest = dataclasses.replace(
        SHORT, query_max_length=38, document_max_length=38, explicit_max_length=40
    )
    assert lay(prompt=widest).mesh.size == 8


def test_explicit_inputs_that_nothing_reads_take_no_positions() -> None:
    long = dataclasses.replace(SHORT, explicit_max_length=41)
    assert lay(prompt=long, objective=CONTRASTIVE).mesh.size == 8
    gircse = ObjectiveConfig(method="gircse")
    assert lay(prompt=long, objective=gircse, data=DataConfig(eval="world")).mesh.size == 8


def test_a_batch_need_not_divide_by_the_devices_that_share_a_row() -> None:
    assert lay(train=TrainConfig(batch_size=2), mesh=MeshConfig(1, 2, 4)).mesh.size == 8
