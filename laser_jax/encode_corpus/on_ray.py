"""The shards of a plan, spread over a Ray cluster.

Plain actors, since a shard is a task of its own that ends in a file, and there is no dataset for
Ray Data to move. An actor holds the model; where its process or machine dies, Ray starts it again
and gives it the shard once more.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from laser_jax.encode_corpus.directory import CorpusDirectory
from laser_jax.encode_corpus.encoding import CorpusConfig, RayConfig, ShardEncoder
from laser_jax.encode_corpus.plan import read_plan
from laser_jax.files.terminal import extra
from laser_jax.search.vectors import Shard

_OBJECT_STORE_BYTES = 100 * 2**20
"""Nothing lies in it but numbers; Ray would take 30 % of the memory."""
_RESTARTS = 10
"""How often a worker that died is started again before the run gives up."""
_log = logging.getLogger(__name__)


class RayError(ValueError):
    """The cluster or its workers cannot do the work."""


class Worker:
    """An actor: number `index` of a run. The paths of its config begin in `folder`, which need not
    be there if they are absolute."""

    def __init__(self, config: CorpusConfig, folder: str = ".", index: int = 0):
        with suppress(OSError):
            os.chdir(folder)
        directory = CorpusDirectory(config.output)
        if not directory.path.is_dir():
            fault = f"{directory.path} is not there on {socket.gethostname()}"
            raise RayError(f"{fault}: --output must be on storage that all nodes share")
        self._index = index
        self._encoder = ShardEncoder(config, read_plan(directory.path), directory)

    def encode(self, number: int) -> tuple[int, str, Shard]:
        """Encodes a shard. Returns which worker did it, in which process, and its entry."""
        shard = self._encoder.encode(number)
        process = f"process {os.getpid()} on {socket.gethostname()}: {self._encoder.device}"
        return self._index, process, shard


def encode_on_ray(
    config: CorpusConfig, wanted: RayConfig, missing: Sequence[int], done: Callable[[Shard], object]
) -> None:
    """Encodes the shards `missing`, and calls `done` for each as it is finished. Raises a RayError
    on too few resources, or a worker that died more often than `_RESTARTS`, and what a worker
    raised over a shard."""
    with extra("ray", "--ray.workers"):
        import ray
        from ray.exceptions import RayActorError, RayTaskError
    _start(ray, wanted)
    try:
        for shard in _encoded(ray, config, wanted, missing):
            done(shard)
    except RayTaskError as error:
        if isinstance(error.cause, ValueError | OSError | ImportError):
            raise error.cause from error
        raise RayError(str(error)) from error
    except RayActorError as error:
        raise RayError(f"a worker cannot go on: {error}") from error
    finally:
        ray.shutdown()


def _start(ray: Any, wanted: RayConfig) -> None:
    """Joins the cluster, or starts one."""
    how: dict[str, Any] = {"address": wanted.address}
    if wanted.address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        how = {"num_cpus": wanted.workers * wanted.cpus, "include_dashboard": False}
        how["object_store_memory"] = _OBJECT_STORE_BYTES
    ray.init(logging_level="warning", **how)
    found = ray.cluster_resources()
    for kind, each in (("CPU", wanted.cpus), ("GPU", wanted.gpus)):
        there, all_want = found.get(kind, 0), each * wanted.workers
        if there < all_want:
            message = f"{wanted.workers} workers want {all_want} {kind}s, and Ray has {there:g}"
            if wanted.address is None or there < each:
                raise RayError(message)
            _log.warning("%s: some workers wait for more", message)


def _encoded(
    ray: Any, config: CorpusConfig, wanted: RayConfig, missing: Sequence[int]
) -> Iterator[Shard]:
    from ray.util import ActorPool

    # XLA takes all cores for its threads (NPROC on the CPU) and, on a GPU, three quarters of the
    # memory, whatever Ray was told.
    preallocate = "XLA_PYTHON_CLIENT_PREALLOCATE"
    environment = {"NPROC": str(wanted.cpus), preallocate: os.environ.get(preallocate, "false")}
    actor = ray.remote(Worker).options(
        num_cpus=wanted.cpus,
        num_gpus=wanted.gpus,
        max_restarts=_RESTARTS,
        max_task_retries=_RESTARTS,
        runtime_env={"env_vars": environment | ({} if wanted.gpus else {"JAX_PLATFORMS": "cpu"})},
    )
    count = min(wanted.workers, len(missing))
    workers = ActorPool([actor.remote(config, os.getcwd(), index) for index in range(count)])
    processes: dict[int, str] = {}
    for worker, process, shard in workers.map_unordered(
        lambda worker, number: worker.encode.remote(number), list(missing)
    ):
        before = processes.get(worker)
        if before not in (None, process):
            _log.warning("a worker died and was started again: %s", before)
        if before != process:
            _log.info("worker: %s", process)
        processes[worker] = process
        yield shard
