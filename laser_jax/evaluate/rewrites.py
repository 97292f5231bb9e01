"""Rewritten queries in a file: a JSON object a line, of `laser_jax.rewrite` or of another program.

Every line holds `_id` and `rewrite`. `laser_jax.rewrite` adds the fields of `WritingCost` and the
`query` it read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from laser_jax.data.documents import EvalQuery
from laser_jax.files.reading import DataError, json_lines, json_object
from laser_jax.settings import kinds_of


@dataclass(frozen=True)
class WritingCost:
    """What writing took."""

    prompt_tokens: int
    tokens: int
    """Written, the stop token included."""
    rows: int
    """Queries in its batch."""
    prefill_seconds: float
    """The whole batch's, as `decode_seconds`."""
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
    def wanted(key: str, *kinds: type, optional: bool = False) -> Any:
        value = row.get(key)
        if type(value) not in kinds and not (optional and value is None):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise DataError(f"{where}: field {key!r} must be {names}, got {value!r}")
        return value

    cost, numbers = None, kinds_of(WritingCost)
    if not row.keys().isdisjoint(numbers):
        cost = WritingCost(*(wanted(key, int, float) for key in numbers))
        if not (cost.rows >= 1 and cost.prefill_seconds >= 0 and cost.decode_seconds >= 0):
            raise DataError(f"{where}: rows must be at least 1 and no seconds negative: {cost}")
    query, finished = wanted("query", str, optional=True), wanted("finished", bool, optional=True)
    return wanted("_id", str), Rewrite(wanted("rewrite", str), query, finished, cost)


def read_rewrites(path: str | Path) -> dict[str, Rewrite]:
    """Reads a file of rewrites: query id -> rewrite, in its order. Raises a FileNotFoundError when
    it is missing, and a DataError on a line of another form or a query that stands twice."""
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
    if lacking := [id_ for id_ in queries if id_ not in rewrites]:
        without = f"{len(lacking)} of {len(queries)} queries have no rewrite"
        way_out = "run laser_jax.rewrite again to complete the file"
        raise DataError(f"{path}: {without}, the first is {lacking[0]!r}; {way_out}")
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
    costs = [rewrite.cost for rewrite in rewrites.values() if rewrite.cost is not None]
    if not costs or len(costs) < len(rewrites):
        return None
    return 1000 * np.array([(c.prefill_seconds / c.rows, c.decode_seconds / c.rows) for c in costs])
