"""How much of training batches is padding, by the settings that decide it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from laser_jax.config import DataConfig
from laser_jax.data.pipeline import BatchSettings, padding_share, training_batches
from laser_jax.data.schema import DataError
from laser_jax.data.sources import Source
from laser_jax.data.tokenization import PromptTokenizer
from laser_jax.settings import require, require_in


@dataclass(frozen=True)
class PaddingConfig:
    """Training batches that are drawn to see how much of them is padding."""

    batch_size: int = 32
    group_size: int = 2
    length_multiples: tuple[int, ...] = (32, 128)
    bucket_windows: tuple[int, ...] = (1, 8, 32)
    batches: int = 256
    """The most that are drawn; one epoch is enough."""

    def __post_init__(self) -> None:
        counts = ("batch_size", "group_size", "batches", "length_multiples", "bucket_windows")
        require_in("[1, inf)", self, "padding.", *counts)
        for name in ("length_multiples", "bucket_windows"):
            require(bool(getattr(self, name)), f"padding.{name} is empty")


def measure_padding(
    source: Source, prompts: PromptTokenizer, config: PaddingConfig
) -> list[dict[str, Any]]:
    """The share of padding in one epoch of batches, for every multiple and window. Raises as
    `require_negatives`."""
    require_negatives(source, config)
    shares = []
    for multiple, window in itertools.product(config.length_multiples, config.bucket_windows):
        data = DataConfig(
            train=str(source.path),
            group_size=config.group_size,
            selection="random",
            length_multiple=multiple,
            bucket_window=window,
        )
        batches = training_batches(
            [source],
            prompts,
            data,
            BatchSettings(
                batch_size=config.batch_size,
                seed=0,
                num_thinking_steps=1,
                keyframes="paper",
                need_explicit=True,
                shared_prefix=False,
            ),
        )
        number = min(config.batches, math.ceil(len(source) / config.batch_size))
        padding, tokens, shapes = 0.0, 0, set()
        for batch in itertools.islice(batches, number):
            assert batch.explicit is not None
            size = batch.documents.ids_BT.size + batch.explicit.ids_BT.size
            padding += padding_share(batch) * size
            tokens += size
            shapes.add((batch.documents.ids_BT.shape, batch.explicit.ids_BT.shape))
        of_settings = {"length_multiple": multiple, "bucket_window": window, "batches": number}
        share = {"padding_share": round(padding / tokens, 4), "shapes": len(shapes)}
        shares.append(of_settings | share)
    return shares


def require_negatives(source: Source, padding: PaddingConfig) -> None:
    """Raises a DataError where the batches to be drawn want negatives that a row has not."""
    row = source.facts.row_without_negatives
    if padding.group_size > 1 and row is not None:
        raise DataError(
            f"{source.where(row)} has no negative_passages, and padding.group_size "
            f"{padding.group_size} wants {padding.group_size - 1}: pass --padding.group_size 1, "
            "or mine negatives"
        )
