"""Evaluates a run or a model.

    python -m laser_jax.evaluate --run RUN[.gz] --qrels QRELS [--excluded FILE] [--metrics ...]
    python -m laser_jax.evaluate --model DIR --data BEIR_DIR --output DIR [--split test]
    python -m laser_jax.evaluate --model DIR --data BRIGHT_DIR --output DIR [--domains all]

The first scores any TREC run as trec_eval does. The second encodes a BEIR directory and compares
the query alone, the latent view at every K, and the explicit view with the given reasoning and, as
a control, with that of another query; `--rewrites FILE` adds rewrite-then-retrieve. The third does
so for the domains of BRIGHT.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from laser_jax.command_line import parse_command_line
from laser_jax.config import ConfigError, Dtype, MeshConfig, RetrieverConfig, load_retriever_config
from laser_jax.data.tokenization import PromptTokenizer
from laser_jax.evaluate.beir import BeirDataset, read_beir, read_qrels_file
from laser_jax.evaluate.bright import ALL, EXAMPLES, choose_domains, is_bright, read_bright
from laser_jax.evaluate.metrics import (
    Qrels,
    changed_documents,
    cutoff_of,
    evaluate_run,
    mean,
    p_mrr,
    without_excluded,
)
from laser_jax.evaluate.plots import plot_quality_by_steps, require_matplotlib
from laser_jax.evaluate.results import (
    PER_QUERY_FILE,
    RESULTS_FILE,
    Difference,
    Evaluation,
    QueryScores,
    markdown_table,
    model_name,
    write_evaluation,
    write_per_query,
)
from laser_jax.evaluate.retrieval import (
    CONTROL,
    DEPTH,
    EXPLICIT,
    REWRITES,
    QueryTokens,
    document_prompts,
    explicit_view_fault,
    latent,
    query_ways,
    rank_ways,
    rewrite_ways,
    unrestricted,
    with_instruction,
)
from laser_jax.evaluate.rewrites import (
    Rewrite,
    milliseconds_per_query,
    read_rewrites,
    require_rewrites_of,
)
from laser_jax.evaluate.significance import paired_bootstrap
from laser_jax.files.durable import write_atomically
from laser_jax.files.terminal import fail, printable
from laser_jax.inference.batch_encoder import LatentEncoder
from laser_jax.inference.options import with_max_length
from laser_jax.inference.retriever import LatentRetriever, local_mesh, require_positions
from laser_jax.search.matching import IdCount, exclusions, identical_count, unmatched
from laser_jax.search.trec import (
    DatasetError,
    Run,
    read_excluded,
    read_trec_run,
    write_trec_run,
)

METRICS = ("nDCG@10", "Recall@100", "MRR@10")
P_MRR = "p-MRR"
PLOT_STEM = "quality_by_steps"
DOMAINS_FILE = "domains.md"
SHOWN_BAD_LINES = 5
_PART = ".evaluation-"


# --- a run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunOptions:
    """Scores a TREC run. (`--model` instead of `--run` evaluates a model: `--model x --help`.)"""

    run: str
    """`qid Q0 docid rank score tag`, plain or .gz; document ids may hold blanks."""
    qrels: str
    """Judgements: a .tsv is BEIR's form, any other name trec_eval's; plain or .gz."""
    excluded: str | None = None
    """Documents to take out of the rankings first: a queries.jsonl with `excluded_ids`, or a .tsv
    of query and document id."""
    ignore_identical_ids: bool = True
    """BEIR's rule: what has its query's own id leaves every ranking too"""
    metrics: tuple[str, ...] = METRICS
    """NAME@CUTOFF with NAME one of nDCG, nDCG_exp, Recall, P, MRR, MAP, Hit."""
    complete: bool = False
    """Judged queries that the run lacks count as 0 (trec_eval -c); otherwise they are left out."""
    original_run: str | None = None
    """For p-MRR: the run under the original instructions; `run` is that under the changed ones."""
    original_qrels: str | None = None
    """For p-MRR: the judgements under the original instructions."""
    json: str | None = None
    """A file for the result."""
    per_query: str | None = None
    """A .tsv file for the values of every query."""

    def __post_init__(self) -> None:
        _check_metrics(self.metrics)
        if (self.original_run is None) != (self.original_qrels is None):
            raise ConfigError("p-MRR wants both --original_run and --original_qrels")


def _check_metrics(metrics: Sequence[str], depth: int | None = None) -> None:
    if not metrics:
        raise ConfigError("metrics must name one metric at least")
    for name in metrics:
        try:
            cutoff = cutoff_of(name)
        except ValueError as error:
            raise ConfigError(f"metrics: {error}") from error
        if depth is not None and cutoff > depth:
            raise ConfigError(f"metrics: {name} looks deeper than --depth {depth}")


def evaluate_trec_run(options: RunOptions) -> dict[str, Any]:
    """Scores a run and writes what `options` ask for.

    Returns:
        What the JSON file holds: the files, the counts and the mean scores.

    Raises:
        ConfigError: a file to write in a folder that is not there.
        FileNotFoundError, DatasetError, ValueError: bad input; the message names it.
    """
    for key in ("json", "per_query"):
        path = getattr(options, key)
        if path is not None and not Path(path).parent.is_dir():
            raise ConfigError(
                f"{key}: {path} cannot be written, as {Path(path).parent} is no directory: make "
                "it, or name another file"
            )
    run, qrels = read_trec_run(options.run), read_qrels_file(options.qrels)
    counts = {
        "queries in the run": len(run),
        "queries judged": len(qrels),
        "of the run, not judged": len(run.keys() - qrels.keys()),
        "judged, not in the run": len(qrels.keys() - run.keys()),
        "judged, without a relevant document": _without_relevant(qrels),
    }
    removed, id_counts = _removed(run, qrels, options)
    run = without_excluded(run, removed)
    counted = run | {query: {} for query in qrels if options.complete and query not in run}
    per_query = evaluate_run(counted, qrels, options.metrics)
    if not per_query:
        raise DatasetError(
            f"no query of {options.run} is judged in {options.qrels}; their first queries are "
            f"{next(iter(run))!r} and {next(iter(qrels))!r}"
        )
    scores = mean(per_query)
    if options.original_run and options.original_qrels:
        original = without_excluded(read_trec_run(options.original_run), removed)
        changes = changed_documents(read_qrels_file(options.original_qrels), qrels)
        if not changes:
            raise DatasetError(
                f"p-MRR: no document is relevant in {options.original_qrels} and irrelevant in "
                f"{options.qrels}; it is measured on those that the changed instruction rules out"
            )
        changes_of = p_mrr(original, run, changes)
        scores |= mean({query: {P_MRR: value} for query, value in changes_of.items()})
        counts["queries with a changed document"] = len(changes_of)
    result = {
        "run": options.run,
        "qrels": options.qrels,
        "excluded": options.excluded,
        "queries": len(per_query),
        "counts": counts,
        "id_counts": [asdict(count) for count in id_counts],
        "scores": scores,
    }
    if options.per_query:
        write_per_query(Path(options.per_query), {Path(options.run).name: per_query})
    if options.json:
        write_atomically(Path(options.json), json.dumps(result, indent=2) + "\n")
    return result


def _removed(
    run: Run, qrels: Qrels, options: RunOptions
) -> tuple[dict[str, Collection[str]], list[IdCount]]:
    """Query id -> documents to take out of rankings; and what is to be said about ids."""
    excluded = read_excluded(options.excluded) if options.excluded else {}
    ranked = dict.fromkeys(document for scores in run.values() for document in scores).keys()
    judged = dict.fromkeys(document for grades in qrels.values() for document in grades).keys()
    named = [document for query in run for document in excluded.get(query, ())]
    own = [query for query, scores in run.items() if query in scores]
    counts = [
        *unmatched(
            "documents of the run that are judged for no query", ranked, judged, options.run
        ),
        *unmatched("queries with exclusions that the run lacks", excluded, run, options.excluded),
        *unmatched("excluded documents that no ranking holds", named, ranked, options.excluded),
        *identical_count(run, own, options.ignore_identical_ids),
    ]
    of_rule = [*run, *qrels] if options.ignore_identical_ids else []
    return exclusions(excluded, of_rule), counts


def _without_relevant(qrels: Mapping[str, Mapping[str, int]]) -> int:
    return sum(max(grades.values()) < 1 for grades in qrels.values())


def _print_run(result: dict[str, Any]) -> None:
    for what, count in result["counts"].items():
        print(f"{what}: {count}")
    print(f"mean over {result['queries']} queries:")
    for name, value in result["scores"].items():
        print(f"  {name:<12} {value:.5f}")
    for count in result["id_counts"]:
        print(IdCount(**count))


# --- a model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelOptions:
    """Evaluates a model on a BEIR directory or on BRIGHT at every K, and its explicit view with a
    control."""

    model: str
    """A directory that laser_jax.train exported."""
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
    name: str | None = None
    """What tables call the model; by default its directory, less a last part `model`."""
    adapter: str | None = None
    """A directory with a PEFT LoRA adapter for the model."""
    instruction: str | None = None
    """One task description for all queries, instead of their own field `instruction`, or of the
    domain's."""
    max_length: int | None = None
    """Tokens of a query and of a document; None takes the model's limits (the paper trains at 512
    and evaluates at 8192)."""
    dtype: Dtype | None = None
    """Compute in another dtype than the model's."""
    ignore_identical_ids: bool = True
    """BEIR's rule: a query is not given the document that has its own id."""
    thinking_steps: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    """Values of K, all from one pass; K = 1 is the query alone."""
    metrics: tuple[str, ...] = METRICS
    """NAME@CUTOFF; the first is the one of the plot."""
    depth: int = DEPTH
    """Documents kept of each ranking."""
    batch_size: int = 64
    """The most rows of a batch."""
    batch_tokens: int = 8192
    """The most tokens of a batch, on all devices together."""
    length_multiple: int = 32
    """Widths of batches are multiples of it."""
    devices: int | None = None
    """Local devices that share every batch, and the search. None: all of them."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How those devices share weights and rows; by default rows alone."""
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
        if not self.thinking_steps or min(self.thinking_steps) < 1:
            raise ConfigError(f"thinking_steps must each be at least 1, got {self.thinking_steps}")
        counts = ("depth", "batch_size", "batch_tokens", "length_multiple", "resamples")
        for key in (*counts, "devices", "max_length"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ConfigError(f"{key} must be at least 1, got {value}")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"confidence must lie between 0 and 1, got {self.confidence}")
        _check_metrics(self.metrics, self.depth)


