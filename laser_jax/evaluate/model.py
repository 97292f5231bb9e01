"""Evaluates a model on a BEIR directory or on domains of BRIGHT.

    python -m laser_jax.evaluate model --model DIR --data BEIR_DIR --output DIR [--split test]
    python -m laser_jax.evaluate model --model DIR --data BRIGHT_DIR --output DIR [--domains all]

The query alone, the latent view at every K, and the explicit view with the given reasoning and, as
a control, with that of another query are compared; `--rewrites FILE` adds rewrite-then-retrieve.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType

import numpy as np

from laser_jax.command_line import parse_command_line
from laser_jax.config import pools_prompt
from laser_jax.evaluate import metrics
from laser_jax.evaluate.beir import BeirDataset, read_beir
from laser_jax.evaluate.bright import ALL, EXAMPLES, REWRITTEN, BrightCopy, is_bright
from laser_jax.evaluate.metrics import METRICS
from laser_jax.evaluate.oracle import StepsOracle, steps_oracle
from laser_jax.evaluate.plots import can_draw, plot_quality_by_steps
from laser_jax.evaluate.results import (
    Difference,
    Evaluation,
    QueryScores,
    markdown_table,
    model_name,
    new_directory,
    write_results,
)
from laser_jax.evaluate.retrieval import (
    CONTROL,
    DEPTH,
    EXPLICIT,
    LATENT,
    REWRITES,
    EvaluationOptions,
    QueryInputs,
    explicit_view_fault,
    latent,
    load_retriever,
    query_inputs,
    rank_corpus,
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
from laser_jax.inference.retriever import LatentRetriever
from laser_jax.search.matching import unmatched
from laser_jax.settings import require, require_in

DOMAINS_FILE = "domains.md"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(EvaluationOptions):
    """Evaluates a model on a BEIR directory or on BRIGHT at every K, and its explicit view with a
    control. Of BRIGHT every domain gets a directory in the output. A directory that holds an
    evaluation is refused."""

    data: str
    """A BEIR directory, or a local copy of BRIGHT."""
    split: str = "test"
    """The split of a BEIR directory."""
    domains: str = ALL
    """BRIGHT's domains: names with commas between, or `all` that the copy holds."""
    long_documents: bool = False
    """Search BRIGHT's whole web pages instead of its passages."""
    rewrites: str | None = None
    """For a BEIR directory: a file that laser_jax.rewrite wrote, which adds rewrite-then-retrieve.
    Of BRIGHT: the folder of rewritten queries to take, such as `gpt4_reason`."""
    ignore_identical_ids: bool = True
    """BEIR's rule: a query is not given the document that has its own id."""
    eval_thinking_steps: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    """Values of K at which the latent view is evaluated, all from one pass."""
    metrics: tuple[str, ...] = METRICS
    """NAME@CUTOFF; the first is the one of the plot."""
    measure_time: bool = False
    """Encode the queries again for every run by itself and time it (no compilation, no search)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.eval_thinking_steps), "eval_thinking_steps must name one K at least")
        require_in("[1, inf)", self, "", "eval_thinking_steps")
        metrics.deepest_cutoff(self.metrics)


# --- the data ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    """What is evaluated in one go."""

    dataset: BeirDataset
    name: str
    split: str
    rewrites: dict[str, Rewrite] | None = None
    """The rewritten queries, by id."""


def _as_asked(dataset: BeirDataset, options: ModelOptions) -> BeirDataset:
    """The dataset with the instruction and the rule on ids that the options ask for."""
    queries = dataset.queries
    if options.instruction is not None:
        given = options.instruction
        queries = {id_: replace(query, instruction=given) for id_, query in queries.items()}
    return replace(dataset, queries=queries, ignore_identical_ids=options.ignore_identical_ids)


def _read_beir(options: ModelOptions) -> _Data:
    dataset, rewrites = _as_asked(read_beir(options.data, options.split), options), None
    if options.rewrites is not None:
        written, queries = read_rewrites(options.rewrites), dataset.queries
        require_rewrites_of(queries, written, options.rewrites)
        other = unmatched("rewrites of no query of this split", written, queries, options.rewrites)
        dataset = replace(dataset, unmatched=(*dataset.unmatched, *other))
        rewrites = {id_: written[id_] for id_ in queries}
    return _Data(dataset, options.data, options.split, rewrites)


def _read_domain(copy: BrightCopy, domain: str, options: ModelOptions) -> _Data:
    dataset = _as_asked(copy.read(domain), options)
    split = EXAMPLES + (", long documents" if copy.long_documents else "")
    split += f"{REWRITTEN}{copy.rewrites}" if copy.rewrites else ""
    return _Data(dataset, str(copy.directory / domain), split)


# --- the evaluation ----------------------------------------------------------------------------


def evaluate_model(options: ModelOptions) -> dict[str, Evaluation]:
    """Evaluates a model and writes the output: of a BEIR directory a directory, of BRIGHT one a
    domain in it, and the table of all. Gives the evaluation of every domain by its name, in
    BRIGHT's order; of a BEIR directory the one, under ""."""
    output = Path(options.output)
    bright = _is_bright(options)
    reading: dict[str, Callable[[], _Data]] = {"": cache(partial(_read_beir, options))}
    if bright:
        copy = BrightCopy(Path(options.data), options.long_documents, options.rewrites)
        domains = copy.domains(options.domains)
        reading = {domain: partial(_read_domain, copy, domain, options) for domain in domains}
    with ExitStack() as stack:
        for name, read in reading.items():
            stack.enter_context(new_directory(output / name))
            read()  # so that its faults are not said after hours, when its turn comes
        retriever = load_retriever(options, *options.eval_thinking_steps)
        evaluations = {}
        for name, read in reading.items():
            if bright:
                _log.info("%s, %d of %d", name, len(evaluations) + 1, len(reading))
            evaluations[name] = _evaluate(read(), retriever, output / name, options)
        if bright:
            write_atomically(output / DOMAINS_FILE, domain_table(evaluations) + "\n")
    return evaluations


