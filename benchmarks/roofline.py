"""How near `encode` comes to what the device can do: FLOPs, bytes, roofline and MFU.

    python -m benchmarks.roofline [--backbones NAME ...] [--batch 8x128] [--dtype bfloat16]

Reading the prompts and each thinking step are two kinds of work: the first is bound by matmuls, the
second by reading the weights. The roofline is the sum of both, each at the slower of two ceilings
that are measured in the same run, in turn with the encoders: a large matmul and a large copy.

    roofline = max(FLOPs / matmul, bytes / copy) of reading + (K - 1) times that of a thought

FLOPs are those of the formula (`training.throughput.forward_flops`), of causal pairs alone; bytes
are the least that must move (`benchmarks.flops`). For every backbone the formula is compared with
XLA's count of a compiled program of three layers at the real widths (CPU compiler, one block of
attention, each loop turned once). Backbones that do not fit into memory have the formula alone.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.ceilings import Ceilings, ceiling_runs, ceilings, sizes
from benchmarks.encode_latency import rows_by_tokens
from benchmarks.flops import encode_reading, parameters, reading_bytes, thought_bytes
from benchmarks.measure import (
    Report,
    Spread,
    command_line,
    environment,
    positive,
    seconds_cell,
    time_alternating,
)
from benchmarks.workload import (
    SHAPES,
    SMALL,
    TINY,
    add_dtype,
    drawn_unstacked,
    kernel_for,
    make_backbone,
    random_tokens,
    unstacked_shapes,
)
from laser_jax import encode
from laser_jax.config import BackboneConfig, Dtype, RetrieverConfig, as_dict
from laser_jax.evaluation.plots import Interval, plot_intervals
from laser_jax.training.throughput import GIB, device_bytes, forward_flops

BACKBONES = [SMALL, *(f"qwen3-{size}" for size in ("0.6b", "4b", "8b"))]
BACKBONES += ["llama-3.2-1b", "llama-3.1-8b"]
CHECKED_LAYERS, CHECKED_ROWS, CHECKED_TOKENS = 3, 2, 64
ROOM = 1.25 * GIB
"""For activations, caches and the runtime, beside the weights."""


# --- the formula against XLA's count ------------------------------------------------------------


def xla_cost(config: BackboneConfig, thinking_steps: int) -> dict[str, float]:
    """FLOPs and bytes that XLA counts in the compiled `encode` of CHECKED_ROWS x CHECKED_TOKENS,
    float32, on the CPU. Nothing runs. K = 1 and 2 have no loop that turns more than once."""
    backbone = make_backbone(config, "float32", lora=None)
    shape = (CHECKED_ROWS, CHECKED_TOKENS)
    rows = jax.ShapeDtypeStruct(shape, jnp.int32)
    retriever = RetrieverConfig(config, thinking_steps, dtype="float32")
    with jax.default_device(jax.devices("cpu")[0]):
        lowered = jax.jit(functools.partial(encode, config=retriever)).lower(
            unstacked_shapes(backbone), rows, rows
        )
        cost: Any = lowered.compile().cost_analysis()
    return {"flops": cost["flops"], "bytes": cost["bytes accessed"]}


def checked(config: BackboneConfig) -> dict[str, float]:
    """XLA's count over the formula's, of reading and of a thought, for three layers."""
    short = replace(config, num_layers=min(CHECKED_LAYERS, config.num_layers))
    one, two = xla_cost(short, 1), xla_cost(short, 2)
    lengths = [CHECKED_TOKENS] * CHECKED_ROWS
    # XLA's attention computes a whole block of 64 x 64 pairs and masks half of them
    flops = [forward_flops(short, encode_reading(lengths, K, causal=False)) for K in (1, 2)]
    return {
        "reading_flops": one["flops"] / flops[0],
        "thought_flops": (two["flops"] - one["flops"]) / (flops[1] - flops[0]),
        "reading_bytes": one["bytes"] / reading_bytes(short, lengths, 4),
        "thought_bytes": (two["bytes"] - one["bytes"]) / thought_bytes(short, lengths, 4),
    }


# --- measured ----------------------------------------------------------------------------------


def free_bytes() -> int:
    """Memory that weights may take: the device's, or what the host has free."""
    room = device_bytes(jax.devices()[0])
    if room is not None:
        return room
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return 1024 * int(found[1])


