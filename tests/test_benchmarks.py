"""The benchmarks run, their JSON holds what docs/benchmarks.md promises, and PyTorch's
transcriptions compute what we compute."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import (
    all as all_benchmarks,
)
from benchmarks import (
    compile_time,
    corpus_cost,
    data_pipeline,
    encode_latency,
    encode_throughput,
    encode_variants,
    gpu,
    gpu_checks,
    kernels,
    load_memory,
    matmul,
    memory,
    rewrite_latency,
    search,
    search_quality,
    thinking_overhead,
    train_step,
)
from benchmarks.encode_contenders import require_same_vectors
from benchmarks.flops import matmul_flops
from benchmarks.measure import (
    LOCK,
    BenchmarkError,
    markdown_table,
    paired_ratio,
    time_alternating,
    torch_missing,
)
from benchmarks.workload import (
    SHAPES,
    TINY,
    TINY_TRAIN_SHAPE,
    make_backbone,
    random_batch,
    random_variables,
)
from laser_jax.config import ObjectiveConfig, OptimizerConfig
from laser_jax.losses import pool
from laser_jax.step import objective_terms
from laser_jax.views import latent_view

# torch, transformers and peft warn about themselves on import and use.
pytestmark = pytest.mark.filterwarnings("ignore")

SPREAD = {"median", "q1", "q3", "minimum", "maximum"}
ENVIRONMENT = {
    *("date", "commit", "python", "versions", "platform", "processor", "cores"),
    *("load_average_at_start", "backend", "device", "device_count", "xla_flags"),
}
PYTORCH = [] if torch_missing() else ["published PyTorch", "tuned PyTorch"]


@pytest.fixture(autouse=True)
def _optax_promotes() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):  # optax takes a float to an integer power
        yield


def run(
    program: Callable[[Sequence[str]], None], name: str, folder: Path, *flags: str
) -> dict[str, Any]:
    """What a program writes in its quick form."""
    output = folder / f"{name}.json"
    arguments = ["--quick", "--repeats", "2", "--output", str(output), *flags]
    program(arguments)
    report = json.loads(output.read_text())
    assert set(report) == {"benchmark", "command", "settings", "environment", "notes", "rows"}
    assert report["benchmark"] == name
    assert report["command"] == " ".join(["python -m", f"benchmarks.{name}", *arguments])
    assert set(report["environment"]) == ENVIRONMENT
    assert report["environment"]["versions"]["jax"] == jax.__version__
    return report


def assert_spread(found: dict[str, Any], *, repeats: int | None = None) -> None:
    assert set(found) == SPREAD | ({"repeats"} if repeats else set())
    assert 0 < found["minimum"] <= found["q1"] <= found["median"] <= found["q3"]
    assert found["q3"] <= found["maximum"]
    assert repeats is None or len(found["repeats"]) == repeats


# --- the programs ------------------------------------------------------------------------------


def test_train_step_times_every_contender_that_agrees(tmp_path: Path, capsys) -> None:
    report = run(train_step.main, "train_step", tmp_path)
    rows = {row["contender"]: row for row in report["rows"]}
    ours = ["fast", "parity", "gradcache / 2", "plain / 2"]
    assert list(rows) == ours + PYTORCH
    for name, row in rows.items():
        assert_spread(row["seconds"], repeats=2)
        assert_spread(row["ratio"])
        assert row["queries_per_second"] > 0
        facts = {"trace_seconds", "compile_seconds", "matmul_flops", "temp_bytes"}
        facts |= {"xla_flops_loops_once", "xla_bytes_loops_once", "argument_bytes"}
        assert facts <= set(row) if name in ours else not facts & set(row)
    assert rows["fast"]["ratio"]["maximum"] == 1.0
    assert rows["fast"]["matmul_flops"] < rows["parity"]["matmul_flops"]
    assert rows["fast"]["matmul_flops"] < rows["gradcache / 2"]["matmul_flops"]
    losses = {name: row["first_step"]["loss"] for name, row in rows.items()}
    assert abs(losses.pop("plain / 2") / losses["fast"] - 1) > 1e-2  # fewer negatives
    np.testing.assert_allclose(list(losses.values()), losses["fast"], rtol=1e-4)

    printed = capsys.readouterr().out
    assert printed.startswith("    python -m benchmarks.train_step --quick")
    assert "| gradcache / 2 " in printed


def test_encode_latency_times_every_encoder_on_every_batch(tmp_path: Path) -> None:
    report = run(encode_latency.main, "encode_latency", tmp_path)
    assert [row["contender"] for row in report["rows"]] == ["ours", *PYTORCH]
    for row in report["rows"]:
        assert (row["rows"], row["tokens"], row["thinking_steps"]) == (2, 8, 2)
        assert_spread(row["seconds"], repeats=2)
        assert_spread(row["ratio"])
        assert row["rows_per_second"] > 0


@pytest.mark.usefixtures("require_torch")
def test_torch_compile_is_a_contender_of_its_own_where_it_is_asked_for(
    tmp_path: Path, monkeypatch
) -> None:
    import torch

    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled.append(f) or f)
    report = run(encode_latency.main, "encode_latency", tmp_path, "--torch_compile")
    name = "tuned PyTorch, compiled"
    assert [row["contender"] for row in report["rows"]] == ["ours", *PYTORCH, name]
    report = run(train_step.main, "train_step", tmp_path, "--torch_compile", "--only", "parity")
    assert [row["contender"] for row in report["rows"]][-1] == name
    assert len(compiled) == 2


def test_thinking_overhead_compares_an_encoder_with_its_own_first_step_also_without_pytorch(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("benchmarks.encode_contenders.torch_unusable", lambda: "torch absent")
    report = run(thinking_overhead.main, "thinking_overhead", tmp_path)
    assert report["notes"] == ["PyTorch is not measured: torch absent."]
    rows = {(row["contender"], row["thinking_steps"]): row for row in report["rows"]}
    assert list(rows) == [("ours", 1), ("ours", 2)]
    for row in rows.values():
        assert_spread(row["seconds"], repeats=2)
        assert_spread(row["ratio"])
    assert rows["ours", 1]["ratio"]["minimum"] == rows["ours", 1]["ratio"]["maximum"] == 1.0


def test_rewrite_latency_compares_three_methods_and_says_what_was_scaled(tmp_path: Path) -> None:
    report = run(rewrite_latency.main, "rewrite_latency", tmp_path)
    methods = ["standard retriever", "latent, K = 3", "rewrite-then-retrieve"]
    assert [(row["method"], row["rows"]) for row in report["rows"]] == [
        (method, rows) for rows in (1, 2) for method in methods
    ]
    for row in report["rows"]:
        assert_spread(row["seconds"], repeats=2)
        assert_spread(row["ratio"])
        assert_spread(row["of_rewrite"])
    rewrite = report["rows"][5]
    assert rewrite["of_rewrite"]["median"] == 1
    assert_spread(rewrite["prefill_seconds"])
    assert_spread(rewrite["decode_seconds"])
    assert rewrite["decode_seconds"]["maximum"] < rewrite["seconds"]["maximum"]
    median = rewrite["decode_seconds"]["median"]
    assert rewrite["tokens_per_second"] == pytest.approx(2 * 5 / median)
    # 4 of 6 tokens were written, and the first belongs to prefill
    assert "scaled by 1.667" in report["notes"][1]
    whole = run(rewrite_latency.main, "rewrite_latency", tmp_path, "--measured_tokens", "6")
    assert len(whole["notes"]) == 1


def test_compile_time_is_cold_and_then_warm(tmp_path: Path) -> None:
    flags = ("--programs", "encode", "--repeats", "1")
    report = run(compile_time.main, "compile_time", tmp_path, *flags)
    assert [row["layers"] for row in report["rows"]] == ["scanned", "unscanned"]
    for row in report["rows"]:
        assert (row["program"], row["backbone"]) == ("encode", TINY)
        for key in ("trace", "cold", "warm"):
            assert_spread(row[key], repeats=1)
        assert_spread(row["ratio"])


def test_corpus_cost_measures_one_row_and_estimates_the_others(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    rows = [{"_id": str(n), "text": f"Ulm lies on the Danube, {n}."} for n in range(32)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = run(corpus_cost.main, "corpus_cost", tmp_path, "--data", str(tmp_path))
    first, *others = report["rows"]
    assert first["basis"] == "measured"
    assert_spread(first["documents_per_second"])
    assert {row["basis"] for row in others} == {"estimate"}
    teraflops = {"A100": 312, "H100": 989, "TPU v5 lite": 197, "TPU v6 lite": 918}
    for row in others:
        speed = row["documents_per_second"]["median"] * row["flops"]
        assert speed == pytest.approx(0.4e12 * teraflops[row["device"]])


def test_encode_throughput_times_full_batches_and_a_mix_of_lengths(
    tmp_path: Path, shared_data: Path
) -> None:
    flags = ("--data", str(shared_data), "--repeats", "1")
    report = run(encode_throughput.main, "encode_throughput", tmp_path, *flags)
    rows = {(row["workload"], row["contender"]): row for row in report["rows"]}
    ways = ["published PyTorch", "tuned, as published", "tuned, sorted"] if PYTORCH else []
    assert list(rows) == [("2×32", name) for name in ["ours", *PYTORCH]] + [
        ("mix", name) for name in ["ours", *ways]
    ]
    for (workload, name), row in rows.items():
        assert_spread(row["seconds"], repeats=1)
        assert row["documents_per_second"] > 0
        assert (row["documents"], row["tokens"]) == (
            (4, 128) if workload == "2×32" else (8, rows["mix", "ours"]["tokens"])
        )
        assert workload == "mix" or row["padding_share"] == 0, name
        assert row["of_matmul"] > 0
        assert row["flops"] > 0
    if PYTORCH:
        shares = {name: rows["mix", name]["padding_share"] for name in ways}
        assert shares["published PyTorch"] == shares["tuned, as published"]
        assert 0 <= shares["tuned, sorted"] <= shares["tuned, as published"] < 1


def test_a_mix_without_its_data_is_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.encode_contenders.torch_unusable", lambda: "torch absent")
    flags = ("--data", str(tmp_path), "--repeats", "1")
    report = run(encode_throughput.main, "encode_throughput", tmp_path, *flags)
    assert [row["workload"] for row in report["rows"]] == ["2×32"]
    assert "has no entailmentbank, scifact" in report["notes"][1]


def test_padding_is_what_batches_in_order_of_arrival_add() -> None:
    rows = [[1] * n for n in (2, 8, 4, 4)]
    workload = encode_throughput.Workload("w", rows, 2, 4, 64, True)
    batches = encode_throughput.arrival_batches(workload)
    assert [encode_throughput.padded(b).ids_BT.shape for b in batches] == [(2, 8), (2, 4)]


def test_encode_variants_agree_and_are_timed(tmp_path: Path) -> None:
    report = run(encode_variants.main, "encode_variants", tmp_path)
    names = [row["variant"] for row in report["rows"]]
    assert names == ["layers apart, xla", "layers scanned, xla"]
    for row in report["rows"]:
        assert_spread(row["seconds"], repeats=2)
        assert row["ready_seconds"] > 0


@pytest.mark.parametrize("program", kernels.PROGRAMS)
def test_kernels_share_the_time_of_a_run(program: str, tmp_path: Path) -> None:
    listing = tmp_path / "program.txt"
    report = run(kernels.main, "kernels", tmp_path, "--program", program, "--hlo", str(listing))
    *kinds, idle = report["rows"]
    assert idle["kind"] == "idle"
    assert len({row["kind"] for row in kinds}) == len(kinds) > 5
    assert all(row["seconds"] > 0 and row["kernels"] >= 0.5 for row in kinds)
    assert [row["seconds"] for row in kinds] == sorted((r["seconds"] for r in kinds), reverse=True)
    assert sum(row["share"] for row in report["rows"]) > 0.99  # more where kernels run at once
    assert "ENTRY" in listing.read_text()


def test_kernels_are_counted_by_kind_and_their_gaps_as_idle() -> None:
    names = ["nvjet_sm90_64x6", "gemm_fusion_dot_12", "loop_add_fusion_3", "loop_add_fusion_12.1"]
    names += ["void cudnn::fusion::fmha_reduce_head<true>(float*)", "memcpy128", "void f<int>(int)"]
    kinds = ["matmul", "matmul", "loop_add_fusion", "loop_add_fusion", "attention", "copy", "f"]
    assert [kernels.kind_of(name) for name in names] == kinds

    first = [kernels.Kernel("a_1", 0, 4), kernels.Kernel("a_2", 2, 6), kernels.Kernel("b", 9, 10)]
    second = [kernels.Kernel("a_1", 100, 110)]
    rows = {row["kind"]: row for row in kernels.rows_of([first, second])}
    assert list(rows) == ["a", "b", "idle"]
    assert [row["kernels"] for row in rows.values()] == [1.5, 0.5, 0]
    seconds = [row["seconds"] for row in rows.values()]
    np.testing.assert_allclose(seconds, [9e-9, 0.5e-9, 1.5e-9])
    np.testing.assert_allclose([row["share"] for row in rows.values()], [18 / 20, 1 / 20, 3 / 20])


def test_kinds_of_kernels_that_take_little_are_one_row_of_the_table() -> None:
    taken = {"matmul": 0.9, "copy": 0.004, "fusion": 0.003, kernels.IDLE: 0.001}
    rows = [
        {"kind": kind, "kernels": 2.0, "seconds": share, "share": share}
        for kind, share in taken.items()
    ]
    first, small, last = kernels.shown_rows(rows)
    assert (first, last) == (rows[0], rows[-1])
    assert small == {"kind": "2 kinds of less", "kernels": 4.0} | dict.fromkeys(
        ("seconds", "share"), pytest.approx(0.007)
    )
    assert kernels.shown_rows([rows[0], *rows[2:]]) == [rows[0], *rows[2:]]


def test_matmuls_are_those_of_a_model_and_of_both_libraries(tmp_path: Path) -> None:
    report = run(matmul.main, "matmul", tmp_path)
    by = ["XLA", *(["PyTorch"] if PYTORCH else [])]
    assert [(row["what"], row["contender"]) for row in report["rows"]] == [
        (what, contender) for what in ("projection", "LM head", "soft token") for contender in by
    ]
    for row in report["rows"]:
        assert_spread(row["seconds"], repeats=2)
        assert row["flops_per_second"] > 0 < row["bytes_per_second"]


def test_search_times_what_finds_the_same_documents(tmp_path: Path) -> None:
    report = run(search.main, "search", tmp_path)
    names = [row["contender"] for row in report["rows"]]
    faiss = ["FAISS"] if importlib.util.find_spec("faiss") else []
    ours = ["ours, from the host", "ours, on the device"]
    assert names == [*ours, "NumPy", *(["PyTorch"] if PYTORCH else []), *faiss]
    for row in report["rows"]:
        assert (row["queries"], row["documents"], row["width"]) == (3, 500, 16)
        assert_spread(row["seconds"], repeats=2)


def test_a_search_that_finds_something_else_is_not_timed() -> None:
    queries_QD, corpus_CD = search.unit_rows(1, 3, 8), search.unit_rows(2, 50, 8)
    right = search.numpy_search(queries_QD, corpus_CD, 4, 16)
    brute_QC = queries_QD @ corpus_CD.T
    np.testing.assert_array_equal(right[1], np.argsort(-brute_QC, axis=1)[:, :4])
    search.require_found("other", right, right, queries_QD, corpus_CD)
    worse = np.argsort(-brute_QC, axis=1)[:, 1:5]
    lower = (np.take_along_axis(brute_QC, worse, axis=1), worse)
    with pytest.raises(BenchmarkError, match="other finds other documents"):
        search.require_found("other", lower, right, queries_QD, corpus_CD)
    with pytest.raises(BenchmarkError, match="not those of its documents"):
        search.require_found("other", (right[0], worse), right, queries_QD, corpus_CD)


def test_search_quality_compares_smaller_vectors_with_float32(tmp_path: Path) -> None:
    output = tmp_path / "quality.json"
    search_quality.main(["--quick", "--output", str(output)])
    report = json.loads(output.read_text())
    assert report["command"].startswith("python -m benchmarks.search_quality --quick")
    assert set(report["environment"]) == ENVIRONMENT
    rows = {(row["code"], row["oversample"]): row for row in report["rows"]}
    assert list(rows) == list(search_quality.SEARCHES)
    exact, signs, again = (rows[how] for how in (("float32", 0), ("binary", 0), ("binary", 10)))
    assert exact["nDCG@10"] > 0.5
    assert exact["difference"] == {"difference": 0.0, "low": 0.0, "high": 0.0}
    assert signs["difference"]["low"] <= signs["difference"]["difference"] < 0
    assert signs["same"] < again["same"] == exact["same"] == 1.0
    assert exact["bytes_a_document"] == 32 * signs["bytes_a_document"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data DIR is wanted"),
        (["--data", "x", "--query_vectors", "y"], "both --corpus_vectors and --query_vectors"),
        (["--quick", "--dimension", "12"], "a multiple of 8, got 12"),
    ],
)
def test_search_quality_says_what_it_lacks(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        search_quality.main(arguments)
    assert message in capsys.readouterr().err


def test_search_quality_without_its_data_is_told(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: .*qrels/test.tsv is missing"):
        search_quality.main(["--data", str(tmp_path)])


def test_data_pipeline_counts_the_same_tokens_however_batches_are_made(
    tmp_path: Path, shared_data: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = (shared_data / "entailmentbank/train.jsonl").read_text().splitlines()[:40]
    rows.write_text("\n".join(lines))
    flags = ("--rows", str(rows), "--repeats", "1")
    report = run(data_pipeline.main, "data_pipeline", tmp_path, *flags)
    found = {row["way"]: row for row in report["rows"]}
    plain, stored, sorted_ = (
        found[name] for name in ("1 thread", "stored tokens, 1 thread", "1 thread, bucket_window 4")
    )
    assert plain["padding_share"] == stored["padding_share"] > sorted_["padding_share"] > 0
    for row in found.values():
        assert_spread(row["tokens_per_second"])
        assert row["tokens_per_processor_second"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_memory_tells_the_peak_of_every_contender(tmp_path: Path, monkeypatch) -> None:
    def here(function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    monkeypatch.setattr(memory, "in_new_process", here)
    flags = ("--programs", "encode")
    rows = run(memory.main, "memory", tmp_path, *flags)["rows"]
    # a training step is made in the same way, by what `train_step` is made of
    flags = ("--programs", "train_step", "--no_torch", "--only", "fast")
    rows += run(memory.main, "memory", tmp_path, *flags)["rows"]
    found = [(row["program"], row["contender"]) for row in rows]
    assert found == [
        *(("encode", name) for name in ("ours", *PYTORCH)),
        ("train_step", "fast"),
    ]
    for row in rows:
        assert row["host_peak_bytes"] >= row["host_before_bytes"] > 0
        assert ("temp_bytes" in row) == (row["contender"] not in PYTORCH)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_load_memory_tells_what_every_way_takes_beyond_its_result(
    tmp_path: Path, monkeypatch
) -> None:
    ways = load_memory.WAYS[-2:]  # a process each
    monkeypatch.setattr(load_memory, "WAYS", ways)
    report = run(load_memory.main, "load_memory", tmp_path, "--repeats", "1", "--devices", "2")
    assert [row["way"] for row in report["rows"]] == list(ways)
    for row in report["rows"]:
        before, result, peak, overhead = (
            row[f"{name}_bytes"]["median"] for name in ("before", "result", "peak", "overhead")
        )
        assert 0 < before <= peak <= row["peak_with_files_bytes"]["median"]
        assert overhead == peak - before - result
    loaded, written = report["rows"]
    parameters = load_memory.count(SHAPES[TINY])
    assert loaded["result_bytes"]["median"] >= 2 * parameters  # bfloat16, some leaves held twice
    assert written["result_bytes"]["median"] == 0
    assert "2 CPU device(s)" in report["notes"][0]


def test_of_size_adds_layers_until_a_checkpoint_is_as_large() -> None:
    assert 2 * load_memory.count(load_memory.of_size(2.0)) == pytest.approx(2e9, rel=0.02)


def test_a_peak_is_that_of_the_runs_alone(monkeypatch) -> None:
    def work(case: Any) -> Any:
        del case
        np.ones(2**27, np.uint8)  # made and forgotten before the runs
        return lambda: np.ones(2**25, np.uint8).sum(), {"known": 1}

    monkeypatch.setitem(memory.WORK, "encode", work)
    case: Any = SimpleNamespace(program="encode", contender="ours", repeats=2)
    found = memory.peak_of(case)
    assert found["known"] == 1
    assert 0.9 * 2**25 < found["host_working_bytes"] < 1.5 * 2**25  # the kernel counts in lumps


def test_gpu_checks_compare_with_the_reference_numbers(tmp_path: Path, golden_dir: Path) -> None:
    output = tmp_path / "checks.json"
    with pytest.raises(SystemExit) as ended:
        gpu_checks.main(["--quick", "--golden", str(golden_dir), "--output", str(output)])
    report = json.loads(output.read_text())
    assert ended.value.code == 0, [row for row in report["rows"] if not row["passed"]]
    checks = " ".join(row["check"] for row in report["rows"])
    for part in ("float32", "bfloat16", "trajectory", "norm of the gradient"):
        assert part in checks
    for attention in ("reading, 4/2×16, T = 96, xla, dk", "thinking, 4/2×16, T = 96, xla, dq"):
        assert attention in checks
    assert not gpu_checks.row("nothing", float("nan"), 1.0)["passed"]


def test_gpu_checks_keep_the_reference_numbers_where_attention_takes_too_long(
    tmp_path: Path, golden_dir: Path, monkeypatch
) -> None:
    def out_of_time(*_: object) -> gpu_checks.Check:
        return gpu_checks.Check([(lambda: 1 / 0, ())], lambda outputs: [])

    monkeypatch.setattr(gpu_checks, "reading_check", out_of_time)
    output = tmp_path / "checks.json"
    with pytest.raises(ZeroDivisionError):
        gpu_checks.main(["--quick", "--golden", str(golden_dir), "--output", str(output)])
    checks = [row["check"] for row in json.loads(output.read_text())["rows"]]
    assert checks
    assert not any(check.startswith(gpu_checks.ATTENTIONS) for check in checks)


def test_of_an_attention_the_table_has_the_part_nearest_to_its_bound_and_all_that_fail() -> None:
    rows = [
        gpu_checks.row("train_model1_K3, loss", 0.0, 1e-4),
        gpu_checks.row("train_model1_K3, latent", 1e-6, 1e-4),
        gpu_checks.row("reading, T = 64, cudnn, dq", 0.1, 1.0),
        gpu_checks.row("reading, T = 64, cudnn, dk", 0.3, 0.5),
        gpu_checks.row("reading, T = 64, cudnn, dv", float("nan"), 1.0),
        gpu_checks.row("reading, T = 64, xla, dq", 0.1, 1.0),
    ]
    assert gpu_checks.shown_rows(rows) == [*rows[:2], *rows[3:]]


def test_a_gpu_run_records_what_fails_and_goes_on(tmp_path: Path, monkeypatch) -> None:
    parts = (
        gpu.Part("absent", "no_such_program", "", 60),
        gpu.Part("slow", "search", "", 0),
        gpu.Part("search", "search", "", 100),
    )
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "in_new_process", lambda function: function())
    arguments = ["--quick", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        gpu.main(arguments)
    assert ended.value.code == 1
    report = json.loads((tmp_path / "out/gpu.json").read_text())
    absent, slow, searched = report["rows"]
    assert absent["state"] == "failed"
    assert "no_such_program" in absent["message"]
    assert slow["state"] == "out of time"
    assert "report" not in slow
    assert searched["state"] == "done"
    assert searched["report"]["benchmark"] == "search"

    with pytest.raises(SystemExit):
        gpu.main([*arguments, "--minutes", "0.1"])
    report = json.loads((tmp_path / "out/gpu.json").read_text())
    assert [row["state"] for row in report["rows"]] == ["not begun"] * 3


def test_programs_that_share_a_lock_are_timed_one_after_the_other(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv(LOCK, str(tmp_path / "lock"))
    inside, most = [0], [0]

    def work() -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        inside[0] -= 1

    def timed(_: int) -> None:
        time_alternating({"work": work}, repeats=3)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(timed, range(3)))
    assert most[0] == 1


def test_parts_of_a_gpu_run_work_at_once_but_for_those_that_time_compiling(
    tmp_path: Path, monkeypatch
) -> None:
    compiling = gpu.Part("compile", "any", "", 60, times_compiling=True)
    parts = (compiling, *(gpu.Part(name, "any", "", 60) for name in "abc"))
    together, order = threading.Barrier(3, timeout=60), []

    def run_part(part: gpu.Part, *_: object) -> dict[str, Any]:
        if not part.times_compiling:
            together.wait()
        order.append(part.name)
        return {"part": part.name, "state": "done", "seconds_taken": 0.0}

    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "run_part", run_part)
    monkeypatch.setattr(gpu, "in_new_process", lambda function: function())
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--output", str(tmp_path / "out"), "--at_once", "3"])
    assert ended.value.code == 0
    assert order[-1] == "compile"
    rows = json.loads((tmp_path / "out/gpu.json").read_text())["rows"]
    assert [row["part"] for row in rows] == [part.name for part in parts]


@pytest.mark.parametrize(
    "command",
    [*all_benchmarks.RUNS.values(), *(f"{part.program} {part.arguments}" for part in gpu.PARTS)],
)
def test_the_long_runs_ask_for_what_the_programs_can_do(command: str, monkeypatch) -> None:
    name, *arguments = shlex.split(command)
    program = importlib.import_module(f"benchmarks.{name}")
    asked: list[Any] = []

    def measure(options: Any, arguments: Any) -> Any:
        asked.append(options)
        return SimpleNamespace(rows=[], finish=lambda columns, output: None)

    monkeypatch.setattr(program, "measure", measure)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    with contextlib.suppress(SystemExit):  # gpu_checks ends with its status
        program.main(arguments)
    assert len(asked) == 1
    assert not asked[0].quick


def test_quick_runs_of_all_do_not_take_the_place_of_results(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    commands: list[list[str]] = []

    def record(command: list[str]) -> Any:
        commands.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(all_benchmarks.subprocess, "run", record)
    with pytest.raises(SystemExit):
        all_benchmarks.main(["--quick"])
    assert "--quick wants --output FOLDER" in capsys.readouterr().err
    assert commands == []
    all_benchmarks.main(["--quick", "--output", str(tmp_path), "--only", "search"])
    assert commands[0][-5:] == ["--quick", "--repeats", "1", "--output", f"{tmp_path}/search.json"]


def test_unscanned_layers_leave_no_loop_in_a_step_that_does_not_think() -> None:
    shape = dataclasses.replace(TINY_TRAIN_SHAPE, thinking_steps=1)
    case = compile_time.Case(TINY, "train_step", False, "float32", shape)
    assert "stablehlo.while" not in compile_time.lower_train_step(case).as_text()


def test_an_output_that_cannot_be_written_is_refused_at_once(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        train_step.main(["--output", str(tmp_path / "absent" / "file.json")])
    assert "absent does not exist" in capsys.readouterr().err


# --- PyTorch computes what we compute ------------------------------------------------------------


@pytest.mark.usefixtures("require_torch")
def test_transcriptions_give_our_loss_gradients_and_embeddings_on_rows_of_all_lengths() -> None:
    from benchmarks.torch_reference import (
        TRANSCRIPTIONS,
        TorchEncoder,
        TorchTraining,
        exported,
        left_padded,
        load,
    )

    config, K = SHAPES[TINY], 3
    shape = dataclasses.replace(TINY_TRAIN_SHAPE, thinking_steps=K)
    batch = random_batch(shape, config.vocab_size, shortest=0.3)
    assert len({*batch.query.lengths_B}) > 1
    objective = ObjectiveConfig(num_thinking_steps=K)
    backbone = make_backbone(config, "float32", None)
    variables = random_variables(backbone)

    @jax.jit
    def ours(variables: Any) -> Any:
        def loss(variables: Any) -> Any:
            terms = objective_terms(backbone, variables, batch, objective, jnp.ones(()))
            return terms["loss"], terms

        grads, terms = jax.grad(loss, has_aux=True)(variables)
        return terms | {"grad_norm": optax.tree.norm(grads)}

    @jax.jit
    def embeddings(variables: Any) -> jax.Array:
        query = batch.query
        return pool(
            latent_view(
                backbone, variables, query.ids_BT, query.lengths_B, K, "prompt_and_thoughts"
            )
        )

    wanted = {name: float(value) for name, value in ours(variables).items()}
    with exported(variables, config, None, "float32") as export:
        for transcription in TRANSCRIPTIONS:
            model = load(export, transcription, train=True)
            rows = left_padded(batch.query, "cpu")
            got_BD = TorchEncoder(transcription, model, rows, K)().numpy()
            np.testing.assert_allclose(got_BD, embeddings(variables), atol=1e-5)
            step = TorchTraining(transcription, model, batch, objective, OptimizerConfig())
            train_step.require_agreement(transcription.name, step(), wanted, "float32")
            assert step()["loss"] != wanted["loss"]  # it has learned


def test_chosen_contenders_are_compared_with_fast() -> None:
    base = train_step.base_config(TINY_TRAIN_SHAPE, "float32", None)
    variants = functools.partial(train_step.variants, base, [2, 3], [], ["dots"])
    assert list(variants(only=["remat dots"])) == ["fast", "remat dots"]
    with pytest.raises(BenchmarkError, match=r"--only \['gradcache / 5'\]"):
        variants(only=["gradcache / 5"])
    with pytest.raises(BenchmarkError, match="4 queries do not divide into 3 micro-batches"):
        variants()  # which is no matter where it is not among the chosen
    configs = train_step.variants(base, [2], [], ["dots"])
    assert list(configs) == ["fast", "parity", "gradcache / 2", "remat dots"]
    unrolled = train_step.variants(base, [], [], [], unrolled=True, only=["unrolled"])
    assert [config.model.unroll_layers for config in unrolled.values()] == [False, True]
    on_gpu = train_step.base_config(TINY_TRAIN_SHAPE, "bfloat16", None, "cudnn")
    assert train_step.variants(on_gpu, [], [], [])["xla attention"].model.attention == "xla"


def test_contenders_that_disagree_are_not_timed() -> None:
    wanted = dict.fromkeys((*train_step.TERMS, "grad_norm"), 2.0)
    train_step.require_agreement("other", wanted | {"output": 2.0001}, wanted, "float32")
    with pytest.raises(BenchmarkError, match=r"other computes another function.*output 2\.001 and"):
        train_step.require_agreement("other", wanted | {"output": 2.001}, wanted, "float32")
    with pytest.raises(BenchmarkError, match="loss nan"):
        train_step.require_agreement("other", wanted | {"loss": np.nan}, wanted, "float32")

    rows_BD = np.eye(3, dtype=np.float32)
    require_same_vectors("other", rows_BD + 1e-5, rows_BD, "float32")
    for wrong_BD in (rows_BD + 1e-3, rows_BD * np.nan):
        with pytest.raises(BenchmarkError, match="other computes another function"):
            require_same_vectors("other", wrong_BD, rows_BD, "float32")


# --- the measuring core --------------------------------------------------------------------------


def test_every_round_times_all_contenders_and_begins_with_another(monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.measure.REST_SECONDS", 0.0)
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = time_alternating(contenders, repeats=3)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"  # the first round warms up
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}
    with pytest.raises(ValueError, match="at least one contender"):
        time_alternating({}, repeats=3)


def test_ratios_are_taken_within_a_round() -> None:
    # the machine slows down threefold; the contender is twice as slow all the time
    ratio = paired_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert ratio.minimum == ratio.median == ratio.maximum == 2.0


def test_tables_are_aligned_markdown() -> None:
    assert markdown_table(["step", "s"], [["fast", "1.0"], ["parity", "12.5"]]).split("\n") == [
        "| step   |    s |",
        "| :----- | ---: |",
        "| fast   |  1.0 |",
        "| parity | 12.5 |",
    ]


def test_matmuls_are_counted_as_xla_counts_them_and_once_for_every_turn_of_a_loop() -> None:
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))

    def twice(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w @ w

    def looped(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jax.checkpoint(jnp.dot)(x, w), None), x, None, length=5)[
            0
        ]

    cost: Any = jax.jit(twice).lower(x, w).compile().cost_analysis()
    assert matmul_flops(twice, x, w) == cost["flops"] == 2 * (2 * 4 * 8 * 8)
    assert matmul_flops(jax.jit(looped), x, w) == 5 * (2 * 4 * 8 * 8)
    # backward: one matmul for x and one for w each turn, and the forward pass again
    assert matmul_flops(jax.grad(lambda w: looped(x, w).sum()), w) >= 2 * matmul_flops(looped, x, w)

    def endless(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x)

    with pytest.raises(ValueError, match="while loop"):
        matmul_flops(endless, x)
