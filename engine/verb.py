"""What the verbs share: lines on the terminal, and errors as one line and an exit code."""

import sys
from collections.abc import Callable


def say(text: str) -> None:
    """A line on stdout, at once."""
    print(text, flush=True)


def warn(text: str) -> None:
    """A warning on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def exit_code(action: Callable[[], None], failures: tuple[type[Exception], ...]) -> int:
    """Do it; 0, or 2 for a ValueError (a wrong command), or 1 for one of the failures, after one
    line that says what was wrong."""
    try:
        action()
        return 0
    except (ValueError, *failures) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ValueError) else 1
