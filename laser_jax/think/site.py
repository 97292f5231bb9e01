"""The page with a form in front of it: the query of an address in, a status and a page out.

The form is sent by GET, so that an address shows the same again, and there is nothing that a
request could change. `laser_jax.serve` puts it on the net.
"""

from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, urlencode

from laser_jax.think.page import Form, render_page
from laser_jax.think.thought import Inspector

LARGEST_STEPS = 32
"""A page with more columns cannot be read."""
_EXAMPLES = 8


@dataclass(frozen=True)
class Site:
    """What is asked, and what the page says of it."""

    inspector: Inspector
    model: str
    """Its name."""
    corpus: str
    """A sentence about the corpus."""
    instruction: str | None = None
    """What the form starts with; None takes the inspector's."""

    def form(self, fields: dict[str, str]) -> Form:
        """The form with what was sent, and where nothing was, what stands in; and with queries from
        all over the corpus's file."""
        inspector = self.inspector
        known = inspector.known(fields.get("query", ""))
        instruction = known.instruction if self.instruction is None else self.instruction
        queries = list(inspector.corpus.queries.values()) if inspector.corpus else []
        shown = queries[:: max(len(queries) // _EXAMPLES, 1)][:_EXAMPLES]
        return Form(
            query=known.text,
            instruction=fields.get("instruction", instruction or ""),
            num_thinking_steps=fields.get("steps", str(inspector.config.num_thinking_steps)),
            reasoning=fields.get("reasoning") or known.reasoning or "",
            largest_steps=LARGEST_STEPS,
            examples=[(q.text, "/?" + urlencode({"query": q.text})) for q in shown],
        )


def answer(site: Site, query: str) -> tuple[HTTPStatus, str]:
    """Status and page for a GET with this query, as it stands behind the `?` of the address."""
    # a form ends its lines with CR LF; the model's separators are those of Unix
    fields = {
        name: values[-1].replace("\r\n", "\n")
        for name, values in parse_qs(query, keep_blank_values=True).items()
    }
    form = site.form(fields)
    known: dict[str, Any] = {"model": site.model, "corpus": site.corpus, "form": form}
    if not fields:
        return HTTPStatus.OK, render_page(**known)
    K = form.num_thinking_steps
    try:
        if not (K.isascii() and K.isdigit() and 1 <= int(K) <= LARGEST_STEPS):
            raise ValueError(f"K must be a whole number from 1 to {LARGEST_STEPS}, got {K!r}")
        thought = site.inspector.think(
            form.query,
            instruction=form.instruction,
            reasoning=form.reasoning,
            num_thinking_steps=int(K),
        )
    except ValueError as error:
        return HTTPStatus.BAD_REQUEST, render_page(**known, error=str(error))
    return HTTPStatus.OK, render_page(**known, thought=thought)
