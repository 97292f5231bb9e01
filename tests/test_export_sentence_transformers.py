"""An export for sentence-transformers: the same vectors as ours, or a loud error."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from laser_jax.config import PromptConfig, RetrieverConfig, ScratchConfig, save_retriever_config
from laser_jax.data.tokenization import PromptTokenizer, special_token_ids, train_tokenizer
from laser_jax.data.tokenizer_files import save_tokenizer
from laser_jax.evaluate.beir import BeirDataset, Document, EvalQuery
from laser_jax.evaluate.metrics import evaluate_run, mean
from laser_jax.evaluate.retrieval import latent, retrieval_runs
from laser_jax.export.run import ExportOptions, export
from laser_jax.hf.writing import save_params
from laser_jax.inference.retriever import EncodingStats, LatentRetriever
from laser_jax.modeling.backbone import Backbone

st = pytest.importorskip("sentence_transformers", reason="absent: pip install laser-jax[parity]")
transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

TASK = "Find the town"
TEXTS = [
    "Where is Ulm?",
    "  Kiel lies at the sea.  ",
    "a",
    "<|im_end|> is a <think> token, <|im_start|>user",
    "Öl und 東京 🙂 " * 3,
    "long words follow here " * 20,
    "",
]
LIMITS = {"query_max_length": 60, "document_max_length": 50, "explicit_max_length": 80}
PROMPT = PromptConfig(**LIMITS)
WIDTH = 16

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Writes a random model of a family: (family, changes of its config)."""
    tokenizer = train_tokenizer([*TEXTS, TASK], 330)

    def written(family: Any = "qwen3", prompt: PromptConfig = PROMPT, **changed: Any) -> Path:
        backbone = ScratchConfig(
            family=family,
            hidden_size=WIDTH,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            intermediate_size=16,
            max_position_embeddings=70,
        ).backbone(len(tokenizer))
        drawn = jax.eval_shape(Backbone(backbone).init, jax.random.key(0), np.zeros((1, 2), int))
        rng = np.random.default_rng(0)
        variables = jax.tree.map(
            lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(np.float32), nn.meta.unbox(drawn)
        )
        directory = tmp_path_factory.mktemp(family) / "model"
        tokens = special_token_ids(tokenizer)
        save_params(directory, variables, backbone, dtype=np.float32, lora=None, tokens=tokens)
        save_tokenizer(tokenizer, directory)
        checksum = PromptTokenizer(tokenizer, prompt).checksum()
        config = RetrieverConfig(backbone, prompt=prompt, prompt_checksum=checksum)
        save_retriever_config(dataclasses.replace(config, **changed), directory)
        return directory

    return written


