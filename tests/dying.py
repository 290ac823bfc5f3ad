"""The training command in a process that a fault strikes at a chosen moment.

    python -m tests.dying FAULTS RECIPE [overrides]         (FAULTS: JSON, a list of Fault)

A fault strikes in the first life alone: a marker file says that it has struck.
"""

import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from engine import train
from engine.world import environment, leave
from pipelines.batch import Clock


@dataclass(frozen=True)
class Fault:
    """What befalls a rank, and when.

    kind: "kill" (SIGKILL), "stop" (SIGSTOP) or "hang" (an endless loop). doing: which of a clock's
    moments, at the iteration that follows so many images; or "rename", the moment when the
    checkpoint of so many images is written but has not got its name. after: a file to wait for
    before that, for instance of a checkpoint, which is written while training goes on.
    """

    kind: str
    rank: int
    images: int
    doing: str
    marker: str
    after: str = ""
    wait_s: float = 0.0

    def strike(self) -> None:
        """Let it happen, once."""
        if Path(self.marker).exists():
            return
        while self.after and not Path(self.after).exists():
            time.sleep(0.01)
        Path(self.marker).touch()
        time.sleep(self.wait_s)  # for the watchdog's last sign to be of this very moment
        if self.kind == "hang":
            while True:
                time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL if self.kind == "kill" else signal.SIGSTOP)


def arm(fault: Fault) -> None:
    """Make the fault strike this process when its moment comes."""
    if environment()[0] != fault.rank:
        return
    enter, rename = Clock.enter, os.rename

    def entering(clock: Clock, doing: str) -> None:
        enter(clock, doing)
        if (clock.images, doing) == (fault.images, fault.doing):
            fault.strike()

    def renaming(old: Path, new: Path) -> None:
        if fault.doing == "rename" and Path(new).name == f"{fault.images:09}":
            fault.strike()
        rename(old, new)

    Clock.enter, os.rename = entering, renaming


def command(faults: list[Fault], *arguments: str, launcher: tuple[str, ...] = ()) -> list[str]:
    """The command line of such a run; with launcher flags, on two ranks through torchrun."""
    line = [sys.executable]
    if launcher:
        line += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *launcher]
    return [*line, "-m", "tests.dying", json.dumps([asdict(f) for f in faults]), *arguments]


if __name__ == "__main__":
    for values in json.loads(sys.argv[1]):
        arm(Fault(**values))
    leave(train.main(sys.argv[2:]))
