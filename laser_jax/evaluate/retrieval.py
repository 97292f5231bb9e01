"""A trained model over a BEIR dataset: the latent view at several K, and the explicit view."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from laser_jax.config import RetrieverConfig, pools_prompt
from laser_jax.data.documents import EvalQuery
from laser_jax.data.prompts import PromptTokens
from laser_jax.data.tokenization import ExplicitTokens, PromptTokenizer
from laser_jax.evaluate.beir import BeirDataset
from laser_jax.evaluate.metrics import evaluate_run, mean
from laser_jax.evaluate.results import markdown_table
from laser_jax.files.reading import DataError
from laser_jax.inference.batch_encoder import LatentEncoder
from laser_jax.inference.options import EncoderOptions, require_positions
from laser_jax.inference.retriever import LatentRetriever, shortened
from laser_jax.search.topk import device_mesh, search
from laser_jax.search.trec import Run, trec_order

DEPTH = 100
METRICS = ("nDCG@10", "Recall@100", "Hit@1")
LATENT = "latent"
EXPLICIT = "explicit"
CONTROL = "explicit of another query"
REWRITE = "rewrite, explicit"
REWRITE_AS_QUERY = "rewrite, in the query"
REWRITES = (REWRITE_AS_QUERY, REWRITE)


def latent(num_thinking_steps: int) -> str:
    """The name of the latent view's run at a K."""
    return f"latent K={num_thinking_steps}"


def shorter(run: str, dimensions: int) -> str:
    """The name of a run with shortened vectors."""
    return f"{run}, {dimensions} dimensions"


def unrestricted(run: str) -> str:
    """The name of a run in which nothing was excluded."""
    return f"{run}, nothing excluded"


# --- the model ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(EncoderOptions):
    """Which model is evaluated, what it is called, and where the results go."""

    output: str
    """The directory to write."""
    name: str | None = None
    """What the model is called; by default its directory, less a last part `model`."""
    instruction: str | None = None
    """One task description for all queries, instead of their own or of the task's."""


def load_retriever(options: EncoderOptions, *num_thinking_steps: int) -> LatentRetriever:
    """Loads the model that `options` name, for its own K and others, at which documents are read
    too unless the model has a K of its own for them. Raises a ConfigError, HFError or
    FileNotFoundError where it cannot be loaded, or has fewer positions than its limits and the
    largest K take."""
    config = options.retriever_config()
    largest = max(config.num_thinking_steps, *num_thinking_steps)
    require_positions(config, "query_max_length", largest)
    require_positions(config, "document_max_length", config.document_thinking_steps or largest)
    return LatentRetriever.from_options(options)


# --- inputs ------------------------------------------------------------------------------------


def require_instructions(queries: Iterable[EvalQuery], template: str) -> None:
    """Raises a DataError that names the first query without an instruction, where the template has
    a place for one."""
    lacking = [query.id for query in queries if query.instruction is None]
    if lacking and "{instruction}" in template:
        way_out = 'give every line of queries.jsonl an "instruction" field, which may be empty'
        raise DataError(f"query {lacking[0]} has no instruction: {way_out}")


def _other_queries(count: int) -> list[int]:
    """For each of two or more queries the index of another, drawn by chance but always the same."""
    order = np.random.default_rng(0).permutation(count)
    other = np.empty(count, np.int64)
    other[order] = np.roll(order, 1)  # one cycle through all of them
    return other.tolist()


@dataclass(frozen=True)
class QueryInputs:
    """The queries as the model reads them for one run, or for one run at every K."""

    rows: list[list[int]]
    """Token ids."""
    num_thinking_steps: tuple[int, ...]
    """Every K at which they are embedded."""
    documents_at: int | None = None
    """K of the documents; None where it is the queries' own."""
    shortened: int = 0
    """Rows whose texts did not fit."""


