"""A trained model over a BEIR dataset: the latent view at several K, and the explicit view."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from laser_jax.batch_encoder import LatentEncoder
from laser_jax.data.tokenization import PromptTokenizer
from laser_jax.evaluation.beir import BeirDataset
from laser_jax.evaluation.metrics import evaluate_run, mean
from laser_jax.search.topk import search
from laser_jax.search.trec import DatasetError, Run, trec_order

DEPTH = 100
METRICS = ("nDCG@10", "Recall@100", "Hit@1")


def require_instructions(dataset: BeirDataset) -> None:
    """Raises a DatasetError that names the first query without an instruction."""
    for query in dataset.queries.values():
        if query.instruction is None:
            raise DatasetError(
                f"query {query.id} has no instruction: give every line of queries.jsonl an "
                '"instruction" field; an empty string is allowed'
            )


def retrieval_runs(
    encoder: LatentEncoder,
    prompts: PromptTokenizer,
    dataset: BeirDataset,
    steps: Sequence[int],
    *,
    progress: bool = False,
) -> dict[str, Run]:
    """Ranks the corpus for every query, the first 100 documents each.

    Args:
        steps: values of K. Queries and documents think equally long, as `encode` would.

    Returns:
        A run for "latent K=k" at every k; and "explicit", the queries with their written reasoning
        against documents at the model's own K, where all queries carry a reasoning and the model
        pools its prompt's state (a GIRCSE model has no explicit view).

    Raises:
        DatasetError: a query without an instruction.
    """
    require_instructions(dataset)
    queries = list(dataset.queries.values())
    instructions = [query.instruction or "" for query in queries]
    order = trec_order([document.id for document in dataset.documents])
    documents = [dataset.documents[i] for i in order]
    own = encoder.config.num_thinking_steps
    wanted = sorted({*steps, own})

    def embed(rows: list[list[int]], what: str, wanted: Sequence[int]) -> dict[int, np.ndarray]:
        label = f"encode {what}" if progress else None
        return dict(zip(wanted, encoder.encode_tokens(rows, wanted, progress=label), strict=True))

    document_vectors = embed([prompts.document(d.text) for d in documents], "documents", wanted)
    query_rows = [
        prompts.query(q.text, instruction)
        for q, instruction in zip(queries, instructions, strict=True)
    ]
    query_vectors = embed(query_rows, "queries", sorted(set(steps)))

    def run(vectors: np.ndarray, documents_at: int) -> Run:
        return search(
            vectors,
            document_vectors[documents_at],
            [query.id for query in queries],
            [document.id for document in documents],
            DEPTH,
            {query.id: query.excluded_ids for query in queries},
        )

    runs = {f"latent K={k}": run(vectors, k) for k, vectors in query_vectors.items()}
    written = [query.reasoning for query in queries]
    if encoder.config.pooling == "prompt_and_thoughts" and all(written):
        explicit_rows = [
            prompts.explicit(q.text, instruction, reasoning or "").ids
            for q, instruction, reasoning in zip(queries, instructions, written, strict=True)
        ]
        # the state at EOS is what one thinking step reads
        runs["explicit"] = run(embed(explicit_rows, "queries with reasoning", [1])[1], own)
    return runs


def score_runs(
    runs: dict[str, Run], dataset: BeirDataset, metrics: Sequence[str] = METRICS
) -> dict[str, dict[str, float]]:
    """The mean of each metric for each run."""
    return {name: mean(evaluate_run(run, dataset.qrels, metrics)) for name, run in runs.items()}


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """Rows of named metrics as aligned text."""
    columns = list(next(iter(rows.values())))
    width = max(len(name) for name in rows)
    lines = [" " * width + "".join(f"{column:>13}" for column in columns)]
    lines += [
        f"{name:<{width}}" + "".join(f"{values[column]:>13.4f}" for column in columns)
        for name, values in rows.items()
    ]
    return "\n".join(lines)
