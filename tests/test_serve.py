"""The server: what clients may send, what they get, and that it stays bounded and quick to end."""

from __future__ import annotations

import base64
import contextlib
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from langchain_openai import OpenAIEmbeddings

from laser_jax.config import ConfigError, load_retriever_config, save_retriever_config
from laser_jax.encode_corpus.run import main as encode_main
from laser_jax.evaluate.beir import Document
from laser_jax.files.reading import DataError
from laser_jax.inference.batch_encoder import LatentEncoder, NotFiniteError
from laser_jax.inference.retriever import EncodingStats, LatentRetriever
from laser_jax.search.vectors import (
    Manifest,
    VectorsInfo,
    read_manifest,
    shard_name,
    write_manifest,
    write_shard,
)
from laser_jax.serve.batching import Batcher
from laser_jax.serve.index import read_index
from laser_jax.serve.metrics import Metrics
from laser_jax.serve.requests import RequestError
from laser_jax.serve.run import ServeOptions, Server, _Protocol, address_of, bind, load, main
from laser_jax.think.thought import load_corpus

SIZES: dict[str, Any] = {"max_length": 64, "batch_size": 8, "length_multiple": 32}


class Running:
    """A server in a thread of this process, and a client of it."""

    def __init__(self, options: ServeOptions, host: str = "127.0.0.1") -> None:
        self.socket = bind(host, 0)
        self.service, make_ready = load(options, local_only=True)
        self.server = Server(self.service, make_ready)
        self.thread = threading.Thread(target=self.server.serve_on, args=(self.socket,))
        self.thread.start()
        port = self.socket.getsockname()[1]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self.client = httpx2.Client(base_url=self.url, timeout=120)

    def wait(self) -> None:
        while self.client.get("/ready").status_code != 200:
            assert self.server.failure is None
            time.sleep(0.02)

    def embed(self, **body: Any) -> httpx2.Response:
        return self.client.post("/v1/embeddings", json={"model": "model", **body})

    def stop(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()


@contextlib.contextmanager
def running(options: ServeOptions, host: str = "127.0.0.1") -> Iterator[Running]:
    server = Running(options, host)
    try:
        server.wait()
        yield server
    finally:
        server.stop()
        assert server.server.failure is None


@pytest.fixture(scope="module")
def server(thinking_model: Path) -> Iterator[Running]:
    options = ServeOptions(
        model=str(thinking_model),
        corpus=str(thinking_model.parent / "corpus"),
        max_thinking_steps=5,
        max_rows=64,
        **SIZES,
    )
    with running(options) as server:
        yield server


@pytest.fixture(scope="module")
def retriever(server: Running) -> LatentRetriever:
    return server.service.retriever


def vectors_of(response: httpx2.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    rows = response.json()["data"]
    assert [row["index"] for row in rows] == list(range(len(rows)))
    return np.array([row["embedding"] for row in rows], np.float32)


# --- embeddings --------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 3, 4, 5])
def test_vectors_are_those_of_the_retriever_at_every_K(
    server: Running, retriever: LatentRetriever, K: int
) -> None:
    texts = ["Where is Ulm?", "Kiel", "far " * 5]
    got = vectors_of(
        server.embed(input=texts, input_type="query", instruction="Find", thinking_steps=K)
    )
    wanted = retriever.encode_query(texts, instruction="Find", num_thinking_steps=K)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    got = vectors_of(server.embed(input=texts, input_type="document", thinking_steps=K))
    np.testing.assert_allclose(
        got, retriever.encode_document(texts, num_thinking_steps=K), atol=1e-6
    )


def test_one_text_the_roles_by_name_dimensions_and_base64(
    server: Running, retriever: LatentRetriever
) -> None:
    wanted = retriever.encode_document("Kiel lies at the sea.", truncate_dim=7)
    asked = {"input": "Kiel lies at the sea.", "model": "model:document", "dimensions": 7}
    np.testing.assert_allclose(vectors_of(server.embed(**asked))[0], wanted, atol=1e-5)
    answer = server.embed(**asked, encoding_format="base64").json()
    raw = base64.b64decode(answer["data"][0]["embedding"])
    np.testing.assert_allclose(np.frombuffer(raw, "<f4"), wanted, atol=1e-5)
    tokens = len(retriever.prompts.document("Kiel lies at the sea."))
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert answer["model"] == "model:document"


def test_token_ids_are_the_text_that_they_stand_for(
    server: Running, retriever: LatentRetriever
) -> None:
    texts = ["Ulm lies on the Danube.", "<think> Kiel"]
    ids = [retriever.prompts.text_ids(text) for text in texts]
    wanted = retriever.encode_document(texts)
    got = vectors_of(server.embed(input=ids, input_type="document"))
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    one = vectors_of(server.embed(input=ids[0], input_type="document"))
    np.testing.assert_allclose(one[0], wanted[0], atol=1e-5)


def test_token_ids_of_blanks_are_refused_as_a_blank_text_is(
    server: Running, retriever: LatentRetriever
) -> None:
    blank = retriever.prompts.text_ids(" \n ")
    for sent in (blank, [blank]):
        error = server.embed(input=sent, input_type="document").json()["error"]
        assert (error["param"], error["message"]) == ("input", "input[0] is empty")


def test_what_does_not_fit_is_refused_unless_it_may_be_cut(
    server: Running, retriever: LatentRetriever
) -> None:
    texts = ["short", "long " * 100]
    refused = server.embed(input=texts, input_type="document")
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "input"
    assert "input[1] takes" in error["message"]
    cut = vectors_of(server.embed(input=texts, input_type="document", truncate=True))
    with pytest.warns(UserWarning, match="shortened"):
        wanted = retriever.encode_document(texts)
    np.testing.assert_allclose(cut, wanted, atol=1e-5)


BAD: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({}, 400, "input_type", 'or ask for the model "model:query"'),
    ({"model": 3}, 400, "model", "model must be a text"),
    ({"model": "gpt"}, 404, "model", "there is no model 'gpt'"),
    ({"model": "model:query", "input_type": "document"}, 400, "input_type", "name says 'query'"),
    ({"input_type": "passage"}, 400, "input_type", "query or document"),
    ({"input_type": "query"}, 400, "instruction", "instruction is missing"),
    ({"input_type": "query", "instruction": 3}, 400, "instruction", "must be a text"),
    ({"input_type": "query", "instruction": "w " * 99}, 400, "instruction", "no room for"),
    ({"input_type": "document", "instruction": "x"}, 400, "instruction", "without an instr"),
    ({"input": [], "input_type": "document"}, 400, "input", "that is not empty"),
    ({"input": None, "input_type": "document"}, 400, "input", "input must be"),
    ({"input": {"a": 1}, "input_type": "document"}, 400, "input", "input must be"),
    ({"input": ["a", " "], "input_type": "document"}, 400, "input", "input[1] is empty"),
    ({"input": ["a", []], "input_type": "document"}, 400, "input", "input[1] is empty"),
    ({"input": ["a", None], "input_type": "document"}, 400, "input", "input[1] must be a text"),
    ({"input": ["a", 3], "input_type": "document"}, 400, "input", "input[1] must be a text"),
    ({"input": [3, "a"], "input_type": "document"}, 400, "input", "input[0] must be a text"),
    ({"input": [True], "input_type": "document"}, 400, "input", "input[0] must be a text"),
    ({"input": [99999], "input_type": "document"}, 400, "input", "token id 99999"),
    ({"input": [[-1]], "input_type": "document"}, 400, "input", "token id -1"),
    ({"input": ["x"] * 65, "input_type": "document"}, 400, "input", "65 rows"),
    ({"dimensions": 0, "input_type": "document"}, 400, "dimensions", "1.."),
    ({"dimensions": 9999, "input_type": "document"}, 400, "dimensions", "got 9999"),
    ({"dimensions": 2.5, "input_type": "document"}, 400, "dimensions", "got 2.5"),
    ({"thinking_steps": 6, "input_type": "document"}, 400, "thinking_steps", "1..5"),
    ({"thinking_steps": True, "input_type": "document"}, 400, "thinking_steps", "got True"),
    (
        {"encoding_format": "int8", "input_type": "document"},
        400,
        "encoding_format",
        "float or base64",
    ),
    ({"truncate": "yes", "input_type": "document"}, 400, "truncate", "true or false"),
    ({"temperature": 1}, 400, "temperature", "unknown field 'temperature'"),
]


@pytest.mark.parametrize(("sent", "status", "param", "message"), BAD)
def test_whatever_is_wrong_is_named(
    server: Running, sent: dict[str, Any], status: int, param: str | None, message: str
) -> None:
    response = server.embed(**{"input": "Ulm", **sent})
    assert response.status_code == status
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"a": "\xff"}', b'{"input": "\\ud800"}'])
def test_a_body_that_is_no_json_object_is_refused(server: Running, body: bytes) -> None:
    for route in ("/v1/embeddings", "/v1/search"):
        response = server.client.post(route, content=body)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "invalid_json"


