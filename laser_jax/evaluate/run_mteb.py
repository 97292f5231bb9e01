"""Evaluates a model on tasks of mteb: BRIGHT, FollowIR, BrowseComp-Plus or any other retrieval.

    python -m laser_jax.evaluate_mteb --model DIR --tasks "BRIGHT(v1.1)" --output DIR

mteb loads the data, from the hub or its local cache, and scores. Results stay in mteb's layout in
the output directory, and what is there is not computed again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from laser_jax.command_line import parse_command_line
from laser_jax.config import ConfigError, Dtype, MeshConfig, load_retriever_config
from laser_jax.evaluate.results import markdown_table, model_name
from laser_jax.files.durable import write_atomically
from laser_jax.files.terminal import fail
from laser_jax.inference.options import with_max_length
from laser_jax.inference.retriever import LatentRetriever, local_mesh

if TYPE_CHECKING:
    from laser_jax.evaluate.mteb import MtebRetriever, TaskScore

SCORES_FILE = "scores.json"


@dataclass(frozen=True)
class MtebOptions:
    """Evaluates a model on tasks of mteb, BRIGHT with exclusions and without."""

    model: str
    """A directory that laser_jax.train exported."""
    tasks: str
    """Names of mteb's benchmarks and tasks with commas between: "BRIGHT(v1.1)", BRIGHT, FollowIR,
    BrowseCompPlusRetrieval, ..."""
    output: str
    """The directory to write: mteb's results, and scores.json."""
    name: str | None = None
    """What mteb calls the model, organisation/model; by default laser_jax/ and its directory."""
    adapter: str | None = None
    """A directory with a PEFT LoRA adapter for the model."""
    num_thinking_steps: int | None = None
    """K; None takes the model's."""
    instruction: str | None = None
    """One task description for all queries, instead of the task's."""
    max_length: int | None = None
    """Tokens of a query and of a document; None takes the model's limits (the paper trains at 512
    and evaluates at 8192)."""
    dtype: Dtype | None = None
    """Compute in another dtype than the model's."""
    batch_size: int = 64
    """The most rows of a batch."""
    batch_tokens: int = 8192
    """The most tokens of a batch, on all devices together."""
    devices: int | None = None
    """Local devices that share every batch. None: all of them."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How those devices share weights and rows; by default rows alone."""
    overwrite: bool = False
    """Compute again what is in the output directory."""

    def __post_init__(self) -> None:
        if not task_names(self.tasks):
            raise ConfigError("tasks must name one task at least")
        counts = ("num_thinking_steps", "max_length", "batch_size", "batch_tokens", "devices")
        for key in counts:
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"{key} must be at least 1, got {value}")


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
        for task in named:
            print(f"{task.metadata.name}, {len(scores[name]) + 1} of {len(named)}")
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

    config = load_retriever_config(options.model)
    experiment = {}
    if options.dtype is not None and options.dtype != config.dtype:
        config = replace(config, dtype=options.dtype)
        experiment["dtype"] = options.dtype
    if options.max_length is not None:
        config = with_max_length(config, options.max_length)
        experiment["max_length"] = options.max_length
    name = options.name or Path(model_name(options.model)).name
    return MtebRetriever(
        LatentRetriever.from_pretrained(
            options.model,
            config=config,
            adapter=options.adapter,
            batch_size=options.batch_size,
            batch_tokens=options.batch_tokens,
            mesh=local_mesh(options.mesh, options.devices),
        ),
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
        rows += [
            _row(
                score.task if score.subset == "default" else f"{score.task}, {score.subset}",
                [score],
            )
            for score in named
        ]
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


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    try:
        options = parse_command_line(MtebOptions, "python -m laser_jax.evaluate_mteb", arguments)
        table = score_table(evaluate(options))
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    print(f"\n{table}\n\nwritten to {options.output}")