def _claim_output(output: Path, overwrite: bool) -> None:
    """Makes an output directory, or says now, not after the work, why it cannot be had."""
    if (output / RESULTS_FILE).exists() and not overwrite:
        raise ConfigError(
            f"{output} holds an evaluation: choose another --output, or --overwrite true"
        )
    output.mkdir(parents=True, exist_ok=True)


@contextmanager
def _replaced_evaluation(output: Path) -> Iterator[Path]:
    """Gives a folder for the files of an evaluation, which take the place of an older one when the
    block ends. If the block fails, the older one stays and nothing is left of the new one."""
    for abandoned in output.glob(f"{_PART}*"):  # of a killed process
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=_PART) as folder:
        part = Path(folder)
        (part / "runs").mkdir()
        yield part
        _remove_evaluation(output)
        (output / "runs").mkdir(exist_ok=True)
        written = [file for file in part.rglob("*") if file.is_file()]
        for file in sorted(written, key=lambda file: file.name == RESULTS_FILE):  # that one last
            file.replace(output / file.relative_to(part))


def _remove_evaluation(output: Path) -> None:
    """Removes an older evaluation, whose runs need not be those of the new one."""
    old = [output / RESULTS_FILE, output / PER_QUERY_FILE, *output.glob(f"{PLOT_STEM}.*")]
    for file in (*old, *(output / "runs").glob("*.trec")):
        file.unlink(missing_ok=True)


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

    def ways(
        self, prompts: PromptTokenizer, config: RetrieverConfig, options: ModelOptions
    ) -> dict[str, QueryTokens]:
        """The queries as tokens, in every way in which the model reads them."""
        steps, seed = options.thinking_steps, options.seed
        ways = query_ways(prompts, self.dataset, config, steps, seed)
        if self.rewrites is not None:
            texts = {id_: rewrite.text for id_, rewrite in self.rewrites.items()}
            ways |= rewrite_ways(prompts, self.dataset, config, texts)
        return ways

    def writing_milliseconds(self) -> dict[str, float]:
        """The mean time to write a rewrite, by run; empty where nobody knows."""
        shares = milliseconds_per_query(self.rewrites or {})
        return {} if shares is None else dict.fromkeys(REWRITES, float(shares.sum(axis=1).mean()))


