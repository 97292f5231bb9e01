"""A model over a BEIR dataset: which runs there are, and what is in them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from laser_jax.config import ConfigError, PromptConfig, RetrieverConfig, ScratchConfig
from laser_jax.data.documents import Document, EvalQuery
from laser_jax.data.tokenization import PromptTokenizer, train_tokenizer
from laser_jax.evaluate.beir import BeirDataset
from laser_jax.evaluate.retrieval import (
    REWRITE,
    REWRITE_AS_QUERY,
    REWRITES,
    format_table,
    query_inputs,
    rank_corpus,
    require_instructions,
    retrieval_runs,
    rewrite_inputs,
    score_runs,
)
from laser_jax.files.reading import DataError
from laser_jax.inference.batch_encoder import LatentEncoder
from laser_jax.inference.options import with_max_length
from laser_jax.modeling.backbone import Backbone
from laser_jax.train.selection import score_dev

SCRATCH = ScratchConfig(
    hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=16
)
TEXTS = ["Ulm lies on the Danube.", "Kiel lies at the sea.", "Jena lies in a valley.", "Bonn."]
DOCUMENTS = [Document(f"d{n}", text) for n, text in enumerate(TEXTS)]
QUERIES = [
    EvalQuery("q0", "Where is Ulm?", instruction="Find", reasoning="South.\n\nOn the Danube."),
    EvalQuery("q1", "Where is Kiel?", instruction="", reasoning="North."),
]
DATASET = BeirDataset(
    DOCUMENTS, {q.id: q for q in QUERIES}, {"q0": {"d0": 1}, "q1": {"d1": 1, "d2": 0}}
)


@pytest.fixture(scope="module")
def prompts() -> PromptTokenizer:
    return PromptTokenizer(train_tokenizer(TEXTS, 270), PromptConfig())


class RecordingEncoder(LatentEncoder):
    """Records what it is asked for."""

    asked: list[tuple[int, tuple[int, ...]]]

    def encode_tokens(
        self, rows: Sequence[Sequence[int]], steps: Sequence[int], **options: Any
    ) -> np.ndarray:
        self.asked.append((len(rows), tuple(steps)))
        return super().encode_tokens(rows, steps, **options)


@pytest.fixture(scope="module")
def encoder(prompts: PromptTokenizer) -> RecordingEncoder:
    config = RetrieverConfig(SCRATCH.backbone(len(prompts.tokenizer)), num_thinking_steps=2)
    backbone = Backbone(config.backbone)
    drawn = nn.meta.unbox(jax.jit(backbone.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    made = RecordingEncoder(drawn, config, batch_size=4, length_multiple=128)
    made.asked = []
    return made


def with_queries(*queries: EvalQuery) -> BeirDataset:
    return dataclasses.replace(DATASET, queries={q.id: q for q in queries})


def ranked(encoder, queries: list[list[int]], prompts, query_k: int, document_k: int) -> np.ndarray:
    """Scores [Q, C], documents in their own order."""
    documents = [prompts.document(text) for text in TEXTS]
    return encoder.encode_tokens(queries, [query_k])[0] @ (
        encoder.encode_tokens(documents, [document_k])[0].T
    )


def assert_scores(run: dict[str, dict[str, float]], scores_QC: np.ndarray) -> None:
    for query, scores_C in zip(QUERIES, scores_QC, strict=True):
        wanted = {document.id: s for document, s in zip(DOCUMENTS, scores_C, strict=True)}
        assert run[query.id] == pytest.approx(wanted, abs=1e-5)
        assert list(run[query.id].values()) == sorted(run[query.id].values(), reverse=True)


def test_queries_and_documents_think_equally_long(encoder, prompts) -> None:
    runs = retrieval_runs(encoder, prompts, DATASET, [1, 3])
    assert list(runs) == ["latent K=1", "latent K=3", "explicit"]
    rows = [prompts.query(q.text, q.instruction or "") for q in QUERIES]
    for k in (1, 3):
        assert_scores(runs[f"latent K={k}"], ranked(encoder, rows, prompts, k, k))


def test_documents_with_a_k_of_their_own_are_embedded_once_at_it(encoder, prompts) -> None:
    own = copy.copy(encoder)
    own.config = dataclasses.replace(encoder.config, document_thinking_steps=1)
    own.asked.clear()
    runs = retrieval_runs(own, prompts, DATASET, [2, 3])
    assert own.asked == [(len(TEXTS), (1,)), (len(QUERIES), (2, 3)), (len(QUERIES), (1,))]
    rows = [prompts.query(q.text, q.instruction or "") for q in QUERIES]
    for k in (2, 3):
        assert_scores(runs[f"latent K={k}"], ranked(encoder, rows, prompts, k, 1))
    explicit = [prompts.explicit(q.text, q.instruction or "", q.reasoning).ids for q in QUERIES]
    assert_scores(runs["explicit"], ranked(encoder, explicit, prompts, 1, 1))


def test_a_model_of_several_sizes_is_ranked_at_each(encoder, prompts) -> None:
    sized = copy.copy(encoder)
    sized.config = dataclasses.replace(encoder.config, dimensions=(3, 8))
    runs = retrieval_runs(sized, prompts, DATASET, [1, 2])
    expected = ["latent K=1", "latent K=2", "latent K=2, 3 dimensions", "latent K=2, 8 dimensions"]
    assert list(runs) == [*expected, "explicit"]
    rows = [prompts.query(q.text, q.instruction or "") for q in QUERIES]
    documents = [prompts.document(text) for text in TEXTS]
    for size in (3, 8):
        queries_QD, documents_CD = (
            rows_D[:, :size] / np.linalg.norm(rows_D[:, :size], axis=1, keepdims=True)
            for rows_D in (encoder.encode_tokens(texts, [2])[0] for texts in (rows, documents))
        )
        assert_scores(runs[f"latent K=2, {size} dimensions"], queries_QD @ documents_CD.T)


def test_the_explicit_run_reads_the_reasoning_against_documents_at_the_models_own_k(
    encoder, prompts
) -> None:
    run = retrieval_runs(encoder, prompts, DATASET, [1])["explicit"]
    rows = [prompts.explicit(q.text, q.instruction or "", q.reasoning or "").ids for q in QUERIES]
    assert_scores(run, ranked(encoder, rows, prompts, 1, 2))


def test_every_text_is_encoded_once_for_all_steps(encoder, prompts) -> None:
    encoder.asked.clear()
    retrieval_runs(encoder, prompts, DATASET, [3, 1, 3])
    assert encoder.asked == [(4, (1, 2, 3)), (2, (1, 3)), (2, (1,))]


def test_there_is_no_explicit_run_without_a_reasoning_for_every_query(encoder, prompts) -> None:
    for reasoning in (None, ""):
        dataset = with_queries(QUERIES[0], dataclasses.replace(QUERIES[1], reasoning=reasoning))
        assert list(retrieval_runs(encoder, prompts, dataset, [1])) == ["latent K=1"]


def test_there_is_no_explicit_run_for_a_model_that_pools_thoughts_alone(encoder, prompts) -> None:
    config = dataclasses.replace(encoder.config, pooling="thoughts")
    thinker = LatentEncoder({"params": encoder.variables["params"]}, config, length_multiple=128)
    assert list(retrieval_runs(thinker, prompts, DATASET, [1])) == ["latent K=1"]


def test_excluded_documents_are_in_no_run(encoder, prompts) -> None:
    dataset = with_queries(dataclasses.replace(QUERIES[0], excluded_ids=("d1", "d9")), QUERIES[1])
    for run in retrieval_runs(encoder, prompts, dataset, [1]).values():
        assert set(run["q0"]) == {"d0", "d2", "d3"}
        assert set(run["q1"]) == {"d0", "d1", "d2", "d3"}


def test_a_query_that_is_a_document_is_not_its_own_answer(encoder, prompts) -> None:
    """As in ArguAna, where the query's own text is in the corpus, under the query's id."""
    query = EvalQuery("d1", TEXTS[1], instruction="", reasoning="North.", excluded_ids=("d3",))
    dataset = BeirDataset(DOCUMENTS, {"q0": QUERIES[0], "d1": query}, {"d1": {"d2": 1}})
    rows = [prompts.document(document.text) for document in DOCUMENTS]
    inputs = query_inputs(prompts, dataset, encoder.config, [1, 2])
    runs = rank_corpus(encoder, rows, dataset, inputs, nothing_excluded=True)
    assert len(runs) == 6
    for name, run in runs.items():
        assert set(run["d1"]) == {"d0", "d2"} | ({"d3"} if "nothing excluded" in name else set())
        assert set(run["q0"]) == {"d0", "d1", "d2", "d3"}
    kept = dataclasses.replace(dataset, ignore_identical_ids=False)
    assert set(retrieval_runs(encoder, prompts, kept, [1])["latent K=1"]["d1"]) == {
        "d0",
        "d1",
        "d2",
    }


def test_the_dev_score_follows_beirs_rule(encoder, prompts) -> None:
    """So the choice of a checkpoint does."""
    query = EvalQuery("d1", TEXTS[1], instruction="")
    best = retrieval_runs(
        encoder, prompts, BeirDataset(DOCUMENTS, {"d1": query}, {"d1": {"d2": 1}}), [2]
    )["latent K=2"]["d1"]
    first = next(iter(best))
    dev = BeirDataset(DOCUMENTS, {"d1": query}, {"d1": {first: 1, "d1": 0}})
    assert score_dev(encoder, prompts, dev)["Hit@1"] == 1
    only_itself = dataclasses.replace(dev, qrels={"d1": {"d1": 1}})
    assert score_dev(encoder, prompts, only_itself)["nDCG@10"] == 0
    kept = dataclasses.replace(only_itself, ignore_identical_ids=False)
    assert score_dev(encoder, prompts, kept)["nDCG@10"] > 0


def test_a_query_without_instruction_is_named(encoder, prompts) -> None:
    dataset = with_queries(QUERIES[0], dataclasses.replace(QUERIES[1], instruction=None))
    for refuse in (
        lambda: require_instructions(dataset.queries.values(), "{instruction} {query}"),
        lambda: retrieval_runs(encoder, prompts, dataset, [1]),
    ):
        with pytest.raises(DataError, match="query q1 has no instruction"):
            refuse()


def test_scores_are_means_over_queries_and_the_table_shows_them() -> None:
    runs = {
        "first": {"q0": {"d0": 0.9, "d1": 0.1}, "q1": {"d1": 0.9, "d2": 0.1}},
        "second": {"q0": {"d1": 0.9, "d0": 0.1}, "q1": {"d1": 0.9, "d2": 0.1}},
    }
    scores = score_runs(runs, DATASET)
    assert scores["first"] == {"nDCG@10": 1.0, "Recall@100": 1.0, "Hit@1": 1.0}
    assert scores["second"]["Hit@1"] == 0.5
    assert scores["second"]["nDCG@10"] == pytest.approx((1 + 1 / np.log2(3)) / 2)
    assert format_table(scores).splitlines() == [
        "| run    | nDCG@10 | Recall@100 |  Hit@1 |",
        "| :----- | ------: | ---------: | -----: |",
        "| first  |  1.0000 |     1.0000 | 1.0000 |",
        "| second |  0.8155 |     1.0000 | 0.5000 |",
    ]


def test_a_rewrite_is_a_reasoning_or_a_part_of_a_longer_query(prompts: PromptTokenizer) -> None:
    config = RetrieverConfig(SCRATCH.backbone(len(prompts.tokenizer)), num_thinking_steps=2)
    rewrites = {"q0": "The river. " * 90, "q1": "No."}  # too long for a query; too short for any
    inputs = rewrite_inputs(prompts, DATASET, config, rewrites)
    assert set(inputs) == set(REWRITES)
    written = prompts.explicit("Where is Ulm?", "Find", rewrites["q0"])
    assert inputs[REWRITE].rows == [
        written.ids,
        prompts.explicit("Where is Kiel?", "", "Where is Kiel?").ids,
    ]
    assert (inputs[REWRITE].num_thinking_steps, inputs[REWRITE].documents_at) == ((1,), 2)
    assert inputs[REWRITE].shortened == int(written.truncated)
    longer, alone = inputs[REWRITE_AS_QUERY].rows
    assert prompts.config.query_max_length < len(longer) <= prompts.config.explicit_max_length
    text = str(prompts.tokenizer.decode(longer))
    assert "Query: Where is Ulm?\n\nThe river. The river. " in text
    assert text.endswith("</think>\n\n")
    assert alone == prompts.query("Where is Kiel?", "")
    assert (inputs[REWRITE_AS_QUERY].num_thinking_steps, inputs[REWRITE_AS_QUERY].documents_at) == (
        (1,),
        1,
    )

    endless = rewrite_inputs(prompts, DATASET, config, {"q0": "The river. " * 900, "q1": "No."})
    assert {name: of.shortened for name, of in endless.items()} == dict.fromkeys(REWRITES, 1)

    gircse = dataclasses.replace(config, pooling="thoughts")
    assert set(rewrite_inputs(prompts, DATASET, gircse, rewrites)) == {REWRITE_AS_QUERY}


def test_the_limit_of_a_text_may_leave_room_for_its_thoughts_alone() -> None:
    backbone = dataclasses.replace(SCRATCH, max_position_embeddings=100).backbone(270)
    prompt = PromptConfig(query_max_length=64, explicit_max_length=64)
    for pooling, most in (("prompt_and_thoughts", 98), ("thoughts", 97)):
        config = RetrieverConfig(backbone, num_thinking_steps=3, pooling=pooling, prompt=prompt)
        assert with_max_length(config, most).prompt.document_max_length == most
        with pytest.raises(ConfigError, match="positions, and the model has 100"):
            with_max_length(config, most + 1)
