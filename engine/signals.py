"""SIGTERM, SIGINT and SIGUSR1 ask for a stop at the end of the iteration; all ranks leave together.

SIGUSR1 is what Slurm is told to send before the time is up: who sends it wants the run to go on in
another place or at another time, and looks for the file that `leave_marker` leaves.
"""

import os
import signal
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from engine import early_signal
from engine.world import Ranks

MARKER = "SADDLE_STOPPED"


class StopRequest:
    """Whether this run was asked to stop, agreed over ranks without waiting for the device.

    The ranks' flags are reduced on the host while the next iteration runs, so agreement lags one
    iteration and costs no stall. A second SIGINT leaves at once.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._flag = torch.zeros(1)
        self._pending: dist.Work | None = None
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        if early_signal.came:
            self.signal = signal.SIGUSR1

    def restore(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            os._exit(130)
        if self.signal is None and number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            os.write(
                2, b"\nstopping after this iteration, compiling included; Ctrl-C again leaves\n"
            )
        self.signal = self.signal or signal.Signals(number)  # launchers send SIGTERM after theirs

    def agreed(self, ranks: Ranks) -> bool:
        """True on every rank at the same iteration once any was asked. Called each iteration."""
        if ranks.world_size == 1:
            return self.signal is not None
        stop = False
        if self._pending is not None:
            self._pending.wait()
            stop = bool(self._flag[0])
        if not stop:
            self._flag = torch.full((1,), float(self.signal is not None))
            self._pending = dist.all_reduce(self._flag, dist.ReduceOp.MAX, async_op=True)
        return stop

    def leave_marker(self) -> None:
        """Tell a batch script that the run was stopped to go on later: make the file that
        SADDLE_STOPPED names, for torchrun loses exit codes. Any rank that was asked does."""
        if self.signal == signal.SIGUSR1 and os.environ.get(MARKER):
            Path(os.environ[MARKER]).touch()

    def settle(self) -> None:
        """Finish the last reduction, before other collectives or the end."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
