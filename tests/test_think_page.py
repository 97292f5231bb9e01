"""The page of laser_jax.think: what it shows, that texts stay texts, and its form."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from laser_jax.data.documents import Document
from laser_jax.think.page import SHADES, Form, heat, moves, rank_chart, render_page
from laser_jax.think.site import (
    Site,
    answer,
)
from laser_jax.think.thought import (
    Inspector,
    RankedDocument,
    Segment,
    Step,
    Thought,
    Token,
    load_corpus,
)

VOID = {"meta", "link", "input", "br", "rect", "circle", "line", "path"}
TRAP = (
    "</title></textarea></style></code></td></table><script>alert(1)</script>\" onfocus='alert(2)' "
    "& {{ 7 * 7 }}"
)


class Page(HTMLParser):
    """The elements of a page, each with its attributes and the text within."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[int] = []
        self.feed(html)
        self.close()
        assert [self.elements[i][0] for i in self._open] == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        self.elements.append((tag, {name: value or "" for name, value in attrs}, []))
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.elements[self._open.pop()][0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for i in self._open:
            self.elements[i][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str], str]]:
        return [(attributes, "".join(text)) for t, attributes, text in self.elements if t == tag]

    def text(self) -> str:
        return " ".join(self.all("body")[0][1].split())


def a_thought(text: str = "a query", steps: int = 3) -> Thought:
    """Three documents that change places, and two segments; `text` stands wherever a text can."""
    shown = Step((Token(text, 0.6), Token("\n\n", 0.004), Token("x", 0.0003)), 0.5)
    cosines = [0.1, 0.9, -0.3, *[0.0] * steps][:steps]

    def document(id_: str, ranks: list[int], relevant: bool = False) -> RankedDocument:
        padded = (ranks + ranks[-1:] * steps)[:steps]
        return RankedDocument(
            Document(id_, f"{text} {id_}"), relevant, tuple(cosines), tuple(padded)
        )

    return Thought(
        query=text,
        instruction=text,
        reasoning=text,
        pooling="prompt_and_thoughts",
        steps=(shown,) * steps,
        segments=(
            Segment(text, tuple(cosines)),
            Segment("\n\n", tuple(c - 0.2 if c < 0.5 else c + 0.05 for c in cosines)),
        ),
        documents=(
            document("rising", [12, 3, 1], True),
            document("steady", [2]),
            document("falling", [1, 1, 3]),
            document("leaving", [3, 9, 9]),
        ),
        top_documents=3,
        corpus_size=20,
        notices=(f"note {text}",),
    )


def rendered(**values: Any) -> Page:
    return Page(render_page(**{"model": "runs/m", "corpus": "Corpus of 20."} | values))


FORM = Form("a query", "Find", "3", "one\n\ntwo", 32, (("other", "/?query=other"),))


@pytest.mark.parametrize(
    "values",
    [
        {"form": FORM},
        {"form": FORM, "thought": a_thought()},
        {"form": FORM, "error": "wrong"},
        {"thought": a_thought()},
        {"thought": a_thought(steps=1)},
        {"thought": replace(a_thought(), segments=(), documents=(), corpus_size=0)},
        {"thought": replace(a_thought(), pooling="thoughts")},
    ],
)
def test_the_page_is_sound_and_says_what_everything_is(values: dict[str, Any]) -> None:
    page = rendered(**values)
    assert page.all("html")[0][0]["lang"] == "en"
    assert len(page.all("h1")) == 1
    assert next(t for t, _, _ in page.elements if re.fullmatch("h[1-6]", t)) == "h1"
    assert {t for t, _, _ in page.elements} & {"h3", "h4", "h5", "h6"} == set()
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = {
        id_
        for _, attributes, _ in page.elements
        for name in ("for", "aria-labelledby", "aria-describedby")
        for id_ in attributes.get(name, "").split()
    }
    links = {a["href"][1:] for a, _ in page.all("a") if a["href"].startswith("#")}
    assert (referred | links) - set(ids) == set()
    labelled = {attributes["for"] for attributes, _ in page.all("label")}
    fields = page.all("input") + page.all("textarea")
    assert {attributes["id"] for attributes, _ in fields} == labelled
    for i, (tag, _, text) in enumerate(page.elements):
        if tag == "table":
            assert page.elements[i + 1][0] == "caption"
        if tag in ("th", "caption", "label", "button", "h1", "h2", "a", "title"):
            assert "".join(text).strip(), f"an empty <{tag}>"
        if tag == "th":
            assert page.elements[i][1]["scope"] in ("row", "col")
    assert all(a["aria-label"] for a, _ in page.all("svg") if a.get("role") == "img")


