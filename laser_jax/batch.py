"""What one optimizer step reads, as arrays. `data.pipeline` makes it of rows of text.

B queries, C documents of the pool, G of them a query, K thinking steps, T tokens.
"""

from __future__ import annotations

from typing import Any

import flax.struct

Array = Any  # numpy or jax


@flax.struct.dataclass
class Tokens:
    """Right-padded rows of tokens."""

    ids_BT: Array
    """int32."""
    lengths_B: Array
    """int32, the real tokens of each row."""


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
    """int32 token positions in `explicit` of the states that teach the K thinking steps."""
    contrast_BC: Array
    """bool, True where document c is contrasted with query b. False at a positive of any row of the
    batch with this query's text, unless c is the query's designated positive b G."""
    teacher_scores_BG: Array | None = None
    """float32, what another teacher gives each query's own passages; NaN in rows without. None
    where the objective does not ask for it."""
    rows_B: Array | None = None
    """int32, each query's row in the concatenation of the sources (see `describe_row`)."""
