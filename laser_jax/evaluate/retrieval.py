"""A trained model over a BEIR dataset: the latent view at several K, and the explicit view."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from laser_jax.config import RetrieverConfig
from laser_jax.data.tokenization import ExplicitTokens, PromptTokenizer, PromptTokens
from laser_jax.evaluate.beir import BeirDataset
from laser_jax.evaluate.metrics import evaluate_run, mean
from laser_jax.inference.batch_encoder import LatentEncoder
from laser_jax.search.topk import device_mesh, search
from laser_jax.search.trec import DatasetError, Run, trec_order

DEPTH = 100
METRICS = ("nDCG@10", "Recall@100", "Hit@1")
EXPLICIT = "explicit"
CONTROL = "explicit of another query"
REWRITE = "rewrite, explicit"
REWRITE_AS_QUERY = "rewrite, in the query"
REWRITES = (REWRITE_AS_QUERY, REWRITE)


def latent(steps: int) -> str:
    """The name of the latent view's run at K = `steps`; K = 1 reads the query alone."""
    return f"latent K={steps}"


def unrestricted(run: str) -> str:
    """The name of a run in which nothing was excluded."""
    return f"{run}, nothing excluded"


def require_instructions(dataset: BeirDataset) -> None:
    """Raises a DatasetError that names the first query without an instruction."""
    for query in dataset.queries.values():
        if query.instruction is None:
            raise DatasetError(
                f"query {query.id} has no instruction: give every line of queries.jsonl an "
                '"instruction" field; an empty string is allowed'
            )


def with_instruction(dataset: BeirDataset, instruction: str) -> BeirDataset:
    """The dataset with one instruction for every query."""
    queries = {id_: replace(q, instruction=instruction) for id_, q in dataset.queries.items()}
    return replace(dataset, queries=queries)


def other_queries(count: int, seed: int) -> np.ndarray:
    """For each of `count` queries another one, drawn by `seed`: [count] int64, no i at place i.

    Raises:
        ValueError: when there is only one.
    """
    if count < 2:
        raise ValueError("the control gives every query the reasoning of another: it wants two")
    order = np.random.default_rng(seed).permutation(count)
    other = np.empty(count, np.int64)
    other[order] = np.roll(order, 1)  # one cycle through all of them
    return other


@dataclass(frozen=True)
class QueryTokens:
    """The token rows of one way of putting the queries to the model."""

    rows: list[list[int]]
    steps: tuple[int, ...]
    """Every K at which they are embedded."""
    documents_at: int | None = None
    """K of the documents; None where it is the queries' own."""
    shortened: int = 0
    """Rows whose texts did not fit."""


def document_prompts(prompts: PromptTokenizer, dataset: BeirDataset) -> list[PromptTokens]:
    """The documents as tokens, in the order of the dataset.

    Raises:
        TokenizationError: the template leaves no room for a text.
    """
    return [prompts.document_prompt(document.text) for document in dataset.documents]


def query_ways(
    prompts: PromptTokenizer,
    dataset: BeirDataset,
    config: RetrieverConfig,
    steps: Sequence[int],
    control_seed: int | None = None,
) -> dict[str, QueryTokens]:
    """The queries as tokens: "latent" always; `EXPLICIT` and, with a seed and more than one query,
    `CONTROL` where `explicit_view_fault` finds none.

    Raises:
        DatasetError: a query without an instruction.
    """
    require_instructions(dataset)
    queries = list(dataset.queries.values())
    alone = [prompts.query_prompt(q.text, q.instruction or "") for q in queries]
    ways = {"latent": _query_tokens(alone, tuple(sorted(set(steps))))}
    if explicit_view_fault(dataset, config) is not None:
        return ways

    def explicit(donors: Iterable[int]) -> QueryTokens:
        reasoned = [
            prompts.explicit(q.text, q.instruction or "", queries[donor].reasoning or "")
            for q, donor in zip(queries, donors, strict=True)
        ]
        # the state at EOS is what one thinking step reads
        return _query_tokens(reasoned, (1,), config.num_thinking_steps, alone)

    ways[EXPLICIT] = explicit(range(len(queries)))
    if control_seed is not None and len(queries) > 1:
        ways[CONTROL] = explicit(other_queries(len(queries), control_seed).tolist())
    return ways


def _query_tokens(
    read: Sequence[PromptTokens | ExplicitTokens],
    steps: tuple[int, ...],
    documents_at: int | None = None,
    alone: Sequence[PromptTokens] = (),
) -> QueryTokens:
    """One way of reading the queries. An explicit input is shortened too where its query is, which
    its own mark leaves out: `alone` are the prompts of the queries."""
    cut = [tokens.truncated for tokens in read]
    if alone:
        cut = [a or b.truncated for a, b in zip(cut, alone, strict=True)]
    return QueryTokens([tokens.ids for tokens in read], steps, documents_at, sum(cut))


