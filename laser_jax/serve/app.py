"""The routes: bodies in, answers out. Whatever takes long runs in threads beside the event loop."""

import asyncio
import base64
import hmac
import ipaddress
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from laser_jax.inference.batch_encoder import NotFiniteError
from laser_jax.inference.retriever import LatentRetriever, shortened
from laser_jax.serve.batching import Batcher
from laser_jax.serve.index import Index
from laser_jax.serve.metrics import Metrics
from laser_jax.serve.requests import (
    EmbeddingRequest,
    Limits,
    RequestError,
    Texts,
    parse_embedding,
    parse_search,
    token_rows,
)
from laser_jax.think.page import render_page
from laser_jax.think.site import Site, answer

LARGEST_BODY = 16 << 20
"""Bytes of a request's body."""
_PAGES = 8
"""Requests for pages that may wait."""
_OPEN = ("/health", "/ready")
"""What is answered without a key."""
_log = logging.getLogger(__name__)
_A = TypeVar("_A", bound=Texts)


@dataclass
class Service:
    """What the routes work with."""

    retriever: LatentRetriever
    batcher: Batcher
    limits: Limits
    metrics: Metrics
    timeout_s: float
    """The most time that a request may take."""
    keys: Sequence[bytes] = ()
    """Any of them is wanted of clients; none where there is none."""
    local_only: bool = True
    """Whether the server listens on the loopback, where only names of this machine are served."""
    index: Index | None = None
    """Both are set before `batcher.ready`."""
    site: Site | None = None
    tokenise: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 1, "tokenise"))
    find: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 1, "search"))
    page: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 1, "page"))
    pages: int = 0

    def require_ready(self) -> None:
        """Raises a RequestError until everything is compiled, and while the server ends."""
        if not self.batcher.ready.is_set():
            text = "the server compiles its programs, or is ending; /ready says when it is ready"
            raise RequestError(text, status=503, code="not_ready", retry_after=5)


def make_app(service: Service) -> ASGIApp:
    """The ASGI application."""

    def route(handler: Callable[[Service, Request], Awaitable[Response]]) -> Any:
        async def bound(request: Request) -> Response:
            try:
                async with asyncio.timeout(service.timeout_s):
                    return await handler(service, request)
            except Exception as error:
                return _failed(error)

        return bound

    routes = [
        Route("/v1/embeddings", route(_embeddings), methods=["POST"]),
        Route("/v1/search", route(_search), methods=["POST"]),
        Route("/v1/models", route(_models)),
        Route("/v1/models/{name:path}", route(_model)),
        Route("/health", route(_health)),
        Route("/ready", route(_ready)),
        Route("/metrics", route(_metrics)),
        Route("/", route(_page)),
    ]
    handlers: Any = {HTTPException: _no_route}
    return _Guard(Starlette(routes=routes, exception_handlers=handlers), service)


