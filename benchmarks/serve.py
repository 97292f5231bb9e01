"""The server beside the retriever that it serves: texts a second, and how long a request takes.

    python -m benchmarks.serve --model DIR [--clients 1 8 64] [--texts 256]

Clients send a text a request, each its next one when it has its answer, and all of them the same
texts: documents, of 2 to 400 words in equal parts of their logarithm, drawn by a fixed seed. The
retriever embeds them in one call in this process. With `mixed` the K of requests goes 1, 2, ..., 8.
The server is a process of its own on the same machine, so that clients take time from it. So is the
peer of `--peer`, which must know a model `model:document` and is compared with ours at K = 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np

from benchmarks import measure
from benchmarks.measure import BenchmarkError, Report, Run, timing_fields
from laser_jax.inference.options import EncoderOptions
from laser_jax.inference.retriever import EncodingStats, LatentRetriever

IN_PROCESS = "LatentRetriever, one call"
MIXED = 8
"""The largest K of mixed requests."""
_WORDS = (
    *("river", "town", "hill", "where", "people"),
    *("trade", "salt", "and", "wool", "with", "ships"),
)


def draw_texts(count: int) -> list[str]:
    """The documents."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(np.log(2), np.log(400), count)).astype(int)
    return [" ".join(rng.choice(_WORDS, length)) for length in lengths]


@contextlib.contextmanager
def serving(options: argparse.Namespace) -> Iterator[str]:
    """The address of a server that is ready.

    Raises:
        BenchmarkError: it ended instead.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "laser_jax.serve", "--model", options.model, "--name", "model"]
    command += ["--listen", str(port), "--max_thinking_steps", str(MIXED), "--devices", "1"]
    command += ["--compute_dtype", options.dtype, "--timeout_s", "600"]
    command += ["--max_length", str(options.max_length)]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"{url}/ready", timeout=600).status_code == 200:
                    break
            time.sleep(0.2)
        else:
            raise BenchmarkError("the server did not start; it says why above")
        yield url
    finally:
        process.terminate()
        process.wait()


async def ask(
    url: str, texts: list[str], clients: int, most: int | None, seconds: list[float]
) -> np.ndarray:
    """The vectors of all texts, by so many clients at once, at K = 1 to `most`, or the model's."""
    found: list[Any] = [None] * len(texts)
    places = iter(range(len(texts)))

    async def one_client(client: httpx2.AsyncClient) -> None:
        for place in places:
            body: dict[str, Any] = {"model": "model:document", "input": texts[place]}
            body |= {"truncate": True, "encoding_format": "float"}
            if most is not None:
                body["thinking_steps"] = 1 + place % most
            began = time.perf_counter()
            answer = await client.post(f"{url}/v1/embeddings", json=body)
            answer.raise_for_status()
            found[place] = answer.json()["data"][0]["embedding"]
            seconds.append(time.perf_counter() - began)

    limits = httpx2.Limits(max_connections=clients)
    async with httpx2.AsyncClient(timeout=600, limits=limits) as client:
        await asyncio.gather(*(one_client(client) for _ in range(clients)))
    return np.array(found, np.float32)


def fill(options: argparse.Namespace, report: Report) -> None:
    """Checks that both give the same vectors, and times them in turn.

    Raises:
        BenchmarkError: they differ, or the server does not start.
    """
    texts, waits = draw_texts(options.texts), {}
    told = {"model": options.model, "compute_dtype": options.dtype, "devices": 1}
    retriever = LatentRetriever.from_options(EncoderOptions(**told, max_length=options.max_length))
    contenders: dict[str, Run] = {
        IN_PROCESS: lambda: retriever.encode_document(texts, stats=EncodingStats())
    }
    with serving(options) as url:
        asked = [("", url, None), (f", K = 1 to {MIXED}", url, MIXED)]
        if options.peer is not None:
            asked += [(", K = 1", url, 1), (" of the peer", options.peer, None)]
        for clients in options.clients:
            for what, where, most in asked:
                name = f"{clients} clients{what}"
                waits[name] = []
                told = (where, texts, clients, most, waits[name])
                contenders[name] = lambda told=told: asyncio.run(ask(*told))
        ours = contenders[IN_PROCESS]()
        theirs = contenders[f"{options.clients[0]} clients"]()
        worst = float(np.abs(np.asarray(ours) - np.asarray(theirs)).max())
        if worst > 1e-3 and options.dtype == "float32":  # a thought amplifies rounding
            raise BenchmarkError(f"the server's vectors differ from the retriever's by {worst:.1e}")
        times = measure.time_alternating(contenders, repeats=options.repeats)
    for name in contenders:
        row = {"contender": name, **timing_fields(times, name, base=IN_PROCESS)}
        row["texts_per_second"] = len(texts) / row["seconds"]["median"]
        row["pace"] = 1 / row["ratio"]["median"]
        timed = waits.get(name, [])[-options.repeats * len(texts) :]
        if timed:
            row["p50"], row["p99"] = np.quantile(timed, (0.5, 0.99)).tolist()
        report.rows.append(row)


COLUMNS = {
    "contender": measure.value("contender"),
    "texts/s": measure.value("texts_per_second", ".1f"),
    "of the retriever's": measure.value("pace", ".2f"),
    "request, median ms": measure.value("p50", ".0f", 1e-3),
    "request, 99th percentile ms": measure.value("p99", ".0f", 1e-3),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a directory with laser_config.json")
    parser.add_argument("--dtype", default="float32", help="to compute in; default float32")
    measure.add_numbers(parser, {"texts": (256, "how many"), "max_length": (256, "tokens")})
    parser.add_argument("--peer", metavar="URL", help="of another server, before /v1/embeddings")
    clients = [1, 8, 64]
    parser.add_argument("--clients", type=measure.positive, nargs="+", default=clients)


PROGRAM = measure.Program("serve", __doc__, fill, COLUMNS, add_flags, {"texts": 4}, repeats=3)

if __name__ == "__main__":
    PROGRAM.main(sys.argv[1:])