def fits(config: BackboneConfig, dtype: Dtype) -> bool:
    """Whether the weights fit into memory, with some room."""
    return parameters(config) * jnp.dtype(dtype).itemsize + ROOM < free_bytes()


def work(
    config: BackboneConfig, lengths: Sequence[int], thinking_steps: int, dtype: Dtype
) -> dict[str, float]:
    """FLOPs and bytes by formula, of reading and of one thought of all rows."""
    itemsize = jnp.dtype(dtype).itemsize
    read, thought = (forward_flops(config, encode_reading(lengths, K)) for K in (1, 2))
    return {
        "reading_flops": read,
        "thought_flops": thought - read,
        "flops": forward_flops(config, encode_reading(lengths, thinking_steps)),
        "reading_bytes": reading_bytes(config, lengths, itemsize),
        "thought_bytes": thought_bytes(config, lengths, itemsize),
    }


def roofline_seconds(found: dict[str, float], thinking_steps: int, best: Ceilings) -> float:
    """Reading, then K - 1 thoughts."""
    return best.seconds(found["reading_flops"], found["reading_bytes"]) + (
        thinking_steps - 1
    ) * best.seconds(found["thought_flops"], found["thought_bytes"])


def measured(
    config: BackboneConfig, options: argparse.Namespace, rows: int, width: int, steps: Sequence[int]
) -> list[dict[str, Any]]:
    """A row for every K, with the time and the ceilings."""
    dtype: Dtype = options.dtype
    variables = drawn_unstacked(config, dtype)
    tokens = random_tokens(np.random.default_rng(0), rows, width, config.vocab_size)
    ids_BT = jnp.asarray(tokens.ids_BT)
    mask_BT = jnp.ones_like(ids_BT)
    of = sizes(quick=options.quick)
    contenders = {
        str(K): functools.partial(
            jax.jit(
                functools.partial(
                    encode,
                    config=RetrieverConfig(config, K, dtype=dtype),
                    attention=kernel_for("auto", config, dtype),
                )
            ),
            variables,
            ids_BT,
            mask_BT,
        )
        for K in steps
    }
    times = time_alternating(contenders | ceiling_runs(dtype, of), repeats=options.repeats)
    best = ceilings(times, dtype, of)
    found = []
    for K in steps:
        seconds = float(np.median(times[str(K)]))
        row: dict[str, Any] = work(config, [width] * rows, K, dtype)
        bound = roofline_seconds(row, K, best)
        row |= {
            "thinking_steps": K,
            "seconds": vars(Spread.of(times[str(K)])) | {"repeats": times[str(K)]},
            "roofline_seconds": bound,
            "roofline_fraction": bound / seconds,
            "of_matmul": row["flops"] / seconds / best.flops.median,
            "matmul_flops_per_second": vars(best.flops),
            "copy_bytes_per_second": vars(best.bytes),
        }
        if best.data_sheet_flops is not None:
            row["mfu"] = row["flops"] / seconds / best.data_sheet_flops
        found.append(row)
    return found


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> Report:
    """Counts for every backbone, and times those that fit."""
    names = [TINY] if options.quick else options.backbones
    (rows, width), steps = ((2, 8), [1, 2]) if options.quick else (options.batch, options.steps)
    settings = {
        "backbones": {name: as_dict(SHAPES[name]) for name in names},
        "dtype": options.dtype,
        "rows": rows,
        "tokens": width,
        "repeats": options.repeats,
    }
    report = Report("roofline", arguments, settings, environment())
    for name in names:
        config = SHAPES[name]
        common = {
            "backbone": name,
            "rows": rows,
            "tokens": width,
            "parameters": parameters(config),
            "xla_over_formula": checked(config),
        }
        if fits(config, options.dtype):
            found = measured(config, options, rows, width, steps)
        else:
            found = [
                {"thinking_steps": K} | work(config, [width] * rows, K, options.dtype)
                for K in steps
            ]
            report.notes.append(
                f"{name}: by formula alone, as its weights take "
                f"{parameters(config) * jnp.dtype(options.dtype).itemsize / GIB:.1f} GiB and "
                f"{free_bytes() / GIB:.1f} GiB were free."
            )
        report.rows += [common | row for row in found]
    return report


