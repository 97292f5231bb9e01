"""The benchmarks run, stop where contenders disagree, and PyTorch's transcriptions compute what we
compute."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import (
    ablation,
    encode_latency,
    encode_throughput,
    gpu_checks,
    kernels,
    rewrite_latency,
    search,
    serve,
    train_step,
)
from benchmarks import all as whole_runs
from benchmarks.encoders import require_same_vectors
from benchmarks.measure import (
    LOCK,
    BenchmarkError,
    Program,
    markdown_table,
    paired_ratio,
    table_of,
    time_alternating,
    torch_unusable,
    value,
)
from benchmarks.workload import (
    SHAPES,
    TINY,
    TINY_TRAIN_SHAPE,
    make_backbone,
    random_batch,
    random_variables,
    shape_of,
)
from laser_jax.config import ObjectiveConfig, OptimizerConfig, load_retriever_config
from laser_jax.losses import pool
from laser_jax.step import loss_terms, read_views
from laser_jax.views import latent_view

# torch, transformers and peft warn about themselves on import and use.
pytestmark = pytest.mark.filterwarnings("ignore")

PYTORCH = [] if torch_unusable() else ["published PyTorch", "tuned PyTorch"]
PROGRAMS = {
    module.PROGRAM.name: module.PROGRAM
    for module in (
        *(ablation, encode_latency, encode_throughput, whole_runs, gpu_checks),
        *(rewrite_latency, search, serve, train_step),
    )
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("benchmarks.measure.REST_SECONDS", 0.0)
    with jax.numpy_dtype_promotion("standard"):  # optax takes a float to an integer power
        yield


def run(program: Program, folder: Path, *flags: str) -> list[dict[str, Any]]:
    """The rows that a program writes in its quick form."""
    output = folder / "report.json"
    repeats = ["--repeats", "1"] if program.repeats else []
    program.main(["--quick", *repeats, "--output", str(output), *flags])
    report = json.loads(output.read_text())
    assert report["benchmark"] == program.name
    assert "--quick" in report["command"]
    assert report["environment"]["versions"]["jax"] == jax.__version__
    return report["rows"]


def names_of(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["contender"] for row in rows))


# --- the programs ------------------------------------------------------------------------------


def test_train_step_times_every_contender_that_agrees(tmp_path: Path, capsys) -> None:
    only = ["fast", "gradcache / 2"]  # of the others other tests say what they compute
    rows = run(train_step.PROGRAM, tmp_path, "--only", *only)
    assert names_of(rows) == [*only, *PYTORCH]
    found = {row["contender"]: row for row in rows}
    assert all(row["seconds"]["median"] > 0 < row["queries_per_second"] for row in rows)
    assert found["fast"]["ratio"]["maximum"] == 1.0
    assert found["fast"]["matmul_flops"] < found["gradcache / 2"]["matmul_flops"]
    losses = {name: row["first_step"]["loss"] for name, row in found.items()}
    np.testing.assert_allclose(list(losses.values()), losses["fast"], rtol=1e-4)
    printed = capsys.readouterr().out
    assert printed.startswith("    python -m benchmarks.train_step --quick")
    assert "| gradcache / 2 " in printed


def test_encode_latency_compares_with_ours_with_one_step_and_with_the_device(
    tmp_path: Path, monkeypatch
) -> None:
    names = ["ours", *PYTORCH]
    if PYTORCH:
        import torch

        monkeypatch.setattr(torch, "compile", lambda f, **_: f)
        names.append("tuned PyTorch, compiled")
    rows = run(encode_latency.PROGRAM, tmp_path, "--torch_compile", "--profile")
    assert [(row["contender"], row["thinking_steps"]) for row in rows] == [
        (name, K) for K in (1, 2) for name in names
    ]
    for row in rows:
        assert (row["contender"] == "ours") == (row["ratio"]["minimum"] == 1.0)
        assert (row["thinking_steps"] == 1) == (row["over_one_step"]["minimum"] == 1.0)
        assert row["roofline_fraction"] > 0
        *kinds, idle = row.get("kernels", [{}])
        assert (len(kinds) > 5 and idle["kind"] == "idle") == (row["contender"] == "ours")


def test_encoders_without_pytorch_say_why(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("benchmarks.encoders.torch_unusable", lambda: "torch absent")
    rows = run(encode_throughput.PROGRAM, tmp_path)
    assert [(row["contender"], row["workload"]) for row in rows] == [
        *(("ours", "2×32"), ("ours", "mix"))
    ]
    assert rows[0]["padding_share"] == 0
    assert "PyTorch is not measured: torch absent." in capsys.readouterr().out


@pytest.mark.usefixtures("require_torch")
def test_encode_throughput_times_full_batches_and_a_mix_of_lengths(tmp_path: Path) -> None:
    rows = run(encode_throughput.PROGRAM, tmp_path)
    found = {(row["workload"], row["contender"]): row for row in rows}
    ways = ["published PyTorch", "tuned, as published", "tuned, sorted"]
    assert list(found) == [("2×32", name) for name in ["ours", *PYTORCH]] + [
        ("mix", name) for name in ["ours", *ways]
    ]
    assert all(row["padding_share"] == 0 for (name, _), row in found.items() if name == "2×32")
    as_published, sorted_ = (found["mix", name]["padding_share"] for name in ways[1:])
    assert found["mix", ways[0]]["padding_share"] == as_published
    assert 0 <= sorted_ <= as_published < 1


def test_padding_is_what_batches_in_order_of_arrival_add() -> None:
    rows = [[1] * n for n in (2, 8, 4, 4)]
    workload = encode_throughput.Workload("w", rows, 2, 4, 64, True)
    batches = encode_throughput.arrival_batches(workload)
    assert [encode_throughput.padded(b).ids_BT.shape for b in batches] == [(2, 8), (2, 4)]


def test_rewrite_latency_compares_three_methods(tmp_path: Path) -> None:
    rows = run(rewrite_latency.PROGRAM, tmp_path)
    methods = ["standard retriever", "latent, K = 3", "rewrite-then-retrieve"]
    assert [(row["method"], row["rows"]) for row in rows] == [(method, 2) for method in methods]
    rewrite = rows[2]
    assert rewrite["of_rewrite"]["median"] == 1
    assert 0 < rewrite["decode_seconds"]["median"] < rewrite["seconds"]["median"]
    assert rewrite["tokens_per_second"] == pytest.approx(
        2 * 5 / rewrite["decode_seconds"]["median"]
    )


def test_search_times_what_finds_the_same_documents(tmp_path: Path) -> None:
    rows = run(search.PROGRAM, tmp_path)
    faiss = ["FAISS"] if importlib.util.find_spec("faiss") else []
    torch = ["PyTorch"] if PYTORCH else []
    ours = ["ours, from the host", "ours, on the device"]
    assert names_of(rows) == [*ours, *torch, *faiss]
    assert names_of(run(search.PROGRAM, tmp_path, "--without", *search.OTHERS)) == ours


def test_a_search_that_finds_something_else_is_not_timed() -> None:
    queries_QD, corpus_CD = search.unit_rows(1, 3, 8), search.unit_rows(2, 50, 8)
    brute_QC = queries_QD @ corpus_CD.T
    best = np.argsort(-brute_QC, axis=1)[:, :4]
    right = (np.take_along_axis(brute_QC, best, axis=1), best)
    search.require_found("other", right, right, queries_QD, corpus_CD)
    worse = np.argsort(-brute_QC, axis=1)[:, 1:5]
    lower = (np.take_along_axis(brute_QC, worse, axis=1), worse)
    with pytest.raises(BenchmarkError, match="other finds other documents"):
        search.require_found("other", lower, right, queries_QD, corpus_CD)
    with pytest.raises(BenchmarkError, match="not those of its documents"):
        search.require_found("other", (right[0], worse), right, queries_QD, corpus_CD)


def test_the_server_is_timed_beside_its_retriever(thinking_model: Path, tmp_path: Path) -> None:
    flags = ("--model", str(thinking_model), "--clients", "2", "--max_length", "32")
    rows = run(serve.PROGRAM, tmp_path, *flags)
    names = ["LatentRetriever, one call", "2 clients", "2 clients, K = 1 to 8"]
    assert [row["contender"] for row in rows] == names
    assert all(0 < row["p50"] <= row["p99"] for row in rows[1:])


def test_kernels_are_counted_by_kind_and_their_gaps_as_idle() -> None:
    names = ["nvjet_sm90_64x6", "gemm_fusion_dot_12", "loop_add_fusion_3", "loop_add_fusion_12.1"]
    names += ["void cudnn::fusion::fmha_reduce_head<true>(float*)", "memcpy128", "void f<int>(int)"]
    kinds = ["matmul", "matmul", "loop_add_fusion", "loop_add_fusion", "attention", "copy", "f"]
    assert [kernels.kind_of(name) for name in names] == kinds

    first = [kernels.Kernel("a_1", 0, 4), kernels.Kernel("a_2", 2, 6), kernels.Kernel("b", 9, 10)]
    second = [kernels.Kernel("a_1", 100, 110)]
    rows = kernels.rows_of([first, second])
    assert [row["kind"] for row in rows] == ["a", "b", "idle"]
    assert [row["kernels"] for row in rows] == [1.5, 0.5, 0]
    np.testing.assert_allclose([row["seconds"] for row in rows], [9e-9, 0.5e-9, 1.5e-9])
    np.testing.assert_allclose([row["share"] for row in rows], [18 / 20, 1 / 20, 3 / 20])
    assert kernels.told({"kernels": rows}) == "a 90%, b 5%, idle 15%"


# --- checks on a device --------------------------------------------------------------------------


def test_gpu_checks_compare_with_the_reference_numbers_and_keep_what_they_know(
    tmp_path: Path, golden_dir: Path, monkeypatch
) -> None:
    def out_of_time(*_: object) -> gpu_checks.Check:
        return gpu_checks.Check(lambda: 1 / 0, (), lambda outputs: [])

    monkeypatch.setenv("LASER_GOLDEN", str(golden_dir))
    monkeypatch.setattr(gpu_checks, "reading_check", out_of_time)
    output = tmp_path / "checks.json"
    with pytest.raises(ZeroDivisionError):
        gpu_checks.main(["--quick", "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    checks = " ".join(row["check"] for row in rows)
    assert "float32" in checks
    assert "bfloat16" in checks
    assert all(row["passed"] for row in rows)


def test_gpu_checks_compare_attention_forward_and_backward(tmp_path: Path, monkeypatch) -> None:
    output = tmp_path / "checks.json"
    monkeypatch.setattr(gpu_checks, "golden_folder", lambda: None)
    with pytest.raises(SystemExit) as ended:
        gpu_checks.main(["--quick", "--output", str(output)])
    assert ended.value.code == 0
    checks = " ".join(row["check"] for row in json.loads(output.read_text())["rows"])
    for attention in ("reading, 4/2×16, T = 96, xla, dk", "thinking, 4/2×16, T = 96, xla, dq"):
        assert attention in checks
    assert not gpu_checks.row("nothing", float("nan"), 1.0)["passed"]


def test_attention_that_is_wrong_in_bfloat16_alone_fails_whoever_computes_it() -> None:
    """XLA's is the bound of others: it must not be its own."""
    x = np.linspace(-1, 1, 64, dtype=np.float32)

    def wrong(x: jax.Array) -> jax.Array:
        return x * (1.0 if x.dtype == jnp.float32 else 1.1)

    for attend, passed in ((lambda x: x * 1.0, True), (wrong, False)):
        check = gpu_checks.against_float32("reading", {"xla": attend}, {"q": x}, np.ones_like(x))
        rows = check.rows(jax.device_get(check.compiled()()))
        assert {row["passed"] for row in rows} == {passed}