def _is_bright(options: ModelOptions) -> bool:
    bright = is_bright(options.data)
    of_bright = options.domains != ALL or options.long_documents
    lacking = f"and {options.data} has no folder {EXAMPLES}"
    require(bright or not of_bright, f"domains and long_documents are BRIGHT's, {lacking}")
    no_split = not bright or options.split == "test"
    require(no_split, "BRIGHT has no splits: take --split away, or choose --domains")
    return bright


def _evaluate(
    data: _Data, retriever: LatentRetriever, output: Path, options: ModelOptions
) -> Evaluation:
    dataset, config = data.dataset, retriever.encoder.config
    inputs = _query_inputs(data, retriever, options)
    documents = [retriever.prompts.document_prompt(d.text) for d in dataset.documents]
    document_rows = [document.ids for document in documents]
    read = {"documents": (document_rows, sum(document.truncated for document in documents))}
    read |= {f"queries, {name}": (of.rows, of.shortened) for name, of in inputs.items()}
    for what, (rows, cut) in read.items():
        tokens = sum(map(len, rows)) / len(rows)
        share = f"{cut:,} shortened ({cut / len(rows):.2%})"
        _log.info("%s %s: %.1f tokens each, %s", f"{len(rows):,}", what, tokens, share)
    runs = rank_corpus(
        retriever.encoder,
        document_rows,
        dataset,
        inputs,
        depth=max(DEPTH, metrics.deepest_cutoff(options.metrics)),
        nothing_excluded=any(query.excluded_ids for query in dataset.queries.values()),
        progress=True,
    )
    qrels, names = dataset.qrels, options.metrics
    per_query = {name: metrics.evaluate_run(run, qrels, names) for name, run in runs.items()}
    by_steps = {k: runs[latent(k)] for k in inputs[LATENT].num_thinking_steps}
    evaluation = Evaluation(
        model=options.name or model_name(options.model),
        data=data.name,
        split=data.split,
        num_thinking_steps=config.num_thinking_steps,
        document_thinking_steps=config.document_thinking_steps,
        query_max_length=config.prompt.query_max_length,
        document_max_length=config.prompt.document_max_length,
        dtype=config.dtype,
        pools_prompt=pools_prompt(config.pooling),
        metrics=list(options.metrics),
        documents=len(dataset.documents),
        queries=len(dataset.queries),
        queries_without_relevant=metrics.without_relevant(qrels),
        scores={name: metrics.mean(queries) for name, queries in per_query.items()},
        differences=_differences(per_query, config.num_thinking_steps, names),
        milliseconds_per_query=_reading_times(retriever, inputs) if options.measure_time else {},
        writing_milliseconds_per_query=_writing_times(data, runs),
        shortened={what: cut for what, (_, cut) in read.items()},
        steps_oracle=steps_oracle(by_steps, qrels, names[0]),
        id_counts=list(dataset.id_counts),
    )
    draw = partial(_plot, evaluation, inputs) if can_draw() else None
    write_results(output, asdict(evaluation), per_query, runs, draw)
    return evaluation


