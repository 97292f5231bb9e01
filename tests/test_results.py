"""docs/results.md is what the files of results give, and says what they do not."""

from __future__ import annotations

import gzip
import json
import re
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report as reporting
from benchmarks.measure import Report
from benchmarks.report import Result, ResultsError, draw, inner_results, page, read_results, shown
from benchmarks.targets import TARGETS, Target, reached

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks/results"

ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "abc",
    "python": "3.11",
    "versions": {"jax": "1", "torch": None},
    "processor": "an abacus",
    "cores": 2,
    "load_average_at_start": [0, 0, 0],
    "backend": "cpu",
    "device": "cpu",
    "device_count": 1,
}
TARGET = TARGETS[0]


def spread(median: float) -> dict[str, float]:
    return {"median": median, "q1": 0.9 * median, "q3": 1.1 * median}


def latency(*, ratio: float = 4.0, date: str = "2026-01-02", **changes: Any) -> dict[str, Any]:
    """What `encode_latency` writes."""
    common = {"rows": 8, "tokens": 128, "thinking_steps": 3, "rows_per_second": 1.0}
    row = {"contender": "tuned PyTorch, compiled", "seconds": spread(2.0), "ratio": spread(ratio)}
    ours = {"contender": "ours", "seconds": spread(2 / ratio), "ratio": spread(1.0)}
    return {
        "benchmark": "encode_latency",
        "command": "python -m benchmarks.encode_latency",
        "settings": {"backbone": "small-42m", "dtype": "float32"},
        "environment": ENVIRONMENT | {"date": date},
        "notes": ["A note."],
        "rows": [common | ours, common | row],
    } | changes


def test_the_page_is_what_the_files_of_results_give() -> None:
    results = read_results(RESULTS)
    wanted = (REPOSITORY / "docs/results.md").read_text()
    assert page(results) == wanted, "run `python -m benchmarks.report`"
    assert len(wanted.splitlines()) <= 150
    for result in results:  # also those of programs that are gone
        assert result.report["command"] in shown(result)


@pytest.fixture(scope="module")
def row_differences() -> Callable[[Sequence[str]], str]:
    return runpy.run_path(str(REPOSITORY / "examples/row_differences.py"))["main"]


ALONE = "without_explicit_view"
REAL = [str(RESULTS / "cpu-real-scores_and_logs.tar.gz"), "--seeds", "low-*w"]
REAL += ["--sets", "ecare", "strategyqa", "entailmentbank", "qasc", "copa_sse"]
HARD = [str(RESULTS / "cpu-ablation-few_labels-per_query.tar.gz")]


@pytest.mark.parametrize(
    ("where", "page", "rows", "line", "told"),
    [
        (REAL, "real", "laser@3 contrastive@1", "macro, seed 2", "+.011 [+.006, +.016]"),
        (REAL, "real", "laser@3 contrastive@1", "entailmentbank", "+.061 [+.045, +.077]"),
        (REAL, "real", f"laser@3 {ALONE}@3", "macro, seeds drawn too", "+.012 [+.007, +.017]"),
        (REAL, "real", "laser@explicit contrastive@explicit", "macro, seeds drawn too", "+.059"),
        (HARD, "ablation", f"laser@7 {ALONE}@7", "all seeds", "+0.058 [+0.044, +0.071]"),
        (HARD, "ablation", f"laser@7 {ALONE}@7", "seeds drawn too", "[+0.020, +0.109]"),
        (HARD, "ablation", "without_output@7 without_distillation@7", "seed 7", "+0.088"),
    ],
)
def test_differences_that_the_pages_tell_come_out_of_the_kept_scores(
    row_differences: Callable[[Sequence[str]], str],
    where: Sequence[str],
    page: str,
    rows: str,
    line: str,
    told: str,
) -> None:
    table = row_differences([where[0], *rows.split(), *where[1:]])
    (number,) = re.findall(rf"^\| {line} +\| +(.*) \|$", table, re.MULTILINE)
    assert told in (number.replace("0.", ".") if page == "real" else number)
    assert told in (REPOSITORY / f"docs/{page}.md").read_text()


