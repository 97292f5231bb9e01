"""Scores a TREC run as trec_eval does.

python -m laser_jax.evaluate run --run RUN[.gz] --qrels QRELS [--excluded FILE] [--metrics ...]
"""

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from laser_jax.command_line import parse_command_line
from laser_jax.evaluate import metrics
from laser_jax.evaluate.beir import read_qrels_file
from laser_jax.evaluate.metrics import METRICS, Qrels, without_excluded
from laser_jax.evaluate.results import QueryScores, new_directory, write_results
from laser_jax.files.reading import DataError
from laser_jax.search.matching import IdCount, exclusions, identical_count, unmatched
from laser_jax.search.trec import Run, read_excluded, read_trec_run


@dataclass(frozen=True)
class RunOptions:
    """Scores a TREC run."""

    run: str
    """`qid Q0 docid rank score tag`, plain or .gz; document ids may hold blanks."""
    qrels: str
    """Judgements: a .tsv is BEIR's form, any other name trec_eval's; plain or .gz."""
    output: str | None = None
    """A directory for results.json and the values of every query; None prints the means alone."""
    excluded: str | None = None
    """Documents to take out of the rankings first: a queries.jsonl with `excluded_ids`, or a .tsv
    of query and document id."""
    ignore_identical_ids: bool = True
    """BEIR's rule: what has its query's own id leaves every ranking too"""
    metrics: tuple[str, ...] = METRICS
    """NAME@CUTOFF with NAME one of nDCG, nDCG_exp, Recall, P, MRR, MAP, Hit."""
    complete: bool = False
    """Judged queries that the run lacks count as 0 (trec_eval -c); otherwise they are left out."""

    def __post_init__(self) -> None:
        metrics.deepest_cutoff(self.metrics)


def score_run(options: RunOptions) -> dict[str, Any]:
    """Scores a run, and writes the output where there is to be one. Gives what results.json holds:
    the files, the counts and the mean scores. Raises as `new_directory`, and a FileNotFoundError,
    DataError or ValueError on bad input."""
    with ExitStack() as stack:
        if options.output:
            stack.enter_context(new_directory(options.output))
        result, per_query = _scores_of(options)
        if options.output:
            write_results(Path(options.output), result, {Path(options.run).name: per_query})
    return result


def _scores_of(options: RunOptions) -> tuple[dict[str, Any], QueryScores]:
    """What results.json holds, and the values of every query."""
    run, qrels = read_trec_run(options.run), read_qrels_file(options.qrels)
    counts = {
        "queries in the run": len(run),
        "queries judged": len(qrels),
        "of the run, not judged": len(run.keys() - qrels.keys()),
        "judged, not in the run": len(qrels.keys() - run.keys()),
        "judged, without a relevant document": metrics.without_relevant(qrels),
    }
    removed, id_counts = _removed(run, qrels, options)
    run = without_excluded(run, removed)
    counted = run | {query: {} for query in qrels if options.complete and query not in run}
    per_query = metrics.evaluate_run(counted, qrels, options.metrics)
    if not per_query:
        raise DataError(
            f"no query of {options.run} is judged in {options.qrels}; their first queries are "
            f"{next(iter(run))!r} and {next(iter(qrels))!r}"
        )
    files = {key: getattr(options, key) for key in ("run", "qrels", "excluded")}
    found = {"queries": len(per_query), "counts": counts, "scores": metrics.mean(per_query)}
    return files | found | {"id_counts": [asdict(count) for count in id_counts]}, per_query


def _removed(
    run: Run, qrels: Qrels, options: RunOptions
) -> tuple[dict[str, Collection[str]], list[IdCount]]:
    """Query id -> documents to take out of rankings; and what is to be said about ids."""
    excluded = read_excluded(options.excluded) if options.excluded else {}
    ranked, judged = (dict.fromkeys(d for of in by.values() for d in of) for by in (run, qrels))
    named = [document for query in run for document in excluded.get(query, ())]
    own = [query for query, scores in run.items() if query in scores]
    unjudged = "documents of the run that are judged for no query"
    counts = [
        *unmatched(unjudged, ranked, judged, options.run),
        *unmatched("queries with exclusions that the run lacks", excluded, run, options.excluded),
        *unmatched("excluded documents that no ranking holds", named, ranked, options.excluded),
        *identical_count(run, own, options.ignore_identical_ids),
    ]
    return exclusions(excluded, [*run, *qrels] if options.ignore_identical_ids else []), counts


def main(program: str, arguments: Sequence[str]) -> None:
    result = score_run(parse_command_line(RunOptions, program, arguments))
    for what, count in result["counts"].items():
        print(f"{what}: {count}")
    print(f"mean over {result['queries']} queries:")
    for name, value in result["scores"].items():
        print(f"  {name:<12} {value:.5f}")
    for count in result["id_counts"]:
        print(IdCount(**count))