def _data(
    read: Callable[[list[str] | None], BeirDataset], name: str, split: str, options: ModelOptions
) -> _Data:
    skipped: list[str] | None = [] if options.skip_bad_lines else None
    dataset = replace(read(skipped), ignore_identical_ids=options.ignore_identical_ids)
    if options.instruction is not None:
        dataset = with_instruction(dataset, options.instruction)
    return _Data(dataset, name, split, skipped or [])


def _beir(options: ModelOptions) -> _Data:
    def read(skipped: list[str] | None) -> BeirDataset:
        return read_beir(options.data, options.split, skipped=skipped)

    data = _data(read, options.data, options.split, options)
    if options.rewrites is None:
        return data
    rewrites = read_rewrites(options.rewrites)
    queries = data.dataset.queries
    require_rewrites_of(queries, rewrites, options.rewrites)
    other = unmatched("rewrites of no query of this split", rewrites, queries, options.rewrites)
    dataset = replace(data.dataset, unmatched=(*data.dataset.unmatched, *other))
    return replace(data, dataset=dataset, rewrites={id_: rewrites[id_] for id_ in queries})


def _domain(domain: str, options: ModelOptions) -> _Data:
    long_documents, rewrites = options.long_documents, options.rewrites

    def read(skipped: list[str] | None) -> BeirDataset:
        return read_bright(
            options.data, domain, long_documents=long_documents, rewrites=rewrites, skipped=skipped
        )

    split = (rewrites or EXAMPLES) + (", long documents" if long_documents else "")
    return _data(read, str(Path(options.data) / domain), split, options)


