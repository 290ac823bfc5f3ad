"""Remembers a request to stop (SIGUSR1) that comes while the program is still being imported.

Unhandled, the signal would kill the process, and the seconds in which torch is imported are many.
So `python -m engine.train` calls `listen()` before it imports anything else; StopRequest asks.
"""

import signal
from types import FrameType

came = False


def listen() -> None:
    """Remember SIGUSR1 from now on."""
    signal.signal(signal.SIGUSR1, _remember)


def _remember(_number: int, _frame: FrameType | None) -> None:
    global came
    came = True
