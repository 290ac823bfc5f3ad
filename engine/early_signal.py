"""What a process arranges about signals before torch is imported, which takes seconds.

`python -m engine.train` remembers a request to stop (SIGUSR1) that comes so early and would kill it
unhandled: StopRequest asks for it. And it asks to be stopped if torchrun's agent dies: killed with
-9, that leaves its workers behind, who would train on beside those of the next attempt.
"""

import ctypes
import os
import signal
import sys
from types import FrameType

PR_SET_PDEATHSIG = 1  # linux/prctl.h
came = False


def listen() -> None:
    """Remember SIGUSR1 from now on."""
    signal.signal(signal.SIGUSR1, _remember)
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _remember(_number: int, _frame: FrameType | None) -> None:
    global came
    came = True
