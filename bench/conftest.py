"""Where a benchmark ran, which rows it takes, and the table of ratios at its end."""

import platform

import pytest
import torch

from bench.brief import LEFT_OUT
from engine.precision import has_bf16
from engine.run import commit, device_name

ROWS: list[str] = []


def pytest_addoption(parser):
    help = "measure every row: without it those that are marked `long` are left out"
    parser.addoption("--all", action="store_true", help=help)


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("long") and not config.getoption("--all"):
            item.add_marker(pytest.mark.skip(reason=LEFT_OUT))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that benchmarks run on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def whole(pytestconfig) -> bool:
    """Whether every row is measured."""
    return pytestconfig.getoption("--all")


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
        "all": config.getoption("--all"),
    }


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Each row says by itself where it is from."""
    where = output_json["machine_info"]["saddle"]
    for bench in output_json["benchmarks"]:
        bench["extra_info"] |= {k: where[k] for k in ("device", "torch", "python", "commit")}


def pytest_terminal_summary(terminalreporter):
    if ROWS:
        terminalreporter.section("side by side, one run")
        for line in ROWS:
            terminalreporter.write_line(line)
    skipped = terminalreporter.stats.get("skipped", [])
    left_out = [r for r in skipped if LEFT_OUT in str(r.longrepr)]
    if left_out:
        terminalreporter.section(f"{len(left_out)} rows {LEFT_OUT.replace('it', 'them')}")
        for report in left_out:
            terminalreporter.write_line(report.nodeid)
