"""One rank with batch 2B trains what two ranks with batch B train, in every way of sharing.

Real processes over gloo; DDP's buckets are forced to 1 MB, and the networks are larger.
"""

import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import safetensors.torch
import torch

from tests import equal
from tests.runs import ROOT, environment

EAGER = tuple(name for name, case in equal.CASES.items() if not case[3])
STEPS = {"float32": 8, "float64": 20}
TOLERANCE = {"float32": 1e-5, "float64": 1e-9}


def cases_of(mode: str, cases: tuple[str, ...]) -> tuple[str, ...]:
    """ZeRO-3 cannot differentiate twice."""
    return tuple(c for c in cases if not (mode == "deepspeed-zero3" and "penalty" in c))


@cache
def trained(mode: str, dtype: str, steps: int, cases: tuple[str, ...], ranks: int) -> Path:
    """Folder of what so many ranks trained."""
    out = Path(mkdtemp(prefix="equal-"))
    work = ["-m", "tests.equal", str(out), mode, dtype, str(steps), *cases]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launch if ranks > 1 else []), *work]
    more = {"SADDLE_BUCKET_MB": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment(**more), timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return out


def distance(a: Path, b: Path, case: str) -> float:
    """The largest difference of any tensor."""
    one, two = (safetensors.torch.load_file(p / f"{case}.safetensors") for p in (a, b))
    assert one.keys() == two.keys() and any("_avg" in name for name in one)
    return max((one[name] - two[name]).abs().max().item() for name in one)


def assert_equal(mode: str, dtype: str, cases: tuple[str, ...]) -> None:
    cases, steps = cases_of(mode, cases), STEPS[dtype]
    one = trained("ddp", dtype, steps, cases, 1)
    two = trained(mode, dtype, steps, cases, 2)
    found = {case: distance(one, two, case) for case in cases}
    assert all(d <= TOLERANCE[dtype] for d in found.values()), found


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "deepspeed-zero2"])
def test_two_ranks_train_what_one_does(mode):
    assert_equal(mode, "float32", EAGER)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode", [pytest.param("deepspeed-zero1", marks=pytest.mark.repeated), "deepspeed-zero3"]
)
def test_two_ranks_train_what_one_does_in_the_other_stages(mode):
    assert_equal(mode, "float32", EAGER)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp2", marks=pytest.mark.repeated)])
def test_two_ranks_train_what_one_does_in_float64(mode):
    """Not of the VAE: its sample is float32 by itself."""
    assert_equal(mode, "float64", tuple(case for case in EAGER if "vae" not in case))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "case"),
    [
        ("ddp", "penalty compiled"),
        pytest.param("ddp", "spectral norm compiled", marks=pytest.mark.repeated),
        pytest.param("ddp", "penalty of a critic compiled", marks=pytest.mark.repeated),
        pytest.param("ddp", "vae compiled", marks=pytest.mark.repeated),
        pytest.param("fsdp2", "penalty compiled", marks=pytest.mark.repeated),
    ],
)
def test_two_ranks_train_what_one_does_compiled(mode, case):
    assert_equal(mode, "float32", (case,))


def test_micro_batches_of_one_rank_are_bitwise_the_ranks_of_ddp():
    """The same sums in the same order."""
    one, two = (trained("ddp", "float32", 8, EAGER, ranks) for ranks in (1, 2))
    a = safetensors.torch.load_file(one / "vae halves.safetensors")
    b = safetensors.torch.load_file(two / "vae.safetensors")
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [
        "fsdp2",
        *(
            pytest.param(mode, marks=pytest.mark.repeated)
            for mode in ("ddp", "deepspeed-zero1", "deepspeed-zero2", "deepspeed-zero3")
        ),
    ],
)
def test_ranks_hold_the_same_after_many_steps(mode):
    """The worker compares parameters, averages and moments of all ranks bit for bit."""
    trained(mode, "float32", 50, cases_of(mode, ("gan", "vae accumulated")), 2)