def test_the_page_needs_no_script_and_nothing_from_elsewhere() -> None:
    page = rendered(form=FORM, thought=a_thought())
    assert page.all("script") == []
    for tag, attributes, _ in page.elements:
        assert [name for name in attributes if name.startswith("on")] == [], tag
        for name in ("src", "href", "action"):
            assert re.match(r"/|#|data:,|$", attributes.get(name, "")), attributes
    policies = [a["content"] for a, _ in page.all("meta") if "http-equiv" in a]
    assert "default-src 'none'" in policies[0]


def test_texts_stay_texts() -> None:
    form = Form(TRAP, TRAP, TRAP, "\n" + TRAP, 32, ((TRAP, "/?" + urlencode({"query": TRAP})),))
    thought = a_thought(TRAP)
    documents = (replace(thought.documents[0], document=Document(TRAP, TRAP * 9)),)
    thought = replace(thought, documents=documents)
    page = rendered(model=TRAP, corpus=TRAP, form=form, thought=thought, error=TRAP)
    assert page.all("script") == []
    assert [a for _, a, _ in page.elements if "onfocus" in a] == []
    assert page.all("dd")[0][1] == TRAP
    fields = {a["name"]: a["value"] for a, _ in page.all("input")}
    assert fields == {"instruction": TRAP, "steps": TRAP}
    # a browser drops the first line break of a textarea, this parser does not
    areas = {a["name"]: text for a, text in page.all("textarea")}
    assert areas == {"query": "\n" + TRAP, "reasoning": "\n\n" + TRAP}
    assert page.text().count("49") == 0


def test_steps_show_probabilities_without_rounding_them_to_nothing() -> None:
    page = rendered(thought=a_thought("a"))
    items = [" ".join(text.split()) for _, text in page.all("li")]
    assert items[:3] == ["'a' 60 %", r"'\n\n' 0.4 %", "'x' <0.1 %"]
    assert "0.50 nats ≈ 1.6 tokens" in page.text()  # e ** 0.5


def test_rank_changes_are_told_in_words_too() -> None:
    thought = a_thought()
    assert [m.risen for m in moves(thought.documents[0], 3)] == [0, 9, 2]
    page = rendered(thought=thought)
    text = page.text()
    assert "The relevant document, rising, stands at rank 12 of 20 after step 1" in text
    assert "and at rank 1 after step 3" in text
    cells = [" ".join(text.split()) for a, text in page.all("td") if a.get("class") != "entropy"]
    row = cells[cells.index("12") :]
    assert row[:3] == ["12", "3 rose by ▲9", "1 rose by ▲2"]
    assert "3 fell by ▼2" in row


def test_a_line_of_the_chart_ends_where_its_document_leaves_the_first() -> None:
    documents = {line.name: line for line in rank_chart(a_thought().documents, 3).lines}
    assert [name for name, line in documents.items() if line.label_y is None] == ["leaving"]
    assert documents["leaving"].path.count("M") == 1  # from 3 to 9, not from 9 to 9
    assert documents["rising"].path.count("M") == 2
    assert len(documents["rising"].dots) == 2
    assert documents["rising"].kind == "relevant"
    assert documents["falling"].label_y == rank_chart(a_thought().documents, 3).rows[2]


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (7, 1), (16, 2), (32, 4)])
def test_steps_of_the_chart_are_numbered_up_to_the_last(steps: int, every: int) -> None:
    chart = rank_chart(a_thought(steps=steps).documents, 3)
    assert all(chart.columns[step - 1] == x for x, step in chart.step_numbers)
    assert [step for _, step in chart.step_numbers] == [*range(every, steps + 1, every)]


