"""Ahead-of-time compilation: every kernel builds for GPUs that are not there, within its limits."""

import subprocess
import sys

import pytest

pytest.importorskip("triton")

from kernels import dispatch, inspect
from tests.runs import ROOT

pytestmark = pytest.mark.skipif(
    dispatch.INTERPRET, reason="compiles, which the interpreter does not"
)
VARIANTS = {v.name: v for v in inspect.variants()}


def one_of_each() -> list[str]:
    """The first variant of every kernel, in bf16 or from bytes."""
    first = {}
    for name, variant in VARIANTS.items():
        if {"*bf16", "*u8"} & set(variant.types.values()):
            first.setdefault(variant.kernel.fn.__name__, name)
    return list(first.values())


@pytest.mark.parametrize("name", one_of_each())
def test_each_kernel_builds_for_hopper_within_its_limits(name):
    usage = inspect.read(VARIANTS[name], 90)
    assert not usage.breach
    assert 0 < usage.registers <= inspect.BUDGET and usage.spills == usage.stack == 0
    assert "ld" in usage.loads


def test_what_exceeds_a_limit_is_told(monkeypatch):
    variant = VARIANTS["apply bf16 NCHW affine merge"]
    monkeypatch.setattr(inspect, "BUDGET", 8)
    assert "registers, more than 8" in inspect.read(variant, 90).breach
    code = "LDG.E.64 R2, [R4.64]"
    assert inspect._breach(variant, 8, 0, 0, code) == "no LDG of 16 bytes"
    assert inspect._breach(variant, 8, 16, 3, code) == "3 spills, 16 bytes of stack"


def test_names_tell_variants_apart():
    assert len(VARIANTS) == len(inspect.variants()) > 100


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("target", ["80", pytest.param("90", marks=pytest.mark.repeated)])
def test_everything_builds(target):
    command = [sys.executable, "-m", "kernels.inspect", "--sm", target]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(VARIANTS)} compiled, 0 beyond a limit" in done.stdout


def test_nothing_to_compile_is_a_failure():
    command = [sys.executable, "-m", "kernels.inspect", "--only", "no such kernel"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "0 compiled" in done.stdout
