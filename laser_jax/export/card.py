"""README.md of an export: what is known of the model from its files and from the run beside it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from laser_jax.config import ConfigError, RetrieverConfig, as_dict
from laser_jax.evaluate.model import model_table
from laser_jax.evaluate.results import PER_QUERY_FILE, RESULTS_FILE, read_evaluation, read_per_query
from laser_jax.evaluate.retrieval import format_table
from laser_jax.files.reading import read_object

UNKNOWN = "**unknown: fill in**"
_QWEN_2_5 = tuple(f"qwen2.5-{size}b" for size in ("0.5", "1.5", "7", "14", "32"))  # 3, 72: own ones
_LICENCES = {
    "apache-2.0": ("qwen3-", *_QWEN_2_5, "smollm2", "mistral-7b-"),
    "llama3.2": ("llama-3.2-",),
    "llama3.1": ("llama-3.1-",),
}
"""Licence -> what the names of base models under it begin with."""
_LAID_DOWN = {
    "Data": {"data": ("train", "split", "mixture", "eval", "eval_split")},
    "Recipe": dict.fromkeys(("objective", "lora", "optimizer"), ())
    | {"train": ("batch_size", "epochs", "steps", "seed")},
}
"""Section -> group of a run's config -> which of its settings, or all."""
_OURS = """from laser_jax import LatentRetriever

retriever = LatentRetriever.from_pretrained("NAME")
query = retriever.encode_query("Which town is at the sea?", instruction="Find the town")
document = retriever.encode_document("Kiel lies at the sea.")
"""
_THEIRS = """
from sentence_transformers import SentenceTransformer

# with the code that thinks: pooling gives other vectors, so AutoModel refuses the directory
model = SentenceTransformer("NAME", trust_remote_code=True)
query = model.encode_query("Which town is at the sea?", prompt="Find the town")
document = model.encode_document("Kiel lies at the sea.")
shorter = model.encode_document("...", truncate_dim=64, normalize_embeddings=True)
"""
_JAX = """import jax, numpy as np

encode = jax.export.deserialize(open("encode.bin", "rb").read())
weights = list(np.load("weights.npz").values())
vectors = jax.jit(encode.call)(weights, input_ids, attention_mask)  # [B, T] int32 to [B, D]
"""
_USE = {"sentence-transformers": _OURS + _THEIRS, "hf": _OURS, "stablehlo": _JAX}
_CITATION = Path(__file__).with_name("citation.bib")


def model_card(
    model: Path, config: RetrieverConfig, target: str, name: str, data_licence: str | None
) -> str:
    """The card of the model in a directory, exported to a `target` and called `name`. Raises a
    ConfigError or DataError where config.json or a file of results beside it is damaged."""
    run, results = (_read_object(model.parent / file) for file in ("config.json", RESULTS_FILE))
    base, licence = _base(run.get("model") or {})
    front = {
        "pipeline_tag": "sentence-similarity",
        "library_name": "laser_jax" if target == "hf" else target,
        "tags": ["laser", "dense-retrieval"],
        "license": licence,
        "base_model": base if base.count("/") == 1 else None,
    }
    settings = as_dict(config)
    backbone = settings.pop("backbone")
    sections = {
        "Use": _block("python", _USE[target].replace("NAME", name)),
        "Model and prompts": f"Vectors of {backbone['hidden_size']} dimensions and length 1, to be "
        "compared by cosine. The prompt is laid out as in training:\n\n"
        + _block("yaml", _yaml(settings)),
        **{title: _laid_down(run, groups) for title, groups in _LAID_DOWN.items()},
        "Scores": "\n\n".join(_scores(model.parent, results) if run else ()) or UNKNOWN,
        "Licence": f"Of the base model, {base}: {licence or UNKNOWN}. Of the training data: "
        f"{data_licence or UNKNOWN}.",
        "Citation": _block("bibtex", _CITATION.read_text()),
    }
    about = (
        f"A dense retriever (LaSER, by laser_jax) that thinks {config.num_thinking_steps} latent "
        f"steps before it embeds a query, and {config.documents_at} before a document. Base model: "
        f"{base}."
    )
    known = _yaml({key: value for key, value in front.items() if value})
    parts = [f"---\n{known}---\n\n# {Path(name).name}\n\n{about}"]
    parts += [f"## {title}\n\n{text}" for title, text in sections.items()]
    return "\n\n".join(parts) + "\n"


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object of objects and values, {} where there is none."""
    values = read_object(file) if file.is_file() else {}
    groups = ("model", "data", "train", "scores", "objective", "lora", "optimizer")
    if any(type(values.get(g) or {}) is not dict for g in groups):
        raise ConfigError(f"{file} is of no training run; mend it, or move the model away from it")
    return values


def _base(model: dict[str, Any]) -> tuple[str, str | None]:
    """What a model was trained from, and the licence of that where it is known."""
    if model.get("scratch"):
        return "none (trained from scratch)", None
    name = _shown(str(model.get("path") or UNKNOWN))
    known = str(model.get("backbone") or Path(name).name).lower().removeprefix("meta-")
    return name, next((kind for kind, of in _LICENCES.items() if known.startswith(of)), None)


def _laid_down(run: dict[str, Any], groups: dict[str, tuple[str, ...]]) -> str:
    """The settings of a run, less those that are not set."""
    found = {}
    for group, keys in groups.items():
        settings = (run.get(group) or {}).items()
        found[group] = {k: v for k, v in settings if v and (not keys or k in keys)}
    return _block("yaml", _yaml({g: of for g, of in found.items() if of})) if run else UNKNOWN


def _scores(run: Path, results: dict[str, Any]) -> Iterator[str]:
    """The table of the training run, a row a K, and every evaluation beside it, with intervals."""
    if results.get("scores") and "metrics" in results:
        step = results.get("exported_step", "?")
        try:
            table = format_table(results["scores"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            wanted = "wanted a number for each metric of each run"
            raise ConfigError(f"{run / RESULTS_FILE}: scores: {wanted}") from error
        yield f"After step {step} of one training, without intervals:\n\n{table}"
    files = sorted(run.glob(f"*/{RESULTS_FILE}"))
    for file in (f for f in files if "qrels" not in read_object(f)):  # of rankings, not of models
        values = file.with_name(PER_QUERY_FILE)
        per_query = read_per_query(values) if values.is_file() else {}
        yield model_table(read_evaluation(file.parent), per_query)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(_shown(value), sort_keys=False, allow_unicode=True)


def _shown(value: Any) -> Any:
    """Plain values; of an absolute path its last two parts, as the others are of one machine."""
    if isinstance(value, dict):
        return {key: _shown(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shown(inner) for inner in value]
    return "/".join(Path(value).parts[-2:]) if str(value).startswith("/") else value


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text}```"