# --- runs of many programs -----------------------------------------------------------------------


def test_a_gpu_run_records_what_fails_and_goes_on(tmp_path: Path, monkeypatch) -> None:
    parts = (whole_runs.Part("absent", 60, "no_such_program"), whole_runs.Part("slow", 0, "search"))
    monkeypatch.setitem(whole_runs.PARTS, "gpu", parts)
    monkeypatch.setattr("benchmarks.measure.in_new_process", lambda function: function())
    file = tmp_path / "gpu.json"
    arguments = ["gpu", "--quick", "--output", str(file)]
    with pytest.raises(SystemExit) as ended:
        whole_runs.main(arguments)
    assert ended.value.code == 1
    absent, slow = json.loads(file.read_text())["rows"]
    assert absent["state"] == "failed"
    assert "no_such_program" in absent["message"]
    assert slow["state"] == "out of time"
    assert "report" not in slow

    with pytest.raises(SystemExit):
        whole_runs.main([*arguments, "--minutes", "0.1"])
    rows = json.loads(file.read_text())["rows"]
    assert [row["state"] for row in rows] == ["not begun"] * 2


def test_parts_of_a_gpu_run_work_at_once_and_give_their_reports(
    tmp_path: Path, monkeypatch
) -> None:
    parts = tuple(whole_runs.Part(name, 60, "any") for name in "abc")
    together = threading.Barrier(3, timeout=60)

    def run_part(part: whole_runs.Part, **_: object) -> dict[str, Any]:
        together.wait()
        return {"part": part.name, "state": "done", "seconds_taken": 0.0, "report": {}}

    monkeypatch.setitem(whole_runs.PARTS, "gpu", parts)
    monkeypatch.setattr(whole_runs, "run_part", run_part)
    monkeypatch.setattr("benchmarks.measure.in_new_process", lambda function: function())
    with pytest.raises(SystemExit) as ended:
        whole_runs.main(["gpu", "--output", str(tmp_path / "gpu.json")])
    assert ended.value.code == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row["part"] for row in rows] == list("abc")


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


