"""Looking inside a model: what a thought holds, how it reads, and what the command refuses."""

from __future__ import annotations

import dataclasses
import json
import runpy
import shutil
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from laser_jax.batch import Tokens
from laser_jax.data.documents import Document
from laser_jax.data.tokenization import PromptTokenizer, load_tokenizer, right_pad
from laser_jax.encoder import load_pretrained
from laser_jax.files.reading import DataError
from laser_jax.inference.batch_encoder import LatentEncoder
from laser_jax.think.run import describe, main
from laser_jax.think.thought import (
    PROGRAMS,
    Inspector,
    RankedDocument,
    Segment,
    Step,
    Thought,
    Token,
    load_corpus,
    rank_documents,
)

QUERY = "Where is Ulm?"
REASONING = "Ulm is a town.\n\nIt lies on a river.\n\n"


@pytest.fixture(scope="module")
def inspector(thinking_model: Path) -> Inspector:
    corpus = load_corpus(thinking_model.parent / "corpus")
    return Inspector.load(thinking_model, corpus, top_tokens=5, top_documents=2)


def test_ranks_and_cosines_are_those_of_the_encoder_after_each_step(
    inspector: Inspector, thinking_model: Path
) -> None:
    thought = inspector.think(QUERY)
    variables, config = load_pretrained(thinking_model)
    prompts = PromptTokenizer(load_tokenizer(thinking_model), config.prompt)
    encoder = LatentEncoder(variables, config)
    assert inspector.corpus is not None
    documents = inspector.corpus.documents
    query_KD = encoder.encode_tokens([prompts.query(QUERY, "Find the town")], [1, 2, 3])[:, 0]
    rows = [prompts.document(document.text) for document in documents]
    scores_KC = query_KD @ encoder.encode_tokens(rows, [3])[0].T
    places = {document.id: c for c, document in enumerate(documents)}
    assert thought.corpus_size == len(documents)
    assert [d.document.id for d in thought.documents if d.rank_K[-1] == 1]
    for ranked in thought.documents:
        own_K = scores_KC[:, places[ranked.document.id]]
        np.testing.assert_allclose(ranked.cosine_K, own_K, atol=1e-5)
        assert list(ranked.rank_K) == [1 + int((scores_KC[k] > own_K[k]).sum()) for k in range(3)]


def test_cosines_are_those_of_the_states_where_segments_end(
    inspector: Inspector, thinking_model: Path
) -> None:
    thought = inspector.think(QUERY, reasoning=REASONING, num_thinking_steps=1)
    variables, config = load_pretrained(thinking_model)
    prompts = PromptTokenizer(load_tokenizer(thinking_model), config.prompt)
    explicit = prompts.explicit(QUERY, "Find the town", REASONING)
    eos = len(explicit.ids) - 1
    assert [segment.text for segment in thought.segments] == [
        "Ulm is a town.\n\n",
        "It lies on a river.\n\n",
        prompts.tokenizer.eos_token,
    ]
    # attention is causal and with one step an embedding is the last token's state, so that of any
    # start of the text shows the state where it ends
    lengths = [explicit.query_length, *(end + 1 for end in explicit.segment_ends), eos + 1]
    starts = [explicit.ids[:length] for length in lengths]
    step, *ends = LatentEncoder(variables, config).encode_tokens(starts, [1])[0]
    expected = [[float(end @ step)] for end in ends]
    np.testing.assert_allclose([s.cosine_K for s in thought.segments], expected, atol=1e-5)


def test_a_known_query_brings_its_reasoning_instruction_and_judgements(
    inspector: Inspector,
) -> None:
    known = inspector.think(QUERY)
    assert known.instruction == "Find the town"
    assert known.reasoning == REASONING
    assert [d.document.id for d in known.documents if d.relevant] == ["ulm"]
    other = inspector.think("Where is Kiel?", num_thinking_steps=2)
    assert other.instruction == "Find the town"
    assert other.reasoning == ""
    assert other.segments == ()
    assert other.best_relevant is None
    assert len(other.steps) == 2


def test_what_is_given_wins_over_what_is_known(inspector: Inspector) -> None:
    thought = inspector.think(QUERY, instruction="", reasoning="By the Danube.")
    assert thought.instruction == ""
    assert thought.segments[0].text == "By the Danube."


