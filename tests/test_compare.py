"""Models compared: what with what, which cells are marked, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laser_jax.evaluate.compare import (
    CompareOptions,
    Comparison,
    compare,
    format_comparison,
    read_all,
)
from laser_jax.evaluate.results import PER_QUERY_FILE, Evaluation, write_results
from laser_jax.evaluate.retrieval import (
    EXPLICIT,
    REWRITE,
    REWRITE_AS_QUERY,
    REWRITES,
    latent,
)
from laser_jax.evaluate.run import main
from laser_jax.evaluate.significance import permutation_p_value
from laser_jax.files.reading import DataError

METRIC = "nDCG@10"
QUERIES = [f"q{i}" for i in range(30)]
EASY = np.random.default_rng(0).random(30) * 0.5
"""The values of the baseline, a query each."""

EVALUATION = Evaluation(
    model="base",
    data="/data/towns",
    split="test",
    num_thinking_steps=3,
    metrics=[METRIC],
    documents=10,
    queries=30,
    queries_without_relevant=0,
    scores={},
    differences=[],
)


def write(
    directory: Path, values: dict[str, np.ndarray], queries: list[str] = QUERIES, **changes
) -> str:
    """An evaluated directory in which a run has these values, query by query."""
    per_query = {
        run: {q: {METRIC: float(v)} for q, v in zip(queries, of_run, strict=True)}
        for run, of_run in values.items()
    }
    scores = {run: {METRIC: float(np.mean(of_run))} for run, of_run in values.items()}
    evaluation = dataclasses.replace(EVALUATION, scores=scores, **changes)
    write_results(directory, dataclasses.asdict(evaluation), per_query)
    return str(directory)


def compared(directories: list[str], **options: Any) -> Comparison:
    asked = CompareOptions(tuple(directories), **options)
    return compare(read_all(asked), asked)


@pytest.fixture
def directories(tmp_path: Path) -> list[str]:
    """`base` on two data sets, `better` on both, `worse` on one."""
    noise = np.random.default_rng(1).normal(0, 0.01, 30)

    def views(values: np.ndarray) -> dict[str, np.ndarray]:
        return {latent(1): EASY + noise, latent(2): EASY, latent(3): values, EXPLICIT: values + 0.3}

    timed: Any = {"milliseconds_per_query": {latent(1): 1.0, latent(3): 2.0, EXPLICIT: 9.0}}
    return [
        write(tmp_path / "a", views(EASY), **timed),
        write(tmp_path / "b", views(EASY), data="/data/rivers"),
        write(tmp_path / "c", views(EASY + 0.2), model="better", **timed),
        write(tmp_path / "d", views(EASY + 0.1 + noise), model="better", data="/data/rivers"),
        write(tmp_path / "e", views(EASY - 0.1 + noise), model="worse"),
    ]


def test_rewrite_then_retrieve_is_plotted_with_the_time_to_write_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = dict.fromkeys((latent(1), latent(3), *REWRITES), EASY)
    timed: Any = {"milliseconds_per_query": {latent(1): 1.0, REWRITE: 2.0, REWRITE_AS_QUERY: 3.0}}
    untold = write(tmp_path / "untold", values, **timed)
    timed["writing_milliseconds_per_query"] = {REWRITE: 40.0, REWRITE_AS_QUERY: 50.0}
    told = write(tmp_path / "told", values, model="told", **timed)
    drawn = {}
    monkeypatch.setattr(
        "laser_jax.evaluate.compare.plot_latency_quality", lambda s, *_: drawn.update(s)
    )
    main(["compare", told, untold, "--output", str(tmp_path / "out")])
    times = {name: [point.milliseconds for point in points] for name, points in drawn.items()}
    assert times == {
        "told, latent view": [1.0],
        f"told, {REWRITE} (writing and reading)": [42.0],
        f"told, {REWRITE_AS_QUERY} (writing and reading)": [53.0],
        "base, latent view": [1.0],
    }
    rows = compared([told]).rows
    assert [row.run for row in rows] == [latent(1), latent(3), *REWRITES]


def test_rows_are_models_and_views_and_columns_are_data_sets(directories: list[str]) -> None:
    report = compared(directories)
    assert report.columns == ["towns", "rivers"]
    assert [(row.model, row.run) for row in report.rows] == [
        (model, run)
        for model in ("base", "better", "worse")
        for run in (latent(1), latent(3), EXPLICIT)
    ]
    better = report.rows[4]
    assert better.cells["towns"].score == pytest.approx(EASY.mean() + 0.2)
    scores = [better.cells[column].score for column in report.columns]
    assert better.average == pytest.approx(np.mean(scores))
    assert report.rows[7].average is None  # worse was not evaluated on rivers


def test_marks_are_for_what_differs_from_the_baseline_beyond_chance(directories: list[str]) -> None:
    report = compared(directories)
    assert report.baseline == ("base", latent(3))
    marks = {(row.model, row.run): [c.mark for c in row.cells.values()] for row in report.rows}
    assert marks["base", latent(3)] == ["", ""]
    assert report.rows[1].cells["towns"].difference is None
    assert marks["base", latent(1)] == ["", ""]  # noise
    assert marks["better", latent(3)] == ["▲", "▲"]
    assert marks["worse", latent(3)] == ["▼"]
    assert report.tested == 3 * 5 - 2


def test_p_values_are_corrected_for_all_tested_cells(directories: list[str]) -> None:
    report = compared(directories)
    cells = [cell for row in report.rows for cell in row.cells.values()]
    corrected = sorted(cell.p_value for cell in cells if cell.p_value is not None)
    assert len(corrected) == report.tested
    # the smallest that 10,000 swaps can show, times the number of comparisons
    assert corrected[0] == pytest.approx(report.tested / 10_001)
    alone = permutation_p_value((EASY + 0.2).tolist(), EASY.tolist())
    assert alone == pytest.approx(1 / 10_001)


def test_the_table_shows_scores_times_100_with_the_best_in_bold(directories: list[str]) -> None:
    text = format_comparison(compared(directories))
    header, _, *rows = text.split("\n\n")[0].splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "nDCG@10 x 100",
        "towns",
        "rivers",
        "Avg.",
    ]
    cells = {r[0]: r[1:] for r in ([c.strip() for c in row.strip("|").split("|")] for row in rows)}
    assert cells["base, latent K=3"][0] == f"{100 * EASY.mean():.1f}"
    assert cells["better, explicit"][0] == f"**{100 * (EASY.mean() + 0.5):.1f}**▲"
    assert cells["worse, explicit"][1:] == ["-", "-"]
    assert "p < 0.05 after Holm's correction for 13 comparisons" in text


def test_all_runs_and_another_baseline_on_request(directories: list[str]) -> None:
    report = compared(directories, runs="all", baseline="better")
    assert report.baseline == ("better", latent(3))
    assert [row.run for row in report.rows[:4]] == [latent(1), latent(2), latent(3), EXPLICIT]
    assert report.rows[2].cells["towns"].difference == pytest.approx(-0.2)


def test_an_evaluation_at_other_k_alone_shows_what_it_has(tmp_path: Path) -> None:
    report = compared([write(tmp_path / "a", {latent(2): EASY, latent(4): EASY})])
    assert [row.run for row in report.rows] == [latent(2), latent(4)]
    assert report.tested == 0  # the baseline, K = 3, is not there
    format_comparison(report)


def test_rewritten_queries_are_compared_with_those_that_they_were(tmp_path: Path) -> None:
    """BRIGHT's have the same ids, so they share a column."""
    bright = {"data": "/bright/pony", "split": "examples"}
    asked = write(tmp_path / "a", {latent(1): EASY, latent(3): EASY}, **bright)
    bright["split"] += " as gpt4_reason"
    rewritten = write(tmp_path / "b", {latent(1): EASY + 0.2}, model="rewritten", **bright)
    report = compared([asked, rewritten])
    assert report.columns == ["pony"]
    assert report.rows[-1].cells["pony"].mark == "▲"
    with pytest.raises(DataError, match="both of base on pony; give one of them another --name"):
        compared([asked, write(tmp_path / "c", {latent(1): EASY}, **bright)])