@pytest.fixture(autouse=True)
def own_modules(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies the code of models into a folder of the user."""
    folder = str(tmp_path_factory.getbasetemp() / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
    monkeypatch.syspath_prepend(folder)


def exported(directory: Path) -> Path:
    output = directory.parent / "export"
    if not output.exists():
        export(ExportOptions(str(directory), "sentence-transformers", str(output)))
    return output


def load(directory: Path, **options: Any) -> Any:
    return st.SentenceTransformer(str(directory), trust_remote_code=True, device="cpu", **options)


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def pair(request: pytest.FixtureRequest, write: Write) -> tuple[LatentRetriever, Path]:
    """Our retriever, and the export of its model."""
    directory = write(request.param)
    return our_retriever(directory), exported(directory)


@pytest.fixture(scope="module")
def qwen3(write: Write) -> Path:
    return exported(write())


def our_retriever(directory: Path, **options: Any) -> LatentRetriever:
    """With batches of one shape, so that little is compiled."""
    return LatentRetriever.from_pretrained(directory, length_multiple=64, **options)


def ours(retriever: LatentRetriever, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    stats = EncodingStats()
    queries = retriever.encode_query(TEXTS, instruction=TASK, stats=stats, **options)
    documents = retriever.encode_document(TEXTS, stats=stats, **options)
    assert stats.truncated >= 1
    return queries, documents


def theirs(model: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    return model.encode_query(TEXTS, prompt=TASK, **options), model.encode_document(
        TEXTS, **options
    )


def assert_same(got: Any, wanted: Any) -> None:
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=0)


# --- the same vectors --------------------------------------------------------------------------


def test_vectors_are_those_of_the_retriever_at_any_k(pair) -> None:
    retriever, directory = pair
    model = load(directory)
    found = []
    for K in (1, 2, 3, 5, 8):
        found.append(ours(retriever, num_thinking_steps=K))
        assert_same(theirs(model, num_thinking_steps=K, batch_size=3), found[-1])
        model[0].num_thinking_steps = K
        assert_same(theirs(model, batch_size=len(TEXTS)), found[-1])
    for step, next_step in pairwise(found):  # every K is another function
        assert np.abs(step[0] - next_step[0]).max() > 1e-3
    assert found[0][0].dtype == theirs(model)[0].dtype == np.float32


def test_a_text_alone_has_the_vector_that_it_has_in_a_batch(pair) -> None:
    _, directory = pair
    model = load(directory)
    batch = model.encode_query(TEXTS, prompt=TASK)
    alone = [model.encode_query(text, prompt=TASK) for text in TEXTS]
    np.testing.assert_allclose(batch, alone, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(batch, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    "prompt",
    [
        PromptConfig(**LIMITS, chat_template=False),
        PromptConfig(**LIMITS, truncation="sequence", allow_special_tokens=True),
        PromptConfig(**LIMITS, append_eos=True, document_template="Passage: {document}"),
    ],
)
def test_prompts_of_other_settings_are_the_same_too(write: Write, prompt: PromptConfig) -> None:
    directory = write(prompt=prompt)
    retriever, model = our_retriever(directory), load(exported(directory))
    assert_same(theirs(model), ours(retriever))


def test_documents_think_as_long_as_the_model_says(write: Write, tmp_path: Path) -> None:
    directory = write(document_thinking_steps=1)
    retriever, model = our_retriever(directory), load(exported(directory))
    found = theirs(model)
    assert_same(found, ours(retriever))
    assert_same([found[1]], [ours(retriever, num_thinking_steps=1)[1]])
    assert_same(theirs(model, num_thinking_steps=2), ours(retriever, num_thinking_steps=2))
    model.save(str(tmp_path / "again"))
    assert_same(theirs(load(tmp_path / "again")), found)


def test_gircse_pools_its_thoughts_alone(write: Write) -> None:
    directory = write(pooling="thoughts", num_thinking_steps=2)
    retriever, model = our_retriever(directory), load(exported(directory))
    assert_same(theirs(model), ours(retriever))
    assert_same(theirs(model, num_thinking_steps=1), ours(retriever, num_thinking_steps=1))


def test_laser_jax_reads_the_export_itself(pair) -> None:
    retriever, directory = pair
    np.testing.assert_array_equal(ours(our_retriever(directory)), ours(retriever))


def test_roles_follow_from_the_prompt_or_the_task(qwen3: Path) -> None:
    model = load(qwen3)
    queries, documents = theirs(model)
    assert np.abs(queries - documents).max() > 1e-3
    for same in (
        model.encode(TEXTS, prompt=TASK),
        model.encode(TEXTS, prompt=TASK, task="query"),
        load(qwen3, prompts={"query": TASK}).encode_query(TEXTS),
    ):
        np.testing.assert_array_equal(same, queries)
    for same in (model.encode(TEXTS), model.encode(TEXTS, prompt_name="document")):
        np.testing.assert_array_equal(same, documents)
    assert np.abs(model.encode_query(TEXTS, prompt="") - queries).max() > 1e-4


def test_shorter_vectors_and_similarities_are_those_of_the_retriever(pair) -> None:
    retriever, directory = pair
    model = load(directory)
    queries, documents = ours(retriever, truncate_dim=5)
    assert_same(theirs(model, truncate_dim=5, normalize_embeddings=True), (queries, documents))
    shorter = theirs(load(directory, truncate_dim=5))
    assert model.similarity_fn_name == "cosine"
    np.testing.assert_allclose(model.similarity(*shorter), queries @ documents.T, atol=1e-5)
    assert (model.get_embedding_dimension(), model.max_seq_length) == (WIDTH, 60)


def test_a_lower_limit_shortens_the_texts(pair) -> None:
    retriever, directory = pair
    model = load(directory)
    model.max_seq_length = 45
    prompt = dataclasses.replace(PROMPT, query_max_length=45, document_max_length=45)
    config = dataclasses.replace(retriever.encoder.config, prompt=prompt)
    assert_same(theirs(model), ours(our_retriever(directory, config=config)))


def test_what_is_saved_again_is_read_again(pair, tmp_path: Path) -> None:
    retriever, directory = pair
    model = load(directory)
    model[0].num_thinking_steps = 4
    model.save(str(tmp_path / "saved"))
    wanted = ours(retriever, num_thinking_steps=4)
    assert_same(theirs(load(tmp_path / "saved")), wanted)
    assert_same(ours(our_retriever(tmp_path / "saved")), wanted)


ELSEWHERE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "laser_jax":
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import numpy as np
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu")
np.save(sys.argv[2], model.encode_query(["Where is Ulm?"], prompt="Find the town"))
"""


def test_the_module_imports_every_file_that_comes_with_it(qwen3: Path) -> None:
    """As transformers 4 copies those of a directory alone which the module itself imports."""
    code = (qwen3 / "laser_retriever.py").read_text()
    imported = re.findall(r"^from \.(\w+) import", code, flags=re.MULTILINE)
    assert {path.stem for path in qwen3.glob("*.py")} == {"laser_retriever", *imported}


def test_it_runs_where_laser_jax_is_not(
    qwen3: Path, tmp_path: Path, one_device: dict[str, str]
) -> None:
    environment = one_device | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ELSEWHERE, str(qwen3), str(tmp_path / "vectors.npy")]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    retriever = our_retriever(qwen3)
    wanted = retriever.encode_query(["Where is Ulm?"], instruction=TASK)
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), wanted, atol=1e-5)


