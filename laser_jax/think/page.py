"""A `Thought` as a web page: one file of HTML, without scripts, in `page.html` beside this.

jinja2 escapes every value that the template fills in; nothing here is marked as safe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2

from laser_jax.think.thought import RankedDocument, Segment, Thought

SHADES = 8
"""Shades of the table of cosines, from the lowest cosine in it to the highest."""
_ROW_HEIGHT = 19
_DIGIT = 9.0
"""Room for a digit in the chart, where it is narrow and its letters are largest."""


@dataclass(frozen=True)
class Form:
    """What the fields of the form hold, as typed."""

    query: str = ""
    instruction: str = ""
    steps: str = ""
    reasoning: str = ""
    largest_steps: int = 1
    examples: Sequence[tuple[str, str]] = ()
    """(text, address) of queries to try."""


@dataclass(frozen=True)
class Cell:
    """The cosine of a step with a segment."""

    cosine: float
    shade: int
    """0 to SHADES - 1."""
    closest: bool
    """No segment is closer to this step."""


@dataclass(frozen=True)
class Move:
    """Where a document stands after a step."""

    rank: int
    risen: int
    """Ranks gained since the step before; negative when it fell."""
    shown: bool
    """Among the first documents."""


@dataclass(frozen=True)
class Line:
    """A document's way through the ranks, in the chart."""

    name: str
    path: str
    dots: list[tuple[float, float]]
    kind: str
    """`relevant`, `leading` (the first three after the last step) or `other`."""
    label_y: float | None
    """Where its name stands; None when it ends below the chart."""


@dataclass(frozen=True)
class Chart:
    """Lines over steps; lengths in units of the drawing."""

    width: float
    height: float
    columns: list[float]
    rows: list[float]
    step_numbers: list[tuple[float, int]]
    """(x, step), of as many steps as there is room for, the last among them."""
    rank_x: float
    """Where the numbers of the rows end."""
    label_x: float
    """Where names begin; they have the room to the right edge."""
    lines: list[Line]


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": _count,
        "exp": math.exp,
        "repr": repr,
        "share": _share,
        "short": _short,
    }
    return environment.get_template("page.html")


def _share(probability: float) -> str:
    """0.934 as `93 %` and 0.0134 as `1.3 %`; never `0 %` or `100 %` for what is neither."""
    percent = 100 * probability
    if 0 < percent < 0.1:
        number = "<0.1"
    elif 99.9 < percent < 100:
        number = ">99.9"
    else:
        number = f"{percent:.0f}" if 9.95 <= percent <= 99 else f"{percent:.1f}"
    return f"{number}\N{NO-BREAK SPACE}%"


def _count(number: float) -> str:
    return f"{number:.1f}" if number < 99.95 else f"{number:,.0f}"


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def heat(segments: Sequence[Segment]) -> list[list[Cell]]:
    """The cells of the table of cosines, a row a segment."""
    cosines = [cosine for segment in segments for cosine in segment.cosine_K]
    low, span = min(cosines), max(cosines) - min(cosines) or 1.0
    closest = [max(column) for column in zip(*(s.cosine_K for s in segments), strict=True)]
    return [
        [
            Cell(cosine, min(int((cosine - low) / span * SHADES), SHADES - 1), cosine == best)
            for cosine, best in zip(segment.cosine_K, closest, strict=True)
        ]
        for segment in segments
    ]


def moves(document: RankedDocument, top: int) -> list[Move]:
    """The document's ranks with their changes, a step each."""
    before = (document.rank_K[0], *document.rank_K)
    return [
        Move(rank, was - rank, rank <= top)
        for rank, was in zip(document.rank_K, before, strict=False)
    ]


def rank_chart(documents: Sequence[RankedDocument], top: int) -> Chart:
    """How the first `top` documents change places; a line ends where its document leaves them."""
    rank_x = 2 + _DIGIT * len(str(top))
    left, right, head, width = rank_x + 10, 144.0, 14.0, 360.0
    K = len(documents[0].rank_K)
    apart = (width - left - right) / max(K - 1, 1)
    columns = [left + apart * k for k in range(K)]
    every = math.ceil(_DIGIT * (len(str(K)) + 0.5) / apart)
    step_numbers = [(columns[k], k + 1) for k in range(K) if (K - 1 - k) % every == 0]
    rows = [head + _ROW_HEIGHT * rank for rank in range(1, top + 1)]
    bottom = rows[-1] + _ROW_HEIGHT  # where lines go to and come from

    def y(rank: int) -> float:
        return rows[rank - 1] if rank <= top else bottom

    def line(document: RankedDocument) -> Line:
        ranks, last = document.rank_K, document.rank_K[-1]
        pieces = [
            f"M{columns[k]:.1f} {y(a):.1f}L{columns[k + 1]:.1f} {y(b):.1f}"
            for k, (a, b) in enumerate(pairwise(ranks))
            if min(a, b) <= top
        ]
        kind = "relevant" if document.relevant else "leading" if last <= 3 else "other"
        dots = [(columns[k], y(rank)) for k, rank in enumerate(ranks) if rank <= top]
        label_y = y(last) if last <= top else None
        return Line(document.document.id, "".join(pieces), dots, kind, label_y)

    # drawn last is on top
    order = {"other": 0, "leading": 1, "relevant": 2}
    lines = sorted(map(line, documents), key=lambda drawn: order[drawn.kind])
    label_x = columns[-1] + 12
    return Chart(width, bottom + 8, columns, rows, step_numbers, rank_x, label_x, lines)


def render_page(
    *,
    model: str,
    corpus: str,
    thought: Thought | None = None,
    form: Form | None = None,
    error: str | None = None,
) -> str:
    """The page.

    Args:
        model: its directory.
        corpus: a sentence about the corpus.
        thought: None before a query was asked.
        form: None for a page that stands alone.
        error: shown in the place of a thought.
    """
    values: dict[str, Any] = {"model": model, "corpus": corpus, "thought": thought}
    values |= {"form": form, "error": error, "row_height": _ROW_HEIGHT}
    if thought is not None:
        values["heat"] = heat(thought.segments) if thought.segments else []
        documents, top = thought.documents, thought.top_documents
        values["moves"] = [moves(document, top) for document in documents]
        values["chart"] = rank_chart(documents, top) if documents else None
    return _template().render(values)
