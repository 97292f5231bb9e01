"""One run in several processes: how they find each other, and what each of them holds."""

from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh

from laser_jax.batch import Batch
from laser_jax.command_line import Invocation
from laser_jax.config import ConfigError
from laser_jax.sharding import batch_sharding


def join_processes(invocation: Invocation) -> None:
    """Connects this process with the others of the run, before jax is used. Raises a ConfigError
    where there is no cluster that jax knows, or process 0 cannot be reached."""
    if not invocation.distributed:
        return
    try:
        index, count, coordinator = invocation.process
        jax.distributed.initialize(coordinator, count, index)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--distributed: {error}. jax finds the processes of Slurm, Cloud TPU, GKE and Open "
            "MPI by itself; elsewhere give --distributed INDEX/COUNT@HOST:PORT"
        ) from error


def is_first() -> bool:
    """Whether this is the process that writes, and prints results."""
    return jax.process_index() == 0


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Which of a batch's `rows` lie on this process's devices, increasing."""
    held = batch_sharding(mesh).addressable_devices_indices_map((rows,))
    parts = [np.arange(rows)[index[0]] for index in held.values() if index is not None]
    return np.unique(np.concatenate(parts))


def place_batch(batch: Batch, mesh: Mesh, queries: int) -> Batch:
    """The batch of so many queries over the mesh; this process made the rows of `local_rows`."""
    sharding, held = batch_sharding(mesh), len(batch.query.lengths_B)

    def place(local: np.ndarray) -> jax.Array:
        shape = (len(local) * queries // held, *local.shape[1:])
        return jax.make_array_from_process_local_data(sharding, local, shape)

    return jax.tree.map(place, replace(batch, rows_B=None))
