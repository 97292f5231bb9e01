"""A retriever as a model of mteb, and mteb's tasks with LaSER's instructions (extra `mteb`).

    python -m laser_jax.evaluate mteb --model DIR --tasks "BRIGHT(v1.1)" --output DIR

mteb loads the data, from the hub or its local cache, and scores. What is in the output directory is
not computed again: it is a cache of mteb, with the results in DIR/results/NAME/REVISION, and under
`experiments` there whatever differs from the model as it was exported: another K, other limits,
another instruction, exclusions left out.
"""

import copy
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self, cast

import numpy as np

from laser_jax.command_line import parse_command_line
from laser_jax.data.schema import as_strings
from laser_jax.evaluate.bright import INSTRUCTIONS
from laser_jax.evaluate.results import markdown_table, model_name
from laser_jax.evaluate.retrieval import EvaluationOptions, load_retriever
from laser_jax.files.claim import Claim
from laser_jax.files.durable import checksum, json_text
from laser_jax.files.terminal import extra
from laser_jax.inference.options import read_retriever_config
from laser_jax.inference.retriever import LatentRetriever
from laser_jax.models.directory import model_directory
from laser_jax.settings import require

with extra("mteb", "evaluation by mteb"):
    import mteb
    from mteb.abstasks import AbsTask, AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ScoringFunction
    from mteb.types import PromptType

SCORES_FILE = "scores.json"
_log = logging.getLogger(__name__)

# Tasks of BRIGHT(v1.1), such as BrightEarthScienceRetrieval, in lower case -> domain.
_BRIGHT_TASKS = {f"bright{domain.replace('_', '')}retrieval": domain for domain in INSTRUCTIONS}
BRIGHT_WITH_SUBSETS = ("BrightRetrieval", "BrightLongRetrieval")
"""Tasks of BRIGHT and BRIGHT (long), whose subsets are the domains and which exclude nothing."""
# The released evaluator takes these from a file that is not released; that of Qwen3-Embedding's
# evaluation, which it is made from, has this sentence (docs/evaluation.md).
FOLLOWIR_INSTRUCTION = "Retrieval the relevant passage for the given query"
FOLLOWIR_TASKS = [f"{name}InstructionRetrieval" for name in ("Core17", "News21", "Robust04")]


class MtebRetriever(AbsEncoder):
    """A `LatentRetriever` as mteb wants a model. `mteb_model_meta` has the name and revision under
    which mteb keeps results, and what sets these apart (`experiment_kwargs`)."""

    def __init__(
        self,
        retriever: LatentRetriever,
        *,
        name: str,
        revision: str = "no_revision_available",
        num_thinking_steps: int | None = None,
        instruction: str | None = None,
        experiment: Mapping[str, Any] | None = None,
    ) -> None:
        """mteb takes results of the same name and revision (`model_revision`) from its cache.

        Args:
            name: of the form `organisation/model`, or it is a ValueError.
            num_thinking_steps: K, of queries alone where the model has one of its own for
                documents; None takes the model's.
            instruction: one task description for all tasks, instead of `instruction_of`.
            experiment: what else sets the results apart from those of the exported model.
        """
        if name.count("/") != 1:
            raise ValueError(f"mteb wants a name of the form organisation/model, got {name!r}")
        config = retriever.encoder.config
        settings = dict(experiment or {})
        if num_thinking_steps not in (None, config.num_thinking_steps):
            settings["num_thinking_steps"] = num_thinking_steps
        if instruction is not None:
            settings["instruction"] = instruction
        self.retriever, self._K, self._instruction = retriever, num_thinking_steps, instruction
        self._last_documents: dict[tuple[int, int], np.ndarray] = {}
        self.mteb_model_meta: ModelMeta = ModelMeta.create_empty(
            {
                "name": name,
                "revision": revision,
                "max_tokens": config.prompt.document_max_length,
                "embed_dim": config.backbone.hidden_size,
                "similarity_fn_name": ScoringFunction.COSINE,
                "use_instructions": True,
                "experiment_kwargs": settings or None,
            }
        )

    def without_exclusions(self) -> Self:
        """The same model, whose results mteb keeps apart as those without exclusions."""
        other = copy.copy(self)
        meta = self.mteb_model_meta
        kwargs = {**(meta.experiment_kwargs or {}), "exclusions": "none"}
        other.mteb_model_meta = meta.model_copy(update={"experiment_kwargs": kwargs})
        return other

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        **_: Any,
    ) -> np.ndarray:
        """Embeds the texts of mteb's batches, a list of strings as "text" in each: documents bare,
        all else as queries with the task's instruction. Gives [N, D] float32 unit rows. Raises a
        ValueError on other inputs, and as `LatentRetriever.encode_query`."""
        texts: list[str] = []
        for batch in inputs:
            if not isinstance(batch, Mapping):
                got = f"not a {type(inputs).__name__} of {type(batch).__name__}"
                wanted = 'batches whose "text" is a list of strings, as of mteb\'s DataLoader'
                raise ValueError(f"wanted {wanted}, {got}")
            texts += as_strings("text", batch["text"])
        options: dict[str, Any] = {"batch_size": batch_size, "num_thinking_steps": self._K}
        options["show_progress_bar"] = show_progress_bar
        if prompt_type == PromptType.document:
            own = self.retriever.encoder.config.document_thinking_steps
            return self._documents(texts, options | {"num_thinking_steps": own or self._K})
        instruction = self.instruction_of(task_metadata, hf_subset)
        return self.retriever.encode_query(texts, instruction=instruction, **options)

    def _documents(self, texts: list[str], options: Mapping[str, Any]) -> np.ndarray:
        """Keeps the last corpus, which is searched twice where documents are excluded."""
        key = len(texts), hash(tuple(texts))
        if key not in self._last_documents:
            self._last_documents.clear()  # before the next one is in memory
            self._last_documents[key] = self.retriever.encode_document(texts, **options)
        return self._last_documents[key]

    def instruction_of(self, task: TaskMetadata, subset: str) -> str:
        """The task in words: LaSER's for BRIGHT and FollowIR, mteb's for all others."""
        if self._instruction is not None:
            return self._instruction
        domain = subset if task.name in BRIGHT_WITH_SUBSETS else _domain_of(task.name)
        if domain is not None:
            return INSTRUCTIONS[domain]
        if task.name in FOLLOWIR_TASKS:
            return FOLLOWIR_INSTRUCTION
        return self.get_instruction(task, PromptType.query)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Cosines [N, M] float32 of rows of arrays or tensors."""
        return LatentRetriever.similarity(np.asarray(embeddings1), np.asarray(embeddings2))

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Cosines [N] float32 of each row with the same row of the other."""
        return LatentRetriever.similarity_pairwise(np.asarray(embeddings1), np.asarray(embeddings2))


