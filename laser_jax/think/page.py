"""A `Thought` as a web page: one file of HTML, without scripts, in `page.html` beside this.

jinja2 escapes every value that the template fills in; nothing here is marked as safe.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from laser_jax.think.thought import RankedDocument, Segment, Thought

SHADES = 8
"""Shades of the table of cosines, from the lowest cosine in it to the highest."""
_ROW_HEIGHT = 19


@dataclass(frozen=True)
class Form:
    """What the fields of the form hold, as typed."""

    query: str = ""
    instruction: str = ""
    num_thinking_steps: str = ""
    reasoning: str = ""
    largest_steps: int = 1
    examples: Sequence[tuple[str, str]] = ()
    """(text, address) of queries to try."""


class Cell(NamedTuple):
    """The cosine of a step with a segment, its shade (0 to SHADES - 1), and whether no segment is
    closer to this step."""

    cosine: float
    shade: int
    closest: bool


class Move(NamedTuple):
    """A document's rank after a step, how many ranks it gained there (negative when it fell), and
    whether it is among the first documents."""

    rank: int
    risen: int
    shown: bool


class Line(NamedTuple):
    """A document's way through the ranks, in the chart."""

    name: str
    path: str
    dots: list[tuple[float, float]]
    kind: str
    """`relevant`, `leading` (the first three after the last step) or `other`."""
    label_y: float | None
    """Where its name stands; None when it ends below the chart."""


class Chart(NamedTuple):
    """Lines over steps; lengths in units of the drawing."""

    width: float
    height: float
    columns: list[float]
    rows: list[float]
    step_numbers: list[tuple[float, int]]
    """(x, step) of at most eight steps, the last among them."""
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
    environment.filters |= {"exp": math.exp, "repr": repr, "share": _share, "short": _short}
    return environment.get_template("page.html")


def _share(probability: float) -> str:
    """0.934 as `93 %` and 0.0134 as `1.3 %`; never `0 %` or `100 %` for what is neither."""
    percent = 100 * probability
    number = f"{percent:.0f}" if 9.95 <= percent <= 99 else f"{percent:.1f}"
    if 0 < percent < 0.1:
        number = "<0.1"
    elif 99.9 < percent < 100:
        number = ">99.9"
    return f"{number}\N{NO-BREAK SPACE}%"


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
    ranks = pairwise([document.rank_K[0], *document.rank_K])
    return [Move(rank, was - rank, rank <= top) for was, rank in ranks]


def rank_chart(documents: Sequence[RankedDocument], top: int) -> Chart:
    """How the first `top` documents change places; a line ends where its document leaves them."""
    K = len(documents[0].rank_K)
    columns = [40 + 176 / max(K - 1, 1) * k for k in range(K)]
    every = math.ceil(K / 8)
    step_numbers = [(columns[k], k + 1) for k in range(K) if (K - 1 - k) % every == 0]
    rows = [14.0 + _ROW_HEIGHT * rank for rank in range(1, top + 1)]
    bottom = rows[-1] + _ROW_HEIGHT  # where lines go to and come from

    def line(document: RankedDocument) -> Line:
        ranks, last = document.rank_K, document.rank_K[-1]
        heights = [rows[rank - 1] if rank <= top else bottom for rank in ranks]
        points = list(zip(columns, heights, strict=True))
        path = "".join(
            f"M{x:.1f} {y:.1f}L{next_x:.1f} {next_y:.1f}"
            for (x, y), (next_x, next_y) in pairwise(points)
            if min(y, next_y) < bottom
        )
        kind = "relevant" if document.relevant else "leading" if last <= 3 else "other"
        dots = [(x, y) for x, y in points if y < bottom]
        label_y = rows[last - 1] if last <= top else None
        return Line(document.document.id, path, dots, kind, label_y)

    order = ("other", "leading", "relevant")  # drawn last is on top
    lines = sorted(map(line, documents), key=lambda drawn: order.index(drawn.kind))
    return Chart(360.0, bottom + 8, columns, rows, step_numbers, lines)


def render_page(
    *,
    model: str,
    corpus: str,
    thought: Thought | None = None,
    form: Form | None = None,
    error: str | None = None,
) -> str:
    """The page. `model` is its directory, `corpus` a sentence about the corpus; there is no thought
    before a query was asked, no form on a page that stands alone, and an error takes the place of a
    thought."""
    values: dict[str, Any] = {"model": model, "corpus": corpus, "thought": thought}
    values |= {"form": form, "error": error, "row_height": _ROW_HEIGHT}
    if thought is not None:
        values["heat"] = heat(thought.segments) if thought.segments else []
        documents, top = thought.documents, thought.top_documents
        values["moves"] = [moves(document, top) for document in documents]
        values["chart"] = rank_chart(documents, top) if documents else None
    return _template().render(values)
