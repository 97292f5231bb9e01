"""SIGTERM and SIGINT: a run saves and leaves between two steps, or drops work it can repeat.

In a run of several processes all must leave at the same step, or those that stay wait for ever in
the next collective. jax's own notifier sees to that: it takes SIGTERM over when
`jax.distributed.initialize` is called, passes the notice on, and agrees on a step.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class StopRequested(BaseException):
    """Raised within `StopSignal.interrupting`; holds the signal's name. No Exception, so that no
    library's error handling swallows it."""


class StopSignal:
    """Remembers SIGTERM and SIGINT until the program looks.

    Make it after `jax.distributed.initialize`, if that is called. Then SIGTERM stays with jax, and
    SIGINT is handed on as SIGTERM. Outside the main thread python allows no handlers, and a stop is
    never seen. Leaving it as a context puts the old handlers back.

    Attributes:
        received: the name of the signal that came. In a distributed run it may be set before the
            step that was agreed on: only `should_stop` decides.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._distributed = jax.distributed.is_initialized()
        self._interrupt = False
        self._first_step: int | None = None
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM)[: 1 if self._distributed else 2]:
                self._previous[number] = signal.signal(number, self._handle)

    def should_stop(self, step: int) -> bool:
        """Whether to save and leave after `step`. Call it once a step; all processes get the same
        answer for the same step."""
        if not self._distributed:
            return self.received is not None
        if self._first_step is None:
            self._first_step = step
        # jax agrees on a later call, counted from 0: numbers that began at a resumed step would
        # leap over what was agreed on before the first call
        reached = multihost_utils.reached_preemption_sync_point(step - self._first_step + 1)
        if reached:
            self.received = self.received or "SIGTERM"
        return reached

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Around work that may be dropped half-way, such as start-up and evaluation.

        Not in a distributed run, where the others would wait for this process. Raises a
        StopRequested at once when a signal came before, and as soon as one comes.
        """
        outer = self._interrupt
        self._interrupt = not self._distributed
        try:
            if self._interrupt and self.received is not None:
                raise StopRequested(self.received)
            yield
        finally:
            self._interrupt = outer

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == self.received == "SIGINT":
            raise KeyboardInterrupt  # twice: do not wait for the step
        self.received = name
        if self._distributed:
            signal.raise_signal(signal.SIGTERM)
        elif self._interrupt:
            raise StopRequested(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
