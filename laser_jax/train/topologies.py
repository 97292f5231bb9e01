"""TPU slices that are not there, to compile for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from laser_jax.config import ConfigError
from laser_jax.sharding import Device


def devices_to_compile_for(topology: str) -> Sequence[Device]:
    """Devices that programs can be compiled for and cannot run on.

    Takes jax's own devices to be the CPU, so that an accelerator of this machine stays free.

    Args:
        topology: a TPU and its chips, such as v5e:4x4, v6e:2x4, v4:2x2x2 or v5p:2x2x2.

    Raises:
        ConfigError: no such devices, or the compiler for them is not installed.
    """
    jax.config.update("jax_platforms", "cpu")
    # no question to a cloud's metadata server, and two dry runs may be under way at once
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    name, _, chips = topology.partition(":")
    options: dict[str, Any] = {}
    if name == "v4":
        options["chip_config_name"] = "megacore"  # else a chip counts as two devices
    if chips == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(topology, "tpu", **options).devices
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--topology {topology}: {error}. Names are such as v5e:4x4, v6e:2x4, v4:2x2x2 and "
            "v5p:2x2x2, in chips of TPUs; `pip install laser-jax[tpu]` brings their compiler. For "
            "GPUs leave --topology out, on a machine that has one"
        ) from error
