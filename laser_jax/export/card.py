"""README.md of an export: what is known of the model from its files and from the run beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from laser_jax.config import ConfigError, RetrieverConfig
from laser_jax.evaluate.model import model_table
from laser_jax.evaluate.results import RESULTS_FILE, markdown_table, read_evaluation
from laser_jax.files.reading import DataError, read_json

UNKNOWN = "**unknown: fill in**"
# Of the backbones of the paper, by what their names begin with: identifier and page of the licence.
_LICENCES = {"qwen3-": "apache-2.0", "llama-3.2-": "llama3.2", "llama-3.1-": "llama3.1"}
_USE = """```python
from laser_jax import LatentRetriever

retriever = LatentRetriever.from_pretrained("NAME")
query = retriever.encode_query("Which town is at the sea?", instruction="Find the town")
document = retriever.encode_document("Kiel lies at the sea.")
```"""
_USE_ELSEWHERE = """```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("NAME", trust_remote_code=True)
query = model.encode_query("Which town is at the sea?", prompt="Find the town")
document = model.encode_document("Kiel lies at the sea.")
```

The code that thinks is `laser_retriever.py`. `prompt` is the instruction. `num_thinking_steps=K` takes another K, and
`truncate_dim=D, normalize_embeddings=True` shorter unit vectors. Pooling the backbone gives other vectors, so
`AutoModel` refuses this directory."""
_CITATION = """```bibtex
@misc{laser,
  title = {LaSER: a dense retriever that reasons in latent space},
  eprint = {2603.01425},
  archivePrefix = {arXiv},
  url = {https://arxiv.org/abs/2603.01425},
}
```"""


def model_card(model: Path, config: RetrieverConfig, target: str, name: str) -> str:
    """The card of the model in a directory, exported to a `target` and called `name`.

    Raises:
        ConfigError: config.json or results.json beside the directory is damaged.
    """
    run = _read_object(model.parent / "config.json")
    results = _read_object(model.parent / RESULTS_FILE)
    base, licence = _base(run)
    front = ["---", "pipeline_tag: sentence-similarity", "tags: [laser, dense-retrieval]"]
    front += ["library_name: sentence-transformers"] * (target == "sentence-transformers")
    front += [f"license: {licence}"] * (licence is not None)
    front += [f"base_model: {base}"] * (base is not None and base.count("/") == 1)
    uses = {"In laser_jax": _USE} if target != "stablehlo" else {}
    if target == "sentence-transformers":
        uses["In sentence-transformers"] = _USE_ELSEWHERE
    sections = {
        "Model": _facts(config, base),
        **{title: use.replace("NAME", name) for title, use in uses.items()},
        "Prompts": _prompts(config),
        "Data": _block(run.get("data"), "train", "split", "mixture", "eval", "eval_split"),
        "Recipe": _recipe(run, results),
        "Scores": "\n\n".join(_scores(model.parent, results)) or UNKNOWN,
        "Licence": f"- base model: {licence or UNKNOWN}\n- training data: {UNKNOWN}",
        "Citation": _CITATION,
    }
    body = [f"# {name.rpartition('/')[2]}", *(f"## {t}\n\n{text}" for t, text in sections.items())]
    return "\n".join([*front, "---", "", "\n\n".join(body), ""])


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object, {} where there is none."""
    try:
        values = read_json(file) if file.is_file() else {}
    except DataError as error:
        raise ConfigError(f"{error}; mend it, or move the model away from it") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: a JSON object is wanted; mend it, or move the model away")
    return values


def _base(run: dict[str, Any]) -> tuple[str | None, str | None]:
    """The base model of a run and its licence, None where they are not known."""
    model = run.get("model") or {}
    if model.get("scratch"):
        return "none, trained from scratch", None
    name = model.get("path")
    known = str(model.get("backbone") or Path(name or "").name).lower()
    licences = [licence for start, licence in _LICENCES.items() if known.startswith(start)]
    return name and _shown(name), next(iter(licences), None)


def _facts(config: RetrieverConfig, base: str | None) -> str:
    backbone, K = config.backbone, config.num_thinking_steps
    return (
        f"A dense retriever that thinks {K} latent steps before it embeds a query or a document "
        f"(LaSER, trained with laser_jax).\n\n- base model: {base or UNKNOWN}\n- backbone: "
        f"{backbone.family}, {backbone.num_layers} layers of {backbone.hidden_size}\n- vectors: "
        f"{backbone.hidden_size} dimensions, of length 1, compared by cosine\n- K: {K}, "
        f"pooled: {config.pooling.replace('_', ' ')}"
    )


def _prompts(config: RetrieverConfig) -> str:
    prompt = config.prompt
    limits = {"query": prompt.query_max_length, "document": prompt.document_max_length}
    templates = {"query": prompt.query_template, "document": prompt.document_template}
    rows = [[role, f"`{templates[role]!r}`", str(limits[role])] for role in templates]
    form = "as a user's turn of the chat template" if prompt.chat_template else "as they stand"
    return f"{markdown_table(['role', 'template', 'most tokens'], rows)}\n\nThey are read {form}."


def _recipe(run: dict[str, Any], results: dict[str, Any]) -> str:
    keys = ("objective", "lora", "optimizer")
    train = {**(run.get("train") or {}), **results}
    done = _block(train, "batch_size", "seed", "steps", "exported_step", "train_seconds")
    return "\n".join(f"- {key}: `{_plain(run[key])}`" for key in keys if run.get(key)) + (
        f"\n{done}" if run else UNKNOWN
    )


def _block(values: Any, *keys: str) -> str:
    """A list of the settings that are there."""
    values = values if isinstance(values, dict) else {}
    lines = [f"- {key}: `{_plain(values[key])}`" for key in keys if values.get(key) is not None]
    return "\n".join(lines) or UNKNOWN


def _plain(value: Any) -> str:
    """A setting in JSON; of a path its last two parts, as the rest is of one machine."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    return _shown(value) if isinstance(value, str) else json.dumps(value)


def _shown(path: str) -> str:
    return re.sub(r"^/(?:.*/)?(?=[^/]+/[^/]+/?$)", "", path)


def _scores(run: Path, results: dict[str, Any]) -> Iterator[str]:
    """The table of the training run, one row a K, and every evaluation in its directory, with the
    intervals of its differences."""
    scores = results.get("scores")
    if isinstance(scores, dict) and scores and "differences" not in results:
        metrics = list(next(iter(scores.values())))
        rows = [[name, *(f"{of[m]:.4f}" for m in metrics)] for name, of in scores.items()]
        yield "After training, without intervals:\n\n" + markdown_table(["run", *metrics], rows)
    for file in sorted([*run.glob(RESULTS_FILE), *run.glob(f"*/{RESULTS_FILE}")]):
        if "differences" in _read_object(file):
            yield model_table(read_evaluation(file.parent))