def test_differences_want_what_both_rows_have(
    row_differences: Callable[[Sequence[str]], str], capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [*REAL[:1], "laser@3", "contrastive@1", "--seeds", "low-*w"]
    assert "musique" not in row_differences(kept)
    left_out = "left out are sets that are not everywhere: ['musique', 'scifact']"
    assert left_out in capsys.readouterr().err
    for rows, message in (
        (["laser@3", "laser@9"], "no 'latent K=9' in seed-*/laser"),
        (["laser@7", "laser@7", "--metric", "MAP"], "no MAP, only nDCG@10"),
        (["laser@7", "laser@7", "--seeds", "none-*"], "no 'latent K=7' in none-*/laser"),
        (["laser@7", "laser@7", "--sets", "towns"], "no 'latent K=7' in seed-*/laser"),
    ):
        with pytest.raises(SystemExit) as refused:
            row_differences([*HARD, *rows])
        assert message in str(refused.value)
    with pytest.raises(SystemExit, match="low-3 and low-3w are both of seed 3"):
        row_differences([*kept[:3], "--seeds", "low-*", "--split", "dev"])
    with pytest.raises(SystemExit):
        row_differences([*HARD, "laser", "laser@7"])
    assert "wanted ROW@K, such as laser@3, or ROW@explicit" in capsys.readouterr().err


def test_every_figure_of_the_page_is_there_once() -> None:
    folder = REPOSITORY / "docs/results"
    named = {f"{r.name}.svg" for r in reporting.compared(read_results(RESULTS), "ablation")}
    assert {file.name for file in folder.iterdir()} == named


def test_a_target_takes_the_newest_measurement_of_its_backbone_and_dtype() -> None:
    other = latency(date="2027-01-01", settings={"backbone": "tiny", "dtype": "float32"})
    old, new = latency(ratio=2.0), latency(ratio=5.0, date="2026-02-02")
    half = latency(date="2027-01-01", settings=old["settings"] | {"dtype": "bfloat16"})
    found = reached(TARGET, [new, old, other, half])
    assert found is not None
    assert found.value == 5.0
    assert found.quartiles == pytest.approx((4.5, 5.5))
    assert found.device == "an abacus"
    assert reached(TARGET, [other]) is None
    gpu = latency(environment=ENVIRONMENT | {"backend": "gpu"})
    assert reached(TARGET, [gpu]) is None


def meant_for(target: Target, **changes: Any) -> dict[str, Any]:
    """A report of the workload of a target, with some values of another."""
    values = dict(target.wanted) | {"device": target.device or "any"} | changes
    values = {k: v[0] if isinstance(v, tuple) else v for k, v in values.items()}
    device = values.pop("device")
    measured = {"queries_per_second": 9.0, "documents_per_second": 9.0}
    measured |= {name: spread(2.0) for name in ("seconds", "ratio", "over_one_step")}
    return {
        "benchmark": target.benchmark,
        "settings": {"dtype": "bfloat16" if target.device else "float32"},
        "environment": ENVIRONMENT
        | {"backend": "gpu" if target.device else "cpu", "device": device},
        "rows": [values | measured],
    }


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.what)
def test_a_target_is_not_met_by_another_workload_or_device(target: Target) -> None:
    assert reached(target, [meant_for(target)]) is not None
    for name, value in target.wanted.items():
        other = not value if isinstance(value, bool) else "other" if name == "contender" else 7
        assert reached(target, [meant_for(target, **{name: other})]) is None, name
    on_h100 = reached(target, [meant_for(target, device="NVIDIA H100")])
    assert (on_h100 is None) == (target.device == "H200")


@pytest.mark.parametrize(("ratio", "met"), [(1.0, "yes"), (0.9, "**NO**")])
def test_the_page_says_whether_a_target_is_met(ratio: float, met: str) -> None:
    line = reporting.targets_table([latency(ratio=ratio)]).splitlines()[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1] == "≥ 1 ×"
    assert cells[2].startswith(f"{ratio:g} ×")
    assert cells[3:] == [met, "an abacus", "2026-01-02"]
    told = reporting.headline([latency(ratio=ratio)])
    assert (f"{TARGET.what}, 0.9 ×" in told) == (met == "**NO**")
    assert "Not measured: " in told


