"""What does a run say while it trains? A live display, or plain lines where no terminal is."""

import atexit
import math
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LETTERS = {"generator": "G", "discriminator": "D"}
"""Players that papers write with one letter; any other player keeps its name."""


class Display:
    """Progress of a run; `quiet` (every rank but 0) says nothing at all.

    On a terminal a bar and a line of figures stay at the bottom while messages scroll above.
    Anywhere else (a log file, a pipe, Slurm) every tick is one line. The display is drawn when
    the loop reports, never by a thread of its own, so it takes nothing from the iterations.
    """

    def __init__(
        self, total_images: int, title: str, quiet: bool = False, console: Console | None = None
    ) -> None:
        self.total, self.title, self.quiet = total_images, title, quiet
        self._console = console or Console()
        self._images = 0
        self._values: dict[str, float] = {}
        self._rate = math.nan
        self._origin: tuple[int, float] | None = None
        self._first_step: float | None = None
        self._live: Live | None = None
        # isatty, because FORCE_COLOR lets rich call a log file a terminal
        if not quiet and self._console.is_interactive and self._console.file.isatty():
            self._live = Live(
                console=self._console, get_renderable=self._render, auto_refresh=False
            )
            self._live.start(refresh=True)
            atexit.register(self.close)  # the cursor comes back even without a `with`

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def line(self, text: str) -> None:
        """Say something; it stays above the bar."""
        self._say(text, style="")

    def warn(self, text: str) -> None:
        """Say something that needs attention."""
        self._say(f"warning: {text}", style="yellow")

    def first_step(self, seconds: float) -> None:
        """Report how long the run took from its start to the end of its first step."""
        self._first_step = seconds
        if self._live:
            self._live.refresh()
        else:
            self.line(f"first step after {seconds:.1f} s")

    def update(self, images: int, values: dict[str, float]) -> None:
        """Show a logging tick: images seen so far and the values of its line in stats.jsonl."""
        self._images, self._values = images, values
        self._rate = self._images_per_s(images, values)
        if self._live:
            self._live.refresh()
        else:
            self.line("  ".join([*self._progress(), *figures(values)]))

    def close(self) -> None:
        """Leave the last state on the screen and give the cursor back; harmless when repeated."""
        if self._live:
            live, self._live = self._live, None
            live.stop()
            atexit.unregister(self.close)

    def _say(self, text: str, style: str) -> None:
        """One line, never wrapped, coloured or read as markup on its way to a file."""
        if self.quiet:
            return
        if self._live:
            self._console.print(Text(text, style), soft_wrap=True)
            self._live.refresh()
        else:
            print(text, file=self._console.file, flush=True)

    def _images_per_s(self, images: int, values: dict[str, float]) -> float:
        """The measured speed if the tick has one, else the mean since the first tick."""
        self._origin = self._origin or (images, time.perf_counter())
        seen, since = images - self._origin[0], time.perf_counter() - self._origin[1]
        measured = values.get("speed/images_per_s")
        if measured is not None:
            return measured
        return seen / since if seen > 0 and since > 0 else math.nan

    def _progress(self) -> list[str]:
        """Images seen, share done, speed, time left."""
        share = 100 * self._images / self.total if self.total else 100.0
        rate = f"{self._rate:,.0f}" if self._rate >= 100 else f"{self._rate:.3g}"
        rate = rate if math.isfinite(self._rate) else "-"
        left = max(0, self.total - self._images)
        return [
            f"images {self._images:,}/{self.total:,}",
            f"{share:.1f} %",
            f"{rate} img/s",
            f"ETA {duration(left / self._rate if self._rate > 0 else math.nan)}",
        ]

    def _render(self) -> RenderableType:
        """The bar with its progress, and below it the figures."""
        head = Table.grid(padding=(0, 2), expand=True)
        for _ in range(2):
            head.add_column(no_wrap=True, overflow="ellipsis")
        head.columns[0].ratio = 1
        bar = ProgressBar(total=max(1, self.total), completed=self._images)
        head.add_row(bar, Text("  ".join(self._progress())))
        parts = list(figures(self._values))
        if self._first_step is not None:
            parts.append(f"first step {self._first_step:.1f} s")
        elif not parts:
            parts.append("waiting for the first step")
        line = Text.assemble((self.title, "bold"), "  ", ("  ".join(parts), "dim"))
        return Group(head, line)


def figures(values: dict[str, float]) -> Iterator[str]:
    """The figures of a tick worth a glance, such as `D loss 1.20` and `D(G(z)) 0.30`."""
    for key, value in values.items():
        player, _, name = key.rpartition("/")
        if name == "loss":
            yield f"{LETTERS.get(player, player)} loss {_short(value)}"
    for key, label in (("discriminator/real", "D(x)"), ("discriminator/fake", "D(G(z))")):
        if key in values:
            yield f"{label} {_short(values[key])}"
    if "time/data_share" in values:
        yield f"data wait {100 * values['time/data_share']:.0f} %"


def duration(seconds: float) -> str:
    """Seconds as 3:12, 1:03:12 or 2d 1:03:12; `-` when unknown."""
    if not math.isfinite(seconds):
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02d}"
    return (f"{days}d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"


def _short(value: float) -> str:
    """Three digits that keep their width from tick to tick where they can."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.2f}" if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:.2e}"