def query_inputs(
    prompts: PromptTokenizer,
    dataset: BeirDataset,
    config: RetrieverConfig,
    num_thinking_steps: Sequence[int],
    *,
    control: bool = False,
) -> dict[str, QueryInputs]:
    """The inputs by their names: `LATENT` always; `EXPLICIT` and, if asked for and there is more
    than one query, `CONTROL` where `explicit_view_fault` finds none. Raises a DataError on a query
    without an instruction."""
    queries = list(dataset.queries.values())
    require_instructions(queries, prompts.config.query_template)
    alone = [prompts.query_prompt(q.text, q.instruction or "") for q in queries]
    Ks, documents_at = tuple(sorted(set(num_thinking_steps))), config.document_thinking_steps
    inputs = {LATENT: _inputs(alone, Ks, documents_at)}
    if explicit_view_fault(dataset, config) is not None:
        return inputs

    def explicit(donors: Iterable[int]) -> QueryInputs:
        reasoned = [
            prompts.explicit(q.text, q.instruction or "", queries[donor].reasoning or "")
            for q, donor in zip(queries, donors, strict=True)
        ]
        # the state at EOS is what one thinking step reads
        return _inputs(reasoned, (1,), config.documents_at, alone)

    inputs[EXPLICIT] = explicit(range(len(queries)))
    if control and len(queries) > 1:
        inputs[CONTROL] = explicit(_other_queries(len(queries)))
    return inputs


def _inputs(
    tokens: Sequence[PromptTokens | ExplicitTokens],
    num_thinking_steps: tuple[int, ...],
    documents_at: int | None = None,
    alone: Sequence[PromptTokens] = (),
) -> QueryInputs:
    """Counts what is shortened. An explicit input is also where its query is, which `truncated`
    leaves out: `alone` are the prompts of the queries."""
    cut = np.array([row.truncated for row in tokens])
    if alone:
        cut |= [row.truncated for row in alone]
    rows = [row.ids for row in tokens]
    return QueryInputs(rows, num_thinking_steps, documents_at, int(cut.sum()))


def rewrite_inputs(
    prompts: PromptTokenizer,
    dataset: BeirDataset,
    config: RetrieverConfig,
    rewrites: Mapping[str, str],
) -> dict[str, QueryInputs]:
    """Rewrite-then-retrieve. `REWRITE` reads the rewrite as the explicit view reads a reasoning;
    `REWRITE_AS_QUERY` has it behind the query's text, as with a retriever that knows no reasoning
    (K = 1, also of the documents unless the model has a K of its own for them). Both read as many
    tokens as the explicit view. The query stands for a rewrite that is shorter than the shortest
    reasoning of training, as there. Raises a DataError on a query without an instruction."""
    require_instructions(dataset.queries.values(), config.prompt.query_template)
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
    inputs = {REWRITE_AS_QUERY: _inputs(in_query, (1,), config.document_thinking_steps or 1)}
    if pools_prompt(config.pooling):
        inputs[REWRITE] = _inputs(explicit, (1,), config.documents_at, alone)
    return inputs


def explicit_view_fault(dataset: BeirDataset, config: RetrieverConfig) -> str | None:
    """Why there is no explicit view of the queries, None where there is."""
    if not pools_prompt(config.pooling):
        return f"a model with pooling {config.pooling} has no explicit view"
    lacking = sum(not query.reasoning for query in dataset.queries.values())
    return f"{lacking} of {len(dataset.queries)} queries have no reasoning" if lacking else None


# --- rankings ----------------------------------------------------------------------------------


def retrieval_runs(
    encoder: LatentEncoder,
    prompts: PromptTokenizer,
    dataset: BeirDataset,
    num_thinking_steps: Sequence[int],
    *,
    progress: bool = False,
) -> dict[str, Run]:
    """Ranks the corpus for every query by the latent view at every K and, where there is one, the
    explicit view (see `query_inputs` and `rank_corpus`). Documents think as long as queries, or at
    the K that the model has for them; the explicit view is compared with documents at the model's
    own K. Raises a DataError on a query without an instruction."""
    inputs = query_inputs(prompts, dataset, encoder.config, num_thinking_steps)
    documents = [prompts.document(document.text) for document in dataset.documents]
    return rank_corpus(encoder, documents, dataset, inputs, progress=progress)