def test_a_body_beyond_the_most_is_refused_before_it_has_come(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("laser_jax.serve.app.LARGEST_BODY", 1000)
    response = server.embed(input="x" * 2000, input_type="document")
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


def test_unknown_routes_and_methods_have_answers_of_the_same_shape(server: Running) -> None:
    for method, route, status in (
        ("GET", "/v1/embeddings", 405),
        ("POST", "/v1/completions", 404),
        ("GET", "/<script>", 404),
        ("GET", "/v1/models/gpt", 404),
    ):
        response = server.client.request(method, route)
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_models_say_what_they_take(server: Running, retriever: LatentRetriever) -> None:
    listed = server.client.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["model", "model:query", "model:document"]
    assert server.client.get("/v1/models/model:query").json() == listed[1]
    assert listed[0]["dimensions"] == retriever.encoder.config.backbone.hidden_size
    assert listed[0]["thinking_steps"] == 3
    assert listed[0]["document_thinking_steps"] == 3
    assert listed[0]["max_thinking_steps"] == 5
    assert listed[0]["needs_instruction"] is True


def test_documents_are_embedded_at_the_models_own_k_of_them(
    thinking_model: Path, tmp_path: Path, retriever: LatentRetriever
) -> None:
    run = shutil.copytree(thinking_model.parent, tmp_path / "run")
    config = replace(load_retriever_config(thinking_model), document_thinking_steps=1)
    save_retriever_config(config, run / "model")
    texts = ["Ulm lies on the Danube.", "Kiel"]
    with running(ServeOptions(model=str(run / "model"), **SIZES)) as own:
        for more, K in (({}, 1), ({"thinking_steps": 2}, 2)):
            got = vectors_of(own.embed(input=texts, input_type="document", **more))
            wanted = retriever.encode_document(texts, num_thinking_steps=K)
            np.testing.assert_allclose(got, wanted, atol=1e-5)
        got = vectors_of(own.embed(input=texts, input_type="query", instruction="Find"))
        wanted = retriever.encode_query(texts, instruction="Find", num_thinking_steps=3)
        np.testing.assert_allclose(got, wanted, atol=1e-5)
        said = own.client.get("/v1/models").json()["data"][0]
        assert (said["thinking_steps"], said["document_thinking_steps"]) == (3, 1)


def test_langchain_embeds_documents_and_queries_by_the_models_name(
    server: Running, retriever: LatentRetriever
) -> None:
    told: Any = {"base_url": f"{server.url}/v1", "api_key": "any", "max_retries": 0}
    documents = OpenAIEmbeddings(
        model="model:document", check_embedding_ctx_length=False, chunk_size=2, **told
    )
    texts = ["Ulm lies on the Danube.", "Kiel", "A harbour"]
    got = np.array(documents.embed_documents(texts), np.float32)
    np.testing.assert_allclose(got, retriever.encode_document(texts), atol=1e-5)
    more = {"extra_body": {"instruction": "Find", "thinking_steps": 2}}
    queries = OpenAIEmbeddings(
        model="model:query", check_embedding_ctx_length=False, model_kwargs=more, **told
    )
    wanted = retriever.encode_query("Ulm", instruction="Find", num_thinking_steps=2)
    np.testing.assert_allclose(queries.embed_query("Ulm"), wanted, atol=1e-5)


def test_openai_s_own_client_gets_vectors_and_its_own_errors(
    server: Running, retriever: LatentRetriever
) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        texts = ["Ulm lies on the Danube.", "Kiel"]
        found = client.embeddings.create(model="model:document", input=texts)
        got = np.array([row.embedding for row in found.data], np.float32)
        np.testing.assert_allclose(got, retriever.encode_document(texts), atol=1e-5)
        more = {"input_type": "query", "instruction": "Find", "thinking_steps": 2}
        found = client.embeddings.create(
            model="model", input="Ulm", dimensions=9, encoding_format="float", extra_body=more
        )
        wanted = retriever.encode_query(
            "Ulm", instruction="Find", num_thinking_steps=2, truncate_dim=9
        )
        np.testing.assert_allclose(found.data[0].embedding, wanted, atol=1e-5)
        assert next(model.id for model in client.models.list()) == "model"
        with pytest.raises(openai.BadRequestError) as refused:
            client.embeddings.create(model="model", input="Ulm")
        assert refused.value.param == "input_type"
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="gpt", input="Ulm")


