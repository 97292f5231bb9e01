"""The page with a form in front of it, served by the standard library.

`answer` is the whole site: an address in, a status and a page out. The form is sent by GET, so that
an address shows the same again, and there is nothing that a request could change.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
import threading
import traceback
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from laser_jax.files.terminal import printable
from laser_jax.think.page import Form, render_page
from laser_jax.think.thought import Inspector

LARGEST_STEPS = 32
"""A page with more columns cannot be read."""
LARGEST_QUEUE = 32
"""Connections at a time, each of which has a thread."""
_SECONDS = 30
"""How long a connection may say nothing, or take nothing."""
_EXAMPLES = 8


@dataclass(frozen=True)
class Site:
    """What is asked, and what the page says of it. The form starts with `instruction` and
    `num_thinking_steps`; None takes the inspector's."""

    inspector: Inspector
    model: str
    corpus: str
    instruction: str | None = None
    num_thinking_steps: int | None = None

    def form(self, fields: dict[str, str]) -> Form:
        """The form with what was sent, and where nothing was, what stands in; and with queries from
        all over the corpus's file."""
        inspector = self.inspector
        known = inspector.known(fields.get("query", ""))
        instruction = known.instruction if self.instruction is None else self.instruction
        steps = self.num_thinking_steps or inspector.config.num_thinking_steps
        queries = list(inspector.corpus.queries.values()) if inspector.corpus else []
        shown = queries[:: max(len(queries) // _EXAMPLES, 1)][:_EXAMPLES]
        return Form(
            query=known.text,
            instruction=fields.get("instruction", instruction or ""),
            steps=fields.get("steps", str(steps)),
            reasoning=fields.get("reasoning") or known.reasoning or "",
            largest_steps=LARGEST_STEPS,
            examples=[(q.text, "/?" + urlencode({"query": q.text})) for q in shown],
        )


def answer(site: Site, address: str) -> tuple[HTTPStatus, str]:
    """Status and page for a GET of `address` (path and query string)."""
    parts = urlsplit(address)
    # a form ends its lines with CR LF; the model's separators are those of Unix
    fields = {
        name: values[-1].replace("\r\n", "\n")
        for name, values in parse_qs(parts.query, keep_blank_values=True).items()
    }
    form = site.form(fields)
    known: dict[str, Any] = {"model": site.model, "corpus": site.corpus, "form": form}
    if parts.path != "/":
        text = f"There is no page {parts.path}; the form is at /."
        return HTTPStatus.NOT_FOUND, render_page(**known, error=text)
    if not fields:
        return HTTPStatus.OK, render_page(**known)
    K = form.steps
    try:
        if not (K.isascii() and K.isdigit() and 1 <= int(K) <= LARGEST_STEPS):
            raise ValueError(f"K must be a whole number from 1 to {LARGEST_STEPS}, got {K!r}")
        thought = site.inspector.think(
            form.query,
            instruction=form.instruction,
            reasoning=form.reasoning,
            num_thinking_steps=int(K),
        )
    except ValueError as error:
        return HTTPStatus.BAD_REQUEST, render_page(**known, error=str(error))
    return HTTPStatus.OK, render_page(**known, thought=thought)


def _is_local(host: str) -> bool:
    """Whether a host name, perhaps with a port, can only mean this machine."""
    name = ""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


class PageServer(ThreadingHTTPServer):
    """Listens from its creation on; answers once `site` is set and `serve_forever` runs.

    A browser opens connections that it does not use, so each has a thread; the model has one at a
    time. One that is silent is ended, and beyond `LARGEST_QUEUE` none is taken.

    Attributes:
        local_only: it listens on the loopback.
        url: the address of the page.
    """

    site: Site | None = None

    def __init__(self, host: str, port: int) -> None:
        """Listens on an address, or a name of one, of IPv4 or IPv6; a name of both means IPv4.

        Raises:
            OSError: host or port cannot be had; says how to mend it.
        """
        self.model_lock = threading.Lock()
        self._free = threading.Semaphore(LARGEST_QUEUE)
        try:
            kind, passive = socket.SOCK_STREAM, socket.AI_PASSIVE
            found = socket.getaddrinfo(host or None, port, type=kind, flags=passive)
            first = min(found, key=lambda one: one[0] != socket.AF_INET)
            self.address_family = first[0]
            super().__init__(first[4], _Handler)  # pyright: ignore[reportArgumentType]
        except (OSError, UnicodeError) as error:  # the latter of names that no host can have
            mend = "the host of --serve is an address or a name of this machine, such as 127.0.0.1"
            if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES):
                mend = "choose another port, from 1024 on (0 takes any free one)"
            reason = getattr(error, "strerror", error)
            raise OSError(f"cannot listen on {host}, port {port} ({reason}): {mend}") from error
        bound, port = str(self.server_address[0]), self.server_address[1]
        self.local_only = ipaddress.ip_address(bound).is_loopback
        self.url = f"http://[{bound}]:{port}/" if ":" in bound else f"http://{bound}:{port}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts the thread of a connection, or ends the connection where there are too many."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = _SECONDS

    def do_GET(self) -> None:
        # Another site can make a browser ask here under a name of its own, and read what comes
        # back: only names of this machine are served on its loopback.
        if self.server.local_only and not _is_local(self.headers.get("Host", "")):
            self.send_error(HTTPStatus.FORBIDDEN, f"Ask for {self.server.url}")
            return
        site = self.server.site
        assert site is not None
        try:
            with self.server.model_lock:
                status, page = answer(site, self.path)
        except Exception as error:  # a fault of ours: the page says so, the terminal where
            print(printable(traceback.format_exc()), file=sys.stderr)
            text = f"{type(error).__name__}: {error}. The terminal shows where."
            page = render_page(model=site.model, corpus=site.corpus, error=text)
            status = HTTPStatus.INTERNAL_SERVER_ERROR
        body = page.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Keeps queries off the terminal."""
