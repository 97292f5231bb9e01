"""The evaluation program: a run against pytrec_eval, a model against its own encoder."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import json
import logging
import os
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_bright import DOCUMENTS, EXAMPLES, write_copy

from laser_jax.evaluate.metrics import evaluate_run, without_excluded
from laser_jax.evaluate.model import model_table
from laser_jax.evaluate.plots import can_draw
from laser_jax.evaluate.results import (
    PER_QUERY_FILE,
    new_directory,
    read_evaluation,
    read_per_query,
)
from laser_jax.evaluate.retrieval import (
    CONTROL,
    EXPLICIT,
    REWRITES,
    latent,
    shorter,
    unrestricted,
)
from laser_jax.evaluate.rewrites import Rewrite, WritingCost
from laser_jax.evaluate.run import main
from laser_jax.evaluate.significance import paired_bootstrap
from laser_jax.inference.retriever import LatentRetriever
from laser_jax.search.trec import read_trec_run

TOWNS = ["Ulm", "Kiel", "Jena", "Bonn", "Hof", "Trier"]


# --- a run -------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "run.trec").write_text(
        "q1 Q0 a file.txt 1 0.9 t\nq1 Q0 b 2 0.8 t\nq2 Q0 b 1 0.5 t\nextra Q0 b 1 0.5 t\n"
    )
    (tmp_path / "qrels.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq1\tb\t2\nq2\tb\t0\nq3\ta file.txt\t1\n"
    )
    return tmp_path


def score(files: Path, *more: str) -> dict[str, Any]:
    output = files / "out"
    shutil.rmtree(output, ignore_errors=True)
    where = ["run", "--run", str(files / "run.trec"), "--qrels", str(files / "qrels.tsv")]
    main([*where, "--output", str(output), "--metrics", "[MRR@10, Hit@1]", *more])
    return json.loads((output / "results.json").read_text())


def test_a_run_is_scored_and_counted(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = score(files)
    assert result["scores"] == {"MRR@10": 0.25, "Hit@1": 0.0}
    assert result["queries"] == 2
    assert list(result["counts"].values()) == [3, 3, 1, 1, 1]
    assert read_per_query(files / "out" / "per_query.tsv") == {
        "run.trec": {"q1": {"MRR@10": 0.5, "Hit@1": 0.0}, "q2": {"MRR@10": 0.0, "Hit@1": 0.0}}
    }
    out = capsys.readouterr().out
    assert "judged, without a relevant document: 1" in out
    assert "mean over 2 queries" in out


def test_excluded_documents_leave_the_run_first(files: Path) -> None:
    (files / "excluded.tsv").write_text("q1\ta file.txt\n")
    result = score(files, "--excluded", str(files / "excluded.tsv"))
    assert result["scores"] == {"MRR@10": 0.5, "Hit@1": 0.5}


def test_a_document_with_the_id_of_its_query_leaves_the_run(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "run.trec").write_text("b Q0 b 1 0.9 t\nb Q0 a 2 0.8 t\nq2 Q0 b 1 0.5 t\n")
    (files / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nb\ta\t1\nq2\tb\t1\n")
    result = score(files)
    assert result["scores"] == {"MRR@10": 1.0, "Hit@1": 1.0}
    (count,) = result["id_counts"]
    assert (count["count"], count["of"], count["first"]) == (1, 2, "b")
    assert "dropped from its ranking (BEIR's rule): 1 of 2" in capsys.readouterr().out
    # trec_eval's numbers
    kept = score(files, "--ignore_identical_ids", "false")
    assert kept["scores"] == {"MRR@10": 0.75, "Hit@1": 0.5}
    assert "kept (ignore_identical_ids false)" in kept["id_counts"][0]["what"]


def test_ids_of_a_run_that_match_nothing_are_counted_or_refused(files: Path) -> None:
    (files / "excluded.tsv").write_text("q1\ta file.txt\nq1\ta file.txt \nq9\tb\n")
    excluded = ["--excluded", str(files / "excluded.tsv")]
    (files / "run.trec").write_text("q1 Q0 a file.txt 1 0.9 t\nq1 Q0 c 2 0.8 t\n")
    counts = score(files, *excluded)["id_counts"]
    assert [(c["what"], c["count"], c["of"], c["first"]) for c in counts] == [
        ("documents of the run that are judged for no query", 1, 2, "c"),
        ("queries with exclusions that the run lacks", 1, 2, "q9"),
        ("excluded documents that no ranking holds", 1, 2, "a file.txt "),
    ]
    for name, text, message in (
        ("excluded.tsv", "q1\ta file.txt \n", "excluded documents that no ranking holds: 1 of 1"),
        ("excluded.tsv", "q9\tb\n", "queries with exclusions that the run lacks: 1 of 1"),
        (
            "run.trec",
            "q1 Q0 A 1 0.9 t\n",
            r"run\.trec: documents of the run .*: 1 of 1, the first is",
        ),
    ):
        (files / name).write_text(text)
        with pytest.raises(SystemExit, match=message):
            score(files, *excluded)


def test_a_complete_mean_counts_judged_queries_that_the_run_lacks(files: Path) -> None:
    result = score(files, "--complete", "true")
    assert result["scores"]["MRR@10"] == pytest.approx(0.5 / 3)
    assert result["queries"] == 3


def test_a_run_is_not_scored_over_an_older_result(files: Path) -> None:
    score(files)
    with pytest.raises(SystemExit, match="out holds an evaluation: choose another --output"):
        main(["run", "--run", "absent", "--qrels", "absent", "--output", str(files / "out")])


def test_two_evaluations_do_not_write_into_one_directory(files: Path) -> None:
    command = ["run", "--run", "absent", "--qrels", "absent", "--output", str(files / "out")]
    held = "out is being written by process"
    with new_directory(files / "out"), pytest.raises(SystemExit, match=held):
        main(command)
    with pytest.raises(SystemExit, match="absent"):
        main(command)
    assert not (files / "out").exists()


def test_reference_runs_reach_their_reference(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "bright_runs_a"
    reference = json.loads((folder / "reference_metrics.json").read_text())["pony"]["all"]
    main(
        [
            *("run", "--run", str(folder / "pony" / "reasonir_gpt4cot_top100.txt.gz")),
            *("--qrels", str(folder / "pony" / "qrels.tsv"), "--output", str(tmp_path / "out")),
        ]
    )
    scores = json.loads((tmp_path / "out" / "results.json").read_text())["scores"]
    assert scores["nDCG@10"] == pytest.approx(reference["ndcg_cut_10"], abs=1e-6)
    assert scores["Recall@100"] == pytest.approx(reference["recall_100"], abs=1e-6)


def spoil(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda files: (files / name).write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda files: (files / "qrels.tsv").unlink(), r"No such file.*qrels\.tsv"),
        (lambda files: (files / "run.trec").unlink(), r"No such file.*run\.trec"),
        (spoil("run.trec", b"q1 Q0 a\n"), r"run\.trec:1: wanted 'qid Q0 docid rank score tag'"),
        (spoil("run.trec", b"q1 Q0 a 1 nan t\n"), r"run\.trec:1: .*'a' of query 'q1' is NaN"),
        (spoil("run.trec", b""), "holds no ranked document"),
        (spoil("run.trec", b"q9 Q0 a 1 1 t\n"), "no query of .* is judged in"),
        (spoil("qrels.tsv", b"q1\ta\t1\n"), r"qrels\.tsv:1: the header is missing"),
    ],
)
def test_bad_files_end_the_program_with_their_name(
    files: Path, harm: Callable[[Path], object], message: str
) -> None:
    (files / "run.trec").write_text("q1 Q0 a 1 0.9 t\n")
    (files / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\ta\t1\n")
    harm(files)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        score(files)
    assert not (files / "out").exists()


def test_an_unknown_metric_ends_the_program_at_once(files: Path) -> None:
    with pytest.raises(SystemExit, match="error: metrics: unknown metric 'nDCG'"):
        main(["run", "--run", "absent", "--qrels", "absent", "--metrics", "[nDCG]"])


# --- a model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> Path:
    directory = tmp_path_factory.mktemp("run") / "model"
    texts = [f"{town} lies on a river." for town in TOWNS]
    write_model(directory, texts, vocab_size=280, layers=1, steps=2)
    return directory


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_data(directory: Path, *, reasoning: bool = True, instruction: bool = True) -> Path:
    (directory / "qrels").mkdir(parents=True)
    lines(
        directory / "corpus.jsonl",
        [{"_id": f"{t} 1.txt", "title": t, "text": "lies on a river."} for t in TOWNS],
    )
    queries = [
        {"_id": f"q{i}", "text": f"Where is {t}?"}
        | ({"reasoning": f"{t} is a town.\n\nSo: {t}."} if reasoning else {})
        | ({"instruction": "Find"} if instruction else {})
        for i, t in enumerate(TOWNS)
    ]
    lines(directory / "queries.jsonl", queries)
    judged = [f"q{i}\t{t} 1.txt\t{int(i > 0)}\n" for i, t in enumerate(TOWNS)]
    (directory / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
    return directory


def arguments(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    where = ["model", "--model", str(model), "--data", str(data), "--output", str(output)]
    shapes = ["--length_multiple", "128", "--batch_size", "8", "--eval_thinking_steps", "[1,2,3]"]
    return [*where, *shapes, "--devices", "1", *more]


@pytest.fixture(scope="module")
def evaluated(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = write_data(tmp_path_factory.mktemp("data") / "towns")
    main(arguments(model, data, data.parent / "out", "--measure_time", "true"))
    return data.parent / "out"


RUNS = [latent(1), latent(2), latent(3), EXPLICIT, CONTROL]


def test_the_directory_holds_every_view(evaluated: Path) -> None:
    names = {path.relative_to(evaluated).as_posix() for path in evaluated.rglob("*.*")}
    slugs = ("latent-K-1", "latent-K-2", "latent-K-3", "explicit", "explicit-of-another-query")
    assert names == {
        *("results.json", "per_query.tsv", "quality_by_steps.svg"),
        *(f"runs/{slug}.trec" for slug in slugs),
    }
    evaluation = read_evaluation(evaluated)
    assert list(evaluation.scores) == RUNS
    assert (evaluation.documents, evaluation.queries) == (6, 6)
    assert evaluation.queries_without_relevant == 1
    assert evaluation.num_thinking_steps == 2
    assert evaluation.model == str(Path(evaluation.model))  # the run's directory, not its model/
    assert not evaluation.model.endswith("model")
    assert set(evaluation.milliseconds_per_query) == set(RUNS)


def test_scores_are_those_of_the_runs_beside_them(evaluated: Path) -> None:
    evaluation, per_query = read_evaluation(evaluated), read_per_query(evaluated / "per_query.tsv")
    qrels = {f"q{i}": {f"{t} 1.txt": int(i > 0)} for i, t in enumerate(TOWNS)}
    for name, slug in ((latent(3), "latent-K-3"), (CONTROL, "explicit-of-another-query")):
        run = read_trec_run(evaluated / "runs" / f"{slug}.trec")
        assert all(len(ranking) == 6 for ranking in run.values())
        assert evaluate_run(run, qrels, evaluation.metrics) == per_query[name]
        for metric in evaluation.metrics:
            mean = np.mean([values[metric] for values in per_query[name].values()])
            assert evaluation.scores[name][metric] == pytest.approx(mean, abs=1e-12)


def test_k_1_is_the_query_alone_where_the_prompts_own_state_is_pooled(evaluated: Path) -> None:
    evaluation = read_evaluation(evaluated)
    assert "| latent K=1 (query alone) " in model_table(evaluation)
    gircse = dataclasses.replace(evaluation, pools_prompt=False)
    assert "query alone" not in model_table(gircse)


def test_every_difference_comes_with_its_interval(evaluated: Path) -> None:
    evaluation, per_query = read_evaluation(evaluated), read_per_query(evaluated / "per_query.tsv")
    pairs = [(d.run, d.against) for d in evaluation.differences if d.metric == "nDCG@10"]
    assert pairs == [
        *((run, latent(1)) for run in RUNS[1:]),
        *((EXPLICIT, CONTROL), (EXPLICIT, latent(2))),
    ]
    for found in evaluation.differences:
        a, b = (
            [v[found.metric] for v in per_query[r].values()] for r in (found.run, found.against)
        )
        wanted = paired_bootstrap(a, b)
        assert (found.difference, found.low, found.high) == (
            wanted.difference,
            wanted.low,
            wanted.high,
        )


def test_the_best_k_of_each_query_stands_beside_the_best_for_all(evaluated: Path) -> None:
    evaluation, per_query = read_evaluation(evaluated), read_per_query(evaluated / "per_query.tsv")
    found = evaluation.steps_oracle
    assert found is not None
    values_KQ = np.array([[v["nDCG@10"] for v in per_query[latent(k)].values()] for k in (1, 2, 3)])
    assert found.oracle.chosen == pytest.approx(values_KQ.max(axis=0).mean())
    assert found.oracle.fixed == pytest.approx(values_KQ.mean(axis=1).max())
    assert found.control is None  # a query has one relevant document here
    table = model_table(evaluation)
    assert f"the best K for all is {found.fixed_K}; the best of each query" in table
    assert "| best of each query |" in table
    assert "| share of queries |" in table


def test_the_same_command_gives_the_same_files(model: Path, evaluated: Path) -> None:
    old = {p: p.read_bytes() for p in evaluated.rglob("*.*") if p.name != "results.json"}
    data = evaluated.parent / "towns"
    with pytest.raises(SystemExit, match="holds an evaluation: choose another --output"):
        main(arguments(model, data, evaluated))
    again = evaluated.parent / "again"
    main(arguments(model, data, again))
    for path, content in old.items():
        assert (again / path.relative_to(evaluated)).read_bytes() == content


@pytest.mark.parametrize(
    "mesh", [("--devices", "8"), ("--devices", "4", "--mesh.fsdp", "2", "--mesh.tensor", "2")]
)
def test_several_devices_rank_as_one_does(
    model: Path, evaluated: Path, tmp_path: Path, mesh: tuple[str, ...]
) -> None:
    main(arguments(model, evaluated.parent / "towns", tmp_path / "out", *mesh))
    for path in (evaluated / "runs").glob("*.trec"):
        alone, together = read_trec_run(path), read_trec_run(tmp_path / "out" / "runs" / path.name)
        assert together.keys() == alone.keys()
        for query, ranking in alone.items():
            assert together[query] == pytest.approx(ranking, abs=1e-5)


def test_a_full_disk_is_named_and_leaves_no_results(
    model: Path, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    output = tmp_path / "out"
    with pytest.raises(SystemExit, match=r"error: .*No space left on device: '.*latent-K-1\.trec'"):
        main(arguments(model, evaluated.parent / "towns", output))
    assert list(output.rglob("*")) == []


def test_queries_without_reasoning_or_instruction(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_data(tmp_path / "plain", reasoning=False, instruction=False)
    with pytest.raises(SystemExit, match="query q0 has no instruction"):
        main(arguments(model, data, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    more = ["--instruction", "Find the town", "--name", "tiny"]
    main(arguments(model, data, tmp_path / "out", *more))
    assert "no explicit view: 6 of 6 queries have no reasoning" in caplog.text
    evaluation = read_evaluation(tmp_path / "out")
    assert list(evaluation.scores) == RUNS[:3]
    assert evaluation.model == "tiny"


def test_without_matplotlib_there_is_no_plot_and_the_extra_is_named(
    model: Path,
    evaluated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    find = importlib.util.find_spec
    absent = lambda name: None if name == "matplotlib" else find(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    can_draw.cache_clear()
    main(arguments(model, evaluated.parent / "towns", tmp_path / "out"))
    can_draw.cache_clear()
    assert not list((tmp_path / "out").glob("*.svg"))
    assert caplog.text.count("pip install 'laser-jax[bench]'") == 1


def test_a_single_query_has_no_control(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_data(tmp_path / "towns")
    first, *_ = (data / "queries.jsonl").read_text().splitlines()
    (data / "queries.jsonl").write_text(first + "\n")
    qrels = data / "qrels" / "test.tsv"
    qrels.write_text("\n".join(qrels.read_text().splitlines()[:2]) + "\n")
    main(arguments(model, data, tmp_path / "out"))
    assert "no control: " in caplog.text
    assert list(read_evaluation(tmp_path / "out").scores) == RUNS[:4]


def test_ids_are_counted_below_the_table_and_in_the_results(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "towns", reasoning=False)
    for name in ("queries.jsonl", "corpus.jsonl", "qrels/test.tsv"):
        text = (data / name).read_text().replace("q0", "Kiel")
        (data / name).write_text(text.replace("Kiel 1.txt", "Kiel"))  # the id of both
    with (data / "qrels" / "test.tsv").open("a") as file:
        file.write("q1\tUlm 1.txt \t1\n")
    with (data / "queries.jsonl").open("a") as file:
        file.write('{"_id": "unjudged", "text": "Where?", "instruction": ""}\n')
    rewrites = write_rewrites(tmp_path / "rewrites.jsonl")
    rewrites.write_text(rewrites.read_text().replace("q0", "Kiel"))
    with rewrites.open("a") as file:
        file.write('{"_id": "other", "rewrite": "So."}\n')
    more = ["--rewrites", str(rewrites)]
    main(arguments(model, data, tmp_path / "out", *more))
    evaluation = read_evaluation(tmp_path / "out")
    assert [
        (c.what.split(", dropped")[0], c.count, c.of, c.first) for c in evaluation.id_counts
    ] == [
        ("judged documents that the corpus lacks", 1, 7, "Ulm 1.txt "),
        ("relevant documents that the corpus lacks", 1, 6, "Ulm 1.txt "),
        ("queries without judgements", 1, 7, "unjudged"),
        ("rewrites of no query of this split", 1, 7, "other"),
        ("documents with the id of their query", 1, 6, "Kiel"),
    ]
    out = capsys.readouterr().out
    assert all(f"\n{count}\n" in out for count in evaluation.id_counts)
    for path in (tmp_path / "out" / "runs").glob("*.trec"):
        run = read_trec_run(path)
        assert len(run["Kiel"]) == 5
        assert "Kiel" not in run["Kiel"]
        assert "Kiel" in run["q1"]


def test_texts_that_do_not_fit_are_counted_and_said(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_data(tmp_path / "towns")
    corpus, queries = data / "corpus.jsonl", data / "queries.jsonl"
    corpus.write_text(corpus.read_text().replace("on a river.", "far away. " * 60, 2))
    queries.write_text(queries.read_text().replace("Where is Ulm?", "Where is Ulm? " * 60))
    queries.write_text(queries.read_text().replace("So: Jena.", "So: Jena. " * 300))
    caplog.set_level(logging.INFO, "laser_jax")
    main(arguments(model, data, tmp_path / "out", "--max_length", "90"))
    wanted = {
        "documents": 2,
        "queries, latent": 1,
        f"queries, {EXPLICIT}": 2,  # Ulm's prompt, Jena's reasoning
        f"queries, {CONTROL}": 2,
    }
    assert read_evaluation(tmp_path / "out").shortened == wanted
    out = "\n".join(caplog.messages)
    assert re.search(r"^6 documents: [0-9.]+ tokens each, 2 shortened \(33\.33%\)$", out, re.M)
    assert re.search(r"^6 queries, latent: .* 1 shortened \(16\.67%\)$", out, re.M)

    results = tmp_path / "out" / "results.json"
    older = json.loads(results.read_text())
    del older["shortened"]
    results.write_text(json.dumps(older))
    assert read_evaluation(tmp_path / "out").shortened == {}


# --- a model as its authors released it ----------------------------------------------------------


def test_the_example_asks_finished_rankings_whether_to_stop_sooner(
    evaluated: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "towns"
    shutil.copytree(evaluated.parent / "towns", data)
    shutil.copy(data / "qrels" / "test.tsv", data / "qrels" / "dev.tsv")
    for split in ("dev", "test"):
        shutil.copytree(evaluated, tmp_path / split / "towns")
        table = tmp_path / split / "towns" / PER_QUERY_FILE
        lines = table.read_text().splitlines(keepends=True)
        others = (unrestricted(latent(1)), shorter(latent(3), 8))  # no K of their own
        run = f"\t{latent(1)}\t"
        table.write_text(
            "".join(lines)
            + "".join(
                line.replace(run, f"\t{o}\t") for o in others for line in lines if run in line
            )
        )
    example = runpy.run_path("examples/stop_thinking.py")
    example["main"](str(model), tmp_path, [data])
    printed = capsys.readouterr().out
    scores = json.loads((evaluated / "results.json").read_text())["scores"]
    means = [scores[latent(k)]["nDCG@10"] for k in (1, 2, 3)]
    for k, mean in enumerate(means, start=1):
        assert f"K = {k}: dev {mean:.4f}, test {mean:.4f}\n" in printed
    rules = re.findall(r"a threshold: dev (\S+), test (\S+) at", printed)
    assert len(rules) == 6
    for dev, test in rules:
        assert dev == test  # the same judgements
        assert float(dev) >= means[-1] - 1e-4  # a rule may always go to the end
    signs_QS = np.array([[3.0, 1.0], [1.0, 0.0], [3.0, 3.0]])
    assert example["stops"](signs_QS, 2.0, True).tolist() == [1, 0, 2]
    assert example["stops"](signs_QS, 2.0, False).tolist() == [0, 2, 0]


@pytest.fixture(scope="module")
def released(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as Hugging Face lays out a Qwen3."""
    directory = tmp_path_factory.mktemp("released") / "laser"
    shutil.copytree(model, directory)
    (directory / "laser_config.json").unlink()
    return directory


