"""What encoding computes and moves by formula, against the parameters and against XLA's count."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import roofline
from benchmarks.ceilings import COPY, MATMUL, Ceilings, Sizes, ceilings
from benchmarks.flops import encode_reading, parameters, reading_bytes, thought_bytes
from benchmarks.measure import Spread
from benchmarks.workload import SHAPES, drawn_unstacked, make_backbone, unstacked_shapes
from laser_jax.config import ScratchConfig
from laser_jax.training.throughput import forward_flops

MIDDLING = ScratchConfig(
    hidden_size=256, num_layers=3, num_heads=4, head_dim=64, intermediate_size=512
).backbone(vocab_size=2000)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_model(name: str) -> None:
    shapes = unstacked_shapes(make_backbone(SHAPES[name], "float32", lora=None))
    assert parameters(SHAPES[name]) == sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_formulas_agree_with_xla_on_a_program_without_loops() -> None:
    found = roofline.checked(MIDDLING)
    # XLA counts norms, RoPE and softmax too, and every reading and writing between operations
    assert 1 < found["reading_flops"] < 1.03
    assert 1 < found["thought_flops"] < 1.03
    assert found["reading_bytes"] > 1
    assert found["thought_bytes"] > 1


def test_the_least_traffic_is_every_weight_once_and_the_keys_and_values() -> None:
    c, lengths = MIDDLING, [10, 30]
    table = c.vocab_size * c.hidden_size
    key_values = 2 * c.num_layers * c.num_kv_heads * c.head_dim
    weights = parameters(c) - table  # tied
    assert reading_bytes(c, lengths, 2) == 2 * (weights + 40 * c.hidden_size + 40 * key_values)
    assert thought_bytes(c, lengths, 2) == 2 * (weights + 2 * table + 40 * key_values)


def test_thoughts_cost_the_same_each() -> None:
    one, two, five = (forward_flops(MIDDLING, encode_reading([8, 8], K)) for K in (1, 2, 5))
    assert five - one == pytest.approx(4 * (two - one))


def test_a_roofline_is_the_slower_ceiling_of_each_kind_of_work() -> None:
    flops, moved = Spread.of([90.0, 100.0, 200.0]), Spread.of([10.0])
    best = Ceilings(flops, moved, data_sheet_flops=None)
    work = {"reading_flops": 1000.0, "reading_bytes": 10.0}
    work |= {"thought_flops": 10.0, "thought_bytes": 30.0}
    assert roofline.roofline_seconds(work, 1, best) == 10.0
    assert roofline.roofline_seconds(work, 3, best) == 10.0 + 2 * 3.0


def test_ceilings_are_those_of_every_repeat() -> None:
    times = {MATMUL: [1.0, 2.0, 9.0], COPY: [3.0, 4.0, 5.0]}
    best = ceilings(times, "float32", Sizes(side=100, copied=400))
    assert (best.flops.minimum, best.flops.median, best.flops.maximum) == (2e6 / 9, 1e6, 2e6)
    assert (best.bytes.median, best.data_sheet_flops) == (200.0, None)


def test_the_table_shows_ceilings_with_their_quartiles() -> None:
    cell = roofline.COLUMNS["copy, GB/s"]
    assert cell({"copy_bytes_per_second": {"median": 2e9, "q1": 1e9, "q3": 3e9}}) == (
        "2.0 (1.0 to 3.0)"
    )
    assert cell({}) == ""


def test_the_figure_has_short_names_and_shows_the_roofline(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    seconds = {"q1": 1.0, "median": 2.0, "q3": 3.0}
    row = {"backbone": "tiny", "rows": 8, "tokens": 128, "thinking_steps": 3}
    measured = row | {"seconds": seconds, "roofline_seconds": 1.5}
    roofline.plot([measured, row], tmp_path / "figure")
    drawn = (tmp_path / "figure.svg").read_text()
    assert drawn.count("<!-- tiny, 8×128, K = 3 -->") == 1
    assert "<!-- roofline -->" in drawn
    roofline.plot([row], tmp_path / "figure")  # nothing was measured


def test_weights_are_drawn_as_the_model_lays_them_out() -> None:
    drawn = drawn_unstacked(SHAPES["tiny"], "bfloat16")
    backbone = make_backbone(SHAPES["tiny"], "bfloat16", lora=None)
    wanted = jax.tree.map(lambda a: (a.shape, a.dtype), unstacked_shapes(backbone))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), drawn) == wanted
    assert float(drawn["params"]["norm"]["scale"].sum()) == SHAPES["tiny"].hidden_size
    tables = drawn["params"]["embed_tokens"]["embedding"].astype(jnp.float32)
    assert 0.8 < float(tables.std()) * SHAPES["tiny"].hidden_size ** 0.5 < 1.2


def test_backbones_that_do_not_fit_have_the_formula_alone(tmp_path: Path, monkeypatch) -> None:
    output = tmp_path / "roofline.json"
    roofline.main(["--quick", "--repeats", "2", "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert [row["thinking_steps"] for row in rows] == [1, 2]
    for row in rows:
        assert row["seconds"]["median"] > 0
        np.testing.assert_allclose(
            row["roofline_fraction"], row["roofline_seconds"] / row["seconds"]["median"]
        )
    monkeypatch.setattr(roofline, "free_bytes", lambda: 0)
    known = rows[0]["xla_over_formula"]
    monkeypatch.setattr(roofline, "checked", lambda config: known)
    roofline.main(["--quick", "--repeats", "2", "--output", str(output)])
    report = json.loads(output.read_text())
    assert all("seconds" not in row and row["flops"] > 0 for row in report["rows"])
    assert "tiny: by formula alone" in report["notes"][0]
