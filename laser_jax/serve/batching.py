"""Rows of many requests become batches: one thread owns the device, and requests wait for futures.

While the device works, arriving rows queue up; whatever waits when it is free is cut into batches
of like length, few where a batch costs much and many where padding does (`data.buckets`). Rows of
different K share a batch: a shorter thought is the beginning of a longer one, so the batch thinks
as long as its longest row, and each row takes the embedding after its own K.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass

import jax
import numpy as np
from tqdm import tqdm

from laser_jax.inference.batch_encoder import LatentEncoder, NotFiniteError
from laser_jax.serve.metrics import Metrics
from laser_jax.serve.requests import RequestError

_BATCHES_PER_WINDOW = 4
_LINGER = 0.1
"""Of the last batch's time: how long a batch that is not full waits for rows of other requests."""
_log = logging.getLogger(__name__)


class _Job:
    """The rows of one request on their way: [N, D] float32 when all have come."""

    def __init__(self, rows: Sequence[Sequence[int]], K: int, dimension: int) -> None:
        self.rows, self.K = rows, K
        self.vectors_ND = np.empty((len(rows), dimension), np.float32)
        self.left = len(rows)
        self.future: Future[np.ndarray] = Future()

    def take(self, place: int, vector_D: np.ndarray) -> None:
        self.vectors_ND[place] = vector_D
        self.left -= 1
        if self.left == 0 and self._is_wanted():
            self.future.set_result(self.vectors_ND)

    def fail(self, error: Exception) -> None:
        """Ends the request; its other rows are dropped."""
        if self._is_wanted():
            self.future.set_exception(error)

    def _is_wanted(self) -> bool:
        """Whether the request still waits; from now on it cannot be cancelled."""
        return not self.future.done() and self.future.set_running_or_notify_cancel()


_Row = tuple[_Job, int]
"""A request and the place of a row in it."""


@dataclass
class _Batch:
    """A batch on the device."""

    rows: list[_Row]
    vectors_SBD: jax.Array
    """At K = 1, 2, ..., S."""
    begun: float