def test_the_directory_holds_table_numbers_and_plot(
    directories: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = tmp_path / "report"
    main(["compare", *directories, "--output", str(output)])
    assert {path.name for path in output.iterdir()} == {
        *("report.md", "report.json", "latency_quality.svg")
    }
    out = capsys.readouterr().out
    assert (output / "report.md").read_text().strip() in out
    assert (
        f"not in the plot, as evaluated without --measure_time true: {directories[1]}"
        in caplog.text
    )
    stored = json.loads((output / "report.json").read_text())
    assert stored["rows"][4]["cells"]["towns"]["score"] == pytest.approx(EASY.mean() + 0.2)
    drawn = (output / "latency_quality.svg").read_bytes()
    main(["compare", *directories, "--output", str(output)])
    assert (output / "latency_quality.svg").read_bytes() == drawn


def test_what_cannot_be_compared_is_refused(directories: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"results\.json is missing"):
        main(["compare", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"a and .*a are both of base on towns"):
        main(["compare", directories[0], directories[0]])
    with pytest.raises(SystemExit, match="baseline 'none' is none of the models: base, better"):
        main(["compare", *directories, "--baseline", "none"])
    with pytest.raises(SystemExit, match="has no Recall@10, only nDCG@10"):
        main(["compare", *directories, "--metric", "Recall@10"])
    fewer = write(tmp_path / "f", {latent(3): EASY[:29]}, QUERIES[:29], model="fewer")
    with pytest.raises(SystemExit, match="different queries of towns: 1 are in one of them alone"):
        main(["compare", directories[0], fewer])
    with pytest.raises(SystemExit, match=r"no directories to compare: .* compare DIR\.\.\."):
        main(["compare", "--runs", "all"])


def test_damaged_evaluations_are_named(directories: list[str]) -> None:
    table = Path(directories[0]) / PER_QUERY_FILE
    text = table.read_text()
    table.write_text(text.replace("q3\tlatent K=1\t", "q3\tlatent K=1\tx"))
    with pytest.raises(SystemExit, match=r"per_query\.tsv:5: wanted query_id, run and 1 numbers"):
        main(["compare", *directories])
    table.write_text("\n".join(text.splitlines()[:31]) + "\n")
    with pytest.raises(SystemExit, match=r"per_query\.tsv and results\.json hold other runs"):
        main(["compare", *directories])
    table.write_text("no header\n")
    with pytest.raises(SystemExit, match=r"per_query\.tsv:1: wanted the header"):
        main(["compare", *directories])
    results = Path(directories[0]) / "results.json"
    results.write_text(results.read_text().replace('"split"', '"spilt"'))
    with pytest.raises(SystemExit, match=r"results\.json: no results of laser_jax\.evaluate"):
        main(["compare", *directories])