class _Guard:
    """Counts requests, and refuses those without a key or of another site's pages."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, metrics = time.perf_counter(), self._service.metrics
        statuses: list[int] = []

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            await send(message)

        known = ("/v1/embeddings", "/v1/search", "/v1/models", "/metrics", "/", *_OPEN)
        label = scope["path"] if scope["path"] in known else "other"
        try:
            refusal = self._refusal(Request(scope))
            await (refusal or self._app)(scope, receive, counted)
        finally:
            metrics.requests.labels(label, str(statuses[0] if statuses else 499)).inc()
            metrics.seconds.labels(label).observe(time.perf_counter() - begun)

    def _refusal(self, request: Request) -> Response | None:
        service = self._service
        # A page of another site can make a browser ask here under a name of its own, and read what
        # comes back.
        if service.local_only and not _is_local(request.headers.get("host", "")):
            text = "this server answers names of this machine only, such as http://127.0.0.1"
            return _error(RequestError(text, status=403, code="host"))
        if service.keys and request.url.path not in _OPEN:
            given = _key(request.headers.get("authorization", ""))
            matches = [hmac.compare_digest(given, key) for key in service.keys]
            if not any(matches):
                text = "a key is wanted: send the header Authorization: Bearer KEY"
                refusal = _error(RequestError(text, status=401, code="invalid_api_key"))
                refusal.headers["WWW-Authenticate"] = 'Basic realm="laser_jax"'
                return refusal
        return None


def _key(header: str) -> bytes:
    """The key of a Bearer header, or the password of a Basic one, which browsers send."""
    kind, _, value = header.partition(" ")
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except ValueError:
            return b""
    return value.strip().encode() if kind.lower() == "bearer" else b""


def _is_local(host: str) -> bool:
    """Whether a host name, perhaps with a port, can only mean this machine."""
    name = ""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _error(error: RequestError) -> Response:
    response = _json(error.body(), error.status)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(error.retry_after)
    return response


def _json(values: Any, status: int = 200) -> Response:
    content = orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, status, media_type="application/json")


async def _no_route(request: Request, error: HTTPException) -> Response:
    text = f"{request.method} {request.url.path:.80}: {error.detail}"
    response = _error(RequestError(text, status=error.status_code, code="not_found"))
    response.headers.update(error.headers or {})
    return response


def _failed(error: Exception) -> Response:
    """The answer to a request that an error has ended."""
    match error:
        case RequestError():
            return _error(error)
        case ClientDisconnect():
            return Response(status_code=499)  # nobody reads it
        case TimeoutError():
            text = "the request took longer than this server allows: send fewer texts, or try later"
            return _error(RequestError(text, status=504, code="timeout"))
        case NotFiniteError():
            text = str(error)
        case _:
            _log.error("a request failed: %s", error, exc_info=error)
            text = f"{type(error).__name__}; the server's log says more"
    return _error(RequestError(text, status=500, code="internal_error"))


async def _body(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > LARGEST_BODY:
            text = f"the body is larger than {LARGEST_BODY >> 20} MiB: send fewer texts a request"
            raise RequestError(text, status=413, code="body_too_large")
    return b"".join(parts)


# --- the routes --------------------------------------------------------------------------------


async def _embedded(
    service: Service, request: Request, parse: Callable[[bytes, Limits], _A]
) -> tuple[_A, np.ndarray, int]:
    """What a request asks for, the vectors [N, D] float32 of its texts, and their tokens."""
    service.batcher.require_room(1)  # before the body is read
    body = await _body(request)

    def prepare() -> tuple[_A, list[list[int]]]:
        asked = parse(body, service.limits)
        return asked, token_rows(service.retriever.prompts, asked)

    asked, rows = await asyncio.get_running_loop().run_in_executor(service.tokenise, prepare)
    vectors_ND = await asyncio.wrap_future(service.batcher.submit(rows, asked.thinking_steps))
    return asked, vectors_ND, sum(map(len, rows))


async def _embeddings(service: Service, request: Request) -> Response:
    service.require_ready()
    asked, vectors_ND, tokens = await _embedded(service, request, parse_embedding)
    return await asyncio.to_thread(_embedding_list, asked, vectors_ND, tokens)


def _embedding_list(asked: EmbeddingRequest, vectors_ND: np.ndarray, tokens: int) -> Response:
    if asked.dimensions < vectors_ND.shape[1]:
        vectors_ND = np.ascontiguousarray(shortened(vectors_ND, asked.dimensions))
    shown: list[Any] = list(vectors_ND)
    if asked.base64:
        shown = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors_ND]
    data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(shown)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return _json({"object": "list", "data": data, "model": asked.model, "usage": usage})


async def _search(service: Service, request: Request) -> Response:
    service.require_ready()
    if (index := service.index) is None:
        text = "this server has no corpus: start it with --corpus or --corpus_vectors"
        raise RequestError(text, status=404, code="no_corpus")
    asked, queries_QD, _ = await _embedded(service, request, parse_search)
    loop = asyncio.get_running_loop()
    found = await loop.run_in_executor(service.find, index.search, queries_QD, asked.k)
    results = [
        {
            "index": place,
            "documents": [
                {"id": id_, "score": score, "text": index.texts.get(id_)} for id_, score in ranked
            ],
        }
        for place, ranked in enumerate(found)
    ]
    return _json({"object": "list", "data": results, "model": service.limits.name})


async def _models(service: Service, _: Request) -> Response:
    data = [_described(service, id_) for id_ in service.limits.models]
    return _json({"object": "list", "data": data})


async def _model(service: Service, request: Request) -> Response:
    asked = request.path_params["name"]
    service.limits.role_of(asked)
    return _json(_described(service, asked))


def _described(service: Service, id_: str) -> dict[str, Any]:
    limits, prompt = service.limits, service.retriever.prompts.config
    return {
        "id": id_,
        "object": "model",
        "created": 0,
        "owned_by": "laser_jax",
        "dimensions": limits.dimension,
        "thinking_steps": limits.thinking_steps,
        "document_thinking_steps": limits.document_thinking_steps,
        "max_thinking_steps": limits.max_thinking_steps,
        "query_max_length": prompt.query_max_length,
        "document_max_length": prompt.document_max_length,
        "needs_instruction": limits.needs_instruction,
    }


async def _health(_: Service, __: Request) -> Response:
    return PlainTextResponse("alive\n")


async def _ready(service: Service, _: Request) -> Response:
    service.require_ready()
    return PlainTextResponse("ready\n")


async def _metrics(service: Service, _: Request) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _page(service: Service, request: Request) -> Response:
    service.require_ready()
    site = service.site
    assert site is not None
    if service.pages >= _PAGES:
        text = "too many pages are being made"
        raise RequestError(text, status=429, code="queue_full", retry_after=5)
    service.pages += 1
    try:
        loop = asyncio.get_running_loop()
        status, page = await loop.run_in_executor(service.page, answer, site, request.url.query)
    except Exception as error:  # a fault of ours: the page says so, the log where
        _log.exception("the page failed")
        text = f"{type(error).__name__}: {error}. The server's log says where."
        page = render_page(model=site.model, corpus=site.corpus, error=text)
        status = HTTPStatus.INTERNAL_SERVER_ERROR
    finally:
        service.pages -= 1
    headers = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "script-src 'none'"}
    return HTMLResponse(page, status, headers)
