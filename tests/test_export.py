"""`laser export`: what is written, the model card, the upload, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from laser_jax.config import (
    ConfigError,
    LoraConfig,
    load_retriever_config,
    save_retriever_config,
)
from laser_jax.encoder import load_pretrained
from laser_jax.evaluate.significance import paired_bootstrap
from laser_jax.export.card import model_card
from laser_jax.export.run import ExportOptions, export, main
from laser_jax.files.claim import OutputError
from laser_jax.hf.writing import save_adapter, save_params
from laser_jax.inference.retriever import LatentRetriever

TASK = "Find the town"
TEXTS = ["Where is Ulm?", "Which town is at the sea?"]
STEPS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> Path:
    directory = tmp_path_factory.mktemp("alone") / "model"
    write_model(directory, [*TEXTS, TASK], vocab_size=300, layers=2, steps=STEPS)
    return directory


@pytest.fixture(scope="module")
def vectors(model: Path) -> np.ndarray:
    return embed(model)


def embed(directory: Path, **options: Any) -> np.ndarray:
    retriever = LatentRetriever.from_pretrained(directory, **options)
    return retriever.encode_query(TEXTS, instruction=TASK)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if not path.name.startswith(".")}


# --- hf ----------------------------------------------------------------------------------------


def test_hf_is_what_training_writes(
    model: Path, vectors: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(model), "--to", "hf", str(tmp_path / "a")])
    assert capsys.readouterr().out == f"{tmp_path / 'a'}\n"
    assert names(tmp_path / "a") >= names(model) | {"README.md"}
    np.testing.assert_array_equal(embed(tmp_path / "a"), vectors)
    main([f"--output={tmp_path / 'b'}", "--to", "hf", "--model", str(model)])
    for name in names(tmp_path / "a") - {"README.md"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_weights_keep_their_dtype(model: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    export(ExportOptions(str(model), "hf", str(half)))
    variables, config = load_pretrained(model)
    save_params(half, variables, config.backbone, dtype=jax.numpy.bfloat16, lora=None)
    export(ExportOptions(str(half), "hf", str(tmp_path / "out")))
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (half / weights).read_bytes()


def test_an_adapter_is_merged_and_known_as_merged(
    model: Path, vectors: np.ndarray, tmp_path: Path
) -> None:
    lora, backbone = LoraConfig(rank=2, targets=("q_proj",)), load_retriever_config(model).backbone
    rng = np.random.default_rng(0)
    shapes = {"lora_a": (16, 2), "lora_b": (2, 16)}

    def drawn(*leading: int) -> dict[str, Any]:
        leaves = {n: rng.normal(size=(*leading, *s)).astype(np.float32) for n, s in shapes.items()}
        return {"self_attn": {"q_proj": leaves}}

    adapter = tmp_path / "adapter"
    tree = {"layers": drawn(1), "last_layer": drawn()}
    save_adapter(adapter, tree, lora, backbone, base_model=str(model))
    wanted = embed(model, adapter=adapter)
    assert np.abs(wanted - vectors).max() > 1e-3
    for to in ("hf", "sentence-transformers"):
        output = tmp_path / to
        main([str(model), str(output), "--to", to, "--adapter", str(adapter)])
        np.testing.assert_allclose(embed(output), wanted, atol=1e-6)
        with pytest.raises(ValueError, match="this adapter is merged into"):
            embed(output, adapter=adapter)


# --- stablehlo ---------------------------------------------------------------------------------


def loader() -> str:
    """The program of docs/export.md that runs an export with jax alone."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "export.md").read_text()
    return page.split("```python\n# load.py\n")[1].split("```")[0]