def model_revision(*directories: str | Path) -> str:
    """A revision of 16 hexadecimal digits, of the bytes of all files of a model and its adapter
    that are read: weights, settings, tokenizer and chat template."""
    files = [path for directory in directories for path in sorted(Path(directory).iterdir())]
    kinds = (".safetensors", ".json", ".jinja", ".model")
    return checksum(f for f in files if f.suffix in kinds or f.name == "merges.txt")[:16]


def _domain_of(task: str) -> str | None:
    """The domain of a task of BRIGHT(v1.1), of passages or of `Long` documents; None of others."""
    return _BRIGHT_TASKS.get(task.lower().replace("longretrieval", "retrieval"))


# --- tasks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskScore:
    """The main score of one task, or of one subset of it."""

    task: str
    subset: str
    split: str
    metric: str
    score: float
    """As mteb defines the task."""
    nothing_excluded: float | None
    """BRIGHT's without exclusions; None for other tasks."""


def find_tasks(name: str) -> list[AbsTask]:
    """The tasks of a benchmark, or the task of that name. Raises a ValueError on any other."""
    try:
        return list(mteb.get_benchmark(name).tasks)
    except KeyError as error:
        unknown = error
    try:
        return [mteb.get_task(name)]
    except KeyError:
        raise ValueError(f"no benchmark or task of mteb: {unknown.args[0]}") from unknown


def evaluate_task(
    model: MtebRetriever, task: AbsTask, output: str | Path, *, batch_size: int = 64
) -> list[TaskScore]:
    """Runs a task, and where a task of BRIGHT excludes documents also without exclusions: a score
    each split and subset. Results that are in mteb's cache `output` are not computed again."""

    def run(model: MtebRetriever) -> dict[tuple[str, str], float]:
        result = mteb.evaluate(
            cast(Any, model),  # its protocol also wants a constructor that loads from the hub
            task,
            cache=mteb.ResultCache(output),
            overwrite_strategy="only-missing",
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": True},
            show_progress_bar=False,
            co2_tracker=False,
        )
        (task_result,) = result.task_results
        return {
            (split, scores["hf_subset"]): float(scores["main_score"])
            for split, subsets in task_result.scores.items()
            for scores in subsets
        }

    name = task.metadata.name
    domain = _domain_of(name)
    # of long documents nothing is excluded, as exclusions name passages
    may_exclude = domain is not None and "Long" not in name
    excluding = task if may_exclude and isinstance(task, AbsTaskRetrieval) else None
    if excluding:
        excluding.load_data()
        excluding.convert_v1_dataset_format_to_v2(num_proc=None)
    scores = run(model)
    of_bright = domain is not None or name in BRIGHT_WITH_SUBSETS
    unrestricted = scores if of_bright else dict.fromkeys(scores)
    if excluding:
        if _exclude_nothing(excluding):
            unrestricted = run(model.without_exclusions())
        excluding.unload_data()
    return [
        TaskScore(name, subset, split, task.metadata.main_score, score, unrestricted[split, subset])
        for (split, subset), score in scores.items()
    ]


