"""Devices to compile for: what is refused. Compiling for them wants libtpu, which the
tests do without; docs/scale.md has what it gave."""

from __future__ import annotations

import importlib.util

import pytest

from laser_jax.config import ConfigError
from laser_jax.train.topologies import devices_to_compile_for


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed: this is no error"
)
def test_a_tpu_slice_wants_libtpu() -> None:
    with pytest.raises(ConfigError, match=r"--topology v5e:4x4: .*pip install laser-jax\[tpu\]"):
        devices_to_compile_for("v5e:4x4")


@pytest.mark.parametrize("topology", ["b300:8", "h100:8"])
def test_an_unknown_device_is_answered_with_names(topology: str) -> None:
    with pytest.raises(ConfigError, match=rf"--topology {topology}: .*Names are such as v5e:4x4"):
        devices_to_compile_for(topology)