ELSEWHERE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("laser_jax", "flax"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from load import Retriever
retriever, rows = Retriever(sys.argv[1]), json.loads(sys.argv[2])
np.save("two.npy", retriever(rows))
np.save("one.npy", retriever(rows[:1]))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stablehlo_runs_where_laser_jax_is_not(
    model: Path, vectors: np.ndarray, tmp_path: Path, one_device: dict[str, str], dtype: Any
) -> None:
    pytest.importorskip("flatbuffers", reason="jax.export serialises with it: laser-jax[export]")
    export(ExportOptions(str(model), "hf", str(tmp_path / "model")))
    config = replace(load_retriever_config(model), dtype=dtype)
    save_retriever_config(config, tmp_path / "model")
    with jax.numpy_dtype_promotion("standard"):  # jax's own attention is not strict
        export(ExportOptions(str(tmp_path / "model"), "stablehlo", str(tmp_path / "out")))
    prompts = LatentRetriever.from_pretrained(tmp_path / "model").prompts
    rows = [prompts.query(text, TASK) for text in TEXTS]
    (tmp_path / "load.py").write_text(loader())
    command = [sys.executable, "-c", "import json, numpy as np\n" + ELSEWHERE, "out"]
    subprocess.run([*command, json.dumps(rows)], check=True, cwd=tmp_path, env=one_device)
    two, one = np.load(tmp_path / "two.npy"), np.load(tmp_path / "one.npy")
    np.testing.assert_allclose(one, two[:1], atol=1e-5)
    if dtype == "float32":
        np.testing.assert_allclose(two, vectors, atol=1e-5)
    else:
        assert 0.99 < (two * vectors).sum(1).min() < 0.999999
    assert not (tmp_path / "out" / "config.json").exists()  # no backbone to be misread


def test_documents_of_another_k_have_a_program_of_their_own(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers", reason="jax.export serialises with it: laser-jax[export]")
    export(ExportOptions(str(model), "hf", str(tmp_path / "model")))
    config = replace(load_retriever_config(model), document_thinking_steps=1)
    save_retriever_config(config, tmp_path / "model")
    with jax.numpy_dtype_promotion("standard"):
        export(ExportOptions(str(tmp_path / "model"), "stablehlo", str(tmp_path / "out")))
    retriever = LatentRetriever.from_pretrained(tmp_path / "model")
    with np.load(tmp_path / "out" / "weights.npz") as stored:
        weights = list(stored.values())
    ids = np.array([retriever.prompts.document(TEXTS[0])], np.int32)
    for name, K in (("encode.bin", config.num_thinking_steps), ("encode_documents.bin", 1)):
        program = jax.export.deserialize(bytearray((tmp_path / "out" / name).read_bytes()))
        found = program.call(weights, ids, np.ones_like(ids))
        wanted = retriever.encode_document(TEXTS[:1], num_thinking_steps=K)
        np.testing.assert_allclose(found, wanted, atol=1e-5)


# --- the card ----------------------------------------------------------------------------------

RUN = {
    "model": {"path": "Qwen/Qwen3-0.6B", "backbone": None, "scratch": None},
    "data": {"train": "/home/someone/rows/train.jsonl", "eval": "data/world", "split": None},
    "objective": {"method": "laser", "num_thinking_steps": 3, "weights": {"output": 10.0}},
    "lora": {"rank": 64},
    "optimizer": {"learning_rate": 1e-4},
    "train": {"batch_size": 32, "seed": 7, "log_every": 10},
}
RESULTS = {
    "metrics": {"loss": 1.0},
    "exported_step": 120,
    "scores": {f"latent K={k}": {"nDCG@10": 0.1234 * k, "Hit@1": 0.5} for k in (1, 2, 3)},
}
EVALUATION = {
    "model": "runs/mine",
    "data": "data/world",
    "split": "test",
    "num_thinking_steps": 3,
    "metrics": ["nDCG@10"],
    "documents": 10,
    "queries": 5,
    "queries_without_relevant": 0,
    "scores": {"latent K=1": {"nDCG@10": 0.25}, "latent K=3": {"nDCG@10": 0.375}},
    "differences": [
        {"run": "latent K=3", "against": "latent K=1", "metric": "nDCG@10"}
        | {"difference": 0.125, "low": 0.05, "high": 0.2}
    ],
}


PER_QUERY = {run: [0.0, 0.25, 0.25, 0.25, 0.5 + by] for run, by in (("1", 0), ("3", 0.625))}


def card(output: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The front matter and the sections."""
    text = (output / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    parts = body.split("\n## ")
    return yaml.safe_load(front), {
        part.partition("\n")[0]: part.partition("\n")[2]
        for part in ["about\n" + parts[0], *parts[1:]]
    }


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    """A training run with its model and an evaluation."""
    export(ExportOptions(str(model), "hf", str(tmp_path / "run" / "model")))
    (tmp_path / "run" / "evaluation").mkdir()
    files = {"config": RUN, "results": RESULTS, "evaluation/results": EVALUATION}
    for name, values in files.items():
        (tmp_path / "run" / f"{name}.json").write_text(json.dumps(values))
    rows = [f"q{q}\tlatent K={k}\t{v}" for k, of in PER_QUERY.items() for q, v in enumerate(of)]
    lines = "\n".join(["query_id\trun\tnDCG@10", *rows])
    (tmp_path / "run" / "evaluation" / "per_query.tsv").write_text(lines + "\n")
    return tmp_path / "run"


def test_the_card_says_what_the_run_says(run: Path, tmp_path: Path) -> None:
    main([str(run / "model"), "--to", "sentence-transformers", str(tmp_path / "out")])
    front, sections = card(tmp_path / "out")
    assert front == {
        "pipeline_tag": "sentence-similarity",
        "library_name": "sentence-transformers",
        "tags": ["laser", "dense-retrieval"],
        "license": "apache-2.0",
        "base_model": "Qwen/Qwen3-0.6B",
    }
    assert f"thinks {STEPS} latent steps" in sections["about"]
    assert "trust_remote_code=True" in sections["Use"]
    assert 'LatentRetriever.from_pretrained("out")' in sections["Use"]
    assert "Instruct: {instruction}" in sections["Model and prompts"]
    assert "rows/train.jsonl" in sections["Data"]
    assert "/home/someone" not in sections["Data"]
    assert "output: 10.0" in sections["Recipe"]
    assert "log_every" not in sections["Recipe"]
    assert "| latent K=2 |  0.2468 |" in sections["Scores"]
    assert "After step 120" in sections["Scores"]
    assert "+0.0500 to +0.2000" in sections["Scores"]
    assert sections["Licence"].count("unknown: fill in") == 1
    for known in ("Jin and Zhang and Li", "Internalizing Explicit Reasoning", "2603.01425"):
        assert known in sections["Citation"]


def test_every_score_of_an_evaluation_has_its_interval(run: Path, tmp_path: Path) -> None:
    options = ExportOptions(str(run / "model"), "hf", str(tmp_path / "out"))
    export(options)
    _, sections = card(tmp_path / "out")
    for k, mean in (("1", "0.2500"), ("3", "0.3750")):
        interval = paired_bootstrap(PER_QUERY[k], [0.0] * 5)
        assert f"{mean} [{interval.low:.4f}, {interval.high:.4f}]" in sections["Scores"]
    assert "95% interval over queries" in sections["Scores"]
    (run / "evaluation" / "per_query.tsv").unlink()
    export(replace(options, output=str(tmp_path / "without")))
    _, sections = card(tmp_path / "without")
    assert "|  0.3750 |" in sections["Scores"]


def test_the_licence_of_the_data_is_the_one_that_is_given(run: Path, tmp_path: Path) -> None:
    options = ExportOptions(
        str(run / "model"), "hf", str(tmp_path / "out"), data_licence="cc-by-4.0"
    )
    export(options)
    _, sections = card(tmp_path / "out")
    assert "Of the training data: cc-by-4.0." in sections["Licence"]
    with pytest.raises(OutputError, match=r"data_licence was 'cc-by-4\.0', is None"):
        export(replace(options, data_licence=None))


@pytest.mark.parametrize(
    ("base", "licence"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "apache-2.0"),
        ("smollm2", "apache-2.0"),
        ("Qwen/Qwen2.5-7B-Instruct", "apache-2.0"),
        ("mistralai/Mistral-7B-v0.3", "apache-2.0"),
        ("meta-llama/Llama-3.2-1B", "llama3.2"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama3.1"),
        ("Qwen/Qwen2.5-3B", None),
        ("Qwen/Qwen2.5-72B", None),
    ],
)
def test_the_licence_of_the_base_is_known_by_its_name(
    run: Path, base: str, licence: str | None
) -> None:
    (run / "config.json").write_text(json.dumps({"model": {"path": base}}))
    config = load_retriever_config(run / "model")
    text = model_card(run / "model", config, "hf", "mine", None)
    assert yaml.safe_load(text.split("---\n")[1]).get("license") == licence


def test_the_card_of_a_model_without_a_run_says_what_is_missing(
    model: Path, tmp_path: Path
) -> None:
    main([str(model), "--to", "hf", str(tmp_path / "out")])
    front, sections = card(tmp_path / "out")
    assert "license" not in front
    assert "base_model" not in front
    for title in ("Data", "Recipe", "Scores"):
        assert sections[title].strip() == "**unknown: fill in**"
    assert sections["Licence"].count("unknown: fill in") == 3


def test_scores_beside_a_model_without_a_run_are_not_its_own(model: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(model, tmp_path / "moved")
    for name, values in {"other": EVALUATION, "training": RESULTS}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(values))
    main([str(moved), "--to", "hf", str(tmp_path / "out")])
    _, sections = card(tmp_path / "out")
    assert sections["Scores"].strip() == "**unknown: fill in**"


def test_the_score_of_a_ranking_is_not_the_models(run: Path) -> None:
    (run / "bm25").mkdir()
    ranking = {"run": "bm25.trec", "qrels": "test.tsv", "scores": {"nDCG@10": 0.9876}}
    (run / "bm25" / "results.json").write_text(json.dumps(ranking))
    text = model_card(run / "model", load_retriever_config(run / "model"), "hf", "mine", None)
    assert "0.3750" in text
    assert "0.9876" not in text


def test_a_model_from_scratch_has_no_base(run: Path, tmp_path: Path) -> None:
    scratch = RUN | {"model": {"path": None, "scratch": {"hidden_size": 16}}}
    (run / "config.json").write_text(json.dumps(scratch))
    main([str(run / "model"), "--to", "hf", str(tmp_path / "out")])
    front, sections = card(tmp_path / "out")
    assert "base_model" not in front
    assert "none (trained from scratch)" in sections["about"]


@pytest.mark.parametrize(
    "content", ["[1]", "{", '{"model": [], "data": 3}', '{"optimizer": "adamw"}']
)
def test_a_damaged_file_of_the_run_is_named(run: Path, tmp_path: Path, content: str) -> None:
    (run / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"run/config\.json"):
        export(ExportOptions(str(run / "model"), "hf", str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scores", [[1], {"K=1": 0.5}, {"K=1": {"MRR": "high"}}])
def test_damaged_scores_of_the_run_are_named(run: Path, tmp_path: Path, scores: Any) -> None:
    (run / "results.json").write_text(json.dumps(RESULTS | {"scores": scores}))
    with pytest.raises(ValueError, match=r"run/results\.json"):
        export(ExportOptions(str(run / "model"), "hf", str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


# --- the hub -----------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """A stand-in for the Hugging Face hub: repositories, and files that are sent within a commit
    or, where they are large, by LFS before it.

    Attributes:
        files: repository -> path -> bytes.
        asked: method, path and authorization of every request.
        large: paths that go by LFS.
        stored, verified: what has come by LFS, by its sha256, and what the client made sure of.
        refused: requests with this in their path are answered with 403.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        self.large: set[str] = set()
        self.stored: dict[str, bytes] = {}
        self.verified: set[str] = set()
        self.refused = "?"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_PUT = do_POST

    def _answer(self, body: bytes) -> None:
        self.server.asked.append((self.command, self.path, self.headers.get("Authorization")))
        repository = "/".join(self.path.split("/")[3:5])
        if self.server.refused in self.path:
            self._say({"error": "this token may not write"}, 403)
        elif self.path == "/api/repos/create":
            values = json.loads(body)
            repository = f"{values['organization']}/{values['name']}"
            self.server.files.setdefault(repository, {})
            self._say({"url": f"{self.server.address}/{repository}"})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            answers = [
                {"path": file["path"], "uploadMode": modes[file["path"] in self.server.large]}
                for file in asked
            ]
            self._say({"files": [{**of, "shouldIgnore": False, "oid": None} for of in answers]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._say({"objects": [self._wanted(**file) for file in json.loads(body)["objects"]]})
        elif self.path.startswith("/upload/"):
            self.server.stored[self.path.removeprefix("/upload/")] = body
            self._say({})
        elif self.path == "/verify":
            asked = json.loads(body)
            assert len(self.server.stored[asked["oid"]]) == asked["size"]
            self.server.verified.add(asked["oid"])
            self._say({})
        elif "/commit/" in self.path:
            files = self.server.files[repository]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.stored[value["oid"]]
            url = f"{self.server.address}/{repository}/commit/{'0' * 40}"
            self._say({"commitUrl": url, "commitOid": "0" * 40, "success": True})
        else:
            self._say({"id": repository, "siblings": [], "sha": "0" * 40})

    def _wanted(self, oid: str, size: int) -> dict[str, Any]:
        """What LFS is to do with an object."""
        hrefs = {"upload": f"upload/{oid}", "verify": "verify"}
        actions = {name: {"href": f"{self.server.address}/{at}"} for name, at in hrefs.items()}
        return {"oid": oid, "size": size, "actions": actions}

    def _say(self, values: Any, status: int = 200) -> None:
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The hub that huggingface_hub talks to, with a token."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server
        server.shutdown()


@pytest.mark.parametrize("to", ["hf", "sentence-transformers"])
def test_push_uploads_what_was_written(
    model: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    arguments = [str(model), "--to", to, str(tmp_path / "out"), "--push", "org/mine"]
    main(arguments)
    sent = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.files["org/mine"] == {n: v for n, v in sent.items() if not n.startswith(".")}
    written = [token for method, _, token in hub.asked if method == "POST"]
    assert set(written) == {"Bearer hf_secret"}
    assert f"{hub.address}/org/mine" in capsys.readouterr().out
    assert 'from_pretrained("org/mine")' in sent["README.md"].decode()
    hub.files.clear()
    (tmp_path / "out" / "README.md").write_text("filled in by hand")
    main(arguments)  # what is there already is sent as it is
    assert hub.files["org/mine"]["README.md"] == b"filled in by hand"


def test_another_model_at_the_same_place_is_not_taken_for_the_one_that_was_exported(
    model: Path, tmp_path: Path, hub: Hub
) -> None:
    place = tmp_path / "model"
    export(ExportOptions(str(model), "hf", str(place)))
    options = ExportOptions(str(place), "hf", str(tmp_path / "out"), push="org/mine")
    export(options)
    weights = load_file(place / "model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, place / "model.safetensors")  # trained on
    hub.files.clear()
    with pytest.raises(OutputError, match="checksum was"):
        export(options)
    assert not hub.files


BY_LFS = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's


@BY_LFS
def test_weights_go_by_lfs_before_the_commit_names_them(
    model: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    hub.large = {"model.safetensors"}
    export(ExportOptions(str(model), "hf", str(tmp_path / "out"), push="org/mine"))
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    oid = hashlib.sha256(weights).hexdigest()
    assert hub.files["org/mine"]["model.safetensors"] == weights
    assert hub.verified == {oid}
    assert ("PUT", f"/upload/{oid}", None) in hub.asked  # the store behind it gets no token


@BY_LFS
@pytest.mark.parametrize("refused", ["/preupload/", "/upload/"])
def test_what_the_hub_refuses_is_named_without_a_traceback(
    model: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    hub.large, hub.refused = {"model.safetensors"}, refused
    with pytest.raises(SystemExit, match=r"(?s)403 Forbidden.*this token may not write"):
        main([str(model), "--to", "hf", str(tmp_path / "out"), "--push", "org/mine"])
    assert (tmp_path / "out" / "README.md").is_file()  # the next push sends it as it is
    assert hub.files == {"org/mine": {}}


def test_without_a_token_nothing_is_written_or_sent(
    model: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    options = ExportOptions(str(model), "hf", str(tmp_path / "out"), push="org/mine")
    with pytest.raises(ConfigError, match=r"wants a token of the Hugging Face hub.*hf auth login"):
        export(options)
    assert not (tmp_path / "out").exists()
    assert hub.asked == []


@pytest.mark.parametrize("push", ["mine", "a/b/c", "/mine", "org/"])
def test_a_repository_has_an_organisation_and_a_name(push: str) -> None:
    with pytest.raises(ConfigError, match="push wants ORGANISATION/NAME, got"):
        ExportOptions("m", "hf", "o", push=push)


# --- what is refused ---------------------------------------------------------------------------


def test_an_unknown_form_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["model", "--to", "onnx", "out"])
    wanted = "to must be sentence-transformers or hf or stablehlo, got 'onnx'"
    assert wanted in capsys.readouterr().err


def test_a_third_place_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["model", "--to", "hf", "out", "more"])
    assert "unexpected argument more" in capsys.readouterr().err


def test_an_output_that_is_not_free_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds 'notes\.txt'"):
        export(ExportOptions(str(model), "hf", str(tmp_path)))
    assert names(tmp_path) == {"notes.txt"}
    output = str(tmp_path / "out")
    export(ExportOptions(str(model), "hf", output))
    with pytest.raises(OutputError, match="holds this export; delete it"):
        export(ExportOptions(str(model), "hf", output))
    with pytest.raises(OutputError, match="to was 'hf', is 'stablehlo'"):
        export(ExportOptions(str(model), "stablehlo", output))


@pytest.mark.parametrize("lost", ["laser_config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_that_lacks_a_file_leaves_no_trace(model: Path, tmp_path: Path, lost: str) -> None:
    broken = tmp_path / "broken"
    export(ExportOptions(str(model), "hf", str(broken)))
    (broken / lost).unlink()
    with pytest.raises(FileNotFoundError, match=lost.replace(".", r"\.")):
        export(ExportOptions(str(broken), "hf", str(tmp_path / "new" / "out")))
    assert not (tmp_path / "new").exists()


def test_an_export_that_was_cut_off_is_made_again(
    model: Path, vectors: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ExportOptions(str(model), "hf", str(tmp_path / "out"))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("laser_jax.export.files.save_tokenizer", full)
        with pytest.raises(OSError, match="No space"):
            export(options)
    assert names(tmp_path / "out") == set()
    export(options)
    np.testing.assert_array_equal(embed(tmp_path / "out"), vectors)