def rewrite_ways(
    prompts: PromptTokenizer,
    dataset: BeirDataset,
    config: RetrieverConfig,
    rewrites: Mapping[str, str],
) -> dict[str, QueryTokens]:
    """Rewrite-then-retrieve. `REWRITE` reads the rewrite as the explicit view reads a reasoning;
    `REWRITE_AS_QUERY` has it behind the query's text, as with a retriever that knows no reasoning
    (K = 1, also of the documents). Both read as many tokens as the explicit view. The query stands
    for a rewrite that is shorter than the shortest reasoning of training, as there.

    Args:
        rewrites: of every query, by its id.

    Raises:
        DatasetError: a query without an instruction.
    """
    require_instructions(dataset)
    room = config.prompt.explicit_max_length
    wide = PromptTokenizer(prompts.tokenizer, replace(config.prompt, query_max_length=room))
    alone, explicit, in_query = [], [], []
    for query in dataset.queries.values():
        written, instruction = rewrites[query.id], query.instruction or ""
        if len(written) < config.prompt.min_reasoning_characters:
            reasoning, longer = query.text, query.text
        else:
            reasoning, longer = written, f"{query.text}\n\n{written}"
        alone.append(prompts.query_prompt(query.text, instruction))
        explicit.append(prompts.explicit(query.text, instruction, reasoning))
        in_query.append(wide.query_prompt(longer, instruction))
    ways = {REWRITE_AS_QUERY: _query_tokens(in_query, (1,), 1)}
    if config.pooling == "prompt_and_thoughts":
        ways[REWRITE] = _query_tokens(explicit, (1,), config.num_thinking_steps, alone)
    return ways


def explicit_view_fault(dataset: BeirDataset, config: RetrieverConfig) -> str | None:
    """Why there is no explicit view of the queries, None where there is."""
    if config.pooling != "prompt_and_thoughts":
        return f"a model with pooling {config.pooling} has no explicit view"
    lacking = sum(not query.reasoning for query in dataset.queries.values())
    if lacking:
        return f"{lacking} of {len(dataset.queries)} queries have no reasoning"
    return None


def retrieval_runs(
    encoder: LatentEncoder,
    prompts: PromptTokenizer,
    dataset: BeirDataset,
    steps: Sequence[int],
    *,
    nothing_excluded: bool = False,
    progress: bool = False,
) -> dict[str, Run]:
    """Ranks the corpus for every query, read in each of `query_ways`.

    Args:
        steps: values of K. Queries and documents think equally long, as `encode` would.
        nothing_excluded, progress: see `rank_ways`.

    Returns:
        A run for "latent K=k" at every k; and "explicit", the queries with their written reasoning
        against documents at the model's own K, where all queries carry a reasoning and the model
        pools its prompt's state (a GIRCSE model has no explicit view).

    Raises:
        DatasetError: a query without an instruction.
    """
    ways = query_ways(prompts, dataset, encoder.config, steps)
    documents = [document.ids for document in document_prompts(prompts, dataset)]
    return rank_ways(
        encoder, documents, dataset, ways, nothing_excluded=nothing_excluded, progress=progress
    )


def rank_ways(
    encoder: LatentEncoder,
    document_rows: Sequence[list[int]],
    dataset: BeirDataset,
    ways: Mapping[str, QueryTokens],
    *,
    depth: int = DEPTH,
    nothing_excluded: bool = False,
    progress: bool = False,
) -> dict[str, Run]:
    """Ranks the corpus for every query, read in several ways.

    Args:
        document_rows: the tokens of the documents, in the order of the dataset.
        ways: as `query_ways` and `rewrite_ways` make them.
        depth: documents kept of each ranking.
        nothing_excluded: adds every run once more, named by `unrestricted`, with the documents
            that queries exclude. BEIR's rule on identical ids holds in both.
        progress: shows bars on a terminal.

    Returns:
        A run by the name of its way; those of "latent" by that of `latent`.
    """
    order = trec_order([document.id for document in dataset.documents])
    documents = [dataset.documents[i] for i in order]

    document_ids, query_ids = [document.id for document in documents], list(dataset.queries)

    def embed(
        rows: list[list[int]], what: str, ids: list[str], wanted: Sequence[int]
    ) -> dict[int, np.ndarray]:
        vectors = encoder.encode_tokens(
            rows,
            wanted,
            progress=f"encode {what}" if progress else None,
            describe=lambda place: f"{ids[place]!r} ({what})",
        )
        return dict(zip(wanted, vectors, strict=True))

    read_at = {way.documents_at or k for way in ways.values() for k in way.steps}
    document_vectors = embed(
        [document_rows[i] for i in order], "documents", document_ids, sorted(read_at)
    )

    excluded = dataset.exclusions()
    of_identical = dataset.exclusions(nothing_excluded=True)
    # where processes share the mesh, each has all the vectors and searches for itself
    mesh = device_mesh(encoder.mesh.local_devices) if encoder.mesh is not None else None
    runs: dict[str, Run] = {}
    for way_name, way in ways.items():
        for k, vectors in embed(way.rows, f"queries, {way_name}", query_ids, way.steps).items():
            name = latent(k) if way_name == "latent" else way_name
            rankings = {name: excluded}
            if nothing_excluded:
                rankings[unrestricted(name)] = of_identical
            for run, removed in rankings.items():
                runs[run] = search(
                    vectors,
                    document_vectors[way.documents_at or k],
                    query_ids,
                    document_ids,
                    depth,
                    removed,
                    mesh=mesh,
                )
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
