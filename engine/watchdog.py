"""Which rank is hung? Each says where it is; when all stand still, the one behind is named.

A rank that hangs (stopped, in an endless loop, before a file system that does not answer) hangs all
others in their next collective, and the process group's own timeout names nobody. So a thread of
each rank writes down, every few seconds, where its main thread is:

    RUN/ranks/00003     {"rank": 3, "host": "node1", "pid": 4711, "iteration": 14, ...}

When the main thread has not moved for `hang_after` seconds, the thread reads what the others wrote,
prints one line that names the rank that is behind, with its host and process, and leaves with exit
code 1, so that the launcher starts all ranks again from the last checkpoint.

Files, and not the process group's store, because rank 0 or its launcher serves the store: where
that one is stopped nobody could be named. The run directory is shared by all ranks anyway, for the
checkpoints, and anyone can look into it. A file is overwritten in place (opening it makes NFS ask
the server again; a renamed one would be seen late). What it cannot see: a shared file system that
hangs for all; then the process group's timeout ends the run.

The step pays one call that sets two attributes (`Clock.enter`); all else is the thread's work.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.run import RunError
from engine.world import TIMEOUT, Ranks
from pipelines.batch import Clock

START, DATA, STEP, STATISTICS = "start", "data", "step", "statistics"
OUTPUTS, SAVING = "outputs", "saving"  # what else a clock's `doing` is: a player's name

WORDS = {
    START: "in the start",
    DATA: "waiting for data",
    STEP: "in the step",
    STATISTICS: "reading the statistics",
    OUTPUTS: "measuring or sampling",
    SAVING: "saving a checkpoint",
}
WAITING = ("torch/distributed/", "torch/autograd/")  # code that waits for other ranks
LENGTHY = (START, OUTPUTS, SAVING)  # may rightly take longer than any step

# For what is lengthy and for the first iteration, which compiles. Less than the process group's
# timeout, which would come first and name nobody.
PATIENCE_S = TIMEOUT.total_seconds() * 5 / 6
BEAT_S = 5.0
RECORD = 1024  # bytes of a rank's file, always the same, so that no reader sees it cut short


@dataclass(frozen=True)
class Sign:
    """What a rank says of itself.

    life: of which start of all ranks it is. beat: rises while the rank's thread lives. still_s:
    for how long the main thread has not moved, patience_s: for how long it may. at: its line of
    code, waits: whether that is one where it waits for other ranks. verdict: what it left with.
    """

    life: str
    rank: int
    host: str
    pid: int
    beat: int
    images: int
    moves: int
    iteration: int
    doing: str
    still_s: float
    patience_s: float
    at: str
    waits: bool
    verdict: str = ""

    @property
    def place(self) -> str:
        """What the rank is at, in words."""
        doing = WORDS.get(self.doing, f"in the update of the {self.doing}")
        return f"{doing}, iteration {self.iteration}"

    @property
    def progress(self) -> tuple[int, int]:
        """Rises with every move, in the same way on all ranks."""
        return self.images, self.moves


def write_sign(folder: Path, sign: Sign) -> None:
    """Overwrite a rank's file. Raises OSError."""
    data = json.dumps(asdict(sign)).encode().ljust(RECORD)
    descriptor = os.open(folder / f"{sign.rank:05}", os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def read_signs(folder: Path, life: str, world_size: int) -> dict[int, Sign]:
    """The signs of this life's ranks, by rank; a rank that has given none is left out."""
    signs = {}
    for rank in range(world_size):
        with contextlib.suppress(OSError, ValueError, TypeError):
            sign = Sign(**json.loads((folder / f"{rank:05}").read_bytes()))
            if sign.life == life:
                signs[rank] = sign
    return signs


def accuse(
    before: dict[int, Sign], now: dict[int, Sign], world_size: int, still_s: float
) -> str | None:
    """The verdict over ranks that stand still, from two readings some time apart; None while the
    rank that all wait for may still take its time.

    Named is a rank that gives no sign of life; else the one that is behind; else, in the same
    update, the one that does not wait for the others. still_s: how long the rank that asks waits.
    """
    if lost := [r for r in range(world_size) if r not in now]:
        return f"{_numbers(lost)} gave no sign since all ranks were started"
    silent = [r for r in now if r in before and before[r].beat == now[r].beat]
    hung = sorted(silent or _behind(now), key=lambda r: now[r].progress)
    first = now[hung[0]]
    seconds = still_s if silent else first.still_s
    if seconds < first.patience_s:
        return None
    if len(hung) == world_size:
        return f"no rank moves: all are {first.place}, for {seconds:.0f} s"
    where = f"{first.place}, no sign of life" if silent else f"{first.place} ({first.at})"
    text = f"rank {first.rank} on {first.host}, pid {first.pid}, hangs {where}, for {seconds:.0f} s"
    if len(hung) > 1:
        text += f"; so does {_numbers(hung[1:])}"
    ahead = max((s for r, s in now.items() if r not in hung), key=lambda sign: sign.progress)
    return f"{text}; rank {ahead.rank} waits {ahead.place}"


def _behind(now: dict[int, Sign]) -> list[int]:
    last = min(sign.progress for sign in now.values())
    behind = [r for r, sign in now.items() if sign.progress == last]
    if len(behind) == len(now):  # in the same update: the others wait at its reduction
        behind = [r for r in behind if not now[r].waits] or behind
    return behind


def _main_thread() -> tuple[str, bool]:
    """The line that the main thread is at, and whether it waits there for other ranks."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    if frame is None:
        return "nowhere", False
    path = Path(frame.f_code.co_filename)
    return f"{path.name}:{frame.f_lineno}", any(part in path.as_posix() for part in WAITING)


def _numbers(ranks: list[int]) -> str:
    shown = ", ".join(str(r) for r in ranks[:8])
    return f"rank {shown}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


class Watchdog:
    """Says where this rank is and watches that it moves, in a thread of its own."""

    def __init__(self, folder: Path, ranks: Ranks, clock: Clock, hang_after: float) -> None:
        """Every rank makes one at the same time. Raises RunError on all of them if one cannot write
        there."""
        self.folder, self.ranks, self.clock = folder / "ranks", ranks, clock
        self.hang_after = hang_after
        self.life = ranks.share(f"{time.time_ns()}")
        self.first_images = clock.images
        self.beat_s = min(BEAT_S, hang_after / 20)
        self._host, self._beat = socket.gethostname(), 0
        self._where, self._since = (clock.images, clock.moves), time.monotonic()
        self._looked = self._since
        self._before: dict[int, Sign] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._begin()

    def _begin(self) -> None:
        problem = ""
        try:
            self.folder.mkdir(exist_ok=True)
            write_sign(self.folder, self._sign(self._since))
        except OSError as error:
            problem = f"rank {self.ranks.rank} on {self._host} cannot write there: {error}"
        if problem := next((p for p in self.ranks.gather(problem) if p), ""):
            raise RunError(f"--runs must be a folder that all ranks share; {problem}")

    def start(self) -> "Watchdog":
        """Begin to watch."""
        self._thread.start()
        return self

    def close(self) -> None:
        """End the watch; the last rank to do so leaves no folder behind."""
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # other ranks' files are there still
            (self.folder / f"{self.ranks.rank:05}").unlink(missing_ok=True)
            self.folder.rmdir()

    def _watch(self) -> None:
        while not self._closed.wait(self.beat_s):
            if verdict := self._look(time.monotonic()):
                self._leave(verdict)

    def _look(self, now: float) -> str | None:
        """Give a sign; the verdict, if it is time for one."""
        where = self.clock.images, self.clock.moves
        # Late itself: this process was stopped and goes on, so that standing still proves nothing.
        late = now - self._looked > max(self.hang_after / 4, 2 * self.beat_s)
        if where != self._where or late:
            self._where, self._since, self._before = where, now, None
        self._looked = now
        self._beat += 1
        sign = self._sign(now)
        with contextlib.suppress(OSError):  # a full disk is named by who writes what matters
            write_sign(self.folder, sign)
        if sign.still_s > sign.patience_s * 3 / 4 and self._before is None:
            self._before = self._read()
        turn = min(self.ranks.rank, 4) * 2 * self.beat_s  # so that one speaks and the others hear
        if self._before is None or sign.still_s < sign.patience_s + turn:
            return None
        signs = self._read()
        if said := next((s.verdict for s in signs.values() if s.verdict), ""):
            return said
        return accuse(self._before, signs, self.ranks.world_size, sign.still_s)

    def _read(self) -> dict[int, Sign]:
        return read_signs(self.folder, self.life, self.ranks.world_size)

    def _sign(self, now: float, verdict: str = "") -> Sign:
        clock = self.clock
        doing, first = clock.doing, clock.images == self.first_images
        patience = max(self.hang_after, PATIENCE_S)
        at, waits = _main_thread()
        return Sign(
            life=self.life,
            rank=self.ranks.rank,
            host=self._host,
            pid=os.getpid(),
            beat=self._beat,
            images=self._where[0],
            moves=self._where[1],
            iteration=self._where[0] // clock.batch + 1,
            doing=doing,
            still_s=round(now - self._since, 3),
            patience_s=patience if first or doing in LENGTHY else self.hang_after,
            at=at,
            waits=waits,
            verdict=verdict,
        )

    def _leave(self, verdict: str) -> None:
        """End this process at once, with the verdict unless another rank has said it."""
        said = any(sign.verdict for sign in self._read().values())
        with contextlib.suppress(OSError):
            write_sign(self.folder, self._sign(time.monotonic(), verdict))
        if not said:
            # Past Python's own files: a hung thread may hold their locks.
            os.write(2, f"error: {verdict} (--hang-after {self.hang_after:g})\n".encode())
        os._exit(1)
