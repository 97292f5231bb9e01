"""Host memory of loading a checkpoint: `python -m benchmarks.load_memory --gigabytes 2`.

Writes a random bfloat16 checkpoint with the shapes of Qwen3-0.6B, and as many layers as the size
asks for, into a temporary folder. A fresh process for each way of loading it then tells its own
memory before the load and waits; this one samples that process's anonymous resident memory
(`RssAnon` of /proc, Linux only) until the load is done. Anonymous memory leaves out the file pages
that safetensors maps: those are the system's cache and can be dropped at any time.

    overhead = peak - before - bytes of the resulting arrays

On the CPU the devices' memory is the host's, so the result is subtracted, one copy for each device
that holds one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType

from laser_jax.config import BackboneConfig
from laser_jax.files import write_atomically
from laser_jax.hf import load_params, load_sharded_params, read_backbone_config, save_params
from laser_jax.modeling.backbone import Backbone
from laser_jax.sharding import MESH_AXES, shardings

WAYS = ("load_params", "load_params and device_put", "load_sharded_params", "save_params")
"""The first two are the whole model on the host, alone and then laid out on the devices."""

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "safetensors", "ml_dtypes")
SHARD_BYTES = 5e8
"""Of the files that are read, and of those that `save_params` writes."""


def qwen3(num_layers: int) -> BackboneConfig:
    """Qwen3-0.6B with another number of layers."""
    return BackboneConfig(
        family="qwen3",
        vocab_size=151_936,
        hidden_size=1024,
        num_layers=num_layers,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=3072,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=None,
        tie_word_embeddings=True,
        max_position_embeddings=40_960,
    )


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


def write_checkpoint(directory: Path, gigabytes: float) -> None:
    """A checkpoint of about `gigabytes` * 1e9 bytes, in files of at most SHARD_BYTES."""
    one, two = 2 * count(qwen3(1)), 2 * count(qwen3(2))
    backbone = qwen3(max(2, 1 + round((gigabytes * 1e9 - one) / (two - one))))
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
    print(json.dumps({"before": resident("self")}), flush=True)
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
    print(json.dumps({"result": 0 if way == "save_params" else held}), flush=True)


def measure(way: str, directory: Path, dtype: str, devices: int) -> dict[str, int]:
    """Runs one way in a fresh process. Bytes: before, result, peak, overhead, and the peak with
    file pages (`VmHWM`, of the whole life of the process)."""
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
        peak, over = found["before"], threading.Event()

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
        found |= _said(line, way) | {"peak": peak, "with_files": resident(child.pid, "VmHWM")}
    finally:
        child.kill()
        child.communicate()
    return found | {"overhead": peak - found["before"] - found["result"]}


def _said(line: str, way: str) -> dict[str, int]:
    if not line:
        raise RuntimeError(f"the process of {way} failed; its message is above")
    return json.loads(line)


def provenance() -> dict[str, Any]:
    """Versions, machine, date and commit."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "packages": {name: version(name) for name in PACKAGES},
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load_memory", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the checkpoint, in 1e9 B")
    parser.add_argument("--devices", type=int, default=1, help="forced CPU devices, as mesh.fsdp")
    parser.add_argument("--dtype", default="bfloat16", help="of the arrays that are loaded")
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way is not None:
        measured(arguments.way, arguments.directory, np.dtype(arguments.dtype))
        return

    folder = Path(tempfile.mkdtemp(prefix="load_memory-"))
    try:
        write_checkpoint(folder, arguments.gigabytes)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        backbone = read_backbone_config(folder)
        largest = backbone.vocab_size * backbone.hidden_size * np.dtype(arguments.dtype).itemsize
        rows = {way: measure(way, folder, arguments.dtype, arguments.devices) for way in WAYS}
    finally:
        shutil.rmtree(folder)
    print(
        f"{size / 1e9:.2f} GB of bfloat16 in {backbone.num_layers} layers, loaded as "
        f"{arguments.dtype} on {arguments.devices} CPU device(s); the largest tensor has "
        f"{largest / 1e6:.0f} MB, files at most {SHARD_BYTES / 1e6:.0f} MB. In MB:\n"
    )
    print(f"{'':28}{'before':>8}{'peak':>8}{'result':>8}{'overhead':>10}  in largest tensors")
    for way, row in rows.items():
        before, peak, result, overhead = (
            f"{row[key] / 1e6:.0f}" for key in ("before", "peak", "result", "overhead")
        )
        times = row["overhead"] / largest
        print(f"{way:28}{before:>8}{peak:>8}{result:>8}{overhead:>10}  {times:.2f}")
    if arguments.output is not None:
        settings = {name: getattr(arguments, name) for name in ("gigabytes", "devices", "dtype")}
        numbers = {"checkpoint": size, "largest_tensor": largest, "bytes": rows}
        report = provenance() | {"settings": settings} | numbers
        write_atomically(arguments.output, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