def test_shades_span_the_table_and_the_closest_segment_is_marked() -> None:
    cells = heat(a_thought().segments)
    assert [[cell.closest for cell in row] for row in cells] == [
        [True, False, True],
        [False, True, False],
    ]
    assert cells[1][1].shade == SHADES - 1
    assert cells[1][2].shade == 0
    assert [cell.shade for cell in heat([Segment("x", (0.5, 0.5))])[0]] == [0, 0]


# --- the form ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(thinking_model: Path) -> Site:
    corpus = load_corpus(thinking_model.parent / "corpus")
    inspector = Inspector.load(thinking_model, corpus, top_tokens=5, top_documents=10)
    return Site(inspector, "runs/m", "Corpus of 3.")


def test_the_first_visit_offers_a_form_and_the_queries_of_the_corpus(site: Site) -> None:
    status, html = answer(site, "")
    page = Page(html)
    assert status == HTTPStatus.OK
    assert page.all("table") == []
    fields = {a["name"]: a["value"] for a, _ in page.all("input")}
    assert fields == {"instruction": "Find the town", "steps": "3"}
    links = [a["href"] for a, _ in page.all("a")]
    assert links == ["/?query=Where+is+Ulm%3F"]
    asked = Page(answer(site, links[0].removeprefix("/?"))[1])
    assert "It lies on a river." in asked.text()
    assert len(asked.all("table")) == 3
    assert "The relevant document, ulm," in asked.text()


def test_a_form_is_answered_with_what_it_asked(site: Site) -> None:
    sent = {
        "query": "Where is Kiel?",
        "instruction": "",
        "steps": "2",
        "reasoning": "A town.\r\n\r\nAt the sea.",
    }
    page = Page(answer(site, urlencode(sent))[1])
    assert {a["name"]: a["value"] for a, _ in page.all("input")} == {
        "instruction": "",
        "steps": "2",
    }
    rows = [text for a, text in page.all("th") if a["scope"] == "row"]
    assert [row.split() for row in rows[:2]] == [["Step", "1", "prompt"], ["Step", "2"]]
    assert rows[2:4] == ["A town.", "At the sea."]  # cut at the blank line, CR or not
    assert "No document is judged for this query." in page.text()


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"query": " "}, "The query is empty; write what is to be found"),
        ({"query": "x", "steps": "0"}, "K must be a whole number from 1 to 32, got '0'"),
        ({"query": "x", "steps": "33"}, "got '33'"),
        ({"query": "x", "steps": "two"}, "got 'two'"),
        ({"query": "x", "instruction": "word " * 600}, "no room for the text"),
    ],
)
def test_a_bad_form_comes_back_with_the_reason(
    site: Site, sent: dict[str, str], message: str
) -> None:
    status, html = answer(site, urlencode(sent))
    page = Page(html)
    assert status == HTTPStatus.BAD_REQUEST
    alerts = [text for a, text in page.all("section") if a.get("role") == "alert"]
    assert message in alerts[0]
    assert page.all("table") == []
    assert page.all("textarea")[0][1] == "\n" + sent["query"]


def test_without_a_corpus_the_page_says_so(thinking_model: Path) -> None:
    alone = Inspector.load(thinking_model, None, top_tokens=2, top_documents=1)
    site = Site(alone, "m", "No corpus.", instruction="Find")
    page = Page(answer(site, "query=x")[1])
    assert "No corpus is loaded, so nothing is ranked" in page.text()
    assert "no written chain of thought" in page.text()
    assert {a["name"]: a["value"] for a, _ in page.all("input")} == {
        "instruction": "Find",
        "steps": "3",
    }
