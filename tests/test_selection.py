"""When the dev split is ranked, which step is the best, and when to give up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import laser_jax.train.selection as selection
from laser_jax.config import TrainConfig
from laser_jax.data.documents import Document, EvalQuery
from laser_jax.evaluate.beir import BeirDataset
from laser_jax.train.selection import (
    best_steps,
    fingerprint_of,
    is_evaluated,
    is_out_of_patience,
    score_dev,
)

Lines = list[dict[str, Any]]


def lines(**scores: float) -> Lines:
    """`s2=0.5` is the line of step 2."""
    return [{"step": int(name[1:]), "nDCG@10": score} for name, score in scores.items()]


def test_every_so_many_steps_and_the_last_are_ranked() -> None:
    def ranked(**train: Any) -> list[int]:
        return [step for step in range(1, 8) if is_evaluated(step, 7, TrainConfig(**train))]

    assert ranked() == []
    assert ranked(eval_every=3) == [3, 6, 7]
    assert ranked(eval_every=100) == [7]


@pytest.mark.parametrize(
    ("evaluations", "best"),
    [
        ([], []),
        (lines(s2=0.0), [2]),
        (lines(s2=0.1, s4=0.3, s6=0.2), [4, 6, 2]),
        (lines(s2=0.1, s4=0.3, s6=0.3), [4, 6, 2]),
        (lines(s2=0.3, s4=0.3, s6=0.3), [2, 4, 6]),
    ],
)
def test_the_best_step_is_the_first_of_the_highest(evaluations: Lines, best: list[int]) -> None:
    assert best_steps(evaluations, TrainConfig(eval_every=2)) == best


def test_the_metric_decides() -> None:
    evaluations = [
        {"step": 1, "nDCG@10": 0.2, "Hit@1": 0.5},
        {"step": 2, "nDCG@10": 0.3, "Hit@1": 0.4},
    ]
    assert best_steps(evaluations, TrainConfig(eval_every=1)) == [2, 1]
    assert best_steps(evaluations, TrainConfig(eval_every=1, eval_metric="Hit@1")) == [1, 2]


@pytest.mark.parametrize(
    ("evaluations", "patience", "out"),
    [
        ([], 1, False),
        (lines(s2=0.3), 1, False),
        (lines(s2=0.3, s4=0.2), None, False),
        (lines(s2=0.3, s4=0.2), 1, True),
        (lines(s2=0.3, s4=0.3), 1, True),  # as good is no better
        (lines(s2=0.3, s4=0.2), 2, False),
        (lines(s2=0.3, s4=0.1, s6=0.2), 2, True),
        (lines(s2=0.1, s4=0.0, s6=0.2), 2, False),
        (lines(s2=0.1, s4=0.0, s6=0.2, s8=0.1), 2, False),
    ],
)
def test_patience_ends_after_so_many_rankings_without_a_better_one(
    evaluations: Lines, patience: int | None, out: bool
) -> None:
    assert is_out_of_patience(evaluations, TrainConfig(eval_every=2, patience=patience)) == out


def test_the_dev_split_is_ranked_at_the_trained_k(monkeypatch: pytest.MonkeyPatch) -> None:
    class Encoder:
        class config:
            num_thinking_steps = 3

    asked = []

    def retrieval_runs(encoder: Any, prompts: Any, dev: Any, steps: list[int]) -> dict[str, str]:
        asked.append((prompts, dev, steps))
        return {f"latent K={k}": f"run of {k}" for k in steps} | {"explicit": "run"}

    def score_runs(runs: dict[str, str], dev: Any, metrics: Any) -> dict[str, Any]:
        return {name: {"scored": run, "metrics": metrics} for name, run in runs.items()}

    monkeypatch.setattr(selection, "retrieval_runs", retrieval_runs)
    monkeypatch.setattr(selection, "score_runs", score_runs)
    scores: Any = score_dev(Encoder(), "prompts", "dev")  # pyright: ignore[reportArgumentType]
    assert scores["scored"] == "run of 3"
    assert set(scores["metrics"]) == {"nDCG@10", "Recall@100", "Hit@1"}
    assert asked == [("prompts", "dev", [3])]


def test_an_evaluation_set_is_known_by_all_that_its_scores_follow_from() -> None:
    documents, query = [Document("d", "Ulm"), Document("e", "Kiel")], EvalQuery("q", "Where?")
    sets = [
        BeirDataset(documents, {"q": query}, {"q": {"d": 1}}),
        BeirDataset(documents[::-1], {"q": query}, {"q": {"d": 1}}),
        BeirDataset([documents[0], Document("e", "Bonn")], {"q": query}, {"q": {"d": 1}}),
        BeirDataset(documents, {"q": query}, {"q": {"d": 2}}),
        BeirDataset(documents, {"q": query}, {"q": {"e": 1}}),
        BeirDataset(documents, {"q": replace(query, text="When?")}, {"q": {"d": 1}}),
        BeirDataset(documents, {"q": replace(query, instruction="")}, {"q": {"d": 1}}),
        BeirDataset(documents, {"q": replace(query, excluded_ids=("e",))}, {"q": {"d": 1}}),
    ]
    assert len({fingerprint_of(each) for each in sets}) == len(sets)
    again = BeirDataset([*documents], {"q": replace(query)}, {"q": {"d": 1}})
    assert fingerprint_of(again) == fingerprint_of(sets[0])