@pytest.mark.parametrize("preset", ["official", "official-bare"])
def test_a_released_model_is_evaluated_by_the_vectors_of_the_retriever(
    released: Path, tmp_path: Path, preset: str
) -> None:
    bare = preset == "official-bare"
    # the bare prompt has no place for an instruction, so none is wanted
    data = write_data(tmp_path / "towns", reasoning=False, instruction=not bare)
    main(arguments(released, data, tmp_path / "out", "--preset", preset))
    evaluation = read_evaluation(tmp_path / "out")
    assert evaluation.num_thinking_steps == 3
    assert list(evaluation.scores) == RUNS[:3]
    retriever = LatentRetriever.from_pretrained(released, preset=preset)
    for k in (1, 2, 3):
        queries = retriever.encode_query(
            [f"Where is {t}?" for t in TOWNS], instruction="Find", num_thinking_steps=k
        )
        documents = retriever.encode_document(
            [f"{t} lies on a river." for t in TOWNS], num_thinking_steps=k
        )
        run = read_trec_run(tmp_path / "out" / "runs" / f"latent-K-{k}.trec")
        for i, scores_C in enumerate(queries @ documents.T):
            wanted = {f"{t} 1.txt": float(s) for t, s in zip(TOWNS, scores_C, strict=True)}
            assert run[f"q{i}"] == pytest.approx(wanted, abs=1e-5)


