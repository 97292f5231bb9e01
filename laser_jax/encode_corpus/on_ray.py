"""The shards of a plan, spread over a Ray cluster.

Plain actors, since a shard is a task of its own that ends in a file: nothing but its number and its
counts travels, and there is no dataset for Ray Data to move. An actor holds the model; where its
process or machine dies, Ray starts it again and gives it the shard once more.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from laser_jax.encode_corpus.directory import CorpusDirectory, Record
from laser_jax.encode_corpus.encoding import CorpusConfig, RayConfig, ShardEncoder
from laser_jax.encode_corpus.plan import Plan, read_plan

_OBJECT_STORE_BYTES = 100 * 2**20
"""Nothing lies in it but numbers; Ray would take 30 % of the memory."""


class RayError(ValueError):
    """The cluster or its workers cannot do the work."""


class Worker:
    """An actor."""

    def __init__(self, config: CorpusConfig):
        directory = CorpusDirectory(config.output)
        if not directory.path.is_dir():
            raise RayError(
                f"{directory.path} is not there on {socket.gethostname()}: --output must be on "
                "storage that all nodes share"
            )
        self._encoder = ShardEncoder(config, read_plan(directory.path), directory)

    def encode(self, number: int) -> tuple[str, Record]:
        """Encodes a shard. Returns who did it, and its record."""
        record = self._encoder.encode(number)
        who = f"process {os.getpid()} on {socket.gethostname()}: {self._encoder.device}"
        return who, record


def encode_on_ray(
    config: CorpusConfig,
    plan: Plan,
    directory: CorpusDirectory,
    missing: Sequence[int],
    done: Callable[[int, Record], object],
) -> None:
    """Encodes the shards `missing`, and calls `done` for each as it is finished.

    Raises:
        RayError: too few resources, or a worker that died more often than `restarts`.
        ValueError, OSError: what a worker raised over a shard.
        ImportError: Ray is not installed.
    """
    try:
        import ray
        from ray.exceptions import RayActorError, RayTaskError
    except ImportError as error:
        raise ImportError("--engine ray needs Ray: pip install laser-jax[ray]") from error
    _start(ray, config.ray)
    try:
        _spread(ray, _absolute(config, directory), missing, done)
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
    if wanted.address is not None:
        ray.init(address=wanted.address, logging_level="warning")
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=wanted.workers * wanted.cpus,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            logging_level="warning",
        )
    found = ray.cluster_resources()
    for kind, each in (("CPU", wanted.cpus), ("GPU", wanted.gpus)):
        there, all_want = found.get(kind, 0), each * wanted.workers
        if there < all_want:
            message = f"{wanted.workers} workers want {all_want} {kind}s, and Ray has {there:g}"
            if wanted.address is None or there < each:
                raise RayError(message)
            print(f"{message}: some workers wait for more", flush=True)


def _absolute(config: CorpusConfig, directory: CorpusDirectory) -> CorpusConfig:
    """For workers, which run in another folder."""

    def absolute(path: str) -> str:
        return str(Path(path).absolute()) if Path(path).exists() else path  # a hub id stays

    return replace(
        config,
        model=absolute(config.model),
        input=absolute(config.input),
        output=str(directory.path),
        adapter=config.adapter and absolute(config.adapter),
    )


def _environment(wanted: RayConfig) -> dict[str, str]:
    """What keeps a worker to its share. XLA takes all cores for its threads and, on a GPU, three
    quarters of the memory, whatever Ray was told."""
    return {
        "NPROC": str(wanted.cpus),  # the number of XLA's threads on the CPU
        "XLA_PYTHON_CLIENT_PREALLOCATE": os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "false"),
        **({} if wanted.gpus else {"JAX_PLATFORMS": "cpu"}),
    }


def _spread(
    ray: Any,
    config: CorpusConfig,
    missing: Sequence[int],
    done: Callable[[int, Record], object],
) -> None:
    wanted = config.ray
    actor = ray.remote(Worker).options(
        num_cpus=wanted.cpus,
        num_gpus=wanted.gpus,
        max_restarts=wanted.restarts,
        max_task_retries=wanted.restarts,
        runtime_env={"env_vars": _environment(wanted)},
    )
    left = list(reversed(missing))
    running: dict[Any, tuple[Any, int]] = {}

    def give(worker: Any) -> None:
        number = left.pop()
        running[worker.encode.remote(number)] = worker, number

    for _ in range(min(wanted.workers, len(missing))):
        give(actor.remote(config))
    names: dict[Any, str] = {}
    while running:
        (result,), _ = ray.wait(list(running), num_returns=1)
        worker, number = running.pop(result)
        who, record = ray.get(result)
        if left:
            give(worker)
        if names.get(worker, who) != who:
            print(f"a worker died and was started again: {names[worker]}", flush=True)
        if names.get(worker) != who:
            print(f"worker: {who}", flush=True)
            names[worker] = who
        done(number, record)
