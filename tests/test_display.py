"""The display: right figures, plain lines off a terminal, a cursor that always comes back."""

import io
import math
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.console import Console

from engine.display import Display, duration

VALUES = {
    "generator/loss": 0.7,
    "discriminator/loss": 1.2,
    "discriminator/real": 0.6,
    "discriminator/fake": 0.3,
    "speed/images_per_s": 1234.0,
    "time/data_share": 0.021,
    "memory/gib": 1.5,
}
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
LIVE = """
import sys
from engine.display import Display
values = {values}
with Display(300_000, "dcgan_digits", quiet="quiet" in sys.argv) as display:
    display.line("compiling [bold]the[/bold] generator " + "x" * 100)
    display.first_step(12.34)
    display.update(12_800, values)
    display.warn("something odd")
    print("from a library")
    if "interrupt" in sys.argv:
        raise KeyboardInterrupt
    display.update(300_000, values)
"""


def plain(quiet: bool = False) -> tuple[Display, io.StringIO]:
    stream = io.StringIO()
    return Display(300_000, "dcgan_digits", quiet, Console(file=stream)), stream


def on_a_terminal(columns: int, *arguments: str) -> tuple[int, str]:
    """Exit status and output of a display in a process of its own on a pseudo-terminal."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, columns))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", LIVE.format(values=VALUES), *arguments],
        stdout=follower,
        stderr=subprocess.DEVNULL,
        env=environment | {"TERM": "xterm-256color"},
        cwd=Path(__file__).parents[1],
    )
    os.close(follower)
    output = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # Linux reports EIO where the last writer has gone
            break
        if not piece:
            break
        output += piece
    os.close(leader)
    return process.wait(timeout=30), output.decode()


def test_plain_lines() -> None:
    display, stream = plain()
    with display:
        display.line("a [message] " + "x" * 100)
        display.first_step(12.34)
        display.update(12_800, VALUES)
        display.warn("odd")
    assert stream.getvalue().splitlines() == [
        "a [message] " + "x" * 100,
        "first step after 12.3 s",
        "images 12,800/300,000  4.3 %  1,234 img/s  ETA 3:53  G loss 0.70  D loss 1.20"
        "  D(x) 0.60  D(G(z)) 0.30  data wait 2 %",
        "warning: odd",
    ]


def test_missing_and_odd_values() -> None:
    display, stream = plain()
    display.update(64, {"autoencoder/loss": math.nan, "prior/loss": 3.2e-5})
    assert "- img/s  ETA -  autoencoder loss nan  prior loss 3.20e-05" in stream.getvalue()
    display.update(6_400, {})
    assert "ETA -" not in stream.getvalue().splitlines()[1]  # the mean speed serves


def test_a_log_file_stays_plain_even_when_colours_are_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    display, stream = plain()
    display.update(12_800, VALUES)
    display.close()
    assert "\x1b" not in stream.getvalue()


def test_other_ranks_say_nothing() -> None:
    display, stream = plain(quiet=True)
    with display:
        display.line("a")
        display.warn("b")
        display.first_step(1.0)
        display.update(64, VALUES)
    assert stream.getvalue() == ""
    status, output = on_a_terminal(100, "quiet")
    assert (status, output) == (0, "from a library\r\n")


@pytest.mark.parametrize("columns", [60, 120])
def test_terminal(columns: int) -> None:
    status, output = on_a_terminal(columns)
    assert status == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    assert "compiling [bold]the[/bold] generator " + "x" * 100 in text  # not wrapped, no markup
    for part in (
        "warning: something odd",
        "from a library",
        "waiting for the first step",
        "images 12,800/300,000",
        "D loss 1.20",
        "D(G(z)) 0.30",
        "first step 12.3 s",
    ):
        assert part in " ".join(text.split())  # a narrow terminal wraps the figures
    assert output.rindex(SHOW) > output.rindex(HIDE)


def test_an_interrupt_gives_the_cursor_back() -> None:
    status, output = on_a_terminal(100, "interrupt")
    assert status != 0
    assert output.rindex(SHOW) > output.rindex(HIDE)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (192.4, "3:12"), (3792, "1:03:12"), (176_592, "2d 1:03:12"), (math.inf, "-")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
