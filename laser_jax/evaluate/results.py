"""The directory that an evaluation of a model leaves, written and read:

results.json            scores, differences and what was evaluated
per_query.tsv           query_id, run and every metric
runs/*.trec             the rankings
quality_by_steps.svg    the first metric against K
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from laser_jax.config import ConfigError, from_dict
from laser_jax.evaluate.oracle import StepsOracle
from laser_jax.evaluate.significance import CONFIDENCE, RESAMPLES
from laser_jax.files.claim import Claim, OutputError
from laser_jax.files.durable import folder_written_whole, write_atomically, write_json
from laser_jax.files.reading import DataError, parse_number, read_object, text_lines
from laser_jax.search.matching import IdCount
from laser_jax.search.trec import Run, write_trec_run

RESULTS_FILE, PER_QUERY_FILE = "results.json", "per_query.tsv"
PLOT_STEM = "quality_by_steps"

Scores = dict[str, dict[str, float]]
"""Run -> metric -> mean."""
QueryScores = dict[str, dict[str, float]]
"""Query id -> metric -> value."""


@dataclass(frozen=True)
class Difference:
    """The mean of `metric` over queries for `run` less that for `against`, with its interval."""

    run: str
    against: str
    metric: str
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """What `results.json` holds."""

    model: str
    """What it is called in tables."""
    data: str
    split: str
    num_thinking_steps: int
    """The model's own K."""
    metrics: list[str]
    documents: int
    queries: int
    queries_without_relevant: int
    scores: Scores
    differences: list[Difference]
    document_thinking_steps: int | None = None
    """The K of all documents; None where they were read at each run's own."""
    query_max_length: int | None = None
    """Tokens of a query's prompt that are read, as `document_max_length`; None was not recorded."""
    document_max_length: int | None = None
    dtype: str | None = None
    pools_prompt: bool = True
    """Whether the latent view at K = 1 reads the query by itself."""
    confidence: float = CONFIDENCE
    """How the intervals were drawn, with `resamples` and `seed`."""
    resamples: int = RESAMPLES
    seed: int = 0
    milliseconds_per_query: dict[str, float] = field(default_factory=dict)
    """Run -> time to embed a query, where it was measured."""
    writing_milliseconds_per_query: dict[str, float] = field(default_factory=dict)
    """Run -> time to write the text that a query is read with, where the file of rewrites says."""
    shortened: dict[str, int] = field(default_factory=dict)
    """`documents`, or `queries` and how they were read -> how many did not fit into the model's
    limits and lost their ends."""
    steps_oracle: StepsOracle | None = None
    """In the first metric; None where the latent view was evaluated at a single K."""
    id_counts: list[IdCount] = field(default_factory=list)
    """Ids that match nothing, and documents with their query's id."""


def model_name(directory: str | Path) -> str:
    """What a model is called: its directory, less a last part `model`."""
    path = Path(directory)
    return str(path.parent if path.name == "model" and path.parent.name else path)


def _write_per_query(path: Path, per_query: Mapping[str, QueryScores]) -> None:
    """Writes a table with the columns query_id, run and the metrics."""
    metrics = list(next(iter(next(iter(per_query.values())).values())))
    rows = [["query_id", "run", *metrics]]
    for run, queries in per_query.items():
        rows += [[query, run, *(repr(of[m]) for m in metrics)] for query, of in queries.items()]
    write_atomically(path, "".join("\t".join(row) + "\n" for row in rows))


def read_per_query(path: Path) -> dict[str, QueryScores]:
    """Reads what `write_results` wrote: run -> query -> metric -> value. Raises a FileNotFoundError
    when it is missing, and a DataError on a line of another form."""
    per_query: dict[str, QueryScores] = {}
    metrics: list[str] = []
    for where, line in text_lines(path):
        fields = line.rstrip("\n").split("\t")
        if not metrics:
            if fields[:2] != ["query_id", "run"] or len(fields) < 3:
                raise DataError(f"{where}: wanted the header query_id, run, metrics")
            metrics = fields[2:]
            continue
        values = [value for field in fields[2:] if (value := parse_number(field)) is not None]
        if not len(fields) - 2 == len(values) == len(metrics):
            wanted = f"query_id, run and {len(metrics)} numbers"
            raise DataError(f"{where}: wanted {wanted}, got {line!r}")
        query, run = fields[:2]
        per_query.setdefault(run, {})[query] = dict(zip(metrics, values, strict=True))
    return per_query


@contextmanager
def new_directory(output: str | Path) -> Iterator[None]:
    """Holds the directory of an evaluation that begins. Without results nothing is left of it.
    Raises an OutputError, before the work, where it holds an evaluation or another process has it.
    """
    with Claim(output, RESULTS_FILE, lambda results: []):
        if (Path(output) / RESULTS_FILE).exists():
            way_out = "choose another --output, or delete it"
            raise OutputError(f"{output} holds an evaluation: {way_out}")
        yield


def write_results(
    output: Path,
    results: Mapping[str, Any],
    per_query: Mapping[str, QueryScores],
    runs: Mapping[str, Run] = MappingProxyType({}),
    draw: Callable[[Path], None] | None = None,
) -> None:
    """Writes the files of an evaluation into a directory: what results.json is to hold, the values
    per query of each run, the rankings by their names, and what `draw` draws, which is given a
    stem. If that fails, nothing of it is left."""
    with folder_written_whole(output) as part:
        for name, run in runs.items():
            slug = re.sub(r"[^A-Za-z0-9]+", "-", name)
            (part / "runs").mkdir(exist_ok=True)
            write_trec_run(run, part / "runs" / f"{slug}.trec", slug)
        _write_per_query(part / PER_QUERY_FILE, per_query)
        if draw is not None:
            draw(part / PLOT_STEM)
        write_json(part / RESULTS_FILE, results)


def read_evaluation(directory: str | Path) -> Evaluation:
    """Reads `results.json`. Raises a FileNotFoundError when there is none, and a DataError when it
    is no evaluation of a model."""
    path = Path(directory) / RESULTS_FILE
    if not path.is_file():
        wanted = "a directory that python -m laser_jax.evaluate model wrote"
        raise FileNotFoundError(f"{path} is missing: wanted {wanted}")
    try:
        return from_dict(Evaluation, read_object(path), source=str(path))
    except (ConfigError, DataError) as error:
        raise DataError(f"{path}: no results of laser_jax.evaluate: {error}") from error


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table whose columns are aligned in plain text too: the first column to the
    left, the others to the right."""
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    pads = [str.ljust] + [str.rjust] * (len(header) - 1)

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(p(c, w) for p, c, w in zip(pads, cells, widths, strict=True))} |"

    rule = [f":{'-' * (widths[0] - 1)}"] + [f"{'-' * (width - 1)}:" for width in widths[1:]]
    return "\n".join(map(line, [header, rule, *rows]))
