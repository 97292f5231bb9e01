"""BM25: the formula, ties, and the runs of others."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from laser_jax.data.schema import TrainingRow
from laser_jax.evaluate.beir import read_beir
from laser_jax.evaluate.metrics import evaluate_run, mean
from laser_jax.mine.candidates import rank_by_bm25
from laser_jax.search.trec import read_trec_run

pytest.importorskip("bm25s")
pytest.importorskip("Stemmer")

from laser_jax.mine.bm25 import BM25, tokenize

CORPUS = ["sun sun moon", "moon", "star star star sea", "sea sun", "wind"]


def formula(query: list[str], text: list[str], corpus: list[list[str]]) -> float:
    times, total = Counter(text), 0.0
    mean_length = np.mean([len(tokens) for tokens in corpus])
    for token in query:
        n = sum(token in tokens for tokens in corpus)
        idf = math.log(1 + (len(corpus) - n + 0.5) / (n + 0.5))
        f = times[token]
        total += idf * f / (f + 0.9 * (1 - 0.4 + 0.4 * len(text) / mean_length)) if n else 0.0
    return total


@pytest.mark.parametrize("query", ["sun", "sun sea", "sea sea gone moon", "gone", ""])
def test_documents_and_other_texts_are_scored_by_the_formula(query: str) -> None:
    corpus, asked = [text.split() for text in CORPUS], query.split()
    index = BM25(corpus)
    wanted = [formula(asked, text, corpus) for text in corpus]
    np.testing.assert_allclose(index.scores(asked), wanted, rtol=1e-6)
    np.testing.assert_allclose([index.score(asked, text) for text in corpus], wanted, rtol=1e-12)
    other = ["sea", "gone", "sun", "sun", "sun"]
    assert index.score(asked, other) == pytest.approx(formula(asked, other, corpus))


def test_a_text_becomes_stems_of_words_of_two_letters_without_stop_words() -> None:
    found = tokenize(["The Towers, and a x of ULM are flying!", "of the", "São-Paulo's 2nd"])
    assert found == [["tower", "ulm", "fly"], [], ["são", "paulo", "2nd"]]


def test_ties_stand_in_the_order_of_trec_eval_and_cut_as_there() -> None:
    documents = {"a": "sun", "c": "sun", "b": "sun", "x": "sun moon", "y": "wind"}
    row = TrainingRow("sun", "", "", ("sun moon", "no word of it"), ())
    (ranking,) = rank_by_bm25([row], documents, 2)
    assert list(ranking.candidates) == ["c", "b"]
    (ranking,) = rank_by_bm25([row], documents, 50)
    assert list(ranking.candidates) == ["c", "b", "a", "x"]  # y shares no word
    assert ranking.positives == [pytest.approx(ranking.candidates["x"]), 0.0]


@pytest.mark.parametrize(("name", "wanted"), [("entailmentbank", 0.291), ("strategyqa", 0.699)])
def test_the_scores_of_lucene_are_reached(shared_data: Path, name: str, wanted: float) -> None:
    dataset = read_beir(shared_data / name, "test")
    documents = {document.id: document.text for document in dataset.documents}
    rows = [TrainingRow(query.text, "", "", ("x",), ()) for query in dataset.queries.values()]
    rankings = rank_by_bm25(rows, documents, 100)
    run = dict(zip(dataset.queries, (of.candidates for of in rankings), strict=True))
    score = mean(evaluate_run(run, dataset.qrels, ("nDCG@10",)))["nDCG@10"]
    assert score == pytest.approx(wanted, abs=0.01)
    # the first ten are those of a run that another program made of the same corpus
    others = read_trec_run(shared_data / name / "bm25_test_run.trec")
    shared = [len({*list(run[q])[:10]} & {*list(others[q])[:10]}) / 10 for q in others]
    assert np.mean(shared) > 0.95
