"""Host memory that loading and writing a checkpoint take beyond what comes of it.

    python -m benchmarks.load_memory [--gigabytes 2] [--devices 8]

Writes a random bfloat16 checkpoint with the shapes of Qwen3-0.6B, and as many layers as the size
asks for, into a temporary folder. A fresh process for each way of loading it, and for each of
`--repeats`, then tells its own memory before the load and waits; this one samples that process's
anonymous resident memory (`RssAnon` of /proc, Linux only) until the load is done. Anonymous memory
leaves out the file pages that safetensors maps: those are the system's cache and can be dropped at
any time.

    overhead = peak - before - bytes of the resulting arrays

On the CPU the devices' memory is the host's, so the result is subtracted, one copy for each device
that holds one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType

from benchmarks.measure import Report, Spread, command_line, environment, in_turn, positive
from benchmarks.workload import SHAPES, TINY
from laser_jax.config import BackboneConfig, as_dict
from laser_jax.hf import load_params, load_sharded_params, read_backbone_config, save_params
from laser_jax.modeling.backbone import Backbone
from laser_jax.sharding import MESH_AXES, shardings

WAYS = ("load_params", "load_params and device_put", "load_sharded_params", "save_params")
"""The first two are the whole model on the host, alone and then laid out on the devices."""

SHARD_BYTES = 5e8
"""Of the files that are read, and of those that `save_params` writes."""


def boxed_params(backbone: BackboneConfig) -> Any:
    """Abstract parameters with their logical axes."""
    ids_BT = jnp.zeros((1, 8), jnp.int32)
    return jax.eval_shape(Backbone(backbone).init, jax.random.key(0), ids_BT)["params"]


def count(backbone: BackboneConfig) -> int:
    """Parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(boxed_params(backbone))))


def layout(backbone: BackboneConfig, dtype: np.dtype) -> Any:
    """Abstract leaves, split over all devices as `mesh.fsdp` splits them."""
    sizes, axis_types = (1, jax.device_count(), 1), (AxisType.Auto,) * 3
    mesh = jax.make_mesh(sizes, MESH_AXES, axis_types=axis_types)
    boxed = boxed_params(backbone)
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        shardings(boxed, mesh),
    )


def of_size(gigabytes: float) -> BackboneConfig:
    """Qwen3-0.6B with as many layers, two at least, as make a checkpoint of about `gigabytes`."""
    one, two = (2 * count(replace(SHAPES["qwen3-0.6b"], num_layers=n)) for n in (1, 2))
    layers = max(2, 1 + round((gigabytes * 1e9 - one) / (two - one)))
    return replace(SHAPES["qwen3-0.6b"], num_layers=layers)


def write_checkpoint(directory: Path, backbone: BackboneConfig) -> None:
    """Random bfloat16 weights, in files of at most SHARD_BYTES."""
    random = np.random.default_rng(0)

    def weights(leaf: Any) -> np.ndarray:  # the mask keeps them between -2 and 2
        bits = random.integers(0, 2**16, leaf.shape, np.uint16) & np.uint16(0xBFFF)
        return bits.view(ml_dtypes.bfloat16)

    params = jax.tree.map(weights, nn.meta.unbox(boxed_params(backbone)))
    limit = SHARD_BYTES
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    save_params(
        directory, {"params": params}, backbone, dtype=bfloat16, lora=None, max_shard_bytes=limit
    )


