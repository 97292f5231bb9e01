"""What the benchmarks run on: backbones with random weights, and batches of random tokens.

Speed depends on shapes, not on what was learned, so nothing is downloaded.

Dimension letters as in CONTRIBUTING.md, with C = B G documents and G of them for a query.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import BenchmarkError, add_numbers
from laser_jax.batch import Batch, Tokens
from laser_jax.config import (
    BACKBONES,
    AttentionKernel,
    BackboneConfig,
    Dtype,
    LoraConfig,
    ScratchConfig,
)
from laser_jax.hf.directory import read_backbone_config
from laser_jax.modeling.attention import choose_kernel
from laser_jax.modeling.backbone import Backbone, Variables
from laser_jax.models.directory import model_directory

SMALL = "small-42m"
TINY = "tiny"
SHAPES: dict[str, BackboneConfig] = {
    TINY: ScratchConfig(
        hidden_size=32, num_layers=2, num_heads=4, head_dim=8, intermediate_size=48
    ).backbone(vocab_size=97),
    SMALL: ScratchConfig(
        hidden_size=512,
        num_layers=8,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        intermediate_size=1536,
    ).backbone(vocab_size=32_000),
    **BACKBONES,
}
"""Backbones by the name that `--backbone` takes."""


def shape_of(options: argparse.Namespace) -> BackboneConfig:
    """Of `--backbone`. Raises a BenchmarkError where no model has that name."""
    if options.backbone in SHAPES:
        return SHAPES[options.backbone]
    try:
        return read_backbone_config(model_directory(options.backbone))
    except (OSError, ValueError, ImportError) as error:
        raise BenchmarkError(f"--backbone is not one of {[*SHAPES]}; {error}") from error


@dataclass(frozen=True)
class TrainShape:
    """The sizes of a training batch."""

    queries: int
    query_tokens: int
    explicit_tokens: int
    documents_per_query: int
    document_tokens: int
    thinking_steps: int

    @property
    def documents(self) -> int:
        return self.queries * self.documents_per_query


TRAIN_SHAPE = TrainShape(8, 128, 256, 2, 128, 3)
TINY_TRAIN_SHAPE = TrainShape(4, 8, 16, 2, 8, 2)


# --- flags that several programs have --------------------------------------------------------


def add_train_shape(parser: argparse.ArgumentParser) -> None:
    """The flags of a LoRA or full training step: a `TrainShape`, and what is trained."""
    add_numbers(parser, {name: (size, "size") for name, size in vars(TRAIN_SHAPE).items()})
    parser.add_argument("--full", action="store_true", help="train all weights, not adapters")


def train_shape(options: argparse.Namespace) -> TrainShape:
    """The shape that the flags of `add_train_shape` describe."""
    return TrainShape(**{name: getattr(options, name) for name in vars(TRAIN_SHAPE)})


def add_backbone(parser: argparse.ArgumentParser) -> None:
    """The flags `--backbone` and `--dtype`."""
    text = f"{', '.join(SHAPES)}, or a model whose shape is taken; default {SMALL}"
    parser.add_argument("--backbone", default=SMALL, help=text)
    text = "of the computation and of the weights that are not trained; default float32"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help=text)


def add_contenders(parser: argparse.ArgumentParser) -> None:
    """The flags of `add_backbone`, `--no_torch` and `--torch_compile`."""
    add_backbone(parser)
    parser.add_argument("--no_torch", action="store_true", help="time ours alone")
    text = "also the tuned PyTorch under torch.compile"
    parser.add_argument("--torch_compile", action="store_true", help=text)


def kernel_for(backbone: BackboneConfig, dtype: Dtype) -> AttentionKernel:
    """Our fastest attention kernel that can run on jax's default device."""
    return choose_kernel("auto", jax.default_backend(), dtype, backbone.head_dim)[0]


# --- batches ---------------------------------------------------------------------------------


def random_tokens(
    rng: np.random.Generator, rows: int, width: int, vocab_size: int, shortest: float = 1.0
) -> Tokens:
    """Random rows, each between `shortest` times `width` and `width` tokens long."""
    lengths = rng.integers(max(1, int(shortest * width)), width + 1, rows).astype(np.int32)
    return Tokens(rng.integers(0, vocab_size, (rows, width)).astype(np.int32), lengths)


def random_batch(shape: TrainShape, vocab_size: int, *, shortest: float = 1.0) -> Batch:
    """A training batch in which every query is contrasted with every document.

    The explicit input goes on from the query's own tokens; the K keyframes are spread evenly over
    its reasoning.

    Args:
        shortest: the least share of its width that a row fills.
    """
    rng = np.random.default_rng(0)
    B, K = shape.queries, shape.thinking_steps
    query = random_tokens(rng, B, shape.query_tokens, vocab_size, shortest)
    documents = random_tokens(rng, shape.documents, shape.document_tokens, vocab_size, shortest)
    written_tokens = shape.explicit_tokens - shape.query_tokens
    reasoning = random_tokens(rng, B, written_tokens, vocab_size, shortest)
    ids_BT = np.zeros((B, shape.explicit_tokens), np.int32)
    for row, (prompt, start, written) in enumerate(
        zip(query.ids_BT, query.lengths_B, reasoning.ids_BT, strict=True)
    ):
        ids_BT[row, :start] = prompt[:start]
        ids_BT[row, start : start + len(written)] = written
    ends_BK = (np.arange(1, K + 1) * reasoning.lengths_B[:, None]) // (K + 1)
    return Batch(
        query,
        documents,
        Tokens(ids_BT, query.lengths_B + reasoning.lengths_B),
        (query.lengths_B[:, None] + ends_BK).astype(np.int32),
        np.ones((B, shape.documents), np.bool_),
    )


# --- weights ---------------------------------------------------------------------------------


def make_backbone(config: BackboneConfig, dtype: Dtype, lora: LoraConfig | None) -> Backbone:
    """The module over scanned layers, its weights stored in `dtype`."""
    wanted: Any = jnp.dtype(dtype)
    return Backbone(config, lora=lora, dtype=wanted, param_dtype=wanted)


def random_variables(backbone: Backbone) -> Variables:
    """Random weights, {"params": ...}, in the backbone's storage dtype."""
    ids = jnp.zeros((1, 8), jnp.int32)
    return nn.meta.unbox(jax.jit(backbone.init)(jax.random.key(0), ids))
