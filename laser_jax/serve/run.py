"""Serves a model: `python -m laser_jax.serve --model DIR`.

`POST /v1/embeddings` as OpenAI's clients know it, `POST /v1/search` over a corpus, and at `/` the
page that shows what the model thinks. Everything is compiled before `/ready` says so.
"""

import asyncio
import ipaddress
import logging
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from laser_jax.command_line import program
from laser_jax.config import ConfigError
from laser_jax.encode_corpus.encoding import identity
from laser_jax.evaluate.beir import BeirDataset
from laser_jax.files.durable import Digest
from laser_jax.files.reading import decode
from laser_jax.inference.options import EncoderOptions, require_positions
from laser_jax.inference.retriever import EncodingStats, LatentRetriever
from laser_jax.serve.app import Service, make_app
from laser_jax.serve.batching import Batcher
from laser_jax.serve.index import encode_index, read_index
from laser_jax.serve.metrics import Metrics
from laser_jax.serve.requests import Limits
from laser_jax.settings import require, require_in
from laser_jax.think.site import Site
from laser_jax.think.thought import Inspector, load_corpus

_CONNECTIONS = 512
"""At a time; beyond them a request is answered with 503."""
_SILENT_SECONDS = 30
"""How long a connection may stay open without a request."""
_WAITING = 4
"""How many of the largest requests may wait; beyond them a client is told when to come again."""
_SHORT_BATCHES = (1, 8, 32)  # what waits is seldom a full batch of one length
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServeOptions(EncoderOptions):
    """Serves embeddings, search and the page of thoughts over HTTP."""

    listen: str = "127.0.0.1:8000"
    """HOST:PORT, or a port alone; port 0 takes a free one. Another host than the loopback lets
    other machines ask."""
    name: str | None = None
    """The model's name for clients. None: that of its directory."""
    instruction: str | None = None
    """The task, for queries of clients that send none."""
    corpus: str | None = None
    """A BEIR directory: the texts of search results, and what the page ranks. Without
    --corpus_vectors it is embedded at the start."""
    corpus_vectors: str | None = None
    """A directory that laser_jax.encode_corpus wrote by this model: what is searched."""
    max_thinking_steps: int | None = None
    """The largest K that a request may ask for. None: the model's."""
    max_rows: int = 2048
    """Texts of a request. Four times as many may wait for their turn."""
    timeout_s: float = 60.0
    """Seconds that a request may take."""
    api_key_file: str | None = None
    """A file with keys, one a line: clients must send one of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        address_of(self.listen)
        require_in("[1, inf)", self, "", "max_thinking_steps", "max_rows")
        require_in("(0, inf)", self, "", "timeout_s")


def address_of(text: str) -> tuple[str, int]:
    """Host and port of HOST:PORT, or of a port alone. Raises a ConfigError on anything else."""
    try:
        parts = urlsplit(f"//{text}" if ":" in text else f"//127.0.0.1:{text}")
        host, port = parts.hostname, parts.port
    except ValueError:  # no number, or none of a port
        host, port = None, None
    if host is None or port is None:
        raise ConfigError(f"listen wants PORT or HOST:PORT, a port in 0..65535, got {text!r}")
    return host, port


def bind(host: str, port: int) -> socket.socket:
    """A listening socket at an address of this machine, or a name of one, of IPv4 or IPv6. Raises
    an OSError, which says how to mend it, where host or port cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        return socket.create_server(address[:2], family=family, backlog=_CONNECTIONS)
    except (OSError, UnicodeError) as error:  # the latter of names that no host can have
        mend = "the host of --listen is an address or a name of this machine, such as 127.0.0.1"
        if isinstance(error, OSError) and error.errno in (13, 98, 48):
            mend = "choose another port, from 1024 on (0 takes any free one)"
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot listen on {host}, port {port} ({reason}): {mend}") from error


def read_keys(path: str | Path) -> tuple[bytes, ...]:
    """The keys of a file, one a line. Raises a ConfigError where it holds none, and an OSError."""
    lines = decode(Path(path).read_bytes(), path).splitlines()
    keys = tuple(line.strip().encode() for line in lines if line.strip())
    require(bool(keys), f"{path} holds no key; write one a line")
    return keys