def _comparisons(runs: Sequence[str], own: int) -> list[tuple[str, str]]:
    """Which runs are compared: each with the query alone; the explicit view also with its control
    and, as rewrite-then-retrieve, with the latent view at the model's own K. What excludes nothing
    is compared with none."""
    compared = set(runs) - {latent(1)} - {unrestricted(run) for run in runs}
    pairs = [(run, latent(1)) for run in runs if run in compared]
    pairs += [(EXPLICIT, other) for other in (CONTROL, latent(own)) if own > 1 or other == CONTROL]
    pairs += [(run, latent(own)) for run in REWRITES if own > 1]
    return [(a, b) for a, b in pairs if a in runs and b in runs]


def _load(options: ModelOptions) -> tuple[LatentEncoder, PromptTokenizer]:
    config = load_retriever_config(options.model)
    if options.max_length is not None:
        config = with_max_length(config, options.max_length)
    for side in ("query_max_length", "document_max_length"):
        require_positions(config, side, max(options.thinking_steps))
    retriever = LatentRetriever.from_pretrained(
        options.model,
        config=config,
        adapter=options.adapter,
        dtype=options.dtype,
        batch_size=options.batch_size,
        batch_tokens=options.batch_tokens,
        length_multiple=options.length_multiple,
        mesh=local_mesh(options.mesh, options.devices),
    )
    return retriever.encoder, retriever.prompts


