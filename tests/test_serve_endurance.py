"""A server under many mixed requests: memory, threads and descriptors do not grow with them.

LASER_REQUESTS sets how many; docs/serve.md has what 10,000 gave.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest

CLIENTS = 8
REQUESTS = int(os.environ.get("LASER_REQUESTS", "400"))
pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads /proc (Linux)")


class Use(NamedTuple):
    """What a process holds."""

    mebibytes: float
    threads: int
    descriptors: int


def use_of(pid: int) -> Use:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    pairs = dict(line.split(":", 1) for line in status)
    descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Use(int(pairs["VmRSS"].split()[0]) / 1024, int(pairs["Threads"]), descriptors)


def bodies() -> list[tuple[str, dict[str, Any], int]]:
    """Route, body and the status that is to come: every kind of request once."""
    document = {"model": "model:document"}
    return [
        ("embeddings", {**document, "input": "Ulm lies on the Danube."}, 200),
        ("embeddings", {**document, "input": ["a", "b " * 15, "c"], "thinking_steps": 3}, 200),
        ("embeddings", {**document, "input": "x", "encoding_format": "base64"}, 200),
        ("embeddings", {**document, "input": "x", "dimensions": 4, "thinking_steps": 1}, 200),
        ("embeddings", {"model": "model:query", "input": "Where?", "instruction": "Find it"}, 200),
        ("search", {"query": "Where is Ulm?", "instruction": "Find the town", "k": 2}, 200),
        ("embeddings", {**document, "input": ""}, 400),
        ("embeddings", {**document, "input": "x", "thinking_steps": 99}, 400),
    ]


async def ask(url: str, count: int) -> None:
    """Sends so many requests, a few at a time; every ninth connection is dropped without waiting
    for its answer."""
    kinds, turns = bodies(), iter(range(count))
    port = int(url.rpartition(":")[2])

    async def one_client(client: httpx2.AsyncClient) -> None:
        for turn in turns:
            if turn % 9 == 8:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
                writer.write(head + b"{")
                await writer.drain()
                writer.close()
                await writer.wait_closed()
                continue
            route, body, status = kinds[turn % len(kinds)]
            answer = await client.post(f"{url}/v1/{route}", json=body)
            assert answer.status_code == status, answer.text

    async with httpx2.AsyncClient(timeout=120) as client:
        await asyncio.gather(*(one_client(client) for _ in range(CLIENTS)))


def settled(pid: int, descriptors: int) -> Use:
    """What the process holds once its connections are closed, so that it has at most so many
    descriptors; after a minute, whatever it holds then."""
    for _ in range(600):
        if use_of(pid).descriptors <= descriptors:
            break
        time.sleep(0.1)
    return use_of(pid)


def test_many_requests_leave_memory_threads_and_descriptors_as_they_were(
    thinking_model: Path, one_device: dict[str, str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "laser_jax.serve", "--model", str(thinking_model)]
    command += ["--listen", url.rpartition(":")[2], "--max_length", "64"]
    command += ["--batch_size", "8"]
    command += ["--corpus", str(thinking_model.parent / "corpus")]
    server = subprocess.Popen(command, env=one_device)
    try:
        with httpx2.Client(timeout=120) as client:
            while True:
                assert server.poll() is None
                try:
                    if client.get(f"{url}/ready").status_code == 200:
                        break
                except httpx2.TransportError:
                    pass
                time.sleep(0.1)
        idle = use_of(server.pid)
        asyncio.run(ask(url, REQUESTS // 3))  # allocators and pools grow to their size
        before = settled(server.pid, idle.descriptors)
        asyncio.run(ask(url, REQUESTS - REQUESTS // 3))
        after = settled(server.pid, before.descriptors)
    finally:
        server.terminate()
        server.wait()
    print(f"{REQUESTS} requests: {idle} -> {before} -> {after}")
    # at most a worker for each request that is answered at a time
    assert after.threads <= idle.threads + 2 * CLIENTS
    assert after.descriptors <= before.descriptors
    assert after.mebibytes < before.mebibytes + 20