def test_a_comparison_takes_the_newest_run_that_has_something_to_compare() -> None:
    alone = latency(date="2027-01-01")
    del alone["rows"][1]
    old, new = latency(ratio=2.0), latency(ratio=5.0, date="2026-02-02")
    results = [Result(name, r) for name, r in (("a", old), ("b", new), ("c", alone))]
    [line] = reporting.COMPARISONS[0].table(results).splitlines()[2:]
    assert "CPU, small-42m, float32, 8×128" in line
    assert "5.00 × (4.50 to 5.50)" in line
    assert "2026-02-02" in line


def test_a_file_is_shown_whole_and_so_is_one_of_a_program_that_is_gone() -> None:
    part = {"part": "one", "state": "done", "seconds_taken": 3.0, "report": latency()}
    broken = {"part": "two", "state": "failed", "seconds_taken": 1.0, "message": "x\nout of luck"}
    whole = latency(benchmark="all", command="python -m benchmarks.all gpu", rows=[part, broken])
    [inner] = inner_results("gpu", whole)
    assert inner.name == "gpu-0-encode_latency"
    text = shown(inner) + shown(Result("gpu", whole))
    for wanted in ("abc. an abacus, 2 cores", "| tuned PyTorch, compiled |", "A note.", "luck"):
        assert wanted in text
    rows = [{"way": "by hand", "seconds": spread(2.0), "inner": {"a": 1}}]
    gone = shown(Result("odd", latency(benchmark="unheard_of", rows=rows)))
    assert "| way     | seconds |" in gone
    assert "| by hand |       2 |" in gone


DAY = "2026-12-02-world"


def test_the_same_results_give_the_same_figures_and_no_others(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    by_steps = {k: {"nDCG@10": {"mean": 0.1 * int(k)}} for k in "123"}
    row = {"row": "laser", "title": "LaSER", "K": 3, "by_steps": by_steps}
    rows = [row, row | {"row": "gircse"}]
    days = {"2026-11-26-world": [row, row | {"row": "gircse", "by_steps": {}}], DAY: rows}
    results = [Result(n, latency(benchmark="ablation", rows=found)) for n, found in days.items()]
    results.append(Result("one method", latency(benchmark="ablation", rows=[row])))
    for folder in ("a", "b"):
        draw([*results, Result("latency", latency())], tmp_path / folder)
    one, other = ((tmp_path / folder / f"{DAY}.svg").read_bytes() for folder in "ab")
    assert one == other
    assert [file.name for file in (tmp_path / "a").iterdir()] == [f"{DAY}.svg"]  # the newest
    assert b"LaSER, trained at K = 3" in one  # text stays text
    draw([], tmp_path / "a")
    assert not list((tmp_path / "a").iterdir())  # of results that are gone


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "no benchmark's file"),
        (json.dumps({"rows": []}), "no benchmark's file"),
        (json.dumps(latency(command="python -m benchmarks.x --quick")), "--quick"),
    ],
)
def test_a_file_that_is_no_result_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "odd.json.gz").write_bytes(gzip.compress(text.encode()))
    with pytest.raises(ResultsError, match=f"odd.json.gz.*{message}"):
        read_results(tmp_path)
    with pytest.raises(ResultsError, match="holds no JSON file"):
        read_results(tmp_path / "absent")


def test_the_program_writes_the_page_and_checks_it(tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    results, output = tmp_path / "in/cpu", tmp_path / "out"
    results.mkdir(parents=True)
    Report(**latency()).write(results / "latency.json.gz")
    arguments = ["--results", str(tmp_path / "in"), "--output", str(output)]
    with pytest.raises(SystemExit, match=r"is not what .* gives"):
        reporting.main([*arguments, "--check"])
    reporting.main(arguments)
    reporting.main([*arguments, "--check"])
    assert not list((output / "results").iterdir())
    reporting.main([*arguments, "--show", "cpu-latency"])
    assert "A note." in capsys.readouterr().out
    with pytest.raises(SystemExit, match="the files are cpu-latency"):
        reporting.main([*arguments, "--show", "other"])