def evaluate_model(options: ModelOptions) -> Evaluation:
    """Evaluates a model on a BEIR directory and writes the output directory.

    Raises:
        ConfigError, DatasetError, HFError, TokenizationError, FileNotFoundError: bad input; the
            message names it.
        ImportError: a plot is asked for without matplotlib.
    """
    if options.plot:
        require_matplotlib()
    data = _beir(options)
    encoder, prompts = _load(options)
    # the tokens are made before the directory is: they show what is wrong with the queries
    ways = data.ways(prompts, encoder.config, options)
    output = Path(options.output)
    _claim_output(output, options.overwrite)
    return _evaluate(data, ways, encoder, prompts, output, options)


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
        _domain(domain, options)
    encoder, prompts = _load(options)
    outputs = {domain: Path(options.output) / domain for domain in domains}
    for output in outputs.values():
        _claim_output(output, options.overwrite)
    evaluations = {}
    for domain, output in outputs.items():
        print(f"{domain}, {len(evaluations) + 1} of {len(domains)}")
        data = _domain(domain, options)
        ways = data.ways(prompts, encoder.config, options)
        evaluations[domain] = _evaluate(data, ways, encoder, prompts, output, options)
    table = domain_table(evaluations)
    write_atomically(Path(options.output) / DOMAINS_FILE, table + "\n")
    return evaluations


def _evaluate(
    data: _Data,
    ways: Mapping[str, QueryTokens],
    encoder: LatentEncoder,
    prompts: PromptTokenizer,
    output: Path,
    options: ModelOptions,
) -> Evaluation:
    dataset, config = data.dataset, encoder.config
    if data.bad_lines:
        shown = map(printable, data.bad_lines[:SHOWN_BAD_LINES])
        print(f"left out {len(data.bad_lines)} bad lines:", *shown, sep="\n  ")
    if fault := explicit_view_fault(dataset, config):
        print(f"no explicit view: {fault}")
    elif CONTROL not in ways:
        print("no control: it wants a second query, whose reasoning the first would be read with")
    documents = document_prompts(prompts, dataset)
    document_rows = [document.ids for document in documents]
    shortened = {"documents": sum(document.truncated for document in documents)}
    _print_lengths("documents", document_rows, shortened["documents"])
    for name, way in ways.items():
        shortened[f"queries, {name}"] = way.shortened
        _print_lengths(f"queries, {name}", way.rows, way.shortened)
    runs = rank_ways(
        encoder,
        document_rows,
        dataset,
        ways,
        depth=options.depth,
        nothing_excluded=any(query.excluded_ids for query in dataset.queries.values()),
        progress=True,
    )
    per_query = {
        name: evaluate_run(run, dataset.qrels, options.metrics) for name, run in runs.items()
    }
    milliseconds: dict[str, float] = {}
    if options.measure_time:
        for name, way in ways.items():
            for k in way.steps:
                run = latent(k) if name == "latent" else name
                milliseconds[run] = _milliseconds_per_query(encoder, way.rows, k)

    own = config.num_thinking_steps
    evaluation = Evaluation(
        model=options.name or model_name(options.model),
        data=data.name,
        split=data.split,
        num_thinking_steps=own,
        metrics=list(options.metrics),
        documents=len(dataset.documents),
        queries=len(dataset.queries),
        queries_without_relevant=_without_relevant(dataset.qrels),
        bad_lines=len(data.bad_lines),
        scores={name: mean(queries) for name, queries in per_query.items()},
        differences=_differences(per_query, own, options),
        confidence=options.confidence,
        resamples=options.resamples,
        seed=options.seed,
        milliseconds_per_query=milliseconds,
        writing_milliseconds_per_query={
            run: time for run, time in data.writing_milliseconds().items() if run in runs
        },
        shortened=shortened,
        id_counts=list(dataset.id_counts),
    )
    with _replaced_evaluation(output) as part:
        for name, run in runs.items():
            slug = re.sub(r"[^A-Za-z0-9]+", "-", name)
            write_trec_run(run, part / "runs" / f"{slug}.trec", slug)
        write_per_query(part / PER_QUERY_FILE, per_query)
        if options.plot:
            metric = options.metrics[0]
            by_steps = {k: evaluation.scores[latent(k)][metric] for k in ways["latent"].steps}
            plot_quality_by_steps(
                {"latent view": by_steps},
                {n: evaluation.scores[n][metric] for n in ways if n != "latent"},
                metric,
                part / PLOT_STEM,
            )
        write_evaluation(part, evaluation)
    return evaluation


