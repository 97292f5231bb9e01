"""Signals: remembered, acted on at once where work may be dropped, and agreed on by processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from laser_jax.train.stop import StopRequested, StopSignal

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def stop() -> Iterator[StopSignal]:
    with StopSignal() as made:
        yield made


@pytest.mark.parametrize("number", SIGNALS)
def test_in_the_loop_a_signal_is_only_remembered(stop: StopSignal, number) -> None:
    assert not stop.should_stop(1)
    signal.raise_signal(number)
    assert stop.received == number.name
    assert stop.should_stop(2)


@pytest.mark.parametrize("number", SIGNALS)
def test_work_that_may_be_dropped_is_interrupted(stop: StopSignal, number) -> None:
    with pytest.raises(StopRequested, match=number.name), stop.interrupting():
        signal.raise_signal(number)
    assert stop.received == number.name


def test_no_exception_handler_swallows_the_interruption(stop: StopSignal) -> None:
    def library() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("swallowed")

    with pytest.raises(StopRequested), stop.interrupting():
        library()


def test_a_signal_from_before_interrupts_on_entry(stop: StopSignal) -> None:
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(StopRequested, match="SIGTERM"), stop.interrupting():
        pytest.fail("was entered")


def test_after_the_work_a_signal_is_remembered_again(stop: StopSignal) -> None:
    with stop.interrupting():
        with stop.interrupting():
            pass
        with pytest.raises(StopRequested):
            signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert stop.should_stop(1)


def test_who_presses_twice_is_not_kept_waiting(stop: StopSignal) -> None:
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_the_former_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignal():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_outside_the_main_thread_no_handler_is_set() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    stopping: list[bool] = []

    def run() -> None:
        with StopSignal() as stop, stop.interrupting():
            stopping.append(stop.should_stop(1))
            assert [signal.getsignal(number) for number in SIGNALS] == before

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert stopping == [False]


WORKER = """
import sys, time, jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from laser_jax.train.stop import StopSignal
stop, pause = StopSignal(), float(sys.argv[3])
print("started", flush=True)
sys.stdin.readline()
step = 500  # resumed
with stop.interrupting():
    time.sleep(pause)
while not stop.should_stop(step := step + 1):
    if step == 510:
        print("in the loop", flush=True)
    time.sleep(0.01)
print(stop.received, step, flush=True)
"""


def start_two(pause: float) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(i), str(pause)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for i in range(2)
    ]


def say(worker: subprocess.Popen[str], text: str) -> None:
    assert worker.stdin is not None
    worker.stdin.write(text)
    worker.stdin.flush()


def hear(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    return worker.stdout.readline().strip()


@pytest.mark.parametrize(
    ("number", "before_the_loop", "name"),
    [
        (signal.SIGTERM, False, "SIGTERM"),
        (signal.SIGINT, False, "SIGINT"),
        (signal.SIGTERM, True, "SIGTERM"),
    ],
)
def test_two_processes_stop_at_the_same_step_when_one_is_told(
    number: signal.Signals, before_the_loop: bool, name: str
) -> None:
    workers = start_two(pause=1.0 if before_the_loop else 0.0)
    try:
        assert [hear(w) for w in workers] == ["started", "started"]
        if before_the_loop:
            workers[0].send_signal(number)
        for worker in workers:
            say(worker, "\n")
        if not before_the_loop:
            assert [hear(w) for w in workers] == ["in the loop", "in the loop"]
            workers[0].send_signal(number)
        told, other = hear(workers[0]).split(), hear(workers[1]).split()
        assert told[0] == name
        assert other[0] == "SIGTERM"
        assert told[1] == other[1]
        assert [w.wait() for w in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
