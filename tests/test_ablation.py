"""The ablation program: quick runs end to end, finished runs stay, and the comparison is right."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import ablation, ablation_table
from benchmarks.ablation import ROWS, Seed, probe, run_missing, train_command
from benchmarks.ablation_table import Result, over_seeds, paired_difference, summarise
from benchmarks.measure import BenchmarkError
from benchmarks.thoughts import read_trajectories
from laser_jax.batch import Tokens
from laser_jax.command_line import parse_train_command
from laser_jax.data.tokenization import PromptTokenizer, load_tokenizer
from laser_jax.encoder import backbone_for, load_pretrained
from laser_jax.evaluate.retrieval import EXPLICIT, latent
from laser_jax.thinking import top_tokens
from laser_jax.views import latent_view

QUICK = ["--quick", "--seeds", "1"]


@pytest.fixture(autouse=True, scope="module")
def _optax_promotes() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):  # optax takes a float to an integer power
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ablation")


@pytest.fixture(scope="module")
def report(work: Path) -> dict[str, Any]:
    """What the quick program writes for two rows, of which one more is asked for."""
    output = work / "quick.json"
    ablation.main(
        [*QUICK, "--rows", "laser", "contrastive", "--work", str(work), "--output", str(output)]
    )
    return json.loads(output.read_text())


# --- the program -------------------------------------------------------------------------------


def test_a_quick_run_scores_every_row_at_every_k(report: dict[str, Any]) -> None:
    laser, contrastive = report["rows"]
    assert (laser["K"], laser["scored"], contrastive["K"]) == (3, "latent K=3", 1)
    assert laser["laser_minus"] is None
    for row in (laser, contrastive):
        assert (row["seeds"], row["queries"]) == ([1], 16)
        assert row["scores"] == row["by_steps"][str(row["K"])]
        assert all(0 <= scores["nDCG@10"]["mean"] <= 1 for scores in row["by_steps"].values())
        assert len(row["by_steps"]) == 8
    means = [row["scores"]["Hit@1"]["mean"] for row in (laser, contrastive)]
    difference = contrastive["laser_minus"]["Hit@1"]
    assert difference["difference"] == pytest.approx(means[0] - means[1])
    assert laser["trained_by"]["1"] in report["notes"][0]


def test_the_probe_reads_the_row_and_the_backbone_before_it(report: dict[str, Any]) -> None:
    laser, contrastive = (row["probe"] for row in report["rows"])
    assert contrastive is None  # it does not think
    assert list(laser) == ["laser", "backbone"]
    for readings in laser.values():
        for what in ("documents", "tokens"):
            share = np.array(readings[what])
            assert share.shape == (3, 3)  # K states; start, bridge, answer
            assert (share >= 0).all()
            assert (share.sum(axis=1) <= 1).all()
        assert len(readings["entropy"]) == 3


def test_finished_runs_are_not_trained_again_and_the_missing_are_named(
    report: dict[str, Any], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("trained or evaluated again")

    monkeypatch.setattr(ablation, "train", refuse)
    monkeypatch.setattr(ablation, "evaluate_model", refuse)
    monkeypatch.setattr(ablation, "probe", refuse)
    output = work / "again.json"
    flags = ["--work", str(work), "--output", str(output)]
    ablation.main([*QUICK, "--rows", "laser", "contrastive", *flags])
    assert json.loads(output.read_text())["rows"] == report["rows"]
    with pytest.raises(AssertionError, match="trained or evaluated again"):
        ablation.main([*QUICK, *flags])  # `explicit` is asked for as well
    asked = ["laser", "contrastive", "explicit"]
    ablation.main([*QUICK, "--finished_only", *flags, "--seeds", "2", "--rows", *asked])
    again = json.loads(output.read_text())
    assert again["rows"] == report["rows"]
    assert again["settings"]["not_run"] == {"laser": [2], "contrastive": [2], "explicit": [1, 2]}
    missing = "laser (seed 2); contrastive (seed 2); explicit (seeds 1, 2)"
    assert again["notes"][-1] == f"Not run: {missing}."


def test_a_finished_run_of_another_config_is_refused_by_name(
    report: dict[str, Any], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "TINY_TRAIN", (*ablation.TINY_TRAIN, "--lora.alpha", "7"))
    with pytest.raises(
        SystemExit,
        match=r"seed-1/laser holds a finished run with another config:\n  lora.alpha was .*, is 7",
    ):
        ablation.main([*QUICK, "--rows", "laser", "--work", str(work)])


def test_a_second_process_waits_for_the_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = threading.Event()
    monkeypatch.setattr(ablation, "make_backbone", lambda seed: made.set())
    seed = Seed(1, tmp_path, quick=True)
    second = threading.Thread(target=run_missing, args=([seed], [], "test"))
    with (tmp_path / ".lock").open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        second.start()
        assert not made.wait(0.3)
    second.join()
    assert made.is_set()


def test_nothing_finished_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nothing is finished under"):
        ablation.main([*QUICK, "--finished_only", "--work", str(tmp_path)])


def test_a_quick_run_of_a_world_leaves_the_folder_of_that_world_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Seed] = []
    monkeypatch.setattr(ablation, "run_missing", lambda seeds, *_: made.extend(seeds))
    flags = ["--world", str(ablation.CONFIGS / "world_hard.yaml"), "--work", str(tmp_path)]
    for asked in (QUICK, QUICK[1:]):
        with pytest.raises(SystemExit, match="nothing is finished under"):
            ablation.main([*asked, *flags])
    assert [seed.folder.parent.name for seed in made] == ["quick", "world_hard"]
    assert [seed.config.num_places for seed in made] == [8, 20]


# --- the rows ----------------------------------------------------------------------------------


@functools.cache
def config_of(row: str) -> Any:
    seed = Seed(4, Path("w/seed-4"))
    return parse_train_command(train_command(seed, row))[0]


def test_every_row_trains_the_same_backbone_data_and_steps() -> None:
    for row in ROWS:
        config = config_of(row)
        assert config.model.path == "w/seed-4/backbone"
        steps = 600 if row == "infonce_600_after_laser" else 300
        assert (config.train.seed, config.train.steps, config.train.batch_size) == (4, steps, 32)
        assert (config.data.train, config.data.eval) == ("w/seed-4/data/train.jsonl", None)
        assert config.output == f"w/seed-4/{row}"


def test_the_rows_are_the_papers() -> None:
    weights = {row: config_of(row).objective.weights for row in ROWS}
    full = weights["laser"]
    assert min(full.latent, full.explicit, full.output, full.trajectory) > 0
    assert weights["without_trajectory"].trajectory == weights["without_output"].output == 0
    assert weights["without_distillation"] == dataclasses.replace(full, output=0, trajectory=0)
    assert not weights["without_explicit_view"].need_explicit_view
    assert not weights["contrastive"].need_explicit_view
    assert weights["explicit"].latent == 0
    assert config_of("gircse").objective.method == "gircse"
    assert config_of("latent_rl").objective.method == "latent_rl"
    assert config_of("latent_rl").model.adapter is None
    for row in ("latent_rl", "draws", "infonce", "infonce_600"):
        assert config_of(f"{row}_after_laser").model.adapter == "w/seed-4/laser/adapter"
    assert config_of("draws_after_laser").objective.policy.weight == 0
    assert config_of("without_colearning").objective.teacher == "w/seed-4/explicit/model"
    assert [config_of(f"laser_K{k}").objective.num_thinking_steps for k in (1, 3, 6)] == [1, 3, 6]


# --- the comparison ----------------------------------------------------------------------------


def values(rng: np.random.Generator, seeds: int, queries: int) -> dict[int, dict[str, float]]:
    return {s: {f"q{i}": float(rng.random()) for i in range(queries)} for s in range(1, seeds + 1)}


def test_mean_and_spread_are_over_the_seeds_means() -> None:
    found = over_seeds({1: {"a": 0.0, "b": 1.0}, 2: {"a": 1.0, "b": 1.0}, 5: {"a": 0.25}})
    assert found["per_seed"] == {1: 0.5, 2: 1.0, 5: 0.25}
    assert found["mean"] == pytest.approx(1.75 / 3)
    assert found["std"] == pytest.approx(np.std([0.5, 1.0, 0.25], ddof=1))
    assert over_seeds({1: {"a": 0.5}})["std"] is None


def test_pairs_are_of_one_seed_and_query_and_pooled_over_shared_seeds() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = values(rng, 4, 60), values(rng, 3, 60)
    theirs = {seed: dict(reversed(queries.items())) for seed, queries in theirs.items()}
    theirs[9] = {"q0": 0.5}
    found = paired_difference(ours, theirs)
    assert found is not None
    pairs = np.array([[ours[s][q] - theirs[s][q] for q in ours[s]] for s in (1, 2, 3)])
    assert found["difference"] == pytest.approx(pairs.mean())
    assert found["per_seed"] == pytest.approx(dict(enumerate(pairs.mean(axis=1), start=1)))
    # the percentile interval of a mean of 180 values is near the normal one
    half = 1.96 * pairs.std() / np.sqrt(pairs.size)
    assert found["low"] == pytest.approx(pairs.mean() - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(pairs.mean() + half, abs=0.1 * half)


def test_drawing_seeds_too_sees_that_they_disagree() -> None:
    ours = {1: dict.fromkeys("abcd", 1.0), 2: dict.fromkeys("abcd", 0.0)}
    theirs = {seed: dict.fromkeys("abcd", 0.5) for seed in (1, 2)}
    found = paired_difference(ours, theirs)
    assert found is not None
    assert found["difference"] == 0
    assert found["over_seeds"] == {"low": -0.5, "high": 0.5}
    assert -0.5 < found["low"] < found["high"] < 0.5


def test_other_queries_under_one_seed_are_no_pairs() -> None:
    with pytest.raises(BenchmarkError, match="seed 2: two rows were evaluated on different"):
        paired_difference({2: {"a": 1.0}}, {2: {"b": 1.0}})
    assert paired_difference({1: {"a": 1.0}}, {2: {"a": 1.0}}) is None


def test_the_commits_that_trained_rows_are_told() -> None:
    code = {"laser": {1: "abc", 2: "def"}, "gircse": {1: "abc", 2: "abc"}}
    assert ablation_table.commits_told(code) == [
        "Trained by abc: laser (seed 1); gircse (seeds 1, 2).",
        "Trained by def: laser (seed 2).",
    ]


def test_one_seed_says_nothing_about_other_seeds() -> None:
    found = paired_difference({1: {"a": 1.0, "b": 0.0}}, {1: {"a": 0.0, "b": 0.0}})
    assert found is not None
    assert found["over_seeds"] is None
    assert (found["low"], found["high"]) == (0.0, 1.0)


def test_colearning_compares_the_explicit_views_and_a_row_the_scored_ones() -> None:
    def result(K: int, scored: str, **runs: float) -> Result:
        names = {"latent": latent(K), "explicit": EXPLICIT}
        metrics = ablation_table.METRICS
        steps = {latent(k): {"a": dict.fromkeys(metrics, 0.0)} for k in ablation_table.STEPS}
        given = {names[run]: {"a": dict.fromkeys(metrics, value)} for run, value in runs.items()}
        return Result("a row", names[scored], K, per_query={1: steps | given})

    results = {
        "laser": result(7, "latent", latent=0.75, explicit=1.0),
        "explicit": result(1, "explicit", latent=0.125, explicit=0.875),
    }
    laser, explicit = (summarise(row, results) for row in results)
    assert explicit["scores"]["Hit@1"]["mean"] == 0.875
    assert explicit["laser_minus"]["Hit@1"]["difference"] == 0.75 - 0.875
    assert laser["colearning"]["Hit@1"]["difference"] == 1.0 - 0.875
    assert explicit["colearning"] is None


# --- the probe ---------------------------------------------------------------------------------


def test_the_probe_finds_what_a_direct_reading_of_one_query_finds(
    report: dict[str, Any], work: Path
) -> None:
    model = work / "quick" / "seed-1" / "laser" / "model"
    variables, config = load_pretrained(model)
    prompts = PromptTokenizer(load_tokenizer(model), config.prompt)
    rows = [prompts.query(text, "Find") for text in ("From A, take the ferry.", "From B.")]
    documents_CD = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    documents_CD /= np.linalg.norm(documents_CD, axis=1, keepdims=True)
    read = read_trajectories(variables, config, rows, documents_CD, batch_size=4)
    assert read.first_QK.shape == read.entropy_QK.shape == (2, 3)
    backbone, variables = backbone_for(config, variables), jax.device_put(variables)

    @jax.jit
    def direct(tokens: Tokens) -> tuple[Any, Any]:
        hidden_BKD = latent_view(backbone, variables, tokens, 3, config.pooling)
        return hidden_BKD[0], top_tokens(backbone, variables, hidden_BKD, 1)

    for q, row in enumerate(rows):
        ids, length = np.array([row], np.int32), np.array([len(row)], np.int32)
        hidden_KD, said = jax.device_get(direct(Tokens(ids, length)))
        units_KD = hidden_KD / np.linalg.norm(hidden_KD, axis=1, keepdims=True)
        assert read.first_QK[q].tolist() == (units_KD @ documents_CD.T).argmax(axis=1).tolist()
        assert read.tokens_QKn[q].tolist() == said.ids_BKn[0].tolist()
        np.testing.assert_allclose(read.entropy_QK[q], said.entropy_BK[0], rtol=1e-5)


def test_two_places_with_one_first_token_are_refused(
    report: dict[str, Any], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "_name_token", lambda prompts, name: 7)
    seed = Seed(1, work / "quick" / "seed-1", True, ablation.TINY_WORLD)
    with pytest.raises(BenchmarkError, match="two places begin with the same token"):
        probe(seed, "laser", "test")


def test_a_walk_of_another_world_is_refused(
    report: dict[str, Any], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = Seed(1, work / "quick" / "seed-1", True, ablation.TINY_WORLD)
    other = Seed(2, seed.folder, True, ablation.TINY_WORLD).world
    monkeypatch.setattr(ablation, "build_world", lambda config: other)
    with pytest.raises(BenchmarkError, match="holds the world of another version"):
        probe(seed, "laser", "test")