def resident(process: int | str, field: str = "RssAnon") -> int:
    """Bytes of memory of a process that live, as /proc/PROCESS/status counts them."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return 1024 * int(found[1]) if found else 0  # a process that has just ended has none


def measured(way: str, directory: Path, dtype: np.dtype) -> None:
    """What a subprocess does: says its memory, waits for a line, works, says what there is now."""
    backbone = read_backbone_config(directory)
    like = layout(backbone, dtype)
    if way == "save_params":
        params = load_sharded_params(directory, backbone, like)
    print(json.dumps({"before_bytes": resident("self")}), flush=True)
    sys.stdin.readline()
    if way == "load_params":
        params = load_params(directory, backbone, dtype=dtype)
    elif way == "load_params and device_put":
        host = load_params(directory, backbone, dtype=dtype)
        params = jax.tree.map(lambda a, leaf: jax.device_put(a, leaf.sharding), host, like)
        del host
    elif way == "load_sharded_params":
        params = load_sharded_params(directory, backbone, like)
    else:
        with tempfile.TemporaryDirectory(dir=directory) as out:
            variables = {"params": params}
            limit = SHARD_BYTES
            save_params(out, variables, backbone, dtype=dtype, lora=None, max_shard_bytes=limit)
    held = 0
    for leaf in jax.tree.leaves(jax.block_until_ready(params)):
        shards = leaf.addressable_shards if isinstance(leaf, jax.Array) else ()
        held += sum(shard.data.nbytes for shard in shards) or leaf.nbytes
    found = {"result_bytes": 0 if way == "save_params" else held}
    print(json.dumps(found | {"peak_with_files_bytes": resident("self", "VmHWM")}), flush=True)


def loaded(way: str, directory: Path, dtype: str, devices: int) -> dict[str, int]:
    """Runs one way in a fresh process. The peak with file pages is `VmHWM`, of the whole life of
    the process."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", "benchmarks.load_memory", "--way", way]
    command += ["--directory", str(directory), "--dtype", dtype]
    child = subprocess.Popen(
        command,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        found = _said(child.stdout.readline(), way)
        peak, over = found["before_bytes"], threading.Event()

        def sample() -> None:
            nonlocal peak
            while not over.wait(0.002):
                peak = max(peak, resident(child.pid))

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            child.stdin.write("\n")
            child.stdin.flush()
            line = child.stdout.readline()
        finally:
            over.set()
            sampler.join()
        found |= _said(line, way) | {"peak_bytes": peak}
    finally:
        child.kill()
        child.communicate()
    return found | {"overhead_bytes": peak - found["before_bytes"] - found["result_bytes"]}


def _said(line: str, way: str) -> dict[str, int]:
    if not line:
        raise RuntimeError(f"the process of {way} failed; its message is above")
    return json.loads(line)


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> Report:
    """Writes a checkpoint and measures every way of loading it, in turn."""
    here = environment()
    backbone = SHAPES[TINY] if options.quick else of_size(options.gigabytes)
    found: dict[str, list[dict[str, int]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="load_memory-") as name:
        folder = Path(name)
        write_checkpoint(folder, backbone)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for way, _ in in_turn(WAYS, repeats=options.repeats, warmup=0):
            found[way].append(loaded(way, folder, options.dtype, options.devices))
    largest = backbone.vocab_size * backbone.hidden_size * np.dtype(options.dtype).itemsize
    settings = {
        "backbone": as_dict(backbone),
        "checkpoint_bytes": size,
        "shard_bytes": SHARD_BYTES,
        "dtype": options.dtype,
        "devices": options.devices,
        "largest_tensor_bytes": largest,
        "repeats": options.repeats,
    }
    report = Report("load_memory", arguments, settings, here)
    for way, runs in found.items():
        spreads = {key: vars(Spread.of([run[key] for run in runs])) for key in runs[0]}
        report.rows.append({"way": way, "largest_tensor_bytes": largest} | spreads)
    report.notes.append(
        f"{size / 1e9:.2f} GB of bfloat16 in {backbone.num_layers} layers, as {options.dtype} on "
        f"{options.devices} CPU device(s); the largest tensor has {largest / 1e6:,.0f} MB, files "
        f"at most {SHARD_BYTES / 1e6:,.0f} MB."
    )
    return report


def _megabytes(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: f"{row[key]['median'] / 1e6:,.0f}"


def _overhead(row: dict[str, Any], unit: float, form: str) -> str:
    spread = row["overhead_bytes"]
    median, q1, q3 = (format(spread[key] / unit, form) for key in ("median", "q1", "q3"))
    return f"{median} ({q1} to {q3})"


COLUMNS = {
    "way": lambda row: row["way"],
    "before, MB": _megabytes("before_bytes"),
    "peak, MB": _megabytes("peak_bytes"),
    "peak with file pages, MB": _megabytes("peak_with_files_bytes"),
    "result, MB": _megabytes("result_bytes"),
    "overhead, MB (quartiles)": lambda row: _overhead(row, 1e6, ",.0f"),
    "in largest tensors (quartiles)": lambda row: _overhead(
        row, row["largest_tensor_bytes"], ".2f"
    ),
}


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = command_line("load_memory", __doc__, repeats=3)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the checkpoint; default 2")
    parser.add_argument(
        "--devices", type=positive, default=1, help="forced CPU devices, as mesh.fsdp; default 1"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="of the arrays that are loaded; default bfloat16",
    )
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not sys.platform.startswith("linux"):
        parser.error(f"memory is read from /proc, which Linux alone has; this is {sys.platform}")
    if options.way is not None:
        measured(options.way, options.directory, np.dtype(options.dtype))
        return
    measure(options, arguments).finish(COLUMNS, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
