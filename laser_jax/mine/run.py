"""Hard negatives for training rows:
`python -m laser_jax.mine --input train.jsonl --corpus DIR --candidates bm25 --output mined.jsonl`.
"""

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from laser_jax.command_line import program
from laser_jax.data.schema import TEACHER_SCORES, TrainingRow, parse_row, same_text
from laser_jax.evaluate.beir import read_corpus
from laser_jax.files.claim import Claim, OutputError
from laser_jax.files.durable import checksum, json_text, write_atomically
from laser_jax.files.reading import DataError, json_lines, parse_json
from laser_jax.inference.options import Preset
from laser_jax.mine import candidates as ranked
from laser_jax.mine.candidates import Ranking
from laser_jax.mine.filters import Rules, negatives_of
from laser_jax.models.directory import model_directory
from laser_jax.search.matching import count_ids
from laser_jax.settings import Change, as_dict, changes, require

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MineOptions(Rules):
    """Gives training rows hard negatives of a corpus: what a retriever ranks high, and no filter
    takes for relevant."""

    input: str
    """Training rows, .jsonl or .jsonl.gz."""
    corpus: str
    """A BEIR directory, of which corpus.jsonl is read."""
    candidates: str
    """Who ranks the corpus: `bm25`, a model (a directory or a name on the hub), or a TREC run of
    queries in queries.jsonl beside it."""
    preset: Preset | None = None
    """For a released model, which has no laser_config.json."""
    adapter: str | None = None
    """A directory with a PEFT LoRA adapter, merged into the model."""
    output: str
    """The .jsonl to write. Beside it stands NAME.report.json with the settings and counts."""


class _Row(NamedTuple):
    where: str
    record: dict[str, Any]
    row: TrainingRow
    known: list[str]
    """The positives of all rows with this query."""


def _read_rows(path: str) -> list[_Row]:
    of_query, rows = defaultdict[str, list[str]](list), []
    for where, line in json_lines(path):
        record = parse_json(line, where)
        row = parse_row(record, where)
        known = of_query[same_text(row.query)]
        known += row.positive_passages
        rows.append(_Row(where, record, row, known))
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def _read_documents(directory: str) -> dict[str, str]:
    """Ids and texts; blank ones are left out and counted in the log."""
    found = {document.id: document.text for document in read_corpus(directory)}
    texts = {id_: text for id_, text in found.items() if text.strip()}
    for count in count_ids("blank documents, left out", found, found.keys() - texts):
        _log.info("%s", count)
    if len(texts) < 2:
        raise DataError(f"{directory}: documents with text: {len(texts)}; two at least are wanted")
    return texts


def _retriever(options: MineOptions) -> tuple[list[Path], Callable[..., list[Ranking]]]:
    """Who ranks, as a function of rows, documents and depth, and the files that it is made of."""
    who = options.candidates
    if who == "bm25" or Path(who).is_file():
        fault = f"preset and adapter are for a model, and candidates is {who!r}"
        require(not (options.preset or options.adapter), fault)
        by_run = partial(ranked.rank_by_run, Path(who), options.corpus)
        of_run = [Path(who), *Path(options.corpus).glob("queries.jsonl")]
        return ([], ranked.rank_by_bm25) if who == "bm25" else (of_run, by_run)
    directory, adapter = model_directory(who), options.adapter
    of_both = [directory, *([Path(adapter)] if adapter else [])]
    files = [path for at in of_both for path in sorted(at.iterdir()) if path.is_file()]
    loading = {"preset": options.preset, "adapter": adapter}
    return files, partial(ranked.rank_by_model, directory, loading)


def _median(scores: list[float]) -> float | None:
    there = [score for score in scores if np.isfinite(score)]
    return float(np.median(there)) if there else None


def _mine(
    rows: list[_Row], documents: dict[str, str], rankings: list[Ranking], options: MineOptions
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The new records of the rows, and the report."""
    records, few, hardest, by_filter = [], {}, [], Counter[str]()
    for r, (at, ranking) in enumerate(zip(rows, rankings, strict=True)):
        found, counts = negatives_of(ranking, documents, at.row.query, at.known, options, r)
        new = {
            "negative_passages": list(found),
            "negative_sources": [{"who": options.candidates, **of} for of in found.values()],
            "positive_scores": [s if np.isfinite(s) else None for s in ranking.positives],
        }
        record = {k: v for k, v in at.record.items() if k != TEACHER_SCORES}  # of other passages
        records.append(record | new)
        by_filter += counts
        hardest.append(max((of["score"] for of in found.values()), default=-np.inf))
        if len(found) < options.negatives:
            few[at.where] = len(found)
    forms = set(map(same_text, documents.values()))
    positives = [text for at in rows for text in at.row.positive_passages]
    best, weakest = ([of(ranking.positives) for ranking in rankings] for of in (max, min))
    report = {
        "rows": len(rows),
        "positives_that_the_corpus_lacks": sum(same_text(text) not in forms for text in positives),
        "candidates_by_filter": dict(by_filter.most_common()),
        "negatives": sum(len(record["negative_passages"]) for record in records),
        "rows_with_too_few": len(few),
        "rows_with_a_negative_above_a_positive": int(np.greater(hardest, weakest).sum()),
        "rows_with_a_negative_above_all_positives": int(np.greater(hardest, best).sum()),
        "median_of_best_positives": _median(best),
        "median_of_hardest_negatives": _median(hardest),
        "too_few": few,
    }
    return records, report


def mine(options: MineOptions) -> dict[str, Any]:
    """Writes the rows and the report, unless the same command has. Returns the report."""
    output, rows = Path(options.output), _read_rows(options.input)
    documents, (files, rank) = _read_documents(options.corpus), _retriever(options)
    files = [Path(options.input), Path(options.corpus, "corpus.jsonl"), *files]
    made = as_dict(options) | {"output": output.name, "checksum": checksum(files)}
    name = f"{output.name}.report.json"

    def changed(old: dict[str, Any]) -> list[Change]:
        return changes(old["made"], made, source=name)

    with Claim(output.parent, name, changed, file=output.name) as claim:
        if output.exists() and claim.recorded is None:
            raise OutputError(f"{output} is there without its {name}: choose another --output")
        if output.exists() and claim.recorded:
            _log.info("%s is there already: nothing to do", output)
            return claim.recorded
        rankings = rank([at.row for at in rows], documents, options.ranks[1])
        records, report = _mine(rows, documents, rankings, options)
        if not report["negatives"]:
            by = report["candidates_by_filter"]
            raise DataError(f"{options.input}: no row gets a negative; candidates by filter: {by}")
        claim.record(json_text({"made": made, **report}))
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_atomically(output, "".join(lines))
    _log.info("%s", {key: value for key, value in report.items() if key != "too_few"})
    return report


main = program("mine", MineOptions, mine)
