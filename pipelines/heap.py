"""Memory that is freed stays with the process, for the next batch."""

import contextlib
import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt(3)
LARGEST, KEPT = 32 << 20, 1 << 30
"""Bytes of a block that malloc takes from its heap, at most (glibc's bound), and of free heap that
it keeps."""


def keep_freed_memory() -> None:
    """Have glibc keep what a batch leaves: by default each large block is returned to the system
    and comes back page by page, zeroed, which is a third of what a batch of 64x64 images costs on a
    CPU. Other C libraries are left as they are."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(MMAP_THRESHOLD, LARGEST)
        mallopt(TRIM_THRESHOLD, KEPT)
