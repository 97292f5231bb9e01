"""Devices that are not there, to compile for: TPU slices and NVIDIA GPUs."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.experimental import topologies

from laser_jax.config import ConfigError
from laser_jax.sharding import Device

_NAMES = (
    "Names are such as v5e:4x4, v6e:2x4, v4:2x2x2 and v5p:2x2x2, in chips, and a100:8, h100:2x8 "
    "and h200:8, in GPUs or hosts x GPUs; `pip install laser-jax[tpu]` brings the compiler for "
    "TPUs, `pip install jax[cuda12]` that for GPUs"
)


@dataclass(frozen=True)
class _Gpu:
    """What XLA's compiler wants to know of a GPU; memory and caches in bytes."""

    name: str
    compute_capability: int
    cores: int
    fpus_per_core: int
    clock_ghz: float
    shared_memory_per_core: int
    shared_memory_per_block: int
    l2_cache: int
    memory: int
    bandwidth: float
    """Bytes per second."""

    def target_config(self) -> str:
        """A `GpuTargetConfigProto` of XLA, as text."""
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.name}"
            dnn_version_info {{ major: 9 minor: 10 }}
            runtime_version {{ major: 12 minor: 8 }}
            gpu_device_info {{
              cuda_compute_capability {{ major: {self.compute_capability} }}
              core_count: {self.cores}
              fpus_per_core: {self.fpus_per_core}
              clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory}
              memory_bandwidth: {self.bandwidth:.0f}
              l2_cache_size: {self.l2_cache}
              shared_memory_per_core: {self.shared_memory_per_core}
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.shared_memory_per_block}
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              threads_per_warp: 32
              threads_per_block_limit: 1024
              threads_per_core_limit: 2048
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
            }}"""


_A100 = _Gpu(
    name="NVIDIA A100-SXM4-80GB",
    compute_capability=8,
    cores=108,
    fpus_per_core=64,
    clock_ghz=1.41,
    shared_memory_per_core=167_936,
    shared_memory_per_block=166_912,
    l2_cache=41_943_040,
    memory=85_100_068_864,
    bandwidth=2.039e12,
)
_H100 = _Gpu(
    name="NVIDIA H100 80GB HBM3",
    compute_capability=9,
    cores=132,
    fpus_per_core=128,
    clock_ghz=1.98,
    shared_memory_per_core=233_472,
    shared_memory_per_block=232_448,
    l2_cache=52_428_800,
    memory=84_942_979_072,
    bandwidth=3.352e12,
)
_H200 = replace(_H100, name="NVIDIA H200", memory=151_397_597_184, bandwidth=4.8e12)
_GPUS = {"a100": _A100, "h100": _H100, "h200": _H200}


def devices_to_compile_for(topology: str) -> Sequence[Device]:
    """Devices that programs can be compiled for and cannot run on.

    Takes jax's own devices to be the CPU, so that an accelerator of this machine stays free.

    Args:
        topology: see `_NAMES`.

    Raises:
        ConfigError: no such devices, or the compiler for them is not installed.
    """
    jax.config.update("jax_platforms", "cpu")
    name, _, shape = topology.partition(":")
    try:
        if name in _GPUS:
            return _gpus(_GPUS[name], shape)
        return _tpus(name, shape)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"--topology {topology}: {error}. {_NAMES}") from error


def _tpus(name: str, chips: str) -> Sequence[Device]:
    # no question to a cloud's metadata server, and two dry runs may be under way at once
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {}
    if name == "v4":
        options["chip_config_name"] = "megacore"  # else a chip counts as two devices
    if chips == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    return topologies.get_topology_desc(f"{name}:{chips}", "tpu", **options).devices


def _gpus(gpu: _Gpu, shape: str) -> Sequence[Device]:
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", shape)
    if match is None:
        raise ValueError(f"wanted GPUs or hosts x GPUs, got {shape!r}")
    # jax asks the driver for its version otherwise, and gives up the plugin where there is none
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    return topologies.get_topology_desc(
        platform="cuda",
        target_config=gpu.target_config(),
        topology=f"1x{match[1] or 1}x{match[2]}",
    ).devices
