"""Texts in, vectors out: prompts, order, overflow, loading, and what does not belong together."""

from __future__ import annotations

import dataclasses
import functools
import json
import runpy
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import laser_jax
from laser_jax.config import (
    MeshConfig,
    PromptConfig,
    RetrieverConfig,
    ScratchConfig,
    save_retriever_config,
)
from laser_jax.data.tokenization import (
    PromptTokenizer,
    TokenizationError,
    load_tokenizer,
    train_tokenizer,
)
from laser_jax.encoder import encode
from laser_jax.files.reading import parse_yaml
from laser_jax.hf.directory import read_backbone_config
from laser_jax.hf.writing import save_params
from laser_jax.inference.batch_encoder import LatentEncoder
from laser_jax.inference.retriever import (
    EncodingStats,
    LatentRetriever,
    OverlongTextError,
    shortened,
)
from laser_jax.modeling.backbone import Backbone
from laser_jax.sharding import make_mesh

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

SCRATCH = ScratchConfig(
    hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=16
)
DOCUMENTS = [
    "Ulm lies on the Danube.",
    "",
    "Kiel lies at the sea, and the sea is cold there in the winter and in the spring.",
    "Jena.",
    "Bonn lies on the Rhine, as Mainz does.",
]
TASK = "Find the town"
LONG = "the sea is cold " * 40
PROMPT = PromptConfig(query_max_length=128, document_max_length=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as the trainer exports it."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([*DOCUMENTS, TASK, "Instruct: Query:"], 300)
    backbone = SCRATCH.backbone(len(tokenizer))
    drawn = jax.jit(Backbone(backbone).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    save_params(directory, nn.meta.unbox(drawn), backbone, dtype=np.float32, lora=None)
    tokenizer.save_pretrained(directory)
    checksum = PromptTokenizer(tokenizer, PROMPT).checksum()
    config = RetrieverConfig(
        backbone, num_thinking_steps=2, prompt=PROMPT, prompt_checksum=checksum
    )
    save_retriever_config(config, directory)
    return directory


@pytest.fixture(scope="module")
def retriever(model: Path) -> LatentRetriever:
    made = LatentRetriever.from_pretrained(
        model, batch_size=4, batch_tokens=256, length_multiple=32
    )
    made.warm_up()
    return made


@pytest.fixture(scope="module")
def vectors(retriever: LatentRetriever) -> np.ndarray:
    return retriever.encode_document(DOCUMENTS)


EMBED = jax.jit(encode, static_argnames=("config", "num_thinking_steps"))


def pure(model: Path, ids: list[int], k: int | None = None) -> np.ndarray:
    """What the pure function makes of one row, in a width that serves all tests."""
    params, config = laser_jax.load_pretrained(model)
    ids_BT, mask_BT = np.zeros((1, 512), np.int32), np.zeros((1, 512), np.int32)
    ids_BT[0, : len(ids)], mask_BT[0, : len(ids)] = ids, 1
    return np.asarray(EMBED(params, ids_BT, mask_BT, config=config, num_thinking_steps=k)[0])


# --- vectors -----------------------------------------------------------------------------------


def test_documents_and_queries_are_encoded_with_the_prompts_of_training(
    model, retriever, vectors
) -> None:
    prompts = PromptTokenizer(load_tokenizer(model), PROMPT)
    np.testing.assert_allclose(vectors[2], pure(model, prompts.document(DOCUMENTS[2])), atol=1e-5)
    query = retriever.encode_query("Where is Ulm?", instruction=TASK)
    wanted = pure(model, prompts.query("Where is Ulm?", TASK))
    np.testing.assert_allclose(query, wanted, atol=1e-5)


def test_vectors_are_unit_float32_rows_and_a_string_gives_one_vector(retriever, vectors) -> None:
    assert vectors.shape == (5, 16)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-6)
    assert retriever.encode_document("Jena.").shape == (16,)
    assert retriever.encode_query(("Jena?",), instruction="").shape == (1, 16)


def test_no_texts_give_no_vectors(retriever) -> None:
    for empty in (retriever.encode_document([]), retriever.encode_query([], instruction="")):
        assert empty.shape == (0, 16)
        assert empty.dtype == np.float32


def test_a_text_has_the_same_vector_alone_and_in_any_order_and_batch(retriever, vectors) -> None:
    many = [DOCUMENTS[i % 5] for i in range(37)]  # blocks of 16, so three of them
    np.testing.assert_allclose(
        retriever.encode_document(many), [vectors[i % 5] for i in range(37)], atol=1e-5
    )
    for text, vector in zip(DOCUMENTS, vectors, strict=True):
        np.testing.assert_allclose(retriever.encode_document(text), vector, atol=1e-5)
    other = retriever.encode_document(DOCUMENTS, batch_size=3)
    np.testing.assert_allclose(other, vectors, atol=1e-5)


def test_nothing_is_compiled_after_warming_up(retriever, compilations) -> None:
    with compilations() as compiled, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the text that is too long
        for count in (1, 2, 5, 11):
            retriever.encode_document([*DOCUMENTS, LONG][-count:] * 3)
            retriever.encode_query(DOCUMENTS[:count], instruction=TASK, truncate_dim=4)
    assert compiled == []
    with compilations() as compiled:
        retriever.encode_query("Where?", instruction=TASK, num_thinking_steps=1)
    assert len(compiled) == 1


def test_warming_up_begins_with_the_shortest_prompt_of_either_kind(
    retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(retriever.encoder, "warm_up", lambda *args, **more: asked.append(more))
    templates = ("{query}", "A document: {document}"), ("A query: {query}", "{document}")
    for query, document in templates:
        config = dataclasses.replace(PROMPT, query_template=query, document_template=document)
        monkeypatch.setattr(retriever.prompts, "config", config)
        retriever.warm_up()
    bare = dataclasses.replace(PROMPT, query_template="{query}")
    monkeypatch.setattr(retriever.prompts, "config", bare)
    shortest = len(retriever.prompts.query("", ""))
    assert [more["shortest"] for more in asked] == [shortest] * 2


@pytest.mark.parametrize("settings", [{"longest": 0}, {"num_thinking_steps": 0}])
def test_warming_up_for_nothing_is_refused(retriever, settings) -> None:
    with pytest.raises(ValueError, match="longest and num_thinking_steps must be at least 1, got"):
        retriever.warm_up(**settings)


PROGRAM = """
import sys, jax
sys.modules["torch"] = None  # transformers would load it, and nobody here uses it
hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None
)
from laser_jax import LatentRetriever
LatentRetriever.from_pretrained(sys.argv[1]).encode_document("Jena.")
print(len(hits))
"""


def test_another_process_finds_its_programs_in_jaxs_cache(
    model, tmp_path: Path, one_device: dict[str, str]
) -> None:
    environment = one_device | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    hits = []
    for _ in range(2):
        command = [sys.executable, "-c", PROGRAM, str(model)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        hits.append(int(done.stdout.splitlines()[-1]))
    assert hits[1] > hits[0]


def test_fewer_dimensions_are_unit_length_again(retriever, vectors) -> None:
    short = retriever.encode_document(DOCUMENTS, truncate_dim=5)
    lengths = np.linalg.norm(vectors[:, :5], axis=1, keepdims=True)
    np.testing.assert_allclose(short, vectors[:, :5] / lengths, atol=1e-6)


def test_thinking_longer_or_shorter_is_an_option(model, retriever) -> None:
    ids = retriever.prompts.document("Jena.")
    for k in (1, 3):
        got = retriever.encode_document("Jena.", num_thinking_steps=k)
        np.testing.assert_allclose(got, pure(model, ids, k), atol=1e-5)


def test_a_model_may_have_a_k_of_its_own_for_documents(
    model: Path, retriever: LatentRetriever, vectors: np.ndarray, tmp_path: Path
) -> None:
    """Saved with the model, and nothing that queries need."""
    shutil.copytree(model, tmp_path / "model")
    config = dataclasses.replace(laser_jax.load_pretrained(model)[1], document_thinking_steps=1)
    save_retriever_config(config, tmp_path / "model")
    own = LatentRetriever.from_pretrained(tmp_path / "model", batch_size=4, length_multiple=32)
    found = own.encode_document(DOCUMENTS)
    wanted = retriever.encode_document(DOCUMENTS, num_thinking_steps=1)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(found - vectors).max() > 1e-3
    longer = own.encode_document(DOCUMENTS, num_thinking_steps=2)
    np.testing.assert_allclose(longer, vectors, atol=1e-5)
    queries = (of.encode_query("Ulm?", instruction=TASK) for of in (own, retriever))
    np.testing.assert_allclose(*queries, atol=1e-5)


def test_every_query_may_have_an_instruction_of_its_own(retriever) -> None:
    both = retriever.encode_query(["Ulm?", "Ulm?"], instruction=[TASK, "Bonn"])
    one = retriever.encode_query("Ulm?", instruction="Bonn")
    np.testing.assert_allclose(both[1], one, atol=1e-5)
    assert np.abs(both[0] - both[1]).max() > 1e-3


def test_similarity_is_the_cosine_of_all_pairs_or_of_row_with_row(retriever, vectors) -> None:
    scores = retriever.similarity(vectors[:2], vectors)
    np.testing.assert_allclose(scores, vectors[:2] @ vectors.T, atol=1e-6)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(
        retriever.similarity_pairwise(vectors[:2], vectors[2:4]), scores[[0, 1], [2, 3]], atol=1e-6
    )
    assert retriever.similarity(vectors[0], vectors).shape == (1, 5)
    cut, long = vectors[:2, :8], 3 * vectors.astype(np.float64)[:, :8]
    cosines = retriever.similarity(shortened(cut, 8), shortened(vectors, 8))
    assert retriever.similarity(cut, long).dtype == np.float32
    np.testing.assert_allclose(retriever.similarity(cut, long), cosines, atol=1e-6)
    pairs = retriever.similarity_pairwise(cut, long[2:4])
    np.testing.assert_allclose(pairs, cosines[[0, 1], [2, 3]], atol=1e-6)


# --- texts that do not fit, and arguments that cannot be ----------------------------------------


def test_overlong_texts_are_shortened_and_counted_in_one_warning(retriever) -> None:
    with pytest.warns(UserWarning, match="were shortened") as caught:
        retriever.encode_document([*DOCUMENTS, LONG, LONG + "and dark", DOCUMENTS[0]])
    assert [str(w.message) for w in caught] == [
        "2 of 8 texts (25.0%) are longer than prompt.document_max_length 64 and were shortened"
    ]
    assert caught[0].filename == __file__


def test_stats_count_over_calls_and_replace_the_warning(retriever) -> None:
    seen: list[int] = []
    stats = EncodingStats(watch=lambda t: seen.append(t.texts))
    retriever.encode_document([*DOCUMENTS, LONG], stats=stats)
    retriever.encode_query(LONG, instruction=TASK, stats=stats)
    tokens = [len(retriever.prompts.document(text)) for text in [*DOCUMENTS, LONG]]
    tokens.append(len(retriever.prompts.query(LONG, TASK)))
    assert (stats.texts, stats.tokens, stats.truncated) == (7, sum(tokens), 2)
    assert seen == [4, 6, 7]  # batch by batch


def test_the_closing_suffix_survives_the_shortening(model, retriever) -> None:
    ids = retriever.prompts.document(LONG)
    assert len(ids) <= 64
    suffix = retriever.prompts.tokenizer.decode(ids)[-60:]
    assert suffix.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    with pytest.warns(UserWarning, match=r"1 of 1 texts \(100\.0%\)"):
        vector = retriever.encode_document(LONG)
    np.testing.assert_allclose(vector, pure(model, ids), atol=1e-5)


def test_on_overflow_error_names_the_text_and_its_tokens(retriever) -> None:
    whole = retriever.prompts.document_prompt(LONG).whole_length
    wanted = f"text 1 takes {whole} tokens, and prompt.document_max_length is 64"
    before = threading.active_count()
    with pytest.raises(OverlongTextError, match=wanted):
        retriever.encode_document(["Jena.", LONG, "Bonn."], on_overflow="error")
    assert threading.active_count() == before
    assert retriever.encode_document(DOCUMENTS, on_overflow="error").shape == (5, 16)


def test_an_instruction_that_leaves_no_room_is_an_error(retriever) -> None:
    with pytest.raises(TokenizationError, match="query_max_length leaves 128 tokens"):
        retriever.encode_query("Ulm?", instruction=LONG)


def test_a_forgotten_instruction_is_an_error(retriever) -> None:
    with pytest.raises(ValueError, match=r"wants an instruction: pass instruction="):
        retriever.encode_query("Where is Ulm?")
    with pytest.raises(ValueError, match="1 instructions for 2 queries"):
        retriever.encode_query(["Ulm?", "Bonn?"], instruction=[TASK])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"truncate_dim": 0}, r"truncate_dim must lie in 1\.\.16, got 0"),
        ({"truncate_dim": 17}, "got 17"),
        ({"num_thinking_steps": 0}, "at least 1"),
        ({"num_thinking_steps": 5000}, "5063 positions, and the model has 4096"),
        ({"on_overflow": "ignore"}, '"truncate" or "error", not'),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_an_impossible_argument_is_refused(retriever, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        retriever.encode_document(DOCUMENTS, **settings)


def test_a_text_may_take_all_positions_of_the_model(model) -> None:
    """K = 2 states append one thought to the prompt."""
    params, config = laser_jax.load_pretrained(model)
    backbone = dataclasses.replace(config.backbone, max_position_embeddings=129)
    config = dataclasses.replace(config, backbone=backbone)
    full = LatentRetriever(
        LatentEncoder(params, config), PromptTokenizer(load_tokenizer(model), config.prompt)
    )
    assert full.encode_query("Ulm?", instruction=TASK).shape == (16,)
    with pytest.raises(ValueError, match="query_max_length 128 and 3 thinking steps take 130"):
        full.encode_query("Ulm?", instruction=TASK, num_thinking_steps=3)


def test_the_first_text_whose_vector_is_not_finite_is_named(retriever) -> None:
    nothing = jax.tree.map(lambda a: a * np.nan, retriever.encoder.variables)
    broken = LatentRetriever(LatentEncoder(nothing, retriever.encoder.config), retriever.prompts)
    queries = functools.partial(broken.encode_query, instruction="")
    for run in (broken.encode_document, queries):
        for texts in ("Kiel", ["Kiel", "Ulm"]):
            with pytest.raises(ValueError, match="the vector of text 0, 'Kiel', is not finite"):
                run(texts)


def test_a_text_that_is_no_string_is_named(retriever) -> None:
    with pytest.raises(ValueError, match="text 1 is no string but None"):
        retriever.encode_document(["Jena.", None])


@pytest.mark.parametrize(
    "texts",
    [
        {"a": "Jena.", "b": "Ulm."},
        {"a": "Jena.", "b": "Ulm."}.values(),
        {"Jena.", "Ulm."},
        iter(["Jena.", "Ulm."]),
        (text for text in ["Jena.", "Ulm."]),
        np.array([["Jena."], ["Ulm."]]),
        np.array("Jena."),
        b"Jena.",
        7,
        None,
    ],
    ids=lambda texts: type(texts).__name__,
)
def test_texts_in_no_list_are_refused_by_type(retriever, texts) -> None:
    match = f"with a string for every text is wanted, not a {type(texts).__name__}"
    with pytest.raises(ValueError, match=match):
        retriever.encode_document(texts)
    with pytest.raises(ValueError, match=match):
        retriever.encode_query(texts, instruction=TASK)
    if texts is not None:
        with pytest.raises(ValueError, match=match.replace("every text", "every instruction")):
            retriever.encode_query(["Ulm?", "Bonn?"], instruction=texts)


def test_a_data_frame_is_refused_and_its_column_taken(retriever) -> None:
    pandas, texts = pytest.importorskip("pandas"), ["Jena.", "Ulm."]
    frame = pandas.DataFrame({"text": texts}, index=[5, 3])
    with pytest.raises(ValueError, match="every text is wanted, not a DataFrame"):
        retriever.encode_document(frame)
    with pytest.raises(ValueError, match="text 1 is no string but nan"):
        retriever.encode_document(pandas.Series(["Jena.", float("nan")]))
    expected = retriever.encode_document(texts)
    for column in (frame["text"], tuple(texts), np.array(texts), frame["text"].to_numpy()):
        np.testing.assert_array_equal(retriever.encode_document(column), expected)


def test_a_text_that_is_no_unicode_is_named(retriever) -> None:
    with pytest.raises(ValueError, match=r"^text 1 is no Unicode text: its character 2 is half a"):
        retriever.encode_document(["Jena.", "a \ud800"])
    with pytest.raises(ValueError, match=r"^instruction 0 is no Unicode text: its character 0 "):
        retriever.encode_query("Jena?", instruction="\udfff")


def test_an_instruction_that_is_no_string_is_named(retriever) -> None:
    with pytest.raises(ValueError, match="instruction 1 is no string but None"):
        retriever.encode_query(["Ulm?", "Bonn?"], instruction=[TASK, None])


# --- loading -----------------------------------------------------------------------------------


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model, tmp_path / "copy")


def change_config(directory: Path, **values: object) -> None:
    file = directory / "laser_config.json"
    changed = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))


