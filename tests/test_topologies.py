"""Devices to compile for: what is refused. Compiling for them wants libtpu or the CUDA plugin, some
GB that the tests do without; docs/scale.md has what it gave."""

from __future__ import annotations

import importlib.util

import pytest

from laser_jax.config import ConfigError
from laser_jax.train.topologies import devices_to_compile_for


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@pytest.mark.skipif(installed("libtpu"), reason="libtpu is installed: this is no error")
def test_a_tpu_slice_wants_libtpu() -> None:
    with pytest.raises(ConfigError, match=r"--topology v5e:4x4: .*pip install laser-jax\[tpu\]"):
        devices_to_compile_for("v5e:4x4")


@pytest.mark.skipif(
    installed("jax_cuda12_plugin") or installed("jax_cuda13_plugin"),
    reason="the CUDA plugin is installed: this is no error",
)
@pytest.mark.parametrize("topology", ["a100:8", "h100:2x8", "h200:1"])
def test_gpus_want_the_plugin_of_jax(topology: str) -> None:
    with pytest.raises(ConfigError, match=rf"--topology {topology}: .*pip install jax\[cuda12\]"):
        devices_to_compile_for(topology)


@pytest.mark.parametrize("shape", ["", "0", "8x", "2x0", "x8", "eight", "2x2x2", "-1"])
def test_gpus_are_counted_by_hosts_and_gpus(shape: str) -> None:
    with pytest.raises(ConfigError, match="hosts x GPUs, got"):
        devices_to_compile_for(f"h100:{shape}")


def test_an_unknown_device_is_answered_with_names() -> None:
    with pytest.raises(ConfigError, match=r"--topology b300:8: .*Names are such as v5e:4x4"):
        devices_to_compile_for("b300:8")
