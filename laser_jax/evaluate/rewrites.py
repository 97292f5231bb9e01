"""Rewritten queries in a file: a JSON object a line, of `laser_jax.rewrite` or of another program.

Every line holds `_id` and `rewrite`. `laser_jax.rewrite` adds the `query` it read, counts of
tokens, and the seconds and rows of the batch that wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from laser_jax.evaluate.beir import EvalQuery, json_object
from laser_jax.files.reading import DataError, json_lines

_NUMBERS = ("prompt_tokens", "tokens", "rows", "prefill_seconds", "decode_seconds")


@dataclass(frozen=True)
class WritingCost:
    """What writing took."""

    prompt_tokens: int
    tokens: int
    """Written, the stop token included."""
    rows: int
    """Queries in its batch."""
    prefill_seconds: float
    """Of the whole batch, as `decode_seconds`."""
    decode_seconds: float


@dataclass(frozen=True)
class Rewrite:
    """One query's rewrite."""

    text: str
    query: str | None = None
    """What was rewritten, where the file says so."""
    finished: bool | None = None
    """The model ended it, not the limit."""
    cost: WritingCost | None = None

    def as_row(self, id_: str) -> dict[str, Any]:
        """A line of the file."""
        row = {"_id": id_, "query": self.query, "rewrite": self.text, "finished": self.finished}
        return row | (vars(self.cost) if self.cost else {})


def _rewrite(row: dict[str, Any], where: str) -> tuple[str, Rewrite]:
    def wanted(key: str, kinds: tuple[type, ...], optional: bool = False) -> Any:
        value = row.get(key)
        if (value is None and not optional) or (value is not None and type(value) not in kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise DataError(f"{where}: field {key!r} must be {names}, got {value!r}")
        return value

    cost = None
    if any(key in row for key in _NUMBERS):
        cost = WritingCost(*(wanted(key, (int, float)) for key in _NUMBERS))
        if not (cost.rows >= 1 and cost.prefill_seconds >= 0 and cost.decode_seconds >= 0):
            raise DataError(f"{where}: rows must be at least 1 and no seconds negative: {cost}")
    return wanted("_id", (str,)), Rewrite(
        wanted("rewrite", (str,)),
        wanted("query", (str,), optional=True),
        wanted("finished", (bool,), optional=True),
        cost,
    )


def read_rewrites(path: str | Path) -> dict[str, Rewrite]:
    """Reads a file of rewrites: query id -> rewrite, in its order.

    Raises:
        FileNotFoundError: when it is missing.
        DataError: on a line of another form, or a query that stands twice; names file and line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing: a file that laser_jax.rewrite wrote is wanted")
    rewrites: dict[str, Rewrite] = {}
    for where, line in json_lines(path):
        id_, rewrite = _rewrite(json_object(line, where), where)
        if id_ in rewrites:
            raise DataError(f"{where}: query {id_!r} stands here a second time")
        rewrites[id_] = rewrite
    return rewrites


def require_rewrites_of(
    queries: Mapping[str, EvalQuery], rewrites: Mapping[str, Rewrite], path: str | Path
) -> None:
    """Raises a DataError where a query has no rewrite, or has one of another text."""
    lacking = [id_ for id_ in queries if id_ not in rewrites]
    if lacking:
        raise DataError(
            f"{path}: {len(lacking)} of {len(queries)} queries have no rewrite, the first is "
            f"{lacking[0]!r}; run laser_jax.rewrite again to complete the file"
        )
    for id_, query in queries.items():
        rewritten = rewrites[id_].query
        if rewritten not in (None, query.text):
            raise DataError(
                f"{path}: the rewrite of query {id_!r} is of {rewritten[:60]!r}, and the query now "
                f"is {query.text[:60]!r}; write the rewrites anew, to another file"
            )


def milliseconds_per_query(rewrites: Mapping[str, Rewrite]) -> np.ndarray | None:
    """What every query cost to write, its share of its batch: [N, 2] of reading the prompt and of
    writing. None where a rewrite has no times."""
    costs = [rewrite.cost for rewrite in rewrites.values()]
    shares = [
        (cost.prefill_seconds / cost.rows, cost.decode_seconds / cost.rows)
        for cost in costs
        if cost is not None
    ]
    return 1000 * np.array(shares) if shares and len(shares) == len(costs) else None
