"""What one optimizer step reads, as arrays. `data.pipeline` makes it of rows of text.

B queries, C documents of the pool, G of them a query, K thinking steps, T tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.struct

Array = Any  # numpy or jax


class PackShape(NamedTuple):
    """Into what rows are packed while they are read (`modeling.packing`)."""

    packs: int
    """A multiple of the devices that share the rows, which it divides."""
    places: int
    """N, for the tokens of a pack."""
    parts: int = 1
    """Micro-batches, of which each has its own packs."""


@flax.struct.dataclass
class Tokens:
    """Right-padded rows of tokens."""

    ids_BT: Array
    """int32."""
    lengths_B: Array
    """int32, the real tokens of each row."""
    packed: PackShape | None = flax.struct.field(pytree_node=False, default=None)
    """None reads the rows with their padding."""

    @property
    def size(self) -> int:
        """The tokens that are read, padding included."""
        if self.packed is None:
            return self.ids_BT.size
        return self.packed.parts * self.packed.packs * self.packed.places


@flax.struct.dataclass
class Draws:
    """The thoughts that were drawn for R rollouts of each query, and what came of them: S thoughts
    a rollout, n tokens a thought."""

    tokens_BRSn: Array
    """int32."""
    log_p_BRS: Array
    """float32, of the policy that drew them."""
    advantage_BR: Array
    """float32, of a rollout over those beside it."""


@flax.struct.dataclass
class Batch:
    """What one optimizer step reads."""

    query: Tokens
    """B rows."""
    documents: Tokens
    """C = B G rows; row i G is the positive of query i, its hard negatives follow."""
    explicit: Tokens | None
    """B rows; None where the objective has no explicit view."""
    keyframes_BK: Array | None
    """int32 token positions in `explicit` of the states that teach the K thinking steps;
    of those that are not counted, any."""
    contrast_BC: Array
    """bool, True where document c is contrasted with query b. False at a positive of any row of the
    batch with this query's text, unless c is the query's designated positive b G."""
    counted_BK: Array | None = None
    """bool, which of the K thinking steps are pooled: those of the number that was drawn for this
    batch (`ObjectiveConfig.sample_thinking_steps`). None: all."""
    teacher_scores_BG: Array | None = None
    """float32, what another teacher gives each query's own passages; NaN in rows without. None
    where the objective does not ask for it."""
    keys_B: Array | None = None
    """Random keys to draw each query's thoughts by (`policy`); a step makes them."""
    draws: Draws | None = None
    """Thoughts to replay instead."""
    rows_B: Array | None = None
    """int32, each query's row in the concatenation of the sources (see `describe_row`)."""