def _number(key: str, unit: float, form: str) -> Any:
    """The text of a number of a row; empty where it was not measured."""
    return lambda row: format(row[key] / unit, form) if key in row else ""


def _ceiling(key: str, unit: float, form: str) -> Any:
    """The text of a ceiling with its quartiles; empty where none was measured."""

    def cell(row: dict[str, Any]) -> str:
        if (found := row.get(key)) is None:
            return ""
        median, q1, q3 = (format(found[name] / unit, form) for name in ("median", "q1", "q3"))
        return f"{median} ({q1} to {q3})"

    return cell


def _pair(one: str, other: str, unit: float, form: str) -> Any:
    return lambda row: f"{row[one] / unit:{form}} / {row[other] / unit:{form}}"


def _xla(row: dict[str, Any]) -> str:
    found = row["xla_over_formula"]
    return " / ".join(f"{found[f'{part}_flops']:.3f}" for part in ("reading", "thought"))


def _xla_bytes(row: dict[str, Any]) -> str:
    found = row["xla_over_formula"]
    return " / ".join(f"{found[f'{part}_bytes']:.2f}" for part in ("reading", "thought"))


COLUMNS = {
    "backbone": lambda row: row["backbone"],
    "batch": lambda row: f"{row['rows']}×{row['tokens']}",
    "K": lambda row: str(row["thinking_steps"]),
    "parameters, M": _number("parameters", 1e6, ",.1f"),
    "GFLOP: reading / a thought": _pair("reading_flops", "thought_flops", 1e9, ",.1f"),
    "GB: reading / a thought": _pair("reading_bytes", "thought_bytes", 1e9, ",.2f"),
    "XLA's FLOPs / formula's": _xla,
    "XLA's bytes / least": _xla_bytes,
    "time (quartiles)": lambda row: seconds_cell(row.get("seconds")),
    "roofline, ms": _number("roofline_seconds", 1e-3, ",.1f"),
    "of roofline": _number("roofline_fraction", 1, ".0%"),
    "of large matmul": _number("of_matmul", 1, ".0%"),
    "MFU, data sheet": _number("mfu", 1, ".0%"),
    "matmul, TFLOP/s": _ceiling("matmul_flops_per_second", 1e12, ",.2f"),
    "copy, GB/s": _ceiling("copy_bytes_per_second", 1e9, ",.1f"),
}


def plot(rows: Sequence[Mapping[str, Any]], stem: Path) -> None:
    """Draws the measured times against their rooflines."""
    measured = [row for row in rows if "seconds" in row]
    found = [
        Interval(
            f"{row['backbone']}, {row['rows']}×{row['tokens']}, K = {row['thinking_steps']}",
            row["backbone"],
            *(row["seconds"][key] for key in ("q1", "median", "q3")),
            bound=row["roofline_seconds"],
        )
        for row in measured
    ]
    plot_intervals(found, "seconds, median and quartiles", stem, bound="roofline")


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = command_line("roofline", __doc__, repeats=3)
    add_dtype(parser)
    parser.add_argument(
        "--backbones",
        choices=SHAPES,
        nargs="+",
        default=BACKBONES,
        help=f"default {' '.join(BACKBONES)}",
    )
    parser.add_argument("--batch", type=rows_by_tokens, default=(8, 128), help="default 8x128")
    parser.add_argument("--steps", type=positive, nargs="+", default=[1, 3], help="default 1 3")
    options = parser.parse_args(arguments)
    measure(options, arguments).finish(COLUMNS, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
