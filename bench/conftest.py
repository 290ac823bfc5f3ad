"""Where a benchmark ran, and the table of ratios at its end."""

import platform

import pytest
import torch

from engine.precision import has_bf16
from engine.run import commit, device_name

ROWS: list[str] = []


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that benchmarks run on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def row():
    """Adds a line to the table that ends the run."""
    return ROWS.append


def pytest_benchmark_update_machine_info(config, machine_info):
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine_info["saddle"] = {
        "device": device_name(where),
        "bf16": has_bf16(where)[1],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def pytest_terminal_summary(terminalreporter):
    if ROWS:
        terminalreporter.section("side by side, one run")
        for line in ROWS:
            terminalreporter.write_line(line)
