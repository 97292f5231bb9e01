"""How much of training batches is padding, by the settings that decide it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

from laser_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from laser_jax.data.pipeline import padding_share, training_batches
from laser_jax.data.sources import Source
from laser_jax.data.tokenization import PromptTokenizer

LENGTH_MULTIPLES, BUCKET_WINDOWS = (32, 128), (1, 8, 32)
_MOST_BATCHES = 256
"""That are drawn for each pair of settings; one epoch is enough."""


def measure_padding(source: Source, prompts: PromptTokenizer, batch_size: int) -> dict[str, Any]:
    """The share of padding in batches of so many rows, for every length multiple and bucket window.
    A query has a negative beside its positive passage, where every row has one."""
    group_size = 2 if source.facts.row_without_negatives is None else 1
    plain = Config(
        ModelConfig(path="unread"),
        DataConfig(train=str(source.path), group_size=group_size, selection="random"),
        prompt=prompts.config,
        train=TrainConfig(batch_size=batch_size),
    )
    number = min(_MOST_BATCHES, math.ceil(len(source) / batch_size))
    shares = []
    ways = [(*way, False) for way in itertools.product(LENGTH_MULTIPLES, BUCKET_WINDOWS)]
    for way in [*ways, (max(LENGTH_MULTIPLES), 1, True)]:
        varied = dict(zip(("length_multiple", "bucket_window", "pack"), way, strict=True))
        config = replace(plain, data=replace(plain.data, **varied))
        padding, tokens, shapes = 0.0, 0, set()
        for batch in itertools.islice(training_batches([source], prompts, config), number):
            assert batch.explicit is not None
            read = (batch.documents, batch.explicit)
            size = sum(part.size for part in read)
            padding += padding_share(batch) * size
            tokens += size
            shapes.add(tuple((part.ids_BT.shape, part.packed) for part in read))
        share = round(padding / tokens, 4)
        found = {"batches": number, "padding_share": share, "shapes": len(shapes)}
        shares.append(varied | found)
    return {"batch_size": batch_size, "group_size": group_size, "shares": shares}