@pytest.mark.parametrize(
    "command", [part.command for parts in whole_runs.PARTS.values() for part in parts]
)
def test_the_long_runs_ask_for_what_the_programs_can_do(command: str) -> None:
    name, *arguments = shlex.split(command)
    options = PROGRAMS[name].options(arguments)
    assert not options.quick
    if name == "train_step":
        base = train_step.base_config(options)
        on_gpu = dataclasses.replace(base, model=dataclasses.replace(base.model, attention="cudnn"))
        assert train_step.variants(on_gpu, options)


def test_an_output_that_cannot_be_written_is_refused_at_once(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        train_step.PROGRAM.main(["--output", str(tmp_path / "absent" / "file.json")])
    assert "absent does not exist" in capsys.readouterr().err


def test_a_measurement_that_means_nothing_ends_the_program_with_its_message() -> None:
    with pytest.raises(SystemExit, match="error: --new_tokens: at least 2"):
        rewrite_latency.PROGRAM.main(["--new_tokens", "1"])


def test_the_shape_of_any_model_is_taken(thinking_model: Path, tmp_path: Path) -> None:
    options = argparse.Namespace(backbone=str(thinking_model))
    assert shape_of(options) == load_retriever_config(thinking_model).backbone
    with pytest.raises(SystemExit, match=r"--backbone is not one of \['tiny', .*absent is no"):
        rewrite_latency.PROGRAM.main(["--backbone", str(tmp_path / "absent")])


# --- PyTorch computes what we compute ------------------------------------------------------------


@pytest.mark.usefixtures("require_torch")
def test_transcriptions_give_our_loss_gradients_and_embeddings_on_rows_of_all_lengths() -> None:
    from benchmarks.torch_reference import TorchTraining, load

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
            views = read_views(backbone, variables, batch, objective)
            terms = loss_terms(views, batch.contrast_BC, objective, jnp.ones(()))
            return terms["loss"], terms

        grads, terms = jax.grad(loss, has_aux=True)(variables)
        return terms | {"grad_norm": optax.tree.norm(grads)}

    @jax.jit
    def embeddings(variables: Any) -> jax.Array:
        query = batch.query
        return pool(latent_view(backbone, variables, query, K, "prompt_and_thoughts"))

    wanted = {name: float(number) for name, number in ours(variables).items()}
    models = load(PYTORCH, variables, backbone, "float32", train=True)
    for transcription, model in models.items():
        got_BD = transcription.encoder(model, batch.query, K)().numpy()
        np.testing.assert_allclose(got_BD, embeddings(variables), atol=1e-5)
        step = TorchTraining(transcription, model, batch, objective, OptimizerConfig())
        train_step.require_agreement(transcription.name, step(), wanted, "float32")
        assert step()["loss"] != wanted["loss"]  # it has learned


def test_contenders_of_a_training_step_can_be_chosen() -> None:
    flags = ["--quick", "--gradcache", "2", "--plain", "--remat", "dots"]
    options = train_step.PROGRAM.parser().parse_args(flags)
    vars(options).update(backbone=TINY, **vars(TINY_TRAIN_SHAPE))
    base = train_step.base_config(options)
    assert list(train_step.variants(base, options)) == [
        *("fast", "parity", "gradcache / 2", "remat dots")
    ]
    options.only = ["remat dots"]
    assert list(train_step.variants(base, options)) == ["remat dots"]
    options.only = ["gradcache / 5"]
    with pytest.raises(BenchmarkError, match=r"--only \['gradcache / 5'\]"):
        train_step.variants(base, options)
    options.gradcache = [2, 3]
    options.only = ["gradcache / 2"]
    train_step.variants(base, options)  # 3 is no matter where it is not among the chosen
    options.only = None
    with pytest.raises(BenchmarkError, match="4 queries do not divide into 3 micro-batches"):
        train_step.variants(base, options)


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


def test_every_round_times_all_contenders_and_begins_with_another() -> None:
    calls: list[str] = []
    contenders: dict[str, Callable[[], None]] = {
        name: lambda name=name: calls.append(name) for name in "abc"
    }
    times = time_alternating(contenders, repeats=3)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"  # the first round warms up
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}
    with pytest.raises(ValueError, match="at least one contender"):
        time_alternating({}, repeats=3)


def test_ratios_are_taken_within_a_round() -> None:
    # the machine slows down threefold; the contender is twice as slow all the time
    ratio = paired_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert ratio.minimum == ratio.median == ratio.maximum == 2.0


def test_tables_are_aligned_markdown_without_empty_columns() -> None:
    assert markdown_table(["step", "s"], [["fast", "1.0"], ["parity", "12.5"]]).split("\n") == [
        "| step   |    s |",
        "| :----- | ---: |",
        "| fast   |  1.0 |",
        "| parity | 12.5 |",
    ]
    rows = [{"name": "a", "bytes": 2e9}, {"name": "b", "bytes": {"median": 1e9}}]
    columns = {"name": value("name"), "GB": value("bytes", ".1f", 1e9), "none": value("absent")}
    assert table_of(rows, columns).split("\n")[0] == "| name |  GB |"
    assert table_of(rows, columns).split("\n")[3] == "| b    | 1.0 |"
