"""One run in several processes: how they find each other, what each of them holds and says."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from laser_jax.batch import Batch, Tokens
from laser_jax.command_line import Invocation
from laser_jax.config import ConfigError
from laser_jax.files.terminal import printable
from laser_jax.sharding import batch_sharding


def join_processes(invocation: Invocation) -> None:
    """Connects this process with the others of the run. To be called before jax is used.

    Raises:
        ConfigError: there is no cluster that jax knows, or process 0 cannot be reached.
    """
    if not invocation.distributed:
        return
    try:
        jax.distributed.initialize(
            invocation.coordinator, invocation.num_processes, invocation.process_id
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--distributed: {error}. jax finds the processes of Slurm, Cloud TPU, GKE and Open "
            "MPI by itself; elsewhere give --coordinator HOST:PORT, --num_processes, --process_id"
        ) from error


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints in the first process."""
    if is_first():
        print(printable(text), flush=True)


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Which of a batch's `rows` lie on this process's devices, increasing."""
    held = batch_sharding(mesh).addressable_devices_indices_map((rows,))
    parts = [np.arange(rows)[index[0]] for index in held.values() if index is not None]
    return np.unique(np.concatenate(parts))


def _global_array(local: np.ndarray, mesh: Mesh, rows: int) -> jax.Array:
    """The batch array [rows, ...] of which this process holds the rows of `local_rows`."""
    shape = (rows, *local.shape[1:])
    return jax.make_array_from_process_local_data(batch_sharding(mesh), local, shape)


def place_batch(batch: Batch, mesh: Mesh, queries: int) -> Batch:
    """The batch over the mesh, of which this process made the rows of `local_rows`.

    Args:
        queries: of the whole batch.
    """
    documents = queries * (len(batch.documents.lengths_B) // len(batch.query.lengths_B))

    def place(tokens: Tokens, rows: int) -> Tokens:
        return Tokens(array(tokens.ids_BT, rows), array(tokens.lengths_B, rows))

    def array(local: np.ndarray, rows: int = queries) -> jax.Array:
        return _global_array(local, mesh, rows)

    return Batch(
        query=place(batch.query, queries),
        documents=place(batch.documents, documents),
        explicit=None if batch.explicit is None else place(batch.explicit, queries),
        keyframes_BK=None if batch.keyframes_BK is None else array(batch.keyframes_BK),
        contrast_BC=array(batch.contrast_BC),
    )
