"""Shows what a model thinks: `python -m laser_jax.think --model DIR --text "..."`.

For every latent step: the likeliest next tokens and how sure the model is, how near its state is to
the segments of a written chain of thought, and how the ranking of a small corpus moves. On the
terminal, or as a page (`--html FILE`). `laser_jax.serve` has the page with a form.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laser_jax.command_line import program
from laser_jax.evaluate.beir import BeirDataset
from laser_jax.files.durable import read_state, write_atomically
from laser_jax.files.reading import require_unicode
from laser_jax.files.terminal import printable
from laser_jax.settings import require_in
from laser_jax.think.page import render_page
from laser_jax.think.thought import Inspector, Thought, load_corpus


@dataclass(frozen=True)
class ThinkOptions:
    """Shows each latent step of a query: its top tokens, its nearness to the segments of a written
    chain of thought, and the ranking of a small corpus."""

    model: str
    """A directory that laser_jax.train exported."""
    text: str
    """The query."""
    instruction: str | None = None
    """The task; by default that of the corpus's own queries."""
    reasoning: str | None = None
    """A written chain of thought; by default that of the corpus's query with the same text."""
    corpus: str | None = None
    """A BEIR directory; by default the evaluation set of the run that made the model."""
    num_thinking_steps: int | None = None
    """K; by default the model's."""
    ignore_identical_ids: bool = True
    """BEIR's rule: a query is not given the document that has its own id."""
    top: tuple[int, int] = (5, 10)
    """How many tokens and how many documents a step shows."""
    html: str | None = None
    """Write a page to this file instead."""

    def __post_init__(self) -> None:
        require_in("[1, inf)", self, "", "top", "num_thinking_steps")
        for name in ("text", "instruction", "reasoning"):
            require_unicode(getattr(self, name) or "", name)  # the command line may be no UTF-8


def find_corpus(options: ThinkOptions) -> tuple[BeirDataset | None, str]:
    """The corpus - of the option, or `data.eval` of the training run beside the model - and a
    sentence about it, or about why there is none. Raises as `load_corpus`."""
    directory = options.corpus
    if directory is None and Path(options.model).is_dir():
        directory = read_state(Path(options.model).parent / "config.json", _evaluation_set)
        if directory and not Path(directory).is_dir():
            return None, f"No corpus: the run's own, {directory}, is not there; --corpus names one."
    if not directory:
        return None, "No corpus; --corpus DIR shows how its ranking moves."
    corpus = load_corpus(directory, ignore_identical_ids=options.ignore_identical_ids)
    about = [f"Corpus {directory}, {len(corpus.documents)} documents", *map(str, corpus.unmatched)]
    return corpus, "; ".join(about) + "."


def _evaluation_set(config: dict[str, Any]) -> str | None:
    """`data.eval` of a run; None where it has none."""
    directory = config["data"]["eval"] if "data" in config else None
    return None if directory is None else os.fspath(directory)


def describe(thought: Thought) -> str:
    """The thought as text: a block a step, each document with its change of rank."""
    lines = [f"note: {notice}" for notice in thought.notices]
    for k, step in enumerate(thought.steps):
        said = "  ".join(f"{token.text!r} {token.probability:.2f}" for token in step.tokens)
        lines.append(f"step {k + 1}  entropy {step.entropy:.2f} nats")
        lines.append(f"  says next: {said}")
        if thought.segments:
            near = max(thought.segments, key=lambda segment: segment.cosine_K[k])
            lines.append(f"  closest segment: {near.text.strip()!r} {near.cosine_K[k]:+.3f}")
        for ranked in sorted(thought.documents, key=lambda ranked: ranked.rank_K[k]):
            rank, was = ranked.rank_K[k], ranked.rank_K[max(k - 1, 0)]
            if rank > thought.top_documents:
                break
            named = f"{ranked.document.id}{' (relevant)' if ranked.relevant else ''}"
            move = "" if was == rank else f"  (was {was})"
            text = f"{named}: {ranked.document.text[:60]}{move}"
            lines.append(f"  {rank:>3}. {ranked.cosine_K[k]:+.3f}  {text}")
    return "\n".join(lines)


def show(options: ThinkOptions) -> None:
    """Thinks about one query; prints the thought, or writes it as a page."""
    if options.html is not None and Path(options.html).is_dir():  # now, not at the end
        raise IsADirectoryError(f"--html {options.html} is a directory; name the page in it")
    if options.html is not None and not Path(options.html).parent.is_dir():
        raise FileNotFoundError(f"the folder of --html {options.html} does not exist")
    corpus, about = find_corpus(options)
    tokens, documents = options.top
    inspector = Inspector.load(options.model, corpus, top_tokens=tokens, top_documents=documents)
    thought = inspector.think(
        options.text,
        instruction=options.instruction,
        reasoning=options.reasoning,
        num_thinking_steps=options.num_thinking_steps,
    )
    if options.html is not None:
        page = render_page(model=options.model, corpus=about, thought=thought)
        write_atomically(Path(options.html), page)
        print(options.html)
        return
    given = f"query: {thought.query}\ninstruction: {thought.instruction or '(none)'}\n{about}"
    print(printable(f"{given}\n{describe(thought)}"))


main = program("think", ThinkOptions, show)