def test_few_programs_serve_all_lengths_and_numbers_of_steps(
    inspector: Inspector, compilations
) -> None:
    """Anybody who can make a browser ask the page chooses both."""
    of_three = inspector.think("Where is Kiel?", num_thinking_steps=3)
    with compilations() as compiled:
        longer = inspector.think("Where is Kiel on the sea?", num_thinking_steps=4)
        again = inspector.think("Where is Kiel?", num_thinking_steps=3)
    assert compiled == []
    assert [len(thought.steps) for thought in (of_three, longer)] == [3, 4]
    assert again == of_three
    kept = inspector._program.cache_info()
    assert kept.maxsize == PROGRAMS
    assert kept.currsize == kept.misses <= PROGRAMS  # none of so few was given up


def test_a_cut_text_is_noted(inspector: Inspector) -> None:
    thought = inspector.think("Danube " * 900, reasoning="town " * 2000, num_thinking_steps=1)
    assert len(thought.notices) == 2
    assert "prompt.query_max_length" in thought.notices[0]
    assert "prompt.explicit_max_length" in thought.notices[1]


def test_a_thought_that_is_not_finite_is_refused(
    inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = jax.tree.map(lambda a: a * np.nan, inspector._variables)
    monkeypatch.setattr(inspector, "_variables", broken)
    with pytest.raises(ValueError, match=r"the query 'Where is Ulm\?' is not finite"):
        inspector.think("Where is Ulm?")


def test_too_many_steps_for_the_positions_are_refused(inspector: Inspector) -> None:
    with pytest.raises(ValueError, match=r"thinking steps take \d+ positions, and"):
        inspector.think(QUERY, num_thinking_steps=10**6)


def test_a_prompt_and_its_thoughts_may_take_all_positions(
    inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K states append K - 1 thoughts."""
    config, length = inspector.config, len(inspector._prompts.query(QUERY, "Find the town"))
    for positions, refused in ((length + 2, False), (length + 1, True)):
        backbone = dataclasses.replace(config.backbone, max_position_embeddings=positions)
        monkeypatch.setattr(inspector, "config", dataclasses.replace(config, backbone=backbone))
        with pytest.raises(ValueError, match="and 3 thinking") if refused else nullcontext():
            inspector.think(QUERY, num_thinking_steps=3)


def test_probabilities_of_all_tokens_sum_to_one_and_give_the_entropy(thinking_model: Path) -> None:
    _, config = load_pretrained(thinking_model)
    vocabulary = config.backbone.vocab_size
    everything = Inspector.load(thinking_model, None, top_tokens=vocabulary, top_documents=1)
    for step in everything.think(QUERY).steps:
        p = np.array([token.probability for token in step.tokens])
        assert np.isclose(p.sum(), 1, atol=1e-5)
        assert np.all(np.diff(p) <= 0)
        assert np.isclose(-(p * np.log(p)).sum(), step.entropy, atol=1e-4)


def test_ranking_keeps_the_best_relevant_document_and_skips_excluded_ones() -> None:
    documents = [Document(name, name) for name in "abcde"]
    scores_KC = np.array([[0.9, 0.8, 0.7, 0.1, 0.2], [0.9, 0.7, 0.8, 0.2, 0.1]])
    ranked = rank_documents(
        scores_KC, documents, 1, relevant=frozenset("de"), excluded=frozenset("a")
    )
    assert [(d.document.id, d.relevant, d.rank_K) for d in ranked] == [
        ("c", False, (2, 1)),
        ("b", False, (1, 2)),
        ("d", True, (4, 3)),
    ]


def test_equal_scores_rank_in_the_order_of_the_corpus() -> None:
    documents = [Document(name, name) for name in "ab"]
    ranked = rank_documents(np.array([[0.5, 0.5]]), documents, 2)
    assert [d.document.id for d in ranked] == ["a", "b"]


def write_corpus(directory: Path, query: str, judged: str, excluded: list[str]) -> Path:
    (directory / "qrels").mkdir(parents=True)
    rows = [{"_id": id_, "text": f"{id_} lies on a river."} for id_ in ("ulm", "kiel")]
    (directory / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = {"_id": query, "text": QUERY, "instruction": "", "excluded_ids": excluded}
    (directory / "queries.jsonl").write_text(json.dumps(row) + "\n")
    header = "query-id\tcorpus-id\tscore\n"
    (directory / "qrels" / "test.tsv").write_text(f"{header}{query}\t{judged}\t1\n")
    return directory


def test_a_query_is_not_given_the_document_of_its_own_id(
    thinking_model: Path, tmp_path: Path
) -> None:
    directory = write_corpus(tmp_path / "corpus", "ulm", "kiel", [])
    for kept in (False, True):
        corpus = load_corpus(directory, ignore_identical_ids=not kept)
        inspector = Inspector.load(thinking_model, corpus, top_tokens=1, top_documents=5)
        thought = inspector.think(QUERY, num_thinking_steps=1)
        assert {d.document.id for d in thought.documents} == {"kiel"} | ({"ulm"} if kept else set())
        assert ("Document 'ulm' has the query's own id" in " ".join(thought.notices)) is not kept


def test_ids_of_a_corpus_that_match_nothing_are_counted_or_refused(tmp_path: Path) -> None:
    directory = write_corpus(tmp_path / "some", "q", "ulm", ["kiel", "kiel "])
    assert [str(count) for count in load_corpus(directory).unmatched] == [
        "excluded documents that the corpus lacks: 1 of 2, the first is 'kiel '"
    ]
    for judged, excluded in (("Ulm", []), ("ulm", ["kiel "])):
        directory = write_corpus(tmp_path / judged, "q", judged, excluded)
        with pytest.raises(
            DataError, match=f"{judged}: .* documents that the corpus lacks: 1 of 1"
        ):
            load_corpus(directory)


def test_a_query_without_judgements_is_counted_and_known_all_the_same(tmp_path: Path) -> None:
    directory = write_corpus(tmp_path / "some", "q", "ulm", [])
    with (directory / "queries.jsonl").open("a") as file:
        file.write('{"_id": "free", "text": "Where?", "reasoning": "There."}\n')
    corpus = load_corpus(directory)
    (count,) = map(str, corpus.unmatched)
    assert count == "queries without judgements: 1 of 2, the first is 'free'"  # not: left out
    assert corpus.queries["free"].reasoning == "There."


def test_description_tells_the_closest_segment_and_from_which_rank_a_document_came() -> None:
    first, second = Document("ulm", "Ulm."), Document("kiel", "Kiel lies at the sea.")
    thought = Thought(
        query="q",
        instruction="",
        reasoning="x",
        pooling="prompt_and_thoughts",
        steps=(Step((Token("a", 0.75),), 0.5), Step((Token("b", 0.5),), 1.25)),
        segments=(Segment("one\n\n", (0.9, 0.1)), Segment("two", (0.2, 0.8))),
        documents=(
            RankedDocument(second, True, (0.1, 0.8), (2, 1)),
            RankedDocument(first, False, (0.9, 0.2), (1, 2)),
        ),
        top_documents=1,
        corpus_size=2,
        notices=("The query was cut.",),
    )
    before, after = describe(thought).split("step 2")
    assert before.startswith("note: The query was cut.\nstep 1  entropy 0.50 nats\n")
    assert "'a' 0.75" in before
    assert "closest segment: 'one' +0.900" in before
    assert "1. +0.900  ulm: Ulm." in before
    assert "was" not in before.split("\n", 1)[1]
    assert "kiel" not in before
    assert "closest segment: 'two' +0.800" in after
    assert "1. +0.800  kiel (relevant): Kiel lies at the sea.  (was 2)" in after


def test_the_command_finds_corpus_and_instruction_of_the_run(
    thinking_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--model", str(thinking_model), "--text", "Where is Kiel?", "--num_thinking_steps", "2"])
    out = capsys.readouterr().out
    assert "instruction: Find the town" in out
    assert out.count("says next:") == 2
    assert "kiel: Kiel lies at the sea." in out


def test_without_a_corpus_the_command_says_how_to_name_one(
    thinking_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone" / "model"
    alone.parent.mkdir()
    alone.symlink_to(thinking_model, target_is_directory=True)
    main(["--model", str(alone), "--text", "Where is Kiel?"])
    out = capsys.readouterr().out
    assert "No corpus; --corpus DIR" in out
    assert "kiel" not in out
    (alone.parent / "config.json").write_text(json.dumps({"data": {"eval": "gone/corpus"}}))
    main(["--model", str(alone), "--text", "Where is Kiel?"])
    assert "the run's own, gone/corpus, is not there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not JSON", "JSONDecodeError"),
        (b'"\xff"', "UnicodeDecodeError"),
        (b'{"data": null}', "TypeError"),
        (b'{"data": {"eval": ["DIR"]}}', "TypeError"),
    ],
)
def test_a_wrong_config_of_the_run_is_named_and_not_read_where_a_corpus_is(
    thinking_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    message: str,
) -> None:
    model = tmp_path / "model"
    model.symlink_to(thinking_model, target_is_directory=True)
    (tmp_path / "config.json").write_bytes(content)
    command = ["--model", str(model), "--text", QUERY, "--num_thinking_steps", "1"]
    main(command)
    said = capsys.readouterr()
    assert f"{tmp_path / 'config.json'} is damaged and counts as absent: {message}" in said.err
    assert "No corpus; --corpus DIR" in said.out
    main([*command, "--corpus", str(thinking_model.parent / "corpus")])
    assert "3 documents" in capsys.readouterr().out


def test_texts_of_data_do_not_reach_the_terminal_as_commands(
    thinking_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_corpus(tmp_path / "corpus", "q", "ulm", [])
    rows = [{"_id": id_, "text": f"\x1b]52;c;aGk=\x07 \x9b2J {id_}"} for id_ in ("ulm", "ki\x1b[A")]
    (directory / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--model", str(thinking_model), "--text", QUERY, "--num_thinking_steps", "1"]
    main([*command, "--corpus", str(directory), "--instruction", "\x1b[1mFind"])
    out = capsys.readouterr().out
    assert not set(out) & {"\x1b", "\x07", "\x9b"}
    assert "instruction: \\x1b[1mFind" in out
    assert "ki\\x1b[A: \\x1b]52;c;aGk=\\x07 \\x9b2J ki" in out


def test_html_writes_a_page_that_stands_alone(thinking_model: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    main(["--model", str(thinking_model), "--text", QUERY, "--html", str(page)])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "<form" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "x", "--num_thinking_steps", "0"], "num_thinking_steps must be at least 1"),
        (["--text", "x", "--top", "[0,1]"], r"top must be at least 1, got \(0, 1\)"),
        (["--text", "x", "--top", "[1,0]"], r"top must be at least 1, got \(1, 0\)"),
        (["--text", "x", "--top", "[1000,1]"], r"1000 tokens a step; the model's vocabulary has"),
        (
            ["--text", "bad \udcff bytes"],
            r"text is no Unicode text: its character 4 is half a .*\\udcff",
        ),
        (["--text", "x", "--instruction", "\udcff"], "instruction is no Unicode text"),
        (["--text", "x", "--reasoning", "\udcff"], "reasoning is no Unicode text"),
        (["--text", "x", "--corpus", "/nowhere"], "/nowhere"),
        (["--text", "x", "--html", "/nowhere/x.html"], "the folder of --html"),
        (["--text", "x", "--html", "/"], "--html / is a directory; name the page in it"),
        (["--text", "  "], "the query is empty"),
    ],
)
def test_bad_options_exit_with_the_culprit(
    thinking_model: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["--model", str(thinking_model), *arguments])


def test_a_plain_directory_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"laser_config\.json is missing"):
        main(["--model", str(tmp_path), "--text", "x"])


def test_the_example_finds_thoughts_whose_residual_is_far_from_the_prompts(
    thinking_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its layers add nothing, so a residual is an embedding, which for one token is 100 times the
    others': the one that the first thought says."""
    directory = shutil.copytree(thinking_model, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[:] = 0
    table_VD, norm_D = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
    _, config = load_pretrained(thinking_model)
    prompts = PromptTokenizer(load_tokenizer(thinking_model), config.prompt)
    ids = prompts.query(QUERY, "Find the town")
    x_D = table_VD[ids[-1]]
    h_D = norm_D * x_D / np.sqrt(np.mean(x_D**2) + 1e-6)
    table_VD[7] = 100 * h_D / np.linalg.norm(h_D) * np.linalg.norm(x_D)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    example = runpy.run_path("examples/attention_sinks.py")
    _, look = example["inspector"](str(directory))
    times_KB, cosine_KB = look(Tokens(*right_pad([ids], 0, len(ids) + 3)))
    np.testing.assert_allclose(times_KB[:, 0], 100, rtol=1e-4)
    np.testing.assert_allclose(cosine_KB[:, 0], 1, atol=1e-5)

    rows = tmp_path / "train.jsonl"
    row = {"query": QUERY, "reasoning_query": "", "prompt": "Find the town"}
    rows.write_text(json.dumps(row | {"positive_passages": ["Ulm"], "negative_passages": []}))
    example["main"](str(directory), str(rows))
    printed = capsys.readouterr().out
    assert "queries, thought 1: 100.0% of 1 are sinks (residual up to 100 times)" in printed
    assert printed.count("\n") == 4
