from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval

from laser_jax.evaluate.beir import read_qrels, read_qrels_file
from laser_jax.evaluate.metrics import (
    Qrels,
    evaluate_run,
    mean,
    without_excluded,
)
from laser_jax.search.trec import Run, rank_documents, read_trec_run

CUTOFFS = (1, 3, 5, 10, 25, 50, 100, 1000)
TREC_NAMES = {
    "nDCG": "ndcg_cut",
    "Recall": "recall",
    "P": "P",
    "MAP": "map_cut",
    "Hit": "success",
}
METRICS = [f"{name}@{cutoff}" for name in (*TREC_NAMES, "nDCG_exp", "MRR") for cutoff in CUTOFFS]


def pytrec_metrics(run: Run, qrels: Qrels) -> dict[str, dict[str, float]]:
    """pytrec_eval's values under our names.

    It has no exponential gain and no cut reciprocal rank, but both are what it has on other input:
    linear gain of grades 2^g - 1, and the reciprocal rank of a run that was cut.
    """
    cutoffs = ",".join(map(str, CUTOFFS))
    measures = {f"{name}.{cutoffs}" for name in TREC_NAMES.values()}
    results = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
    raised = {q: {d: 2 ** max(g, 0) - 1 for d, g in grades.items()} for q, grades in qrels.items()}
    exponential = pytrec_eval.RelevanceEvaluator(raised, {f"ndcg_cut.{cutoffs}"}).evaluate(run)
    reciprocal = {}
    for cutoff in CUTOFFS:
        cut = {q: {d: s[d] for d in rank_documents(s)[:cutoff]} for q, s in run.items()}
        reciprocal[cutoff] = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(cut)
    return {
        query: {
            f"{ours}@{cutoff}": values[f"{theirs}_{cutoff}"]
            for ours, theirs in TREC_NAMES.items()
            for cutoff in CUTOFFS
        }
        | {f"nDCG_exp@{cutoff}": exponential[query][f"ndcg_cut_{cutoff}"] for cutoff in CUTOFFS}
        | {f"MRR@{cutoff}": reciprocal[cutoff][query]["recip_rank"] for cutoff in CUTOFFS}
        for query, values in results.items()
    }


def tied_run(seed: int) -> tuple[Run, Qrels]:
    """Few distinct scores, graded and negative judgements, judged documents that are not found."""
    rng = np.random.default_rng(seed)
    documents = [f"d{i}" for i in range(150)] + ["Zé", "é b", "\u65e5\u672c", "\U0001f600"]
    run, qrels = {}, {}
    for query in map(str, range(20)):
        found = rng.permutation(documents)[: rng.integers(0, len(documents))]
        run[query] = {str(d): float(rng.integers(0, 6)) / 7 for d in found}
        judged = rng.permutation(documents)[: rng.integers(1, 40)]
        qrels[query] = {str(d): int(rng.integers(-1, 4)) for d in judged}
    return run, qrels


@pytest.mark.parametrize("seed", range(20))
def test_tied_runs_equal_pytrec_eval_to_the_last_digit(seed: int) -> None:
    run, qrels = tied_run(seed)
    ours = evaluate_run(run, qrels, METRICS)
    assert ours == pytrec_metrics(run, qrels)
    assert len(ours) == 20


@pytest.mark.parametrize(
    "task", ["biology", "economics", "leetcode", "pony", "robotics", "sustainable_living"]
)
def test_bright_runs_equal_pytrec_eval_and_the_reference(shared_data: Path, task: str) -> None:
    folder = shared_data / "bright_runs_a"
    run = read_trec_run(folder / task / "reasonir_gpt4cot_top100.txt.gz")
    qrels = read_qrels_file(folder / task / "qrels.tsv")
    ours = evaluate_run(run, qrels, METRICS)
    assert ours == pytrec_metrics(run, qrels)

    reference = json.loads((folder / "reference_metrics.json").read_text())[task]
    assert len(ours) == reference["num_q"]
    means = mean(ours)
    for name, theirs in TREC_NAMES.items():
        for cutoff in CUTOFFS:
            if f"{theirs}_{cutoff}" in reference["all"]:
                assert means[f"{name}@{cutoff}"] == pytest.approx(
                    reference["all"][f"{theirs}_{cutoff}"], abs=1e-6
                )
    assert means["MRR@100"] == pytest.approx(reference["all"]["recip_rank"], abs=1e-6)
    for query, values in reference["per_query"].items():
        assert ours[query]["nDCG@10"] == pytest.approx(values["ndcg_cut_10"], abs=1e-6)