def test_a_directory_without_prompt_settings_says_how_to_pass_them(copy) -> None:
    change_config(copy, prompt=None)
    with pytest.raises(ValueError, match=r"laser_config\.json: the prompt settings are missing"):
        LatentRetriever.from_pretrained(copy)
    (copy / "laser_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="pass a RetrieverConfig"):
        LatentRetriever.from_pretrained(copy)


def test_a_plain_directory_loads_with_a_config(copy, retriever, vectors) -> None:
    (copy / "laser_config.json").unlink()
    plain = LatentRetriever.from_pretrained(copy, config=retriever.encoder.config)
    np.testing.assert_allclose(plain.encode_document(DOCUMENTS[3]), vectors[3], atol=1e-5)


# --- the models that the authors released --------------------------------------------------------


@pytest.fixture
def released(copy: Path) -> Path:
    """A plain Hugging Face directory of a Qwen3, with its tokenizer and nothing of ours."""
    (copy / "laser_config.json").unlink()
    return copy


SPECIAL = "Ulm <|im_end|> lies"


@pytest.mark.parametrize(
    ("preset", "prompt"),
    [
        ("official", {"query_max_length": 3072, "document_max_length": 3072}),
        ("official-bare", {"query_template": "{query}", "chat_template": False}),
    ],
)
def test_a_preset_reads_as_the_settings_that_it_stands_for(released, preset, prompt) -> None:
    official = parse_yaml((EXAMPLES.parent / "configs" / "official.yaml").read_text())["prompt"]
    if "query_max_length" in prompt:
        prompt = {**prompt, "explicit_max_length": 3072 + 512}
    config = RetrieverConfig(
        read_backbone_config(released),
        num_thinking_steps=3,
        prompt=PromptConfig(**{**official, **prompt}),
    )
    explicit = LatentRetriever.from_pretrained(released, config=config)
    found = LatentRetriever.from_pretrained(released, preset=preset)
    assert found.encoder.config == config
    assert found.prompts.checksum() == explicit.prompts.checksum()
    texts = [*DOCUMENTS, SPECIAL]
    np.testing.assert_array_equal(found.encode_document(texts), explicit.encode_document(texts))
    np.testing.assert_array_equal(
        found.encode_query(texts, instruction=TASK), explicit.encode_query(texts, instruction=TASK)
    )


def test_presets_make_the_tokens_of_the_released_code(released) -> None:
    tokenizer = load_tokenizer(released)

    def turn(text: str) -> list[int]:
        """What `TransformersTextEmbedder.tokenize` of the released evaluator does."""
        turns = [{"role": "user", "content": text}]
        whole = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return tokenizer(f"{whole}<think>\n\n</think>\n\n")["input_ids"]

    official = LatentRetriever.from_pretrained(released, preset="official").prompts
    assert official.document(SPECIAL) == turn(SPECIAL)
    assert official.query(SPECIAL, TASK) == turn(f"Instruct: {TASK}\nQuery: {SPECIAL}")
    bare = LatentRetriever.from_pretrained(released, preset="official-bare").prompts
    assert bare.document(LONG) == tokenizer(LONG.strip())["input_ids"]
    assert bare.query(SPECIAL, TASK) == tokenizer(SPECIAL)["input_ids"]
    assert official.eos_id not in bare.document(LONG)


def test_a_preset_that_cannot_be_is_refused(model, released, retriever) -> None:
    with pytest.raises(
        ValueError, match="preset is one of official, official-bare, gircse, not 'laser'"
    ):
        LatentRetriever.from_pretrained("no/where", preset="laser")
    with pytest.raises(ValueError, match="a config or the preset 'official', not both"):
        LatentRetriever.from_pretrained(
            released, preset="official", config=retriever.encoder.config
        )
    with pytest.raises(ValueError, match=r"has a laser_config\.json, which says how"):
        LatentRetriever.from_pretrained(model, preset="official")
    with pytest.raises(FileNotFoundError, match='preset="official"'):
        LatentRetriever.from_pretrained(released)


# --- what does not belong together ---------------------------------------------------------------


def test_another_chat_template_than_that_of_training_is_refused(copy) -> None:
    tokenizer = load_tokenizer(copy)
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<|im_end|>", "")
    tokenizer.save_pretrained(copy)
    with pytest.raises(ValueError, match="do not make the prompts of training"):
        LatentRetriever.from_pretrained(copy)
    change_config(copy, prompt_checksum=None)
    LatentRetriever.from_pretrained(copy)


def test_a_tokenizer_without_chat_template_is_refused(copy) -> None:
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(TokenizationError, match="no chat template"):
        LatentRetriever.from_pretrained(copy)


def test_a_tokenizer_of_another_model_is_refused(copy) -> None:
    train_tokenizer([*DOCUMENTS, LONG, "more words than before"], 330).save_pretrained(copy)
    with pytest.raises(
        ValueError, match=r"\d+ token\(s\) without an embedding, .* not of one model"
    ):
        LatentRetriever.from_pretrained(copy)


def test_prompts_of_other_settings_are_refused(retriever) -> None:
    other = dataclasses.replace(PROMPT, chat_template=False)
    prompts = PromptTokenizer(retriever.prompts.tokenizer, other)
    with pytest.raises(ValueError, match="prompt settings differ"):
        LatentRetriever(retriever.encoder, prompts)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_a_mesh_gives_the_same_vectors(model, vectors, sizes) -> None:
    split = LatentRetriever.from_pretrained(model, mesh=make_mesh(MeshConfig(*sizes)))
    np.testing.assert_allclose(split.encode_document(DOCUMENTS), vectors, atol=1e-5)


def test_a_name_that_is_neither_a_directory_nor_on_the_hub_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    with pytest.raises(FileNotFoundError, match="org/name is no directory"):
        LatentRetriever.from_pretrained("org/name")


@pytest.mark.parametrize("name", ["search_texts.py", "one_program.py"])
def test_the_examples_run(model, monkeypatch, capsys, name) -> None:
    monkeypatch.setattr(sys, "argv", [name, str(model)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert "Danube" in capsys.readouterr().out


def test_longer_texts_may_be_read_than_in_training(model, retriever) -> None:
    config = retriever.encoder.config
    longer = dataclasses.replace(PROMPT, document_max_length=1024)
    wide = LatentRetriever.from_pretrained(model, config=dataclasses.replace(config, prompt=longer))
    ids = wide.prompts.document(LONG)
    assert len(ids) > 64
    np.testing.assert_allclose(wide.encode_document(LONG), pure(model, ids), atol=1e-5)