def _print_lengths(what: str, rows: Sequence[list[int]], shortened: int) -> None:
    print(
        f"{len(rows):,} {what}: {sum(map(len, rows)) / len(rows):.1f} tokens each, "
        f"{shortened:,} shortened ({shortened / len(rows):.2%})"
    )


def _milliseconds_per_query(encoder: LatentEncoder, rows: list[list[int]], k: int) -> float:
    encoder.encode_tokens(rows, [k])  # compiles what is not compiled yet
    began = time.perf_counter()
    encoder.encode_tokens(rows, [k])
    return 1000 * (time.perf_counter() - began) / len(rows)


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


def _print_model(evaluation: Evaluation) -> None:
    print(
        f"{evaluation.model} on {evaluation.data} ({evaluation.split}): {evaluation.queries} "
        f"queries ({evaluation.queries_without_relevant} without a relevant document), "
        f"{evaluation.documents} documents; the model's own K is {evaluation.num_thinking_steps}\n"
    )

    def title(run: str) -> str:
        return f"{run} (query alone)" if run == latent(1) else run

    times = {
        "ms a query": evaluation.milliseconds_per_query,
        "ms to write": evaluation.writing_milliseconds_per_query,
    }
    times = {what: by_run for what, by_run in times.items() if by_run}
    header = ["run", *evaluation.metrics, *times]
    rows = [
        [title(run), *(f"{scores[m]:.4f}" for m in evaluation.metrics)]
        + [f"{by_run[run]:.2f}" if run in by_run else "" for by_run in times.values()]
        for run, scores in evaluation.scores.items()
    ]
    print(markdown_table(header, rows))
    metric = evaluation.metrics[0]
    shown = [
        [
            f"{title(d.run)} less {title(d.against)}",
            f"{d.difference:+.4f}",
            f"{d.low:+.4f} to {d.high:+.4f}",
        ]
        for d in evaluation.differences
        if d.metric == metric
    ]
    if shown:
        interval = f"{evaluation.confidence:.0%} interval"
        print("\n" + markdown_table(["difference", metric, interval], shown))
    print(*(f"\n{count}" for count in evaluation.id_counts), sep="", end="")


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


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: `--model` evaluates a model, otherwise a run is scored."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    program = "python -m laser_jax.evaluate"
    try:
        if any(argument.split("=")[0] == "--model" for argument in given):
            options = parse_command_line(ModelOptions, program, given)
            if _is_bright(options):
                print("\n" + domain_table(evaluate_domains(options)))
            else:
                _print_model(evaluate_model(options))
            print(f"\nwritten to {options.output}")
        else:
            _print_run(evaluate_trec_run(parse_command_line(RunOptions, program, given)))
    except (ValueError, OSError, ImportError) as error:
        fail(error)