def test_a_preset_that_cannot_be_is_refused(
    model: Path, released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = write_data(tmp_path / "towns"), tmp_path / "out"
    with pytest.raises(SystemExit):
        main(arguments(released, data, output, "--preset", "laser"))
    presets = "official or official-bare or gircse or null"
    assert f"preset must be {presets}, got 'laser'" in capsys.readouterr().err
    for more, message in (
        ([], 'laser_config.json is missing: .* pass preset="official"'),
        (["--preset", "official", "--num_thinking_steps", "5000"], "5000 thinking steps take"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(arguments(released, data, output, *more))
    with pytest.raises(SystemExit, match=r"has a laser_config\.json, which says how"):
        main(arguments(model, data, output, "--preset", "official"))
    assert not output.exists()


# --- rewrite-then-retrieve -----------------------------------------------------------------------


def write_rewrites(path: Path, *, timed: bool = True, count: int = 6) -> Path:
    cost = WritingCost(20, 30, rows=2, prefill_seconds=0.5, decode_seconds=1.5) if timed else None
    rows = [
        Rewrite(f"{t} is a town.\n\nSo: {t}.", f"Where is {t}?", True, cost).as_row(f"q{i}")
        for i, t in enumerate(TOWNS[:count])
    ]
    lines(path, rows)
    return path


def test_rewrites_are_read_as_reasonings_and_as_longer_queries(
    model: Path, evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # the queries have no reasoning of their own, and the rewrites are those that `evaluated` had
    data = write_data(tmp_path / "towns", reasoning=False)
    rewrites = write_rewrites(tmp_path / "rewrites.jsonl")
    main(arguments(model, data, tmp_path / "out", "--rewrites", str(rewrites)))
    evaluation = read_evaluation(tmp_path / "out")
    assert list(evaluation.scores) == [*RUNS[:3], *REWRITES]
    wanted = read_trec_run(evaluated / "runs" / "explicit.trec")
    assert read_trec_run(tmp_path / "out" / "runs" / "rewrite-explicit.trec") == wanted

    pairs = {(d.run, d.against) for d in evaluation.differences}
    assert {(run, latent(k)) for run in REWRITES for k in (1, 2)} <= pairs
    assert evaluation.writing_milliseconds_per_query == dict.fromkeys(REWRITES, 1000.0)
    table = capsys.readouterr().out
    assert "ms to write" in table
    assert "ms a query" not in table
    assert re.search(r"rewrite, in the query +\|.* 1000\.00 \|", table)

    longer = write_data(tmp_path / "longer", reasoning=False)
    rows = [json.loads(line) for line in (longer / "queries.jsonl").read_text().splitlines()]
    texts = [json.loads(line)["rewrite"] for line in rewrites.read_text().splitlines()]
    pairs = zip(rows, texts, strict=True)
    lines(
        longer / "queries.jsonl",
        [row | {"text": f"{row['text']}\n\n{text}"} for row, text in pairs],
    )
    main(arguments(model, longer, tmp_path / "alone"))
    wanted = read_trec_run(tmp_path / "alone" / "runs" / "latent-K-1.trec")
    assert read_trec_run(tmp_path / "out" / "runs" / "rewrite-in-the-query.trec") == wanted


def test_rewrites_without_times_are_of_another_program(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "towns")
    rewrites = write_rewrites(tmp_path / "rewrites.jsonl", timed=False)
    more = ["--rewrites", str(rewrites)]
    main(arguments(model, data, tmp_path / "out", *more))
    evaluation = read_evaluation(tmp_path / "out")
    assert list(evaluation.scores) == [*RUNS, *REWRITES]
    assert evaluation.writing_milliseconds_per_query == {}
    assert "ms to write" not in capsys.readouterr().out


def test_rewrites_that_are_not_of_these_queries_stop_the_program(
    model: Path, tmp_path: Path
) -> None:
    data, output = write_data(tmp_path / "towns"), tmp_path / "out"
    rewrites = write_rewrites(tmp_path / "rewrites.jsonl", count=5)
    with pytest.raises(SystemExit, match=r"1 of 6 queries have no rewrite, the first is 'q5'"):
        main(arguments(model, data, output, "--rewrites", str(rewrites)))
    with pytest.raises(SystemExit, match=r"error: .*absent\.jsonl is missing"):
        main(arguments(model, data, output, "--rewrites", "absent.jsonl"))
    assert not output.exists()


# --- bad input -----------------------------------------------------------------------------------


def test_a_bad_line_stops_the_program(model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", reasoning=False)
    corpus = data / "corpus.jsonl"
    corpus.write_text(corpus.read_text() + "{torn\n")
    with pytest.raises(SystemExit, match=r"error: .*corpus\.jsonl:7: not valid JSON"):
        main(arguments(model, data, tmp_path / "out"))


def drop(name: str) -> Callable[[Path], object]:
    return lambda data: (data / name).unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (drop("qrels/test.tsv"), r"test\.tsv is missing; splits present: none"),
        (drop("corpus.jsonl"), r"corpus\.jsonl is missing"),
        (spoil("corpus.jsonl", b"\n"), r"corpus\.jsonl: holds no document"),
        (
            spoil("corpus.jsonl", b'{"_id": "a", "text": "t"}\n'),
            r"\(test\): judged documents that the corpus lacks: 6 of 6, the first is 'Ulm 1\.txt': "
            "not one matches. Those looked for are like 'a'; an id must be written alike",
        ),
        (
            spoil("corpus.jsonl", b'{"_id": "a\\tb", "text": "t"}\n'),
            r"corpus\.jsonl:1: document id 'a\\tb' holds a tab",
        ),
        (
            spoil("corpus.jsonl", b'{"_id": "a", "text": "t"}\n' * 2),
            r"corpus\.jsonl:2: document id 'a' stands here a second time",
        ),
    ],
)
def test_bad_data_ends_the_program_before_anything_is_written(
    model: Path, tmp_path: Path, harm: Callable[[Path], object], message: str
) -> None:
    data = write_data(tmp_path / "data")
    harm(data)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main(arguments(model, data, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# --- BRIGHT ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bright(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evaluation of two domains, beside the copy in `bright`."""
    directory = tmp_path_factory.mktemp("bright")
    write_copy(directory / "bright", domains=("pony", "biology"))
    examples = [{**row, "excluded_ids": ["N/A"]} for row in EXAMPLES]
    lines(directory / "bright" / "examples" / "biology.jsonl", examples)
    main(arguments(model, directory / "bright", directory / "out"))
    return directory / "out"


def test_every_domain_has_an_evaluation_and_the_table_their_mean(bright: Path) -> None:
    biology, pony = (read_evaluation(bright / name) for name in ("biology", "pony"))
    assert (Path(pony.data).name, pony.split) == ("pony", "examples")
    assert list(biology.scores) == RUNS[:3]
    assert list(pony.scores) == [name for run in RUNS[:3] for name in (run, unrestricted(run))]
    assert {difference.run for difference in pony.differences} == {latent(2), latent(3)}
    shown, notes = (bright / "domains.md").read_text().split("\n\n")
    assert (
        notes
        == "pony, excluded documents that the corpus lacks: 1 of 2, the first is 'elsewhere'\n"
    )
    header, _, *rows, means = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines()
    )
    assert header == ["nDCG@10", *[latent(1), "nothing excluded", latent(2), "nothing excluded"]]
    shown = {row[0]: [float(cell) for cell in row[1:]] for row in rows}
    scores = {name: values["nDCG@10"] for name, values in pony.scores.items()}
    names = [latent(1), unrestricted(latent(1)), latent(2), unrestricted(latent(2))]
    assert shown["pony"] == pytest.approx([scores[name] for name in names], abs=5e-5)
    assert shown["biology"][0] == shown["biology"][1]
    mean = np.mean([shown["biology"], shown["pony"]], axis=0)
    assert means[0] == "mean of 2"
    assert [float(cell) for cell in means[1:]] == pytest.approx(mean.tolist(), abs=1e-4)


def test_excluded_documents_are_only_in_the_runs_that_exclude_nothing(bright: Path) -> None:
    runs = bright / "pony" / "runs"
    ranked = {path.stem: read_trec_run(path) for path in runs.glob("*.trec")}
    assert len(ranked) == 6
    for name, run in ranked.items():
        assert set(run["0"]) == {document["id"] for document in DOCUMENTS}
        assert ("light/Moth_0.txt" in run["1"]) == name.endswith("-nothing-excluded")
    kept, all_of_them = ranked["latent-K-2"], ranked["latent-K-2-nothing-excluded"]
    assert kept == without_excluded(all_of_them, {"1": ["light/Moth_0.txt"]})


def test_reports_take_domains_as_columns(bright: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", str(bright / "biology"), str(bright / "pony")])
    assert "| biology | pony | Avg. |" in " ".join(capsys.readouterr().out.split())


def test_rewrites_and_long_documents_are_evaluated_by_name(model: Path, bright: Path) -> None:
    output = bright.parent / "long"
    more = ["--rewrites", "gpt4_reason", "--long_documents", "true", "--domains", "pony"]
    rest = ["--max_length", "90", "--instruction", "Find"]
    main(arguments(model, bright.parent / "bright", output, *more, *rest))
    evaluation = read_evaluation(output / "pony")
    assert evaluation.split == "examples, long documents as gpt4_reason"
    assert (evaluation.documents, evaluation.queries) == (2, 2)
    assert not (output / "biology").exists()


def test_a_fault_in_the_last_domain_stops_the_program_before_anything_is_written(
    model: Path, bright: Path, tmp_path: Path
) -> None:
    copy = write_copy(tmp_path / "copy", domains=("biology", "pony"))
    lines(copy / "examples" / "pony.jsonl", [{**EXAMPLES[0], "gold_ids": ["gone"]}])
    with pytest.raises(SystemExit, match=r"error: .*pony\.jsonl:1: gold document 'gone' is not"):
        main(arguments(model, copy, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    before = {path: path.read_bytes() for path in bright.rglob("*.*")}
    with pytest.raises(SystemExit, match=r"biology holds an evaluation: choose another --output"):
        main(arguments(model, bright.parent / "bright", bright))
    assert {path: path.read_bytes() for path in bright.rglob("*.*")} == before


@pytest.mark.parametrize(
    ("data", "more", "message"),
    [
        ("towns", ("--domains", "biology"), "are BRIGHT's, and .* has no folder examples"),
        ("towns", ("--long_documents", "true"), "are BRIGHT's, and .* has no folder examples"),
        ("bright", ("--split", "dev"), "BRIGHT has no splits"),
        ("bright", ("--max_length", "0"), "max_length must be at least 1, got 0"),
        ("bright", ("--max_length", "99999"), "take 100511 positions, and the model has 4096"),
        ("towns", ("--eval_thinking_steps", "[1,5000]"), "5511 positions, and the model has 4096"),
        ("bright", ("--eval_thinking_steps", "[1,5000]"), "5511 positions, and the model has 4096"),
    ],
)
def test_options_that_do_not_go_with_data_or_model_are_refused(
    model: Path,
    evaluated: Path,
    bright: Path,
    tmp_path: Path,
    data: str,
    more: tuple[str, ...],
    message: str,
) -> None:
    directory = {"towns": evaluated.parent / "towns", "bright": bright.parent / "bright"}[data]
    with pytest.raises(SystemExit, match=message):
        main(arguments(model, directory, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--eval_thinking_steps", "[0]"), "eval_thinking_steps must be at least 1"),
        (("--eval_thinking_steps", "[]"), "eval_thinking_steps must name one K"),
        (("--num_thinking_steps", "0"), "num_thinking_steps must be at least 1"),
        (("--metrics", "[]"), "must name one metric"),
        (("--batch_tokens", "0"), "batch_tokens must be at least 1, got 0"),
    ],
)
def test_impossible_options_are_refused(
    model: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        main(arguments(model, tmp_path / "absent", tmp_path / "out", *more))


def test_every_evaluation_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"write python -m laser_jax\.evaluate model \.\.\."):
        main(["--model", "x", "--data", "y", "--output", "z"])
    with pytest.raises(SystemExit, match=r"write python -m laser_jax\.evaluate run \.\.\."):
        main(["--run=a"])
    with pytest.raises(SystemExit, match=r"evaluate has no command 'report'\n(.*\n)*  compare "):
        main(["report", "x"])
    with pytest.raises(SystemExit):
        main(["--help"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == [
        *("run", "model", "mteb", "compare")
    ]


def test_a_gzipped_run_is_scored_too(files: Path) -> None:
    packed = files / "run.trec.gz"
    packed.write_bytes(gzip.compress((files / "run.trec").read_bytes()))
    main(
        ["run", "--run", str(packed), "--qrels", str(files / "qrels.tsv"), "--metrics", "[MRR@10]"]
    )
