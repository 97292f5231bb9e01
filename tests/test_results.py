"""docs/results.md is what the files of results give, and says what they do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import encode_latency
from benchmarks import report as reporting
from benchmarks.report import Result, ResultsError, draw, inner_results, page, read_results
from benchmarks.targets import TARGETS, Target, reached
from benchmarks.workload import SHAPES
from laser_jax.config import as_dict
from laser_jax.evaluation.plots import Interval, plot_intervals

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


def spread(median: float) -> dict[str, float]:
    return {"median": median, "q1": 0.9 * median, "q3": 1.1 * median}


def latency(*, ratio: float = 4.0, date: str = "2026-01-02", **changes: Any) -> dict[str, Any]:
    """What `encode_latency` writes."""
    common = {"rows": 8, "tokens": 128, "thinking_steps": 3, "rows_per_second": 1.0}
    row = {"contender": "published PyTorch", "seconds": spread(2.0), "ratio": spread(ratio)}
    ours = {"contender": "ours", "seconds": spread(2 / ratio), "ratio": spread(1.0)}
    return {
        "benchmark": "encode_latency",
        "command": "python -m benchmarks.encode_latency",
        "settings": {"backbone": as_dict(SHAPES["small-42m"])},
        "environment": ENVIRONMENT | {"date": date},
        "notes": ["A note."],
        "rows": [common | ours, common | row],
    } | changes


TARGET = TARGETS[0]


def test_the_page_is_what_the_files_of_results_give() -> None:
    wanted = (REPOSITORY / "docs/results.md").read_text()
    assert page(read_results(RESULTS)) == wanted, "run `python -m benchmarks.report`"


def test_figures_of_the_page_are_there() -> None:
    folder = REPOSITORY / "docs/results"
    named = {r.name for r in read_results(RESULTS) if reporting.figure_of(r)}
    assert {file.stem for file in folder.iterdir()} == named
    for name in named:
        assert (folder / f"{name}.png").is_file()
        assert (folder / f"{name}.svg").is_file()


def test_a_target_takes_the_newest_measurement_of_its_backbone_and_dtype() -> None:
    assert TARGET.wanted["contender"] == "published PyTorch"
    other = latency(date="2027-01-01", settings={"backbone": as_dict(SHAPES["tiny"])})
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
    values = dict(target.wanted) | {"device": target.device or "any", "thinking_steps": 3} | changes
    backbone, full = values.pop("backbone", None), values.pop("full", False)
    device = values.pop("device")
    measured = {"queries_per_second": 9.0, "documents_per_second": 9.0}
    measured |= {"seconds": spread(2.0), "ratio": spread(4.0)}
    return {
        "benchmark": target.benchmark,
        "settings": {
            "backbone": as_dict(SHAPES[backbone]) if backbone else None,
            "lora": None if full else {"rank": 64},
            "dtype": "float32" if target.backend == "cpu" else "bfloat16",
        },
        "environment": ENVIRONMENT | {"backend": target.backend, "device": device},
        "rows": [values | measured],
    }


OTHERS = {
    "encode_latency": {"backbone": "tiny", "rows": 1, "tokens": 64, "thinking_steps": 2},
    "thinking_overhead": {"backbone": "tiny", "rows": 1, "tokens": 64, "thinking_steps": 2},
    "encode_throughput": {"backbone": "tiny", "workload": "2×8", "thinking_steps": 2},
    "train_step": {
        "backbone": "tiny",
        "queries": 2,
        "query_tokens": 64,
        "explicit_tokens": 300,
        "documents_per_query": 3,
        "document_tokens": 64,
        "thinking_steps": 2,
    },
    "search": {"queries": 500, "documents": 100_000, "width": 512, "k": 10},
}
"""Values of a workload that no target is meant for."""


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.what)
def test_a_target_is_not_met_by_another_workload_or_device(target: Target) -> None:
    assert reached(target, [meant_for(target)]) is not None
    others = OTHERS[target.benchmark] | {"contender": "NumPy"}
    if target.benchmark == "train_step":
        others |= {"full": not target.wanted["full"]}
    for name, value in others.items():
        assert reached(target, [meant_for(target, **{name: value})]) is None, name
    on_h100 = reached(target, [meant_for(target, device="NVIDIA H100")])
    assert (on_h100 is None) == ("H200" in target.what)


@pytest.mark.parametrize(("ratio", "met"), [(3.0, "yes"), (2.9, "NO")])
def test_the_table_says_whether_a_target_is_met(ratio: float, met: str) -> None:
    line = reporting.targets_table([latency(ratio=ratio)]).splitlines()[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1] == "≥ 3 ×"
    assert cells[2].startswith(f"{ratio:g} ×")
    assert cells[3:] == [met, "an abacus", "2026-01-02"]
    assert "not measured" in reporting.targets_table([])


def test_the_page_shows_command_machine_table_notes_and_the_parts_of_a_gpu_run() -> None:
    part = {"part": "one", "state": "done", "seconds_taken": 3.0, "report": latency()}
    broken = {"part": "two", "state": "failed", "seconds_taken": 1.0, "message": "x\nout of luck"}
    whole = latency(benchmark="gpu", command="python -m benchmarks.gpu", rows=[part, broken])
    results = [Result("gpu", whole), *inner_results("gpu", whole)]
    assert [result.name for result in results] == ["gpu", "gpu-0-encode_latency"]
    text = page(results)
    for wanted in (
        "    python -m benchmarks.encode_latency\n",
        "2026-01-02, commit abc. an abacus, 2 cores",
        "| published PyTorch |",
        "A note.",
        "out of luck",
        "results/gpu-0-encode_latency.svg",
        "What cannot be shown here",
    ):
        assert wanted in text


def test_a_program_may_have_further_tables(monkeypatch) -> None:
    def tables(rows: list[Any]) -> dict[str, str]:
        return {"Slower rows": f"| {len(rows)} of them |"}

    monkeypatch.setattr(encode_latency, "further_tables", tables, raising=False)
    text = page([Result("latency", latency())])
    assert "#### Slower rows\n\n| 2 of them |" in text


def test_a_bare_number_is_named_by_its_column_in_a_figure() -> None:
    labels = [interval.label for interval in reporting.intervals(Result("latency", latency()))]
    assert labels == ["ours, 8×128, K = 3", "published PyTorch, 8×128, K = 3"]


def test_an_axis_of_powers_of_ten_has_plain_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = [Interval(str(median), "", median, median, median) for median in (0.04, 0.1, 9.0)]
    plot_intervals(found, "seconds", tmp_path / "figure")
    drawn = (tmp_path / "figure.svg").read_text()
    assert "<!-- 0.1 -->" in drawn
    assert "e−0" not in drawn


def test_the_same_results_give_the_same_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = [Result("latency", latency())]
    for folder in ("a", "b"):
        draw(results, tmp_path / folder)
    for form in ("png", "svg"):
        one, other = ((tmp_path / f / f"latency.{form}").read_bytes() for f in ("a", "b"))
        assert one == other
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
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(ResultsError, match=f"odd.json.*{message}"):
        read_results(tmp_path)
    with pytest.raises(ResultsError, match="holds no JSON file"):
        read_results(tmp_path / "absent")
    with pytest.raises(ResultsError, match="benchmarks/unheard_of"):
        page([Result("odd", latency(benchmark="unheard_of"))])


def test_the_program_writes_the_page_and_checks_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results, output = tmp_path / "in/cpu", tmp_path / "out"
    results.mkdir(parents=True)
    (results / "latency.json").write_text(json.dumps(latency()))
    arguments = ["--results", str(tmp_path / "in"), "--output", str(output)]
    with pytest.raises(SystemExit, match=r"is not what .* gives"):
        reporting.main([*arguments, "--check"])
    reporting.main(arguments)
    reporting.main([*arguments, "--check"])
    assert {file.name for file in (output / "results").iterdir()} == {
        "cpu-latency.png",
        "cpu-latency.svg",
    }
