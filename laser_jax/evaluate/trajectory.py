"""What a query's thinking steps hold, one by one: the document that a state ranks first by itself,
and the token that it would say next.

Q queries, K thinking steps, C documents, D model, H things looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from laser_jax.batch import Array, Tokens
from laser_jax.config import RetrieverConfig
from laser_jax.data.tokenization import right_pad
from laser_jax.encoder import backbone_for
from laser_jax.losses import normalize
from laser_jax.modeling.backbone import Variables
from laser_jax.thinking import top_tokens
from laser_jax.views import latent_view


class Trajectories(NamedTuple):
    """A reading of every state of every query."""

    first_QK: Array
    """int32, the index of the document nearest to the state alone, which is not pooled with those
    before it; as the trajectory loss compares them."""
    token_QK: Array
    """int32, the likeliest next token."""
    entropy_QK: Array
    """float32, of the next-token distribution, in nats."""


def read_trajectories(
    variables: Variables,
    config: RetrieverConfig,
    rows: Sequence[Sequence[int]],
    documents_CD: np.ndarray,
    *,
    batch_size: int = 64,
) -> Trajectories:
    """Thinks about every query, a row of token ids, with the model's own K and reads each state.
    `documents_CD` are float32 unit rows."""
    backbone = backbone_for(config, variables)
    # any token pads, as lengths tell; queries are repeated to fill the last batch
    ids_QT, lengths_Q = right_pad([*rows, *[rows[-1]] * (-len(rows) % batch_size)], 0, 8)

    @jax.jit
    def read(variables: Variables, tokens: Tokens) -> Trajectories:
        K, pooling = config.num_thinking_steps, config.pooling
        hidden_BKD = latent_view(backbone, variables, tokens, K, pooling)
        scores_BKC = jnp.einsum("bkd,cd->bkc", normalize(hidden_BKD), documents_CD)
        said = top_tokens(backbone, variables, hidden_BKD, 1)
        return Trajectories(scores_BKC.argmax(-1), said.ids_BKn[..., 0], said.entropy_BK)

    variables, count = jax.device_put(variables), len(ids_QT) // batch_size
    batches = zip(np.split(ids_QT, count), np.split(lengths_Q, count), strict=True)
    parts = [jax.device_get(read(variables, Tokens(*batch))) for batch in batches]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[: len(rows)], *parts)


def shares(found_QK: Array, wanted_QH: np.ndarray) -> np.ndarray:
    """How often step k holds thing h: [K, H] float64, the share of queries where they are equal."""
    return (found_QK[:, :, None] == wanted_QH[:, None, :]).mean(axis=0)
