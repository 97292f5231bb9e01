"""Choosing a checkpoint: the dev split ranked while training, the best step, and when to give up.

What was decided follows from `evaluations.jsonl` alone, so that a resumed run decides the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from laser_jax.batch_encoder import LatentEncoder
from laser_jax.config import TrainConfig
from laser_jax.data.tokenization import PromptTokenizer
from laser_jax.evaluation.beir import BeirDataset
from laser_jax.evaluation.retrieval import METRICS, retrieval_runs, score_runs


def is_evaluated(step: int, steps: int, train: TrainConfig) -> bool:
    """Whether the dev split is ranked after `step` of `steps`."""
    return train.eval_every is not None and (step % train.eval_every == 0 or step == steps)


def score_dev(
    encoder: LatentEncoder, prompts: PromptTokenizer, dev: BeirDataset
) -> dict[str, float]:
    """The metrics of the latent view at the trained K. All processes take part and get the same."""
    own = encoder.config.num_thinking_steps
    name = f"latent K={own}"
    runs = retrieval_runs(encoder, prompts, dev, [own])
    return score_runs({name: runs[name]}, dev, METRICS)[name]


def best_step(evaluations: Sequence[dict[str, Any]], train: TrainConfig) -> int | None:
    """The step with the highest score, the first of equals; None without any."""
    if not evaluations:
        return None
    return max(evaluations, key=lambda line: (line[train.eval_metric], -line["step"]))["step"]


def is_out_of_patience(evaluations: Sequence[dict[str, Any]], train: TrainConfig) -> bool:
    """Whether the last `patience` rankings all brought nothing better."""
    best = best_step(evaluations, train)
    if train.patience is None or best is None:
        return False
    return sum(line["step"] > best for line in evaluations) >= train.patience
