"""Shows what a model thinks: `python -m laser_jax.think --model DIR --text "..."`.

For every latent step: the likeliest next tokens, how sure the model is, and how the ranking of a
small corpus moves. The corpus is `--corpus`, or the evaluation set of the run that made the model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from laser_jax.batch_encoder import LatentEncoder
from laser_jax.config import ConfigError, parse_command_line
from laser_jax.data.tokenization import PromptTokenizer, load_tokenizer, right_pad
from laser_jax.encoder import backbone_for, load_pretrained
from laser_jax.evaluation.beir import Document, read_corpus, read_queries
from laser_jax.losses import pool
from laser_jax.thinking import TopTokens, top_tokens
from laser_jax.views import latent_view


@dataclass(frozen=True)
class ThinkOptions:
    """Shows each latent step of a query: its top tokens, and the ranking of a small corpus."""

    model: str
    """A directory that laser_jax.train exported."""
    text: str
    """The query."""
    instruction: str | None = None
    """The task; by default that of the corpus's own queries."""
    corpus: str | None = None
    """A BEIR directory; by default the evaluation set of the run that made the model."""
    num_thinking_steps: int | None = None
    """K; by default the model's."""
    top: int = 5
    """How many tokens and documents a step shows."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ConfigError(f"top must be at least 1, got {self.top}")
        if self.num_thinking_steps is not None and self.num_thinking_steps < 1:
            raise ConfigError(
                f"num_thinking_steps must be at least 1, got {self.num_thinking_steps}"
            )


@dataclass(frozen=True)
class ThoughtReport:
    """A query's latent steps. K steps, n tokens shown, C documents."""

    tokens: TopTokens
    """Arrays of one row."""
    decoded_Kn: list[list[str]]
    scores_KC: np.ndarray | None
    """Cosine of the query after k steps with every document; None without a corpus."""


def _corpus_of(options: ThinkOptions) -> Path | None:
    """The corpus directory: the option, or `data.eval` of the training run beside the model."""
    if options.corpus is not None:
        return Path(options.corpus)
    run = Path(options.model).parent / "config.json"
    if not run.is_file():
        return None
    directory = json.loads(run.read_text()).get("data", {}).get("eval")
    return Path(directory) if directory and Path(directory).is_dir() else None


def observe(
    options: ThinkOptions, documents: Sequence[Document], instruction: str
) -> ThoughtReport:
    """Thinks about the query once and looks at every step.

    Documents are embedded with the model's own K, as in an index that is built once; the query is
    shown after each of its steps.
    """
    variables, config = load_pretrained(options.model)
    prompts = PromptTokenizer(load_tokenizer(options.model), config.prompt)
    steps = options.num_thinking_steps or config.num_thinking_steps
    backbone = backbone_for(config, variables)
    ids_BT, lengths_B = right_pad([prompts.query(options.text, instruction)], prompts.pad_id, 8)

    @jax.jit
    def run(variables, ids_BT, lengths_B):
        hidden_BKD = latent_view(backbone, variables, ids_BT, lengths_B, steps, config.pooling)
        prefixes_KD = [pool(hidden_BKD[:, :k])[0] for k in range(1, steps + 1)]
        return prefixes_KD, top_tokens(backbone, variables, hidden_BKD, options.top)

    prefixes_KD, tokens = jax.device_get(run(variables, ids_BT, lengths_B))
    decoded_Kn = [[str(prompts.tokenizer.decode([i])) for i in row] for row in tokens.ids_BKn[0]]
    scores_KC = None
    if documents:
        rows = [prompts.document(document.text) for document in documents]
        encoder = LatentEncoder(variables, config)
        vectors_CD = encoder.encode_tokens(
            rows, [config.num_thinking_steps], progress="encode documents"
        )[0]
        scores_KC = np.stack(prefixes_KD) @ vectors_CD.T
    return ThoughtReport(tokens, decoded_Kn, scores_KC)


def describe(report: ThoughtReport, documents: Sequence[Document], top: int) -> str:
    """The report as text: a block a step, each document with its change of rank."""
    lines = []
    before: dict[int, int] = {}
    for k, decoded in enumerate(report.decoded_Kn):
        probabilities = report.tokens.probabilities_BKn[0, k]
        said = "  ".join(
            f"{token!r} {p:.2f}" for token, p in zip(decoded, probabilities, strict=True)
        )
        lines.append(f"step {k + 1}  entropy {report.tokens.entropy_BK[0, k]:.2f} nats")
        lines.append(f"  says next: {said}")
        if report.scores_KC is None:
            continue
        order = np.argsort(-report.scores_KC[k], kind="stable")
        ranks = {int(c): rank for rank, c in enumerate(order, start=1)}
        for c in order[:top]:
            was = before.get(int(c))
            move = "" if was in (None, ranks[int(c)]) else f"  (was {was})"
            document = documents[int(c)]
            lines.append(
                f"  {ranks[int(c)]:>3}. {report.scores_KC[k, c]:+.3f}  {document.id}: "
                f"{document.text[:60]}{move}"
            )
        before = ranks
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    try:
        options = parse_command_line(ThinkOptions, "python -m laser_jax.think", arguments)
        corpus = _corpus_of(options)
        documents = read_corpus(corpus) if corpus else []
        instruction = options.instruction
        if instruction is None:
            queries = read_queries(corpus).values() if corpus else ()
            instruction = next((q.instruction for q in queries if q.instruction is not None), "")
        report = observe(options, documents, instruction)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(f"query: {options.text}\ninstruction: {instruction or '(none)'}")
    print(f"corpus: {corpus or 'none; --corpus DIR shows how its ranking moves'}")
    print(describe(report, documents, options.top))


if __name__ == "__main__":
    main()