def _exclude_nothing(task: AbsTaskRetrieval) -> bool:
    """Lets every query of a loaded task have every document; whether that changed anything. mteb's
    tasks of BRIGHT(v1.1) exclude by listing the documents that a query may have."""
    splits = [split for splits in task.dataset.values() for split in splits.values()]
    excluding = [split for split in splits if split["top_ranked"] is not None]
    for split in excluding:
        documents = list(split["corpus"]["id"])
        split["top_ranked"] = dict.fromkeys(split["queries"]["id"], documents)
    return bool(excluding)


# --- the program -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MtebOptions(EvaluationOptions):
    """Evaluates a model on tasks of mteb, BRIGHT with exclusions and without. `name` is what mteb
    calls the model, organisation/model; by default laser_jax/ and its directory. The output is a
    cache of mteb beside scores.json: what it holds is not computed again."""

    tasks: str
    """Names of mteb's benchmarks and tasks with commas between: "BRIGHT(v1.1)", BRIGHT, FollowIR,
    BrowseCompPlusRetrieval, ..."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(task_names(self.tasks)), "tasks must name one task at least")


def task_names(tasks: str) -> list[str]:
    """The names; a comma within brackets is a part of its name, as in `MTEB(eng, v2)`."""
    return [name.strip() for name in re.split(r",(?![^(]*\))", tasks) if name.strip()]


def evaluate(options: MtebOptions) -> dict[str, list[TaskScore]]:
    """Runs the tasks and writes the output directory, which it holds for the while: name as asked
    for -> a score each task, split and subset. Raises an OSError also on data that can be had
    neither from the hub nor from its cache."""
    tasks = {name: find_tasks(name) for name in task_names(options.tasks)}
    with Claim(options.output, SCORES_FILE, lambda scores: []) as claim:  # any scores may be there
        model = _load(options)
        scores: dict[str, list[TaskScore]] = {name: [] for name in tasks}
        for name, named in tasks.items():
            for number, task in enumerate(named, start=1):
                _log.info("%s, %d of %d", task.metadata.name, number, len(named))
                batch = options.batch_size
                scores[name] += evaluate_task(model, task, claim.directory, batch_size=batch)
        found = {name: [asdict(score) for score in named] for name, named in scores.items()}
        claim.record(json_text(found))
    return scores


def _load(options: MtebOptions) -> MtebRetriever:
    directory = model_directory(options.model)
    own = read_retriever_config(directory, options.preset)
    dtype = options.compute_dtype if options.compute_dtype != own.dtype else None
    asked = {"preset": options.preset, "dtype": dtype, "max_length": options.max_length}
    K = options.num_thinking_steps
    name = options.name or Path(model_name(options.model)).name
    return MtebRetriever(
        load_retriever(replace(options, num_thinking_steps=None), K or 1),
        name=name if "/" in name else f"laser_jax/{name}",
        revision=model_revision(directory, *filter(None, [options.adapter])),
        num_thinking_steps=K,
        instruction=options.instruction,
        experiment={key: value for key, value in asked.items() if value is not None},
    )


def score_table(scores: Mapping[str, Sequence[TaskScore]]) -> str:
    """Every score, and the mean of each split of what was asked for by one name."""
    groups: list[tuple[str, list[TaskScore]]] = []
    for name, named in scores.items():
        for score in named:
            subset = "" if score.subset == "default" else f", {score.subset}"
            groups.append((score.task + subset, [score]))
        for split in dict.fromkeys(score.split for score in named):
            group = [score for score in named if score.split == split]
            if len(group) > 1:
                groups.append((f"mean of {len(group)}, {name}, {split}", group))
    rows = []
    for title, group in groups:
        metrics = ", ".join(dict.fromkeys(score.metric for score in group))
        free = [score.nothing_excluded for score in group if score.nothing_excluded is not None]
        unrestricted = f"{np.mean(free):.4f}" if len(free) == len(group) else "-"
        rows.append([title, metrics, f"{np.mean([s.score for s in group]):.4f}", unrestricted])
    return markdown_table(["task", "metric", "score", "nothing excluded"], rows)


def main(program: str, arguments: Sequence[str]) -> None:
    options = parse_command_line(MtebOptions, program, arguments)
    print(score_table(evaluate(options)))
    _log.info("written to %s", options.output)
