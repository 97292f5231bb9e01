"""Evaluates a model on tasks of mteb: BRIGHT, FollowIR, BrowseComp-Plus or any other retrieval.

    python -m laser_jax.evaluate mteb --model DIR --tasks "BRIGHT(v1.1)" --output DIR

mteb loads the data, from the hub or its local cache, and scores. Results stay in mteb's layout in
the output directory, and what is there is not computed again.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from laser_jax.config import ConfigError, load_retriever_config, parse_command_line
from laser_jax.evaluate.results import markdown_table, model_name
from laser_jax.evaluate.retrieval import EncodingOptions, load_retriever, require_positive
from laser_jax.files.durable import write_atomically

if TYPE_CHECKING:
    from laser_jax.evaluate.mteb import MtebRetriever, TaskScore

SCORES_FILE = "scores.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MtebOptions(EncodingOptions):
    """Evaluates a model on tasks of mteb, BRIGHT with exclusions and without. `name` is what mteb
    calls the model, organisation/model; by default laser_jax/ and its directory."""

    tasks: str
    """Names of mteb's benchmarks and tasks with commas between: "BRIGHT(v1.1)", BRIGHT, FollowIR,
    BrowseCompPlusRetrieval, ..."""
    output: str
    """The directory to write: mteb's results, and scores.json."""
    num_thinking_steps: int | None = None
    """K; None takes the model's."""
    overwrite: bool = False
    """Compute again what is in the output directory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("num_thinking_steps", self.num_thinking_steps)
        if not task_names(self.tasks):
            raise ConfigError("tasks must name one task at least")


def task_names(tasks: str) -> list[str]:
    """The names; a comma within brackets is a part of its name, as in `MTEB(eng, v2)`."""
    return [name.strip() for name in re.split(r",(?![^(]*\))", tasks) if name.strip()]


def evaluate(options: MtebOptions) -> dict[str, list[TaskScore]]:
    """Runs the tasks and writes the output directory.

    Returns:
        Name as asked for -> a score each task, split and subset.

    Raises:
        ConfigError, ValueError, FileNotFoundError: bad input; the message names it.
        OSError: data that can be had neither from the hub nor from its cache.
        ImportError: without mteb.
    """
    from laser_jax.evaluate.mteb import evaluate_task, find_tasks

    tasks = {name: find_tasks(name) for name in task_names(options.tasks)}
    model = _load(options)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    scores: dict[str, list[TaskScore]] = {}
    for name, named in tasks.items():
        scores[name] = []
        for number, task in enumerate(named, start=1):
            logger.info("%s, %d of %d", task.metadata.name, number, len(named))
            scores[name] += evaluate_task(
                model, task, output, batch_size=options.batch_size, overwrite=options.overwrite
            )
    text = json.dumps(
        {name: [asdict(score) for score in named] for name, named in scores.items()}, indent=2
    )
    write_atomically(output / SCORES_FILE, text + "\n")
    return scores


def _load(options: MtebOptions) -> MtebRetriever:
    from laser_jax.evaluate.mteb import MtebRetriever, model_revision

    own = load_retriever_config(options.model)
    experiment = {}  # what sets the results apart from those of the model as it was exported
    if options.compute_dtype not in (None, own.dtype):
        experiment["dtype"] = options.compute_dtype
    if options.max_length is not None:
        experiment["max_length"] = options.max_length
    name = options.name or Path(model_name(options.model)).name
    return MtebRetriever(
        load_retriever(options, options.num_thinking_steps or own.num_thinking_steps),
        name=name if "/" in name else f"laser_jax/{name}",
        revision=model_revision(options.model, *filter(None, [options.adapter])),
        num_thinking_steps=options.num_thinking_steps,
        instruction=options.instruction,
        experiment=experiment,
    )


def score_table(scores: Mapping[str, Sequence[TaskScore]]) -> str:
    """Every score, and the mean of each split of what was asked for by one name."""
    rows = []
    for name, named in scores.items():
        for score in named:
            subset = "" if score.subset == "default" else f", {score.subset}"
            rows.append(_row(score.task + subset, [score]))
        for split in dict.fromkeys(score.split for score in named):
            group = [score for score in named if score.split == split]
            if len(group) > 1:
                rows.append(_row(f"mean of {len(group)}, {name}, {split}", group))
    return markdown_table(["task", "metric", "score", "nothing excluded"], rows)


def _row(title: str, scores: Sequence[TaskScore]) -> list[str]:
    metrics = dict.fromkeys(score.metric for score in scores)
    free = [score.nothing_excluded for score in scores if score.nothing_excluded is not None]
    return [
        title,
        ", ".join(metrics),
        f"{np.mean([score.score for score in scores]):.4f}",
        f"{np.mean(free):.4f}" if len(free) == len(scores) else "-",
    ]


def main(program: str, arguments: Sequence[str]) -> None:
    """The command line."""
    options = parse_command_line(MtebOptions, program, arguments)
    print(score_table(evaluate(options)))
    logger.info("written to %s", options.output)