def _query_inputs(
    data: _Data, retriever: LatentRetriever, options: ModelOptions
) -> dict[str, QueryInputs]:
    """The queries in every form in which the model reads them."""
    dataset, config, prompts = data.dataset, retriever.encoder.config, retriever.prompts
    inputs = query_inputs(prompts, dataset, config, options.eval_thinking_steps, control=True)
    if fault := explicit_view_fault(dataset, config):
        _log.warning("no explicit view: %s", fault)
    elif CONTROL not in inputs:
        _log.warning("no control: it wants a second query, whose reasoning the first would read")
    if data.rewrites is not None:
        texts = {id_: rewrite.text for id_, rewrite in data.rewrites.items()}
        inputs |= rewrite_inputs(prompts, dataset, config, texts)
    return inputs


def _reading_times(
    retriever: LatentRetriever, inputs: Mapping[str, QueryInputs]
) -> dict[str, float]:
    """Run -> milliseconds to embed a query, compilation aside."""
    times = {}
    for name, of in inputs.items():
        for k in of.num_thinking_steps:
            for _ in range(2):  # the first compiles what is not compiled yet
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


def _differences(
    per_query: Mapping[str, QueryScores], own: int, names: Sequence[str]
) -> list[Difference]:
    """Each run less the one of K = 1; the explicit view also less its control and, as
    rewrite-then-retrieve, less the latent view at the model's own K. What excludes nothing is
    compared with none."""
    left_out = {latent(1), *map(unrestricted, per_query)}
    pairs = [(run, latent(1)) for run in per_query if run not in left_out]
    pairs += [(EXPLICIT, CONTROL)]
    shorter = [run for run in per_query if run.endswith(" dimensions")]
    pairs += [(run, latent(own)) for run in (EXPLICIT, *REWRITES, *shorter) if own > 1]
    differences = []
    for run, against in pairs:
        if run in per_query and against in per_query:
            for metric in names:
                a, b = ([v[metric] for v in per_query[r].values()] for r in (run, against))
                interval = paired_bootstrap(a, b)
                differences.append(Difference(run, against, metric, **asdict(interval)))
    return differences


def _plot(evaluation: Evaluation, inputs: Mapping[str, QueryInputs], stem: Path) -> None:
    metric = evaluation.metrics[0]
    scores = {run: of[metric] for run, of in evaluation.scores.items()}
    curve = {k: scores[latent(k)] for k in inputs[LATENT].num_thinking_steps}
    levels = {name: scores[name] for name in inputs if name != LATENT}
    plot_quality_by_steps({"latent view": curve}, levels, metric, stem)


# --- tables ------------------------------------------------------------------------------------


