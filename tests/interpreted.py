"""Tests of kernels by Triton's interpreter: in a process of its own, since TRITON_INTERPRET is read
when a kernel is defined."""

import os
import re
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from kernels import dispatch

either = pytest.mark.interpreted  # a test that runs in both processes


def only(test: Callable) -> Callable:
    """A test that runs in the interpreter's process alone."""
    reason = "runs in the interpreter's own process"
    return either(pytest.mark.skipif(not dispatch.INTERPRET, reason=reason)(test))


def broken() -> str:
    """Why the interpreter cannot be used here; empty where it can."""
    import triton

    old = tuple(int(v) for v in triton.__version__.split(".")[:2]) < (3, 7)
    new = tuple(int(v) for v in np.__version__.split(".")[:2]) >= (2, 4)
    if old and new:
        return f"Triton {triton.__version__}'s interpreter breaks with NumPy {np.__version__}"
    return ""


def run(path: str, fewest: int) -> None:
    """Run a file's interpreted tests; fails with their output, or if too few of them passed."""
    assert not dispatch.INTERPRET, "the interpreter's process starts no other"
    if reason := broken():
        pytest.skip(reason)
    command = [
        sys.executable,
        "-m",
        "pytest",
        path,
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "interpreted",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= fewest, done.stdout


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference, as a share of the norm."""
    wanted = wanted.double()
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))