# --- mteb --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # mteb's own
def test_mteb_scores_it_as_our_evaluator_does(pair, tmp_path: Path) -> None:
    mteb = pytest.importorskip("mteb", reason="mteb is absent: pip install laser-jax[mteb]")
    datasets = pytest.importorskip("datasets")
    rng = np.random.default_rng(1)
    words = ["Ulm", "Kiel", "Bonn", "town", "river", "sea", "lies", "on", "the", "at", "near"]

    def texts(prefix: str, count: int) -> dict[str, str]:
        return {f"{prefix}{n}": " ".join(rng.choice(words, 6)) for n in range(count)}

    queries, corpus = texts("q", 12), texts("d", 40)
    qrels = {q: dict.fromkeys(rng.choice(list(corpus), 3).tolist(), 1) for q in queries}

    class Tiny(mteb.abstasks.AbsTaskRetrieval):
        metadata = mteb.TaskMetadata(
            **dict.fromkeys(["date", "domains", "task_subtypes", "license", "dialect"]),
            **dict.fromkeys(["annotations_creators", "sample_creation", "bibtex_citation"]),
            reference=None,
            name="LaserTiny",
            dataset={"path": "local/data", "revision": "1"},
            description="Made of a few words.",
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, num_proc: int | None = None, **_: Any) -> None:
            def rows(of: dict[str, str], **more: str) -> Any:
                return datasets.Dataset.from_list(
                    [{"id": i, "text": text, **more} for i, text in of.items()]
                )

            split = {"corpus": rows(corpus, title=""), "queries": rows(queries)}
            split |= {"relevant_docs": qrels, "top_ranked": None}
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    retriever, directory = pair
    model = load(directory, prompts={"query": TASK})
    result = mteb.evaluate(
        model,
        Tiny(),
        cache=None,
        prediction_folder=tmp_path,
        show_progress_bar=False,
        co2_tracker=False,
    )
    (scores,) = result.task_results[0].scores["test"]
    (file,) = tmp_path.rglob("*_predictions.json")
    rankings = json.loads(file.read_text())["default"]["test"]
    data = BeirDataset(
        [Document(i, text) for i, text in corpus.items()],
        {i: EvalQuery(i, text, TASK) for i, text in queries.items()},
        qrels,
    )
    run = retrieval_runs(retriever.encoder, retriever.prompts, data, [3])[latent(3)]
    mine, other = (mean(evaluate_run(r, qrels, ["nDCG@10"]))["nDCG@10"] for r in (run, rankings))
    assert mine == pytest.approx(other, abs=1e-6)
    assert scores["ndcg_at_10"] == pytest.approx(mine, abs=1e-5)  # it rounds to five digits
    assert 0 < mine < 1


