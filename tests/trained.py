"""Short runs through the command line, in the test's own process."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import train

TINY = ("--steps", "4", "--data.batch", "16", "--samples", "4", "--device", "cpu")
TINY += ("--checkpoint-every", "0.032", "--compile", "off", "--precision", "fp32")


def trained(folder: Path, name: str, *flags: str) -> Path:
    """A run directory with checkpoints at 32 and 64 images; signal handlers stay as they were."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    command = [name, *TINY, *flags, "--runs", str(folder), "--run", "a"]
    assert train.main([*command, "--data.cache", str(folder / "cache")]) == 0
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    return folder / name / "a"


def refused_by(verb: Callable[..., int]) -> Callable[..., str]:
    """A function (capsys, code, *arguments) that gives the one line with which the verb fails."""

    def refused(capsys: pytest.CaptureFixture, code: int, *arguments: object) -> str:
        capsys.readouterr()
        assert verb(*arguments) == code
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return refused
