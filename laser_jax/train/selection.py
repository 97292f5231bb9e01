"""Choosing a checkpoint: the dev split ranked while training, the best step, and when to give up.

What was decided follows from the scores alone. Every checkpoint holds those of the steps before its
own, so that a resumed run decides the same; `evaluations.jsonl` is for people to read.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from laser_jax.config import Config, RetrieverConfig, TrainConfig
from laser_jax.data.tokenization import PromptTokenizer
from laser_jax.evaluate.beir import BeirDataset
from laser_jax.evaluate.retrieval import METRICS, latent, retrieval_runs, score_runs
from laser_jax.inference.batch_encoder import LatentEncoder
from laser_jax.modeling.backbone import Variables

BATCH_SIZE = 64
"""Rows at most; long ones come in smaller batches, by their tokens."""


def trained_encoder(
    config: Config, retriever: RetrieverConfig, mesh: Mesh, variables: Variables
) -> LatentEncoder:
    """The model as it is being trained, as an encoder. One is made for every ranking, since on a
    single device its weights are a copy; the programs of the first serve all of them."""
    return LatentEncoder(
        variables,
        retriever,
        batch_size=BATCH_SIZE,
        length_multiple=config.data.length_multiple,
        # one device alone runs faster over separate layers, which the encoder then makes
        mesh=mesh if mesh.size > 1 else None,
    )


def is_evaluated(step: int, steps: int, train: TrainConfig) -> bool:
    """Whether the dev split is ranked after `step` of `steps`."""
    return train.eval_every is not None and (step % train.eval_every == 0 or step == steps)


def score_dev(
    encoder: LatentEncoder, prompts: PromptTokenizer, dev: BeirDataset
) -> dict[str, float]:
    """The metrics of the latent view at the trained K. All processes take part and get the same."""
    own = encoder.config.num_thinking_steps
    name = latent(own)
    runs = retrieval_runs(encoder, prompts, dev, [own])
    return score_runs({name: runs[name]}, dev, METRICS)[name]


def best_steps(evaluations: Sequence[dict[str, Any]], train: TrainConfig) -> list[int]:
    """The steps that were ranked, the highest score first, and the first of equals."""
    scores = {line["step"]: line[train.eval_metric] for line in evaluations}
    return sorted(scores, key=lambda step: (-scores[step], step))


def is_out_of_patience(evaluations: Sequence[dict[str, Any]], train: TrainConfig) -> bool:
    """Whether the last `patience` rankings all brought nothing better."""
    steps = best_steps(evaluations, train)
    if train.patience is None or not steps:
        return False
    return sum(step > steps[0] for step in steps) >= train.patience


def fingerprint_of(dataset: BeirDataset) -> str:
    """A hash of all that a ranking's scores follow from, beside the model: texts, queries with
    their fields, and judgements."""
    digest = hashlib.sha256()
    for part in (*dataset.documents, *dataset.queries.values()):
        digest.update(json.dumps(vars(part), sort_keys=True).encode())
    digest.update(json.dumps(dataset.qrels, sort_keys=True).encode())
    return digest.hexdigest()[:32]
