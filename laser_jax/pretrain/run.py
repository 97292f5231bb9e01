"""Teaches a small backbone to write reasonings: `python -m laser_jax.pretrain --config C`.

LaSER starts from a backbone that can already reason in words. The result is a Hugging Face
directory with tokenizer, which `laser_jax.train` takes as `model.path`. A finished run of the same
config and texts is not repeated.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from tqdm import tqdm

from laser_jax.command_line import program
from laser_jax.config import ConfigError, ModelConfig, OptimizerConfig, PromptConfig, as_dict
from laser_jax.data.prompts import query_content
from laser_jax.data.tokenization import PromptTokenizer
from laser_jax.evaluate.beir import read_beir
from laser_jax.files.claim import Claim
from laser_jax.files.durable import checksum_of, json_text
from laser_jax.hf.directory import HFError, read_backbone_config
from laser_jax.hf.reading import find_params, load_params
from laser_jax.modeling.backbone import Backbone, Variables, apply
from laser_jax.pretrain.texts import (
    LanguageRows,
    WrittenReasoning,
    pack_texts,
    read_language_rows,
    reasoning_rows,
)
from laser_jax.settings import Change, changes, require, require_in
from laser_jax.train.model import build_backbone, save_model, starting_model
from laser_jax.train.state import learning_rate_schedule, make_optimizer

REPORT = "pretrain.json"
TEXTS_HASH = "texts_sha256"
_FINITE_EVERY = 20  # steps between two looks at the loss
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainConfig:
    """A causal-LM run that teaches a small backbone to reason in words before it retrieves."""

    model: ModelConfig
    texts: str
    """JSONL lines {"text"} or {"prompt", "query", "reasoning"}; LaSER training rows work too."""
    output: str
    eval: str | None = None
    """A BEIR directory whose queries carry a reasoning: the share written right is reported."""
    eval_split: str = "dev"
    prompt: PromptConfig = field(default_factory=PromptConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-3))
    steps: int = 1000
    batch_size: int = 64
    row_length: int = 128
    """Tokens in a row: plain texts are packed into it, a prompt with its reasoning must fit."""
    text_repeats: int = 1
    """How often the plain texts and the documents' reasonings stand in an epoch, beside one copy of
    the queries' reasonings."""
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.model.adapter is None, "model.adapter: a causal-LM run trains all weights")
        require_in("[1, inf)", self, "", "steps", "batch_size", "text_repeats")
        require_in("[2, inf)", self, "", "row_length")
        require_in("[0, 4294967296)", self, "", "seed")


class PretrainingError(ValueError):
    """A run that cannot go on."""


