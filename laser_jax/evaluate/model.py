"""Evaluates a model on a BEIR directory or on domains of BRIGHT.

    python -m laser_jax.evaluate model --model DIR --data BEIR_DIR --output DIR [--split test]
    python -m laser_jax.evaluate model --model DIR --data BRIGHT_DIR --output DIR [--domains all]

The query alone, the latent view at every K, and the explicit view with the given reasoning and, as
a control, with that of another query are compared; `--rewrites FILE` adds rewrite-then-retrieve.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from laser_jax.command_line import parse_command_line
from laser_jax.config import ConfigError
from laser_jax.evaluate.beir import BeirDataset, read_beir
from laser_jax.evaluate.bright import ALL, EXAMPLES, choose_domains, is_bright, read_bright
from laser_jax.evaluate.metrics import evaluate_run, mean, require_metrics, without_relevant
from laser_jax.evaluate.plots import plot_quality_by_steps, require_matplotlib
from laser_jax.evaluate.results import (
    Difference,
    Evaluation,
    QueryScores,
    claim_directory,
    markdown_table,
    model_name,
    write_evaluation,
)
from laser_jax.evaluate.retrieval import (
    CONTROL,
    DEPTH,
    EXPLICIT,
    LATENT,
    REWRITES,
    EncodingOptions,
    QueryInputs,
    explicit_view_fault,
    latent,
    load_retriever,
    query_inputs,
    rank_corpus,
    require_positive,
    rewrite_inputs,
    unrestricted,
)
from laser_jax.evaluate.rewrites import (
    Rewrite,
    milliseconds_per_query,
    read_rewrites,
    require_rewrites_of,
)
from laser_jax.evaluate.significance import paired_bootstrap
from laser_jax.files.durable import write_atomically
from laser_jax.files.terminal import printable
from laser_jax.inference.retriever import LatentRetriever
from laser_jax.search.matching import unmatched

METRICS = ("nDCG@10", "Recall@100", "MRR@10")
DOMAINS_FILE = "domains.md"
SHOWN_BAD_LINES = 5
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(EncodingOptions):
    """Evaluates a model on a BEIR directory or on BRIGHT at every K, and its explicit view with a
    control."""

    data: str
    """A BEIR directory, or a local copy of BRIGHT."""
    output: str
    """The directory to write: tables, runs, values of every query, plot; of BRIGHT in a directory
    each domain."""
    split: str = "test"
    """Of a BEIR directory."""
    domains: str = ALL
    """Of BRIGHT: names with commas between, or `all` that the copy holds."""
    long_documents: bool = False
    """Of BRIGHT: search whole web pages instead of passages."""
    rewrites: str | None = None
    """For a BEIR directory: a file that laser_jax.rewrite wrote, which adds rewrite-then-retrieve.
    Of BRIGHT: the folder of rewritten queries to take, such as `gpt4_reason`."""
    ignore_identical_ids: bool = True
    """BEIR's rule: a query is not given the document that has its own id."""
    num_thinking_steps: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    """Values of K, all from one pass; K = 1 is the query alone."""
    metrics: tuple[str, ...] = METRICS
    """NAME@CUTOFF; the first is the one of the plot."""
    depth: int = DEPTH
    """Documents kept of each ranking."""
    skip_bad_lines: bool = False
    """Leave bad lines of the data out and count them, instead of stopping at the first."""
    seed: int = 0
    """Of the control and of the resamples."""
    resamples: int = 10_000
    confidence: float = 0.95
    """Of the intervals of the differences."""
    measure_time: bool = False
    """Encode the queries again for every run by itself and time it (no compilation, no search)."""
    plot: bool = True
    """Draw the first metric against K."""
    overwrite: bool = False
    """Replace an evaluation that stands in the output directory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.num_thinking_steps or min(self.num_thinking_steps) < 1:
            raise ConfigError(
                f"num_thinking_steps must each be at least 1, got {self.num_thinking_steps}"
            )
        for key in ("depth", "resamples"):
            require_positive(key, getattr(self, key))
        if not 0 < self.confidence < 1:
            raise ConfigError(f"confidence must lie between 0 and 1, got {self.confidence}")
        require_metrics(self.metrics, self.depth)


# --- the data ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    """What is evaluated in one go."""

    dataset: BeirDataset
    name: str
    split: str
    bad_lines: list[str]
    """What is wrong with the lines that were left out."""
    rewrites: dict[str, Rewrite] | None = None
    """Of its queries."""


def _read(read: Callable[..., BeirDataset], name: str, split: str, options: ModelOptions) -> _Data:
    skipped: list[str] | None = [] if options.skip_bad_lines else None
    dataset = replace(read(skipped=skipped), ignore_identical_ids=options.ignore_identical_ids)
    if options.instruction is not None:
        queries = {
            id_: replace(query, instruction=options.instruction)
            for id_, query in dataset.queries.items()
        }
        dataset = replace(dataset, queries=queries)
    return _Data(dataset, name, split, skipped or [])


def _read_beir(options: ModelOptions) -> _Data:
    read = partial(read_beir, options.data, options.split)
    data = _read(read, options.data, options.split, options)
    if options.rewrites is None:
        return data
    rewrites = read_rewrites(options.rewrites)
    queries = data.dataset.queries
    require_rewrites_of(queries, rewrites, options.rewrites)
    other = unmatched("rewrites of no query of this split", rewrites, queries, options.rewrites)
    dataset = replace(data.dataset, unmatched=(*data.dataset.unmatched, *other))
    return replace(data, dataset=dataset, rewrites={id_: rewrites[id_] for id_ in queries})


def _read_domain(domain: str, options: ModelOptions) -> _Data:
    kind = {"long_documents": options.long_documents, "rewrites": options.rewrites}
    read = partial(read_bright, options.data, domain, **kind)
    split = (options.rewrites or EXAMPLES) + (", long documents" if options.long_documents else "")
    return _read(read, str(Path(options.data) / domain), split, options)


# --- the evaluation ----------------------------------------------------------------------------


def evaluate_model(options: ModelOptions) -> Evaluation:
    """Evaluates a model on a BEIR directory and writes the output directory.

    Raises:
        ConfigError, DataError, HFError, TokenizationError, FileNotFoundError: bad input; the
            message names it.
        ImportError: a plot is asked for without matplotlib.
    """
    if options.plot:
        require_matplotlib()
    data = _read_beir(options)
    retriever = load_retriever(options, max(options.num_thinking_steps))
    return _evaluate(data, retriever, Path(options.output), options)


def evaluate_domains(options: ModelOptions) -> dict[str, Evaluation]:
    """Evaluates a model on domains of BRIGHT and writes a directory each, and the table of all.

    Returns:
        Domain -> evaluation, in BRIGHT's order.

    Raises:
        As `evaluate_model`.
    """
    if options.plot:
        require_matplotlib()
    domains = choose_domains(
        options.data,
        options.domains,
        long_documents=options.long_documents,
        rewrites=options.rewrites,
    )
    for domain in domains:  # and not after hours, when its turn comes
        _read_domain(domain, options)
    retriever = load_retriever(options, max(options.num_thinking_steps))
    outputs = {domain: Path(options.output) / domain for domain in domains}
    for output in outputs.values():
        claim_directory(output, options.overwrite)
    evaluations = {}
    for domain, output in outputs.items():
        logger.info("%s, %d of %d", domain, len(evaluations) + 1, len(domains))
        data = _read_domain(domain, options)
        evaluations[domain] = _evaluate(data, retriever, output, options)
    table = domain_table(evaluations)
    write_atomically(Path(options.output) / DOMAINS_FILE, table + "\n")
    return evaluations


def _evaluate(
    data: _Data, retriever: LatentRetriever, output: Path, options: ModelOptions
) -> Evaluation:
    dataset, encoder, prompts = data.dataset, retriever.encoder, retriever.prompts
    if data.bad_lines:
        shown = "\n  ".join(map(printable, data.bad_lines[:SHOWN_BAD_LINES]))
        logger.warning("left out %d bad lines:\n  %s", len(data.bad_lines), shown)
    # the tokens are made before the directory is: they show what is wrong with the texts
    inputs = _query_inputs(data, retriever, options)
    documents = [prompts.document_prompt(document.text) for document in dataset.documents]
    document_rows = [document.ids for document in documents]
    shortened = {"documents": sum(document.truncated for document in documents)}
    _log_lengths("documents", document_rows, shortened["documents"])
    for name, of in inputs.items():
        shortened[f"queries, {name}"] = of.shortened
        _log_lengths(f"queries, {name}", of.rows, of.shortened)
    claim_directory(output, options.overwrite)
    runs = rank_corpus(
        encoder,
        document_rows,
        dataset,
        inputs,
        depth=options.depth,
        nothing_excluded=any(query.excluded_ids for query in dataset.queries.values()),
        progress=True,
    )
    per_query = {
        name: evaluate_run(run, dataset.qrels, options.metrics) for name, run in runs.items()
    }
    own = encoder.config.num_thinking_steps
    evaluation = Evaluation(
        model=options.name or model_name(options.model),
        data=data.name,
        split=data.split,
        num_thinking_steps=own,
        metrics=list(options.metrics),
        documents=len(dataset.documents),
        queries=len(dataset.queries),
        queries_without_relevant=without_relevant(dataset.qrels),
        bad_lines=len(data.bad_lines),
        scores={name: mean(queries) for name, queries in per_query.items()},
        differences=_differences(per_query, own, options),
        confidence=options.confidence,
        resamples=options.resamples,
        seed=options.seed,
        milliseconds_per_query=_reading_times(retriever, inputs) if options.measure_time else {},
        writing_milliseconds_per_query=_writing_times(data, runs),
        shortened=shortened,
        id_counts=list(dataset.id_counts),
    )
    draw = partial(_plot, evaluation, inputs) if options.plot else None
    write_evaluation(output, evaluation, per_query, runs, draw)
    return evaluation


def _query_inputs(
    data: _Data, retriever: LatentRetriever, options: ModelOptions
) -> dict[str, QueryInputs]:
    """The queries in every form in which the model reads them."""
    dataset, config, prompts = data.dataset, retriever.encoder.config, retriever.prompts
    inputs = query_inputs(prompts, dataset, config, options.num_thinking_steps, options.seed)
    if fault := explicit_view_fault(dataset, config):
        logger.warning("no explicit view: %s", fault)
    elif CONTROL not in inputs:
        logger.warning("no control: it wants a second query, whose reasoning the first would read")
    if data.rewrites is not None:
        texts = {id_: rewrite.text for id_, rewrite in data.rewrites.items()}
        inputs |= rewrite_inputs(prompts, dataset, config, texts)
    return inputs


def _log_lengths(what: str, rows: Sequence[list[int]], shortened: int) -> None:
    tokens = sum(map(len, rows)) / len(rows)
    share = f"{shortened:,} shortened ({shortened / len(rows):.2%})"
    logger.info("%s %s: %.1f tokens each, %s", f"{len(rows):,}", what, tokens, share)


def _reading_times(
    retriever: LatentRetriever, inputs: Mapping[str, QueryInputs]
) -> dict[str, float]:
    """Run -> milliseconds to embed a query, compilation aside."""
    times = {}
    for name, of in inputs.items():
        for k in of.num_thinking_steps:
            retriever.encoder.encode_tokens(of.rows, [k])  # compiles what is not compiled yet
            began = time.perf_counter()
            retriever.encoder.encode_tokens(of.rows, [k])
            run = latent(k) if name == LATENT else name
            times[run] = 1000 * (time.perf_counter() - began) / len(of.rows)
    return times


def _writing_times(data: _Data, runs: Mapping[str, object]) -> dict[str, float]:
    """Run -> mean milliseconds to write a rewrite; empty where nobody knows."""
    times = milliseconds_per_query(data.rewrites or {})
    if times is None:
        return {}
    return {run: float(times.sum(axis=1).mean()) for run in REWRITES if run in runs}


def _comparisons(runs: Sequence[str], own: int) -> list[tuple[str, str]]:
    """Which runs are compared: each with the query alone; the explicit view also with its control
    and, as rewrite-then-retrieve, with the latent view at the model's own K. What excludes nothing
    is compared with none."""
    compared = set(runs) - {latent(1)} - {unrestricted(run) for run in runs}
    pairs = [(run, latent(1)) for run in runs if run in compared]
    pairs += [(EXPLICIT, other) for other in (CONTROL, latent(own)) if own > 1 or other == CONTROL]
    pairs += [(run, latent(own)) for run in REWRITES if own > 1]
    return [(a, b) for a, b in pairs if a in runs and b in runs]


def _differences(
    per_query: Mapping[str, QueryScores], own: int, options: ModelOptions
) -> list[Difference]:
    differences = []
    for run, against in _comparisons(list(per_query), own):
        for metric in options.metrics:
            interval = paired_bootstrap(
                [values[metric] for values in per_query[run].values()],
                [values[metric] for values in per_query[against].values()],
                resamples=options.resamples,
                confidence=options.confidence,
                seed=options.seed,
            )
            differences.append(Difference(run, against, metric, **asdict(interval)))
    return differences


def _plot(evaluation: Evaluation, inputs: Mapping[str, QueryInputs], stem: Path) -> None:
    metric = evaluation.metrics[0]
    scores = {run: of[metric] for run, of in evaluation.scores.items()}
    curve = {k: scores[latent(k)] for k in inputs[LATENT].num_thinking_steps}
    levels = {name: scores[name] for name in inputs if name != LATENT}
    plot_quality_by_steps({"latent view": curve}, levels, metric, stem)


# --- tables ------------------------------------------------------------------------------------


def model_table(evaluation: Evaluation) -> str:
    """The scores of every run, the differences in the first metric, and the counts of ids."""

    def title(run: str) -> str:
        return f"{run} (query alone)" if run == latent(1) else run

    times = {
        "ms a query": evaluation.milliseconds_per_query,
        "ms to write": evaluation.writing_milliseconds_per_query,
    }
    times = {what: by_run for what, by_run in times.items() if by_run}
    rows = [
        [title(run), *(f"{scores[m]:.4f}" for m in evaluation.metrics)]
        + [f"{by_run[run]:.2f}" if run in by_run else "" for by_run in times.values()]
        for run, scores in evaluation.scores.items()
    ]
    parts = [
        f"{evaluation.model} on {evaluation.data} ({evaluation.split}): {evaluation.queries} "
        f"queries ({evaluation.queries_without_relevant} without a relevant document), "
        f"{evaluation.documents} documents; the model's own K is {evaluation.num_thinking_steps}",
        markdown_table(["run", *evaluation.metrics, *times], rows),
    ]
    metric = evaluation.metrics[0]
    differences = [
        [
            f"{title(d.run)} less {title(d.against)}",
            f"{d.difference:+.4f}",
            f"{d.low:+.4f} to {d.high:+.4f}",
        ]
        for d in evaluation.differences
        if d.metric == metric
    ]
    if differences:
        header = ["difference", metric, f"{evaluation.confidence:.0%} interval"]
        parts.append(markdown_table(header, differences))
    if evaluation.id_counts:
        parts.append("\n".join(map(str, evaluation.id_counts)))
    return "\n\n".join(parts)


def domain_table(evaluations: Mapping[str, Evaluation]) -> str:
    """The first metric, a row a domain and their mean: of the query alone, the model's own K and
    the explicit view (or every K, where none of these was evaluated), each with the excluded
    documents removed and with nothing excluded. Below it what is to be said about ids."""
    first, *_ = evaluations.values()
    metric = first.metrics[0]
    wanted = [latent(1), latent(first.num_thinking_steps), EXPLICIT]
    everywhere = [r for r in first.scores if all(r in e.scores for e in evaluations.values())]
    free = {unrestricted(run) for run in everywhere}
    runs = [run for run in everywhere if run in wanted] or [r for r in everywhere if r not in free]

    def values(evaluation: Evaluation) -> list[float]:
        scores = evaluation.scores
        both = [(scores[run], scores.get(unrestricted(run), scores[run])) for run in runs]
        return [score[metric] for pair in both for score in pair]

    rows = {domain: values(evaluation) for domain, evaluation in evaluations.items()}
    rows[f"mean of {len(evaluations)}"] = np.mean(list(rows.values()), axis=0).tolist()
    header = [metric, *(name for run in runs for name in (run, "nothing excluded"))]
    table = markdown_table(
        header, [[name, *(f"{value:.4f}" for value in row)] for name, row in rows.items()]
    )
    notes = [f"{name}, {count}" for name, e in evaluations.items() for count in e.id_counts]
    return "\n\n".join([table, "\n".join(notes)] if notes else [table])


# --- the command line --------------------------------------------------------------------------


def _is_bright(options: ModelOptions) -> bool:
    bright = is_bright(options.data)
    if (options.domains != ALL or options.long_documents) and not bright:
        raise ConfigError(
            f"domains and long_documents are BRIGHT's, and {options.data} has no folder {EXAMPLES}"
        )
    if bright and options.split != "test":
        raise ConfigError("BRIGHT has no splits: take --split away, or choose --domains")
    return bright


def main(program: str, arguments: Sequence[str]) -> None:
    """The command line."""
    options = parse_command_line(ModelOptions, program, arguments)
    if _is_bright(options):
        print(domain_table(evaluate_domains(options)))
    else:
        print(model_table(evaluate_model(options)))
    logger.info("written to %s", options.output)