def load(options: ServeOptions, *, local_only: bool) -> tuple[Service, Callable[[], None]]:
    """The service, its model and corpus read, and the function that makes it ready: compiles, reads
    or embeds the corpus, and starts the batches. Raises a FileNotFoundError or ValueError that
    names the file or option that cannot be used."""
    keys = read_keys(options.api_key_file) if options.api_key_file is not None else ()
    corpus = load_corpus(options.corpus) if options.corpus is not None else None
    seen = Digest()
    retriever = LatentRetriever.from_options(options, seen=seen)
    config, prompts = retriever.encoder.config, retriever.prompts
    own, of_documents = config.num_thinking_steps, config.documents_at
    largest = max(own, of_documents)
    most = options.max_thinking_steps or largest
    require(most >= largest, f"max_thinking_steps {most} is below the model's K, {largest}")
    require_positions(config, "query_max_length", most)
    require_positions(config, "document_max_length", most)
    prompts.require_room([options.instruction or ""], explicit=False)
    metrics, wanted = Metrics(), "{instruction}" in prompts.config.query_template
    limits = Limits(
        name=options.name or Path(options.model).resolve().name,
        dimension=config.backbone.hidden_size,
        thinking_steps=own,
        document_thinking_steps=of_documents,
        max_thinking_steps=most,
        max_rows=options.max_rows,
        instruction=options.instruction,
        needs_instruction=wanted and options.instruction is None,
    )
    room = _WAITING * options.max_rows
    encoder = retriever.encoder.with_shapes(short_batches=_SHORT_BATCHES)
    service = Service(
        retriever=retriever,
        batcher=Batcher(encoder, (of_documents, own, most), max_queue_rows=room, metrics=metrics),
        limits=limits,
        metrics=metrics,
        timeout_s=options.timeout_s,
        keys=keys,
        local_only=local_only,
    )
    found = (*identity(config, prompts, seen.hexdigest()), config.document_thinking_steps)
    return service, lambda: _make_ready(service, options, corpus, found)


def _make_ready(
    service: Service,
    options: ServeOptions,
    corpus: BeirDataset | None,
    model_identity: tuple[str, str, int | None],
) -> None:
    retriever = service.retriever
    vectors_CD = None
    if options.corpus_vectors is not None:
        service.index, vectors_CD = read_index(options.corpus_vectors, model_identity, corpus)
    elif corpus is not None:
        stats = EncodingStats(watch=service.batcher.require_going_on)
        service.index, vectors_CD = encode_index(retriever, corpus, stats)
    if service.index is not None:
        service.index.warm_up()
        service.limits = replace(service.limits, max_k=service.index.most)
    about = "No corpus; --corpus DIR shows how its ranking moves."
    if corpus is not None:
        about = f"Corpus {options.corpus}, {len(corpus.documents)} documents."
    if vectors_CD is None:
        vectors_CD = np.zeros((0, service.limits.dimension), np.float32)
    top = min(5, retriever.encoder.config.backbone.vocab_size)
    inspector = Inspector(retriever, corpus, vectors_CD, top_tokens=top, top_documents=10)
    service.site = Site(inspector, service.limits.name, about, options.instruction)
    limits = retriever.prompts.config
    longest = max(limits.query_max_length, limits.document_max_length)
    empty = (retriever.prompts.document(""), retriever.prompts.query("", ""))
    service.batcher.warm_up(min(*map(len, empty), longest), longest)
    service.batcher.start()


class _Protocol(H11Protocol):
    """Ends connections that stay open without a request."""

    _seen: object = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
        super().connection_made(transport)
        self._timer = self.loop.call_later(_SILENT_SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()  # it would keep the connection in memory
        super().connection_lost(exc)

    def _look(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is self._seen:
            self.transport.close()
            return
        self._seen = self.cycle
        self._timer = self.loop.call_later(_SILENT_SECONDS, self._look)


class Server(uvicorn.Server):
    """Answers while the service is made ready, and ends with what it has begun. `failure` is why
    the service could not be made ready."""

    def __init__(self, service: Service, make_ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            make_app(service),
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=math.ceil(service.timeout_s),
        )
        super().__init__(config)
        self.failure: Exception | None = None
        self._service, self._make_ready = service, make_ready

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the server, and it is a good end: exit status 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def serve_on(self, listening: socket.socket) -> None:
        """Answers until a signal, or until `failure` is set."""
        thread = threading.Thread(target=self._prepare, name="warm-up")
        thread.start()
        try:
            self.run(sockets=[listening])
        finally:
            self._service.batcher.stop()
            thread.join()

    def _prepare(self) -> None:
        try:
            self._make_ready()
            _log.info("ready")
        except CancelledError as told:
            _log.info("%s", told)
        except Exception as error:  # the main thread raises it
            self.failure = error
            self.should_exit = True


def serve(options: ServeOptions) -> None:
    """Serves until SIGTERM or SIGINT, then answers what it has begun. Raises as `bind`, `load` and
    `read_index`."""
    host, port = address_of(options.listen)
    with bind(host, port) as listening:  # now, not after the model is loaded
        address, port = listening.getsockname()[:2]
        local_only = ipaddress.ip_address(address).is_loopback
        service, make_ready = load(options, local_only=local_only)
        shown = f"[{address}]" if ":" in address else address
        _log.info("%s at http://%s:%d/", service.limits.name, shown, port)
        server = Server(service, make_ready)
        server.serve_on(listening)
    if server.failure is not None:
        raise server.failure
    _log.info("ended")


main = program("serve", ServeOptions, serve)