class Batcher:
    """Embeds the rows of requests, batch by batch, in a thread of its own. `ready` is set once
    everything is compiled."""

    def __init__(
        self,
        encoder: LatentEncoder,
        thinking_steps: Sequence[int],
        *,
        max_queue_rows: int,
        metrics: Metrics,
    ) -> None:
        """Starts nothing. `thinking_steps` are the Ks that programs are compiled for, the largest
        that is served among them; a batch takes the first that is enough for all its rows."""
        self.ready = threading.Event()
        self._encoder, self._metrics = encoder, metrics
        self._levels = [tuple(range(1, K + 1)) for K in sorted(set(thinking_steps))]
        self._most = max_queue_rows
        self._pending: deque[_Row] = deque()
        self._changed = threading.Condition()
        self._ending = False
        self._overhead = 0  # of a batch, in tokens
        self._pace = 0.0  # rows per second, of the latest batches
        self._last_seconds = 0.0
        self._crowded = False  # the last batch held rows of several requests
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)

    def warm_up(self, shortest: int, longest: int) -> None:
        """Compiles every program that rows of `shortest` to `longest` tokens can need, and measures
        what a batch costs beside its tokens."""
        buckets = self._encoder.buckets
        widths = sorted({width for _, width in buckets.shapes(shortest, longest)})
        programs = [(Ks, width) for Ks in self._levels for width in widths]
        for Ks, width in tqdm(programs, "compile", disable=None, leave=False):
            self.require_going_on()
            self._encoder.warm_up(width, Ks, shortest=width)
        self._overhead = self._encoder.overhead(widths[0], self._levels[0])
        _log.info("a batch takes as long as %d tokens, beside its own", self._overhead)

    def start(self) -> None:
        """Begins to take rows off the queue."""
        with self._changed:
            self.require_going_on()
            self._thread.start()
            self.ready.set()

    def stop(self) -> None:
        """Finishes what waits, then ends the thread."""
        with self._changed:
            self.ready.clear()
            self._ending = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def require_going_on(self, _: object = None) -> None:
        """Raises a CancelledError once the batcher was told to stop."""
        if self._ending:
            raise CancelledError("told to end before it was ready")

    def require_room(self, count: int) -> None:
        """Raises a RequestError where the queue cannot take so many rows."""
        waiting = len(self._pending)
        if waiting + count > self._most:
            # until those that wait will be done, at the present pace
            wait = max(math.ceil(waiting / self._pace) if self._pace else 1, 1)
            text = f"too many texts are waiting; try again in {wait} s"
            raise RequestError(text, status=429, code="queue_full", retry_after=wait)

    def submit(self, rows: Sequence[Sequence[int]], K: int) -> Future[np.ndarray]:
        """Queues the rows of a request, at least one and none longer than `warm_up` was told, for a
        K that is served. Returns a future of [N, D] float32 unit rows. Cancelled, its rows that
        wait are dropped; it fails with a NotFiniteError where a vector of its own is not finite,
        and with what the device raised. Other requests go on. Raises as `require_room`."""
        with self._changed:
            job = _Job(rows, K, self._encoder.config.backbone.hidden_size)
            self.require_room(len(rows))
            self._pending.extend((job, place) for place in range(len(rows)))
            self._metrics.queued.set(len(self._pending))
            self._changed.notify()
        return job.future

    # --- in the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        size = self._encoder.buckets.batch_size
        running: _Batch | None = None
        while True:
            # A second batch is begun behind the one that runs only if it is a full one: rows that
            # come meanwhile would otherwise be spread over many small batches.
            if running is not None and len(self._pending) < size:
                self._finish(running)
                running = None
            window = self._window(linger=running is None)
            if window is None:
                return
            rows = enumerate(map(_ids, window))
            for batch in self._encoder.buckets.cut(rows, self._overhead):
                begun = self._begin([window[place] for place, _ in batch])
                if running is not None:
                    self._finish(running)
                running = begun

    def _window(self, *, linger: bool) -> list[_Row] | None:
        """The rows that have waited longest, a few batches of them; None at the end."""
        size = self._encoder.buckets.batch_size
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._ending)
            if linger and self._crowded and not self._ending:
                wait = _LINGER * self._last_seconds
                self._changed.wait_for(lambda: len(self._pending) >= size, wait)
            if not self._pending:
                return None
            count = min(len(self._pending), _BATCHES_PER_WINDOW * size)
            window = [self._pending.popleft() for _ in range(count)]
            self._metrics.queued.set(len(self._pending))
        return [row for row in window if not row[0].future.done()]

    def _begin(self, rows: list[_Row]) -> _Batch | None:
        """Sends a batch to the device; its requests fail where that does."""
        most = max(job.K for job, _ in rows)
        Ks = next(Ks for Ks in self._levels if len(Ks) >= most)
        begun = time.perf_counter()
        try:
            return _Batch(rows, self._encoder.start(list(map(_ids, rows)), Ks), begun)
        except Exception as error:
            self._failed(rows, error)
            return None

    def _finish(self, batch: _Batch) -> None:
        """Waits for a batch and hands its vectors out."""
        try:
            vectors_SBD = np.asarray(batch.vectors_SBD)
        except Exception as error:
            self._failed(batch.rows, error)
            return
        for b, (job, place) in enumerate(batch.rows):
            vector_D = vectors_SBD[job.K - 1, b]
            if np.isfinite(vector_D).all():
                job.take(place, vector_D)
            else:
                job.fail(NotFiniteError(f"input[{place}]", self._encoder.config.dtype))
        self._count(batch, vectors_SBD.shape[1])

    def _count(self, batch: _Batch, size: int) -> None:
        count = len(batch.rows)
        self._last_seconds = seconds = time.perf_counter() - batch.begun
        self._crowded = any(job is not batch.rows[0][0] for job, _ in batch.rows)
        self._pace = 0.9 * self._pace + 0.1 * count / seconds if self._pace else count / seconds
        self._metrics.batch_seconds.observe(seconds)
        self._metrics.fill.observe(count / size)
        self._metrics.rows.inc(count)
        self._metrics.tokens.inc(sum(len(_ids(row)) for row in batch.rows))

    def _failed(self, rows: list[_Row], error: Exception) -> None:
        _log.error("a batch of %d rows failed: %s", len(rows), error, exc_info=error)
        for job, _ in rows:
            job.fail(error)


def _ids(row: _Row) -> Sequence[int]:
    job, place = row
    return job.rows[place]