def _embed(
    encoder: LatentEncoder,
    rows: list[list[int]],
    what: str,
    ids: list[str],
    at: Sequence[int],
    *,
    progress: bool,
) -> dict[int, np.ndarray]:
    """The vectors of rows by K, for every K of `at`; `what` they are and their ids say where one
    is not finite."""
    vectors = encoder.encode_tokens(
        rows,
        at,
        progress=f"encode {what}" if progress else None,
        describe=lambda place: f"{ids[place]!r} ({what})",
    )
    return dict(zip(at, vectors, strict=True))


def rank_corpus(
    encoder: LatentEncoder,
    document_rows: Sequence[list[int]],
    dataset: BeirDataset,
    inputs: Mapping[str, QueryInputs],
    *,
    depth: int = DEPTH,
    nothing_excluded: bool = False,
    progress: bool = False,
) -> dict[str, Run]:
    """Ranks the corpus for every query, for each of its inputs.

    Args:
        document_rows: the tokens of the documents, in the order of the dataset.
        inputs: as `query_inputs` and `rewrite_inputs` make them.
        depth: documents kept of each ranking.
        nothing_excluded: adds every run once more, named by `unrestricted`, with the documents
            that queries exclude. BEIR's rule on identical ids holds in both.
        progress: shows bars on a terminal.

    Returns:
        A run by the name of its input; those of `LATENT` by that of `latent`, at the model's own K
        also with the shorter vectors that it was trained for (`shorter`).
    """
    order = trec_order([document.id for document in dataset.documents])
    document_ids = [dataset.documents[i].id for i in order]
    query_ids = list(dataset.queries)
    documents_at = {of.documents_at or k for of in inputs.values() for k in of.num_thinking_steps}
    rows = [document_rows[i] for i in order]
    embed = partial(_embed, encoder, progress=progress)
    document_vectors = embed(rows, "documents", document_ids, sorted(documents_at))
    # where processes share the mesh, each has all the vectors and searches for itself
    mesh = device_mesh(encoder.mesh.local_devices) if encoder.mesh is not None else None

    def rank(queries: np.ndarray, k: int, removed: Mapping[str, Collection[str]]) -> Run:
        size = queries.shape[1]
        documents = document_vectors[k]
        if size < documents.shape[1]:
            documents = shortened(documents, size)
        return search(queries, documents, query_ids, document_ids, depth, removed, mesh=mesh)

    excluded = dataset.exclusions()
    identical = dataset.exclusions(nothing_excluded=True)
    runs: dict[str, Run] = {}
    for name, of in inputs.items():
        vectors = embed(of.rows, f"queries, {name}", query_ids, of.num_thinking_steps)
        for k, queries in vectors.items():
            run = latent(k) if name == LATENT else name
            runs[run] = rank(queries, of.documents_at or k, excluded)
            if nothing_excluded:
                runs[unrestricted(run)] = rank(queries, of.documents_at or k, identical)
            if name == LATENT and k == encoder.config.num_thinking_steps:
                for size in encoder.config.dimensions:
                    queries_of_size = shortened(queries, size)
                    runs[shorter(run, size)] = rank(queries_of_size, of.documents_at or k, excluded)
    return runs


def score_runs(
    runs: dict[str, Run], dataset: BeirDataset, metrics: Sequence[str] = METRICS
) -> dict[str, dict[str, float]]:
    """The mean of each metric for each run."""
    return {name: mean(evaluate_run(run, dataset.qrels, metrics)) for name, run in runs.items()}


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """Run -> metric -> value as a Markdown table."""
    metrics = list(next(iter(rows.values())))
    cells = [[run, *(f"{values[name]:.4f}" for name in metrics)] for run, values in rows.items()]
    return markdown_table(["run", *metrics], cells)