# --- a loud error ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of release 5, which asks our code
def test_without_trust_it_does_not_load(qwen3: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        st.SentenceTransformer(str(qwen3), device="cpu")


@pytest.mark.parametrize(
    "name", ["AutoModel", "AutoModelForCausalLM", "AutoConfig", "Qwen3Model", "LlamaForCausalLM"]
)
@pytest.mark.parametrize("trust", [False, True])
def test_whatever_knows_backbones_alone_refuses_it(qwen3: Path, name: str, trust: bool) -> None:
    with pytest.raises(Exception, match=r"laser_retriever|see backbone"):
        getattr(transformers, name).from_pretrained(qwen3, trust_remote_code=trust)


def test_other_kinds_of_models_do_not_take_it(qwen3: Path) -> None:
    with pytest.raises(ValueError, match="laser_retriever"):
        st.CrossEncoder(str(qwen3), trust_remote_code=True, device="cpu")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode_query(["a"]), "wants an instruction: pass prompt"),
        (lambda m: m.encode(["a"], prompt_name="query"), "wants an instruction"),
        (lambda m: m.encode(["a"], task="query"), "wants an instruction"),
        (lambda m: m.encode_document(["a"], prompt=TASK), "a document has no instruction, got"),
        (lambda m: m.encode(["a"], task="passage"), "does not go with the task 'passage'"),
        (lambda m: m.encode_query(["a"], prompt_name="document"), "does not go with the task"),
        (lambda m: m.encode([("a", "b")]), "texts are wanted, got"),
        (lambda m: m.encode_query(["a"], prompt="word " * 80), "no room for the text 'a'"),
        (lambda m: m.encode(["a"], num_thinking_steps=0), "0 thinking steps; 1 at least"),
        (
            lambda m: m.encode(["a"], num_thinking_steps=80),
            "80 thinking steps; .* within 70 positions",
        ),
        (lambda m: m.encode(["a"], processing_kwargs={"text": {}}), "has no such setting"),
        (lambda m: m.encode(["a"], steps=3), "steps"),
    ],
)
def test_a_call_that_cannot_be_meant_is_refused(qwen3: Path, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(load(qwen3))


@pytest.mark.parametrize(
    "options",
    [{"backend": "onnx"}, {"processor_kwargs": {"padding_side": "right"}}],
)
def test_a_setting_that_would_be_lost_is_refused(qwen3: Path, options: Any) -> None:
    with pytest.raises(ValueError, match="only model_kwargs can be set"):
        load(qwen3, **options)


def test_bfloat16_is_close_and_says_where_it_overflows(qwen3: Path) -> None:
    exact, rounded = load(qwen3), load(qwen3, model_kwargs={"dtype": torch.bfloat16})
    assert rounded.dtype == torch.bfloat16
    cosines = (theirs(exact)[0] * theirs(rounded)[0]).sum(1)
    assert cosines.min() > 0.99
    with torch.no_grad():
        exact[0].model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="a vector is not finite"):
        theirs(exact)


def copied(directory: Path, into: Path) -> Path:
    into.mkdir()
    for file in directory.iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    return into


def test_a_changed_chat_template_is_seen(qwen3: Path, tmp_path: Path) -> None:
    broken = copied(qwen3, tmp_path / "broken")
    template = broken / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "bot"))
    with pytest.raises(ValueError, match="do not make the prompts of training"):
        load(broken)


def test_weights_that_are_not_whole_are_refused(qwen3: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    broken = copied(qwen3, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights do not fit config\.json.*norm"):
        load(broken)