@pytest.mark.parametrize("name", ["2wiki", "entailmentbank", "musique", "scifact", "strategyqa"])
def test_bm25_runs_equal_pytrec_eval(shared_data: Path, name: str) -> None:
    run = read_trec_run(shared_data / name / "bm25_test_run.trec")
    qrels = read_qrels(shared_data / name, "test")
    ours = evaluate_run(run, qrels, METRICS)
    theirs = pytrec_metrics(run, qrels)
    assert ours == theirs
    assert ours
    assert mean(ours) == {
        metric: float(np.mean([values[metric] for values in theirs.values()])) for metric in METRICS
    }


def test_ties_are_broken_by_the_larger_document_id() -> None:
    assert rank_documents({"a": 1.0, "c": 1.0, "b": 1.0, "d": 0.5}) == ["c", "b", "a", "d"]


def test_scores_that_agree_in_float32_are_a_tie() -> None:
    run, qrels = {"q": {"a": 1.0 + 1e-10, "b": 1.0}}, {"q": {"a": 1}}
    assert evaluate_run(run, qrels, ["MRR@10"]) == {"q": {"MRR@10": 0.5}}
    assert pytrec_metrics(run, qrels)["q"]["MRR@10"] == 0.5


def test_scores_beyond_float32_tie_at_infinity() -> None:
    run, qrels = {"q": {"a": 1e300, "b": 1e299}}, {"q": {"a": 1}}
    assert evaluate_run(run, qrels, ["MRR@10"]) == {"q": {"MRR@10": 0.5}}
    assert pytrec_metrics(run, qrels)["q"]["MRR@10"] == 0.5


def test_mrr_is_zero_beyond_its_cutoff() -> None:
    run, qrels = {"q": {"a": 3.0, "b": 2.0, "c": 1.0}}, {"q": {"c": 1}}
    assert evaluate_run(run, qrels, ["MRR@2", "MRR@3"]) == {"q": {"MRR@2": 0.0, "MRR@3": 1 / 3}}


def test_a_query_without_relevant_documents_scores_zero_and_counts() -> None:
    run = {"none": {"a": 1.0}, "one": {"a": 1.0}, "empty": {}, "unjudged": {"a": 1.0}}
    qrels = {"none": {"a": 0}, "one": {"a": 1}, "empty": {"a": 1}, "not run": {"a": 1}}
    ours = evaluate_run(run, qrels, METRICS)
    assert ours == pytrec_metrics(run, qrels)
    assert set(ours) == {"none", "one", "empty"}
    assert mean(ours)["nDCG@10"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["ndcg@10", "nDCG", "nDCG@0", "nDCG@", "F1@10"])
def test_an_unknown_metric_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="nDCG, nDCG_exp, Recall, P, MRR, MAP, Hit"):
        evaluate_run({}, {}, [name])


def test_a_grade_that_has_no_exponential_gain_is_refused_instead_of_computed() -> None:
    qrels = {"q": {"a": 20_251_201_093_000}}  # a time in the column of grades
    with pytest.raises(ValueError, match="nDCG_exp wants grades up to 1000, got 20251201093000"):
        evaluate_run({"q": {"a": 1.0}}, qrels, ["nDCG_exp@10"])
    assert evaluate_run({"q": {"a": 1.0}}, qrels, ["nDCG@10"]) == {"q": {"nDCG@10": 1.0}}


def test_exponential_gain_by_hand() -> None:
    run, qrels = {"q": {"a": 2.0, "b": 1.0}}, {"q": {"a": 1, "b": 3, "c": -2}}
    wanted = (1 + 7 / math.log2(3)) / (7 + 1 / math.log2(3))
    assert evaluate_run(run, qrels, ["nDCG_exp@10"])["q"]["nDCG_exp@10"] == pytest.approx(wanted)


def test_excluded_documents_leave_the_run_before_it_is_cut() -> None:
    run, qrels = {"q": {"a": 3.0, "b": 2.0}, "r": {"a": 1.0}}, {"q": {"b": 1}, "r": {"a": 1}}
    kept = without_excluded(run, {"q": ["a", "not retrieved"]})
    assert kept == {"q": {"b": 2.0}, "r": {"a": 1.0}}
    assert evaluate_run(kept, qrels, ["Hit@1"]) == {"q": {"Hit@1": 1.0}, "r": {"Hit@1": 1.0}}


def test_a_nan_score_is_refused() -> None:
    with pytest.raises(ValueError, match="'b' is NaN"):
        evaluate_run({"q": {"a": 1.0, "b": float("nan")}}, {"q": {"a": 1}})


def test_a_mean_over_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no query"):
        mean(evaluate_run({"q": {"a": 1.0}}, {"other": {"a": 1}}))
