"""How much of training batches is padding, by the settings that decide it."""

from __future__ import annotations

import itertools
import math
from typing import Any

from laser_jax.config import DataConfig
from laser_jax.data.pipeline import BatchSettings, padding_share, training_batches
from laser_jax.data.sources import Source
from laser_jax.data.tokenization import PromptTokenizer

LENGTH_MULTIPLES, BUCKET_WINDOWS = (32, 128), (1, 8, 32)
_MOST_BATCHES = 256
"""That are drawn for each pair of settings; one epoch is enough."""


def measure_padding(source: Source, prompts: PromptTokenizer, batch_size: int) -> dict[str, Any]:
    """The share of padding in batches of so many rows, for every length multiple and bucket window.
    A query has a negative beside its positive passage, where every row has one."""
    group_size = 2 if source.facts.row_without_negatives is None else 1
    settings = BatchSettings(
        batch_size=batch_size,
        seed=0,
        num_thinking_steps=1,
        keyframes="paper",
        need_explicit=True,
        shared_prefix=False,
    )
    number = min(_MOST_BATCHES, math.ceil(len(source) / batch_size))
    shares = []
    ways = [(*way, False) for way in itertools.product(LENGTH_MULTIPLES, BUCKET_WINDOWS)]
    for multiple, window, pack in [*ways, (max(LENGTH_MULTIPLES), 1, True)]:
        data = DataConfig(
            train=str(source.path),
            group_size=group_size,
            selection="random",
            length_multiple=multiple,
            bucket_window=window,
            pack=pack,
        )
        padding, tokens, shapes = 0.0, 0, set()
        batches = training_batches([source], prompts, data, settings)
        for batch in itertools.islice(batches, number):
            assert batch.explicit is not None
            documents, explicit = batch.documents, batch.explicit
            size = documents.size + explicit.size
            padding += padding_share(batch) * size
            tokens += size
            shapes |= {tuple((t.ids_BT.shape, t.packed) for t in (documents, explicit))}
        shares.append(
            {
                "length_multiple": multiple,
                "bucket_window": window,
                "pack": pack,
                "batches": number,
                "padding_share": round(padding / tokens, 4),
                "shapes": len(shapes),
            }
        )
    return {"batch_size": batch_size, "group_size": group_size, "shares": shares}