def test_curl_gets_vectors(server: Running, retriever: LatentRetriever) -> None:
    if (curl := shutil.which("curl")) is None:
        pytest.skip("there is no curl here")
    body = json.dumps({"model": "model:document", "input": "Kiel"})
    command = [curl, "--silent", f"{server.url}/v1/embeddings", "--data", body]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    wanted = retriever.encode_document("Kiel")
    np.testing.assert_allclose(answer["data"][0]["embedding"], wanted, atol=1e-5)


# --- search ------------------------------------------------------------------------------------


def test_search_ranks_as_the_vectors_do_and_brings_the_texts(
    server: Running, retriever: LatentRetriever
) -> None:
    index = server.service.index
    assert index is not None
    queries = ["Where is Ulm?", "Kiel"]
    body = {"query": queries, "instruction": "Find", "k": 2, "thinking_steps": 2}
    answer = server.client.post("/v1/search", json=body).json()
    found = retriever.encode_query(queries, instruction="Find", num_thinking_steps=2)
    ids = sorted(index.texts)
    texts = [index.texts[id_] for id_ in ids]
    scores = found @ retriever.encode_document(texts, stats=EncodingStats()).T
    for row, result in zip(scores, answer["data"], strict=True):
        best = np.argsort(-row)[:2]
        documents = result["documents"]
        assert [document["id"] for document in documents] == [ids[c] for c in best]
        np.testing.assert_allclose([d["score"] for d in documents], row[best], atol=1e-5)
        assert [document["text"] for document in documents] == [index.texts[ids[c]] for c in best]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "query", "query must be a text"),
        ({"query": [["a"]]}, "query", "query[0]"),
        ({"query": [[3]]}, "query", "query[0] must be a text"),
        ({"query": ["x", " "], "instruction": ""}, "query", "query[1] is empty"),
        ({"query": "x", "k": 4, "instruction": ""}, "k", "1..3"),
        ({"query": "x", "input_type": "query"}, "input_type", "unknown field 'input_type'"),
        ({"query": "long " * 100, "instruction": ""}, "query", "query[0] takes"),
        ({"query": "x", "instruction": "w " * 99}, "instruction", "no room for the text"),
    ],
)
def test_a_search_that_cannot_be_is_named(
    server: Running, body: dict[str, Any], param: str, message: str
) -> None:
    response = server.client.post("/v1/search", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]


