"""SIGTERM and SIGINT in the seconds, up to twenty on a loaded host, that the imports of a training
take. Nothing has begun then, so that the program leaves with 0, as it does later.

`laser_jax.train` imports this first, and it imports nothing that takes time.
"""

import os
import signal
from types import FrameType


def leave_on_signals() -> None:
    """Until `train.stop` takes the signals over, and after it gave them back."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    said = f"{name}: stopped outside the steps; the same command goes on from there\n"
    os.write(2, said.encode())
    os._exit(0)  # an exception could be swallowed by what is just being imported