def _predictions(
    backbone: Backbone, params: Any, rows: LanguageRows
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits [B, T-1, V], targets [B, T-1] and [B, T-1] which of them count."""
    logits_BTV = apply(Backbone.__call__, backbone, {"params": params}, rows.ids_BT)[:, :-1]
    return logits_BTV, rows.ids_BT[:, 1:], rows.predict_BT[:, 1:]


def _loss(backbone: Backbone, params: Any, rows: LanguageRows) -> jax.Array:
    logits, targets, counted = _predictions(backbone, params, rows)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.where(counted, losses, 0.0).sum() / jnp.maximum(counted.sum(), 1)


def _batches(rows: LanguageRows, batch_size: int, seed: int) -> Iterator[LanguageRows]:
    """Endless; every epoch in an order of its own, the tail of one joined to the next."""
    rng, order = np.random.default_rng(seed), np.empty(0, np.int64)
    while True:
        while len(order) < batch_size:
            order = np.concatenate([order, rng.permutation(len(rows.ids_BT))])
        chosen, order = order[:batch_size], order[batch_size:]
        yield jax.tree.map(lambda a, chosen=chosen: a[chosen], rows)


def exact_match(
    backbone: Backbone, variables: Variables, rows: LanguageRows, batch_size: int
) -> float:
    """The share of rows whose every predicted token is the likeliest one, given those before it:
    exactly the reasonings that greedy decoding would write without a mistake."""

    @jax.jit
    def right(variables: Variables, rows: LanguageRows) -> jax.Array:
        logits, targets, counted = _predictions(backbone, variables["params"], rows)
        return ((logits.argmax(-1) == targets) | ~counted).all(axis=1)

    parts = [
        np.asarray(right(variables, jax.tree.map(lambda a, i=i: a[i : i + batch_size], rows)))
        for i in range(0, len(rows.ids_BT), batch_size)
    ]
    return float(np.concatenate(parts).mean())


def _is_finished(config: PretrainConfig, report: dict[str, Any]) -> bool:
    """Whether the output directory of this report still holds its weights."""
    if not math.isfinite(loss := float(report["loss"])):
        mend = "Choose another --output, or delete that directory"
        raise ConfigError(f"{config.output} holds a backbone whose loss is {loss}. {mend}")
    try:
        find_params(Path(config.output), read_backbone_config(config.output))
    except (HFError, FileNotFoundError) as error:
        _log.warning("%s\nThe backbone is trained again", error)
        return False
    _log.info("%s: already trained with this config", config.output)
    return True


def _require_finite(step: int, loss: float, config: PretrainConfig) -> None:
    if not math.isfinite(loss):
        raise PretrainingError(
            f"step {step}: the loss is {loss}. Nothing was written to {config.output}; lower "
            "optimizer.learning_rate, or train in model.dtype: float32"
        )


def _texts_of(reasonings: Sequence[WrittenReasoning], prompt: PromptConfig) -> Iterator[str]:
    """What a tokenizer can be learned from, beside the plain texts."""
    for item in reasonings:
        asked = item.instruction
        yield item.text if asked is None else query_content(item.text, asked, prompt)
        yield item.reasoning


def _training_rows(
    config: PretrainConfig,
    texts: Sequence[str],
    reasonings: Sequence[WrittenReasoning],
    prompts: PromptTokenizer,
) -> LanguageRows:
    """The rows of an epoch: texts, and reasonings about documents, stand there repeatedly."""
    parts = []
    if texts:
        parts.append(pack_texts(texts, prompts, config.row_length, config.text_repeats))
    about_documents = [item for item in reasonings if item.instruction is None]
    repeated = [*reasonings, *about_documents * (config.text_repeats - 1)]
    if repeated:
        parts.append(reasoning_rows(repeated, prompts, config.row_length))
    return jax.tree.map(lambda *a: np.concatenate(a), *parts)


def _held_out_rows(config: PretrainConfig, prompts: PromptTokenizer) -> LanguageRows | None:
    """The reasonings of the evaluation's queries, or None without one."""
    if config.eval is None:
        return None
    queries = read_beir(config.eval, config.eval_split).queries.values()
    told = [(q.text, q.reasoning, q.instruction or "") for q in queries if q.reasoning]
    where = f"eval: no {config.eval_split} query in {config.eval}"
    require(bool(told), f"{where} carries a reasoning; leave eval out")
    return reasoning_rows([WrittenReasoning(*one) for one in told], prompts, config.row_length)


def _starting_params(
    config: PretrainConfig, directory: Path | None, backbone: Backbone
) -> dict[str, Any]:
    """The parameters that training begins from: those in `directory`, or drawn from the seed."""
    if directory is not None:
        return load_params(directory, backbone.config, dtype=np.dtype(np.float32))
    ids = jnp.zeros((1, 8), jnp.int32)
    draw = jax.jit(lambda key: nn.meta.unbox(backbone.init(key, ids))["params"])
    return draw(jax.random.key(config.seed))


def _take_steps(
    config: PretrainConfig, backbone: Backbone, params: Any, rows: LanguageRows
) -> tuple[Any, float]:
    """Trains for `steps` steps, and returns the parameters and the last loss, all finite."""
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = learning_rate_schedule(config.optimizer, config.steps)

    @jax.jit
    def step_fn(params: Any, opt_state: Any, rows: LanguageRows) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(lambda p: _loss(backbone, p, rows))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, loss = optimizer.init(params), jnp.zeros(())
    batches = _batches(rows, config.batch_size, config.seed)
    progress = tqdm(range(1, config.steps + 1), desc="pretrain", unit="step", mininterval=1.0)
    for step in progress:
        params, opt_state, loss = step_fn(params, opt_state, next(batches))
        if step % _FINITE_EVERY == 0:
            _require_finite(step, float(loss), config)
            progress.set_postfix(loss=f"{float(loss):.3f}", lr=f"{np.asarray(schedule(step)):.1e}")
    # no loss has shown yet what the last update has made
    finite = all(jnp.isfinite(a).all() for a in jax.tree.leaves(params))
    _require_finite(config.steps, float(loss) if finite else math.nan, config)
    return params, float(loss)


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Runs the causal-LM stage. Returns what `pretrain.json` holds. Raises a PretrainingError where
    the loss is not finite; nothing is written then."""

    def changed(report: dict[str, Any]) -> list[Change]:
        float(report["loss"])  # not there, or no number: the report is damaged
        # the same directory may be spelled otherwise, or have been moved
        changed = changes(report["config"], config, source=REPORT, changeable=("output",))
        read, now = report.get(TEXTS_HASH), checksum_of(Path(config.texts))
        return [*changed, *([] if read in (None, now) else [Change(TEXTS_HASH, read, now)])]

    with Claim(config.output, REPORT, changed) as claim:
        if claim.recorded is not None and _is_finished(config, claim.recorded):
            return claim.recorded
        report = _pretrain(config)
        claim.record(json_text(report))
    return report


def _pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Trains, writes the backbone and returns the report."""
    texts, reasonings = read_language_rows(config.texts)
    texts_hash = checksum_of(Path(config.texts))
    directory, tokenizer, sizes = starting_model(
        config.model, lambda: [*texts, *_texts_of(reasonings, config.prompt)]
    )
    sizes.require_positions(config.row_length, "row_length takes", "lower row_length")
    backbone, attention = build_backbone(config.model, sizes, jax.default_backend())
    prompts = PromptTokenizer(tokenizer, config.prompt)
    rows = _training_rows(config, texts, reasonings, prompts)
    held_out = _held_out_rows(config, prompts)
    params = _starting_params(config, directory, backbone)
    count = sum(a.size for a in jax.tree.leaves(params))
    _log.info(
        f"{len(texts)} texts and {len(reasonings)} reasonings in {len(rows.ids_BT)} rows of "
        f"{config.row_length} tokens; vocabulary {len(tokenizer)}; {count:,} parameters; "
        f"attention: {attention}"
    )
    began = time.monotonic()
    params, loss = _take_steps(config, backbone, params, rows)
    report: dict[str, Any] = {
        "config": as_dict(config),
        TEXTS_HASH: texts_hash,
        "loss": loss,
        "parameters": count,
        "train_seconds": round(time.monotonic() - began, 1),
    }
    variables = {"params": params}
    if held_out is not None:
        report["exact_match"] = exact_match(backbone, variables, held_out, config.batch_size)
        print(
            f"greedy decoding writes {report['exact_match']:.1%} of the {len(held_out.ids_BT)} "
            f"{config.eval_split} reasonings without a mistake"
        )
    save_model(Path(config.output), jax.device_get(variables), backbone, config.model, tokenizer)
    return report


main = program("pretrain", PretrainConfig, pretrain)
