"""Looking inside a model: what a report holds, how it reads, and what the command refuses."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from laser_jax.batch_encoder import LatentEncoder
from laser_jax.config import RetrieverConfig, ScratchConfig, save_retriever_config
from laser_jax.data.tokenization import (
    PromptTokenizer,
    load_tokenizer,
    special_token_ids,
    train_tokenizer,
)
from laser_jax.encoder import load_pretrained
from laser_jax.evaluation.beir import Document
from laser_jax.hf import save_params
from laser_jax.modeling.backbone import Backbone
from laser_jax.think import ThinkOptions, ThoughtReport, describe, main, observe
from laser_jax.thinking import TopTokens

SCRATCH = ScratchConfig(
    hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=16
)
DOCUMENTS = [Document("ulm", "Ulm lies on the Danube."), Document("kiel", "Kiel lies at the sea.")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported random model; its run's config names the corpus beside it."""
    run = tmp_path_factory.mktemp("run")
    tokenizer = train_tokenizer([d.text for d in DOCUMENTS], 280)
    backbone = SCRATCH.backbone(len(tokenizer))
    init = jax.jit(Backbone(backbone).init)
    variables = nn.meta.unbox(init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    directory = run / "model"
    save_params(
        directory,
        jax.device_get(variables),
        backbone,
        dtype=np.float32,
        lora=None,
        **special_token_ids(tokenizer),
    )
    tokenizer.save_pretrained(directory)
    save_retriever_config(RetrieverConfig(backbone, num_thinking_steps=3), directory)
    corpus = run / "corpus"
    corpus.mkdir()
    rows = [{"_id": d.id, "title": "", "text": d.text} for d in DOCUMENTS]
    (corpus / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    query = {"_id": "q", "text": "Where is Ulm?", "instruction": "Find the town"}
    (corpus / "queries.jsonl").write_text(json.dumps(query) + "\n")
    (run / "config.json").write_text(json.dumps({"data": {"eval": str(corpus)}}))
    return directory


def test_scores_are_those_of_the_encoder_after_each_step(model: Path) -> None:
    report = observe(ThinkOptions(str(model), "Where is Ulm?"), DOCUMENTS, "Find the town")
    variables, config = load_pretrained(model)
    encoder = LatentEncoder(variables, config)
    prompts = PromptTokenizer(load_tokenizer(model), config.prompt)
    query = encoder.encode_tokens([prompts.query("Where is Ulm?", "Find the town")], [1, 2, 3])
    documents = encoder.encode_tokens([prompts.document(d.text) for d in DOCUMENTS], [3])[0]
    np.testing.assert_allclose(report.scores_KC, query[:, 0] @ documents.T, atol=1e-5)
    assert [len(step) for step in report.decoded_Kn] == [5, 5, 5]


def test_the_command_finds_corpus_and_instruction_of_the_run(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--model", str(model), "--text", "Where is Kiel?", "--num_thinking_steps", "2"])
    out = capsys.readouterr().out
    assert "instruction: Find the town" in out
    assert out.count("says next:") == 2
    assert "kiel: Kiel lies at the sea." in out


def test_description_tells_from_which_rank_a_document_came() -> None:
    tokens = TopTokens(
        ids_BKn=np.array([[[1], [2]]]),
        probabilities_BKn=np.array([[[0.75], [0.5]]]),
        entropy_BK=np.array([[0.5, 1.25]]),
    )
    scores_KC = np.array([[0.9, 0.1], [0.2, 0.8]])
    text = describe(ThoughtReport(tokens, [["a"], ["b"]], scores_KC), DOCUMENTS, 2)
    first, second = text.split("step 2")
    assert "'a' 0.75" in first
    assert "was" not in first
    assert "entropy 1.25 nats" in second
    assert "1. +0.800  kiel: Kiel lies at the sea.  (was 2)" in second


def test_without_a_corpus_the_command_says_how_to_name_one(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone" / "model"
    alone.parent.mkdir()
    alone.symlink_to(model, target_is_directory=True)
    main(["--model", str(alone), "--text", "Where is Kiel?"])
    out = capsys.readouterr().out
    assert "corpus: none; --corpus DIR" in out
    assert "kiel" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_thinking_steps", "0"], "num_thinking_steps must be at least 1, got 0"),
        (["--top", "0"], "top must be at least 1, got 0"),
        (["--corpus", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_options_exit_with_the_culprit(model: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["--model", str(model), "--text", "x", *arguments])


def test_a_plain_directory_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"laser_config\.json is missing"):
        main(["--model", str(tmp_path), "--text", "x"])