@pytest.fixture(scope="module")
def encoded(thinking_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vectors of the model's corpus, as float16."""
    stored = tmp_path_factory.mktemp("encoded") / "vectors"
    flags = [f for k, v in SIZES.items() for f in (f"--{k}", str(v))]
    corpus = str(thinking_model.parent / "corpus")
    where = ["--input", corpus, "--output", str(stored), "--store_dtype", "float16"]
    encode_main(["--model", str(thinking_model), *where, *flags])
    return stored


def test_stored_vectors_come_with_the_texts_of_the_corpus(
    thinking_model: Path, encoded: Path, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Batcher, "warm_up", lambda *_: None)
    corpus = thinking_model.parent / "corpus"
    given: dict[str, Any] = {"corpus": str(corpus), "corpus_vectors": str(encoded)}
    body = {"query": "Where is Ulm?", "k": 3, "instruction": ""}
    with running(ServeOptions(model=str(thinking_model), **given, **SIZES)) as both:
        found, wanted = (
            {document["id"]: document for document in answer.json()["data"][0]["documents"]}
            for answer in (of.client.post("/v1/search", json=body) for of in (both, server))
        )
        assert both.service.site is not None
        vectors_CD = both.service.site.inspector._vectors_CD
    assert {id_: of["text"] for id_, of in found.items()} == {
        document.id: document.text for document in load_corpus(corpus).documents
    }
    for id_, document in found.items():
        assert document["score"] == pytest.approx(wanted[id_]["score"], abs=2e-3)  # of float16
    texts = [document.text for document in load_corpus(corpus).documents]
    in_order = server.service.retriever.encode_document(texts, stats=EncodingStats())
    np.testing.assert_allclose(vectors_CD, in_order, atol=2e-3)  # the page ranks by them


def test_a_corpus_and_vectors_that_do_not_match_are_refused_in_both_directions(
    thinking_model: Path, encoded: Path
) -> None:
    info = read_manifest(encoded, "documents").info
    identity = (info.model_hash, info.prompt_hash, None)
    corpus = load_corpus(thinking_model.parent / "corpus")
    more = replace(corpus, documents=[*corpus.documents, Document("new", "Bonn")])
    with pytest.raises(DataError, match=r"no vector for 1 of 4 documents of --corpus.* 'new'"):
        read_index(encoded, identity, more)
    fewer = replace(corpus, documents=[d for d in corpus.documents if d.id != "kiel"])
    with pytest.raises(DataError, match=r"1 of 3 ids of --corpus_vectors, the first is 'kiel'"):
        read_index(encoded, identity, fewer)


def test_stored_vectors_are_searched_and_those_of_another_model_are_refused(
    thinking_model: Path, encoded: Path, tmp_path: Path, write_model: Callable[..., None]
) -> None:
    stored = shutil.copytree(encoded, tmp_path / "vectors")
    told: dict[str, Any] = {"corpus_vectors": str(stored), **SIZES}
    with running(ServeOptions(model=str(thinking_model), instruction="", **told)) as server:
        ranked = server.client.post("/v1/search", json={"query": "Ulm", "k": 3}).json()["data"]
        documents = ranked[0]["documents"]
        assert sorted(document["id"] for document in documents) == ["kiel", "trap", "ulm"]
        assert [document["text"] for document in documents] == [None] * 3
        assert "No corpus" in server.client.get("/").text
    own = shutil.copytree(thinking_model, tmp_path / "own")
    config = replace(load_retriever_config(own), document_thinking_steps=1)
    save_retriever_config(config, own)
    _, make_ready = load(ServeOptions(model=str(own), **told), local_only=True)
    with pytest.raises(DataError, match=r"its num_thinking_steps is 3, and that of the .* is 1"):
        make_ready()
    other = tmp_path / "other"
    write_model(other, ["Ulm lies on the Danube."], vocab_size=280, layers=2, steps=3)
    for model, message in ((other, "its prompt_hash is"), (thinking_model, "its model_hash is")):
        if model is thinking_model:
            manifest = json.loads((stored / "manifest.json").read_text())
            manifest["model_hash"] = "0" * 32
            (stored / "manifest.json").write_text(json.dumps(manifest))
        _, make_ready = load(ServeOptions(model=str(model), **told), local_only=True)
        with pytest.raises(DataError, match=message):
            make_ready()


def test_a_server_that_is_told_to_end_embeds_no_more_of_its_corpus(thinking_model: Path) -> None:
    corpus = str(thinking_model.parent / "corpus")
    options = ServeOptions(model=str(thinking_model), corpus=corpus, instruction="", **SIZES)
    service, make_ready = load(options, local_only=True)
    service.batcher.stop()
    with pytest.raises(CancelledError, match="told to end before it was ready"):
        make_ready()
    assert service.index is None


def test_stored_vectors_with_an_id_twice_are_refused_and_so_are_none(tmp_path: Path) -> None:
    info = VectorsInfo("m", "p", 1, "float32", 8, "documents")
    unit_1D = np.eye(1, 8, dtype=np.float32)
    shards = [write_shard(tmp_path, shard_name(n), ["ulm"], unit_1D, info) for n in range(2)]
    write_manifest(tmp_path, Manifest(info, tuple(shards)))
    with pytest.raises(DataError, match=r"shard-00001\.parquet: id 'ulm' stands twice"):
        read_index(tmp_path, ("m", "p", None), None)
    write_manifest(tmp_path, Manifest(info, ()))
    with pytest.raises(DataError, match="holds no vector"):
        read_index(tmp_path, ("m", "p", None), None)


# --- batches -----------------------------------------------------------------------------------


def test_requests_of_different_K_share_batches_and_nothing_is_compiled(
    server: Running,
    retriever: LatentRetriever,
    compilations: Callable[[], AbstractContextManager[list[str]]],
) -> None:
    texts = [f"text {n} " * (1 + n % 4) for n in range(60)]
    wanted = [retriever.encode_document(texts, num_thinking_steps=K) for K in range(1, 6)]
    calls: list[int] = []
    start = LatentEncoder.start

    def counted(self: LatentEncoder, rows: Any, Ks: Any) -> Any:
        calls.append(len(rows))
        return start(self, rows, Ks)

    def ask(n: int) -> np.ndarray:
        K = 1 + n % 5
        sent = {"input": texts[n], "input_type": "document", "thinking_steps": K}
        if n % 7 == 0:  # the search compiles nothing either
            body = {"query": texts[n], "instruction": "", "k": 1 + n % 3}
            assert server.client.post("/v1/search", json=body).status_code == 200
        return vectors_of(server.embed(**sent))[0]

    with pytest.MonkeyPatch.context() as patch, compilations() as compiled:
        patch.setattr(LatentEncoder, "start", counted)
        with ThreadPoolExecutor(24) as pool:
            got = list(pool.map(ask, range(60)))
    assert compiled == []
    for n, vector in enumerate(got):
        np.testing.assert_allclose(vector, wanted[n % 5][n], atol=1e-5)  # another batch rounds anew
    assert max(calls) > 1
    assert len(calls) < 60 + 9


def test_a_bad_row_fails_its_request_and_not_its_neighbours(
    server: Running, retriever: LatentRetriever
) -> None:
    bad = retriever.prompts.document("bad")
    start = LatentEncoder.start

    def broken(self: LatentEncoder, rows: Any, Ks: Any) -> Any:
        vectors = np.array(start(self, rows, Ks))
        for b, row in enumerate(rows):
            if list(row) == bad:
                vectors[:, b] = np.nan
        return vectors

    def ask(text: list[str]) -> httpx2.Response:
        return server.embed(input=text, input_type="document")

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(8) as pool:
        patch.setattr(LatentEncoder, "start", broken)
        answers = list(pool.map(ask, [["good", "bad", "good"], *[["good"]] * 7]))
    assert [answer.status_code for answer in answers] == [500] + [200] * 7
    error = answers[0].json()["error"]
    assert error["type"] == "server_error"
    assert "the vector of input[1] is not finite" in error["message"]


def test_a_fault_of_the_device_fails_its_batch_and_the_server_goes_on(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(LatentEncoder, "start", fail)
        response = server.embed(input="x", input_type="document")
    assert response.status_code == 500
    assert response.json()["error"]["message"].startswith("RuntimeError; the server's log")
    assert server.embed(input="x", input_type="document").status_code == 200


@pytest.fixture
def batcher(retriever: LatentRetriever) -> Batcher:
    """One that was not started."""
    return Batcher(retriever.encoder, (3,), max_queue_rows=4, metrics=Metrics())


def test_the_queue_is_bounded_and_cancelled_rows_are_dropped(
    batcher: Batcher, retriever: LatentRetriever
) -> None:
    row = retriever.prompts.document("Ulm")
    first, second = batcher.submit([row] * 3, 1), batcher.submit([row], 3)
    with pytest.raises(RequestError, match="too many texts are waiting; try again in 1 s"):
        batcher.submit([row], 1)
    assert first.cancel()
    calls: list[int] = []
    start = LatentEncoder.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            LatentEncoder,
            "start",
            lambda self, rows, Ks: calls.append(len(rows)) or start(self, rows, Ks),
        )
        batcher.start()
        vectors = second.result()
        batcher.stop()
    assert calls == [1]
    np.testing.assert_allclose(vectors[0], retriever.encode_document("Ulm"), atol=1e-5)


class _OnDevice:
    """Vectors that are waited for as those of a device are: as an array."""

    def __init__(self, vectors_SBD: np.ndarray, events: list[str]) -> None:
        self._vectors_SBD, self._events = vectors_SBD, events

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        self._events.append("end")
        return self._vectors_SBD


@pytest.mark.parametrize(
    ("waiting", "wanted"),
    [(8, ["begin 8", "begin 8", "end", "end"]), (7, ["begin 8", "end", "begin 7", "end"])],
)
def test_a_second_batch_is_begun_behind_the_first_only_if_it_is_full(
    retriever: LatentRetriever, monkeypatch: pytest.MonkeyPatch, waiting: int, wanted: list[str]
) -> None:
    batcher = Batcher(retriever.encoder, (3,), max_queue_rows=16, metrics=Metrics())
    row = retriever.prompts.document("Ulm")
    events: list[str] = []
    later: list[Future[np.ndarray]] = []

    def start(self: LatentEncoder, rows: Any, Ks: tuple[int, ...]) -> Any:
        events.append(f"begin {len(rows)}")
        if not later:  # while the first batch runs
            later.append(batcher.submit([row] * waiting, 3))
        width = self.config.backbone.hidden_size
        return _OnDevice(np.ones((len(Ks), 8, width), np.float32), events)

    monkeypatch.setattr(LatentEncoder, "start", start)
    batcher.submit([row] * 8, 3)
    batcher.start()
    batcher.stop()
    assert later[0].result(timeout=0).shape[0] == waiting
    assert events == wanted


def test_what_waits_at_the_end_is_still_embedded(
    batcher: Batcher, retriever: LatentRetriever
) -> None:
    future = batcher.submit([retriever.prompts.document("Ulm")] * 4, 3)
    batcher.start()
    batcher.stop()
    assert future.result(timeout=0).shape[0] == 4
    assert not batcher.ready.is_set()


def test_a_full_queue_tells_when_to_come_again(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise RequestError("full", status=429, code="queue_full", retry_after=7)

    monkeypatch.setattr(Batcher, "require_room", full)
    response = server.embed(input="x", input_type="document")
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"
    assert response.json()["error"]["type"] == "rate_limit_error"


def test_a_request_ends_when_its_time_is_over(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    never: list[Future[np.ndarray]] = []

    def forever(*_: Any) -> Future[np.ndarray]:
        never.append(Future())
        return never[-1]

    monkeypatch.setattr(Batcher, "submit", forever)
    monkeypatch.setattr(server.service, "timeout_s", 0.2)
    response = server.embed(input="x", input_type="document")
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "timeout"
    assert never[0].cancelled()


def test_metrics_count_what_was_done(server: Running) -> None:
    def value(name: str) -> float:
        lines = server.client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    rows, compiled = value("laser_rows_total"), value("laser_compilations_total")
    asked = value('laser_requests_total{route="/v1/embeddings",status="200"}')
    server.embed(input=["a", "b", "c"], input_type="document")
    assert value("laser_rows_total") == rows + 3
    assert value('laser_requests_total{route="/v1/embeddings",status="200"}') == asked + 1
    assert value("laser_batch_fill_count") > 0
    assert value("laser_compilations_total") == compiled > 0
    assert value("laser_queued_rows") == 0


# --- who may ask -------------------------------------------------------------------------------


def test_only_names_of_this_machine_are_served_on_loopback(server: Running) -> None:
    for host in ("localhost:8000", "127.0.0.1", "[::1]:80"):
        assert server.client.get("/", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "10.0.0.1", "[::1", ""):
        response = server.client.get("/v1/models", headers={"Host": host})
        assert response.status_code == 403
        assert response.json()["error"]["type"] == "permission_error"


def test_the_page_shows_a_thought(server: Running) -> None:
    assert "<form" in server.client.get("/").text
    page = server.client.get("/", params={"query": "Where is Ulm?", "steps": "2"})
    assert page.status_code == 200
    assert page.text.count("<table") == 3
    assert page.headers["x-content-type-options"] == "nosniff"
    assert server.client.get("/", params={"query": "x", "steps": "99"}).status_code == 400


def test_a_fault_of_the_page_is_shown_and_the_server_goes_on(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of <memory>")

    assert server.service.site is not None
    with monkeypatch.context() as patch:
        patch.setattr(server.service.site.inspector, "think", fail)
        page = server.client.get("/", params={"query": "x"})
    assert page.status_code == 500
    assert "RuntimeError: out of &lt;memory&gt;" in page.text
    assert server.client.get("/").status_code == 200


def test_keys_are_wanted_everywhere_but_for_health(
    thinking_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("first\n\n second \n")
    options = ServeOptions(model=str(thinking_model), api_key_file=str(file), **SIZES)
    monkeypatch.setattr(Batcher, "warm_up", lambda *_: None)
    with running(options) as server:
        for headers in (
            {},
            {"Authorization": "Bearer third"},
            {"Authorization": "first"},
            {"Authorization": "Basic first"},
        ):
            response = server.client.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert server.client.get("/health", headers=headers).status_code == 200
        basic = base64.b64encode(b"me:second").decode()
        for given in ("Bearer first", "Bearer second", f"Basic {basic}"):
            headers = {"Authorization": given}
            assert server.client.get("/v1/models", headers=headers).status_code == 200
            assert server.client.get("/", headers=headers).status_code == 200


def test_silent_connections_are_ended(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laser_jax.serve.run._SILENT_SECONDS", 0.1)
    address = server.socket.getsockname()
    with contextlib.ExitStack() as stack:
        half = [stack.enter_context(socket.create_connection(address)) for _ in range(40)]
        for connection in half:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: local")
        for connection in half:
            assert connection.recv(1) == b""
    assert server.client.get("/health").status_code == 200


def test_ipv6_is_served(thinking_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    monkeypatch.setattr(Batcher, "warm_up", lambda *_: None)
    with running(ServeOptions(model=str(thinking_model), **SIZES), "::1") as server:
        assert server.client.get("/v1/models").status_code == 200
        assert server.client.get("/", headers={"Host": "evil.example"}).status_code == 403


# --- the program -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("8000", ("127.0.0.1", 8000)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("[::1]:8000", ("::1", 8000)),
        ("tower.local:80", ("tower.local", 80)),
    ],
)
def test_an_address_is_a_port_or_a_host_and_a_port(text: str, address: tuple[str, int]) -> None:
    assert address_of(text) == address


@pytest.mark.parametrize("text", ["", "x", "-1", "65536", "host", "host:", ":80", "::1:80"])
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="listen wants PORT or HOST:PORT"):
        address_of(text)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1", "..", "a" * 70])
def test_a_host_that_is_not_this_machine_is_refused_without_blaming_the_port(host: str) -> None:
    with pytest.raises(SystemExit, match="the host of --listen is an address or a name") as refused:
        main(["--model", "/nowhere", "--listen", f"{host}:0"])
    assert "another port" not in str(refused.value)


def test_a_port_in_use_is_refused_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=rf"port {port} .*choose another port"):
            main(["--model", "/nowhere", "--listen", str(port)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_thinking_steps", "2"], "below the model's K, 3"),
        (["--max_thinking_steps", "100000"], "100000 thinking steps take"),
        (["--api_key_file", "KEYS"], "holds no key"),
        (["--corpus_vectors", "nowhere"], "nowhere/manifest.json is missing"),
        (["--corpus", "nowhere"], "nowhere"),
        (["--timeout_s", "0"], "timeout_s"),
    ],
)
def test_a_server_that_cannot_be_says_why(
    thinking_model: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    (tmp_path / "KEYS").write_text("\n \n")
    given = [str(tmp_path / flag) if flag in ("KEYS", "nowhere") else flag for flag in flags]
    with pytest.raises(SystemExit, match=message):
        main(["--model", str(thinking_model), "--listen", "0", *given])


def test_sigterm_answers_what_has_begun_and_ends_with_status_0(
    thinking_model: Path, one_device: dict[str, str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f for k, v in SIZES.items() for f in (f"--{k}", str(v))]
    command = [sys.executable, "-m", "laser_jax.serve", "--model", str(thinking_model)]
    process = subprocess.Popen(
        [*command, "--listen", str(port), *flags],
        stderr=subprocess.PIPE,
        text=True,
        env=one_device,
    )
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            for _ in iter(lambda: _answers(client), True):
                assert process.poll() is None
                time.sleep(0.05)
            texts = [f"text {n}" for n in range(1000)]
            body = {"model": "model:document", "input": texts}
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(client.post, "/v1/embeddings", json=body)
                while client.get("/metrics").text.count("laser_rows_total 0.0"):
                    time.sleep(0.001)
                os.kill(process.pid, signal.SIGTERM)
                assert len(vectors_of(answer.result())) == 1000
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        _, said = process.communicate()
    assert "ready" in said
    assert "ended" in said


def _answers(client: httpx2.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx2.TransportError:
        return False


def test_a_connection_that_ended_is_not_kept(server: Running) -> None:
    """Nor by the timer that would have ended it: many short connections filled the memory."""

    def kept() -> int:
        gc.collect()
        return sum(type(each) is _Protocol for each in gc.get_objects())

    before, address = kept(), server.socket.getsockname()
    for _ in range(20):
        with socket.create_connection(address) as client:
            client.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n")
    for pause in (0.2, 0.5, 1, 2, 4):
        time.sleep(pause)
        if kept() <= before:
            return
    pytest.fail(f"{kept()} connections are kept, {before} were before")


def test_a_warm_up_that_fails_ends_the_server(
    thinking_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise NotFiniteError("document 3", "float16")

    monkeypatch.setattr(Batcher, "warm_up", fail)
    with pytest.raises(SystemExit, match="the vector of document 3 is not finite"):
        main(["--model", str(thinking_model), "--listen", "0"])


def test_until_it_is_ready_it_says_so(
    thinking_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(Batcher, "warm_up", lambda *_: gate.wait())
    server = Running(ServeOptions(model=str(thinking_model), **SIZES))
    try:
        assert server.client.get("/health").status_code == 200
        for response in (
            server.client.get("/ready"),
            server.client.get("/"),
            server.embed(input="x", input_type="document"),
        ):
            assert response.status_code == 503
            assert response.headers["retry-after"] == "5"
            assert response.json()["error"]["code"] == "not_ready"
        gate.set()
        server.wait()
    finally:
        gate.set()
        server.stop()