def model_table(
    evaluation: Evaluation, per_query: Mapping[str, QueryScores] = MappingProxyType({})
) -> str:
    """The scores of every run, with their intervals where the values `per_query` are given, the
    differences in the first metric, and the counts of ids."""
    query_alone = latent(1) if evaluation.pools_prompt else None
    interval = f"{evaluation.confidence:.0%} interval"

    def title(run: str) -> str:
        return f"{run} (query alone)" if run == query_alone else run

    times = {
        "ms a query": evaluation.milliseconds_per_query,
        "ms to write": evaluation.writing_milliseconds_per_query,
    }
    times = {what: by_run for what, by_run in times.items() if by_run}
    rows = [
        [title(run), *(_score(m, scores, per_query.get(run, {})) for m in evaluation.metrics)]
        + [f"{by_run[run]:.2f}" if run in by_run else "" for by_run in times.values()]
        for run, scores in evaluation.scores.items()
    ]
    documents_at = evaluation.document_thinking_steps
    of_documents = f", that of documents always {documents_at}" if documents_at else ""
    parts = [
        f"{evaluation.model} on {evaluation.data} ({evaluation.split}): {evaluation.queries} "
        f"queries ({evaluation.queries_without_relevant} without a relevant document), "
        f"{evaluation.documents} documents; the model's own K is {evaluation.num_thinking_steps}"
        + of_documents,
        markdown_table(["run", *evaluation.metrics, *times], rows),
        *([f"In brackets: {interval} over queries."] if per_query else []),
    ]
    differences = []
    for d in evaluation.differences:
        if d.metric == evaluation.metrics[0]:
            pair = f"{title(d.run)} less {title(d.against)}"
            differences.append([pair, f"{d.difference:+.4f}", f"{d.low:+.4f} to {d.high:+.4f}"])
    if differences:
        header = ["difference", evaluation.metrics[0], interval]
        parts.append(markdown_table(header, differences))
    if evaluation.steps_oracle is not None:
        parts.append(_oracle_tables(evaluation.steps_oracle, interval))
    if evaluation.id_counts:
        parts.append("\n".join(map(str, evaluation.id_counts)))
    return "\n\n".join(parts)


def _score(metric: str, means: Mapping[str, float], queries: QueryScores) -> str:
    """A mean, and its interval where the values of its queries are given."""
    values = [of[metric] for of in queries.values()]
    if not values:
        return f"{means[metric]:.4f}"
    found = paired_bootstrap(values, [0.0] * len(values))
    return f"{means[metric]:.4f} [{found.low:.4f}, {found.high:.4f}]"


def _oracle_tables(found: StepsOracle, interval: str) -> str:
    """What the best K of each query is worth, and how many queries have which."""
    rows = []
    for choice, by in ((found.oracle, ""), (found.control, ", by the other half of the documents")):
        if choice is not None:
            difference = f"{choice.difference:+.4f}", f"{choice.low:+.4f} to {choice.high:+.4f}"
            rows.append([f"best for all{by}", str(choice.queries), f"{choice.fixed:.4f}", "", ""])
            chosen = f"{choice.chosen:.4f}"
            rows.append([f"best of each query{by}", str(choice.queries), chosen, *difference])
    header = ["K", "queries", found.metric, "difference", interval]
    shares = ["share of queries", *(f"{share:.1%}" for share in found.shares.values())]
    said = (
        f"the best K for all is {found.fixed_K}; the best of each query is on average "
        f"{found.mean_K:.2f}"
    )
    tables = markdown_table(header, rows), markdown_table(["best K", *found.shares], [shares])
    return "\n\n".join([said, *tables])


def domain_table(evaluations: Mapping[str, Evaluation]) -> str:
    """The first metric, a row a domain and their mean: at K = 1, at the model's own K and of the
    explicit view (or at every K, where none of these was evaluated), each with the excluded
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
    cells = [[name, *(f"{value:.4f}" for value in row)] for name, row in rows.items()]
    notes = [f"{name}, {count}" for name, e in evaluations.items() for count in e.id_counts]
    return "\n\n".join([markdown_table(header, cells), *(["\n".join(notes)] if notes else [])])


def main(program: str, arguments: Sequence[str]) -> None:
    options = parse_command_line(ModelOptions, program, arguments)
    evaluations = evaluate_model(options)
    one = evaluations.get("")
    print(model_table(one) if one else domain_table(evaluations))
    _log.info("written to %s", options.output)
