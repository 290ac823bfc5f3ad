"""When does `--profile` look? After a few iterations that warm up, at some that are counted, then
at a few that are traced: on rank 0, which writes RUN_DIR/profile/. Nothing that is trained changes.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from engine.profiling import page, shares
from engine.profiling.tally import Tally
from engine.session import Session
from engine.stats import synchronize

WARM_UP = 4  # iterations
SECONDS, MOST = 2.0, 50  # of tracing; iterations
TRACE, PAGE = "trace.json.gz", "summary.md"


class Profiler:
    """Of one start of a run; the loop calls `next` before every iteration."""

    def __init__(
        self,
        session: Session,
        folder: Path,
        name: str,
        pipeline: str,
        say: Callable[[str], None],
    ) -> None:
        self.session, self.folder, self.say = session, folder, say
        self.name, self.pipeline = name, pipeline
        self.period = session.recipe.step.period()
        self.tally = Tally()
        self._number = 0
        self._trace: profile | None = None
        self._range: record_function | None = None
        self._began = 0.0

    def next(self) -> None:
        """Take note that the next iteration begins."""
        traced = self._number - WARM_UP - self.period
        if self._number == WARM_UP:
            self.tally.__enter__()
        if traced == 0:
            self.tally.__exit__(None, None, None)
            self._begin()
        elif self._trace and traced % self.period == 0 and self._enough(traced):
            self._end()
        self._number += 1

    def _enough(self, traced: int) -> bool:
        return traced >= MOST or time.monotonic() - self._began > SECONDS

    def close(self) -> None:
        """At the run's end: write what there is."""
        if WARM_UP < self._number <= WARM_UP + self.period:
            self.tally.__exit__(None, None, None)
        if self._trace:
            self._end()
        elif self._number <= WARM_UP + self.period:
            least = WARM_UP + self.period + 1
            self.say(f"--profile: nothing was written; it needs {least} iterations or more")

    def _begin(self) -> None:
        device = self.session.clock.device
        kinds = [ProfilerActivity.CPU]
        if device.type == "cuda":
            kinds.append(ProfilerActivity.CUDA)
        synchronize(device)
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it tells stderr of every GPU that is not
        self._trace = profile(activities=kinds, record_shapes=True)
        self._trace.__enter__()
        self.session.clock.listener = self._enter
        self._began = time.monotonic()

    def _enter(self, doing: str) -> None:
        """Go over from one range of the trace to the next."""
        if self._range:
            self._range.__exit__(None, None, None)
        self._range = record_function(shares.PREFIX + doing)
        self._range.__enter__()

    def _end(self) -> None:
        clock, trace = self.session.clock, self._trace
        synchronize(clock.device)
        self._enter(shares.END)
        self._range.__exit__(None, None, None)
        clock.listener = self._range = self._trace = None
        trace.__exit__(None, None, None)
        found = shares.read(trace.events(), self.tally.costs, clock.device.type == "cuda")
        self.folder.mkdir(exist_ok=True)
        trace.export_chrome_trace(str(self.folder / TRACE))
        summary = page.write(found, self.session, self.pipeline, self.name)
        (self.folder / PAGE).write_text(summary)
        self.say(f"profile: {page.in_a_line(found.shares)}; {self.folder / PAGE}")
