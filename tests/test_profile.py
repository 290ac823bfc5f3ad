"""What `--profile` writes: its shares and costs against known ones, and that it changes nothing."""

import gzip
import json
import re

import pytest
import torch
from torch.nn import functional as F

from engine.profiling.intervals import common, length, union, without
from engine.profiling.shares import END, PREFIX, read
from engine.profiling.tally import Cost, Tally
from tests.forked import train
from tests.runs import QUICK, differences, final_state, run_folder, toy


def test_spans_are_joined_cut_and_measured():
    a = union([(5, 7), (0, 2), (1, 3), (7, 8), (9, 9)])
    assert a == [(0, 3), (5, 8)] and length(a) == 6
    assert common(a, [(2, 6), (7, 20)]) == [(2, 3), (5, 6), (7, 8)]
    assert without(a, [(1, 2), (6, 100)]) == [(0, 1), (2, 3), (5, 6)]
    assert without(a, []) == a and common(a, []) == []


def test_a_convolution_and_both_its_gradients_are_counted():
    """2 x N x Ho x Wo x Co x Ci x kh x kw each (no gradient for the images of the first layer)."""
    x, w = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 4, 4, requires_grad=True)
    with Tally() as tally:
        F.conv2d(x, w, stride=2, padding=1).square().sum().backward()
    once = 2 * 2 * 4 * 4 * 5 * 3 * 4 * 4
    (forward,) = (c for (name, _), c in tally.costs.items() if name == "aten::convolution")
    (back,) = (c for (name, _), c in tally.costs.items() if name == "aten::convolution_backward")
    assert forward.flops == back.flops == once
    assert forward.bytes == 4 * (x.numel() + w.numel() + 2 * 5 * 4 * 4)


def test_calls_alike_in_shapes_that_cost_differently_count_by_their_mean():
    x, w = (torch.randn(s, requires_grad=True) for s in ((2, 3, 8, 8), (5, 3, 4, 4)))
    with Tally() as tally:
        F.conv2d(x, w, stride=2, padding=1).sum().backward()
        F.conv2d(x, w.detach(), stride=2, padding=1).sum().backward()  # no gradient of the weight
    once = 2 * 2 * 4 * 4 * 5 * 3 * 4 * 4
    (back,) = (c for (name, _), c in tally.costs.items() if name == "aten::convolution_backward")
    assert back.flops == (2 * once + once) / 2


def test_bytes_are_those_read_and_written():
    a, b = torch.ones(10, 10), torch.ones(10)
    with Tally() as tally:
        a + b
        a.add_(b)
        a.t()
        b.expand(7, 10).sum()
    costs = {name: cost.bytes for (name, _), cost in tally.costs.items()}
    assert costs["aten::add"] == 4 * (100 + 10 + 100)
    assert costs["aten::add_"] == 4 * (100 + 10 + 100)
    assert costs["aten::t"] == costs["aten::expand"] == 0
    assert costs["aten::sum"] == 4 * (10 + 1)


class Event:
    """What a trace has of an operation."""

    def __init__(self, name, begin, end, device=torch.autograd.DeviceType.CPU, parent=None):
        self.name, self.device_type, self.cpu_parent = name, device, parent
        self.time_range = type("", (), {"start": begin, "end": end})
        self.is_user_annotation = name.startswith(PREFIX)
        self.cpu_time_total, self.device_time_total = end - begin, 0.0
        self.input_shapes, self.kernels, self.cpu_children = [], [], []


def phases(*marks):
    """Ranges one after the other."""
    return [
        Event(PREFIX + name, begin, end)
        for (name, begin), (_, end) in zip(marks, [*marks[1:], ("", marks[-1][1])], strict=True)
    ]


MARKS = phases(
    ("data", 0), ("step", 10), ("generator", 40), ("statistics", 70), ("outputs", 80), (END, 100)
)


def test_shares_of_a_host_that_computes():
    work = [Event("aten::mm", 5, 8), Event("aten::mm", 12, 30), Event("aten::mul", 30, 50)]
    hidden = [Event("gloo:all_reduce", 45, 60), Event("aten::add", 72, 76)]
    found = read([*MARKS, *work, *hidden], {}, gpu=False)
    assert found.iterations == 1 and found.seconds == pytest.approx(80e-6)
    wanted = {"compute": 38 + 4, "communication": 10, "gaps": 2 + 10, "data": 10, "host": 6}
    for part, micros in wanted.items():
        assert getattr(found.shares, part) == pytest.approx(micros / 80), part


def test_what_pictures_and_checkpoints_compute_is_in_no_row():
    def product(begin: float, end: float) -> Event:
        event = Event("aten::mm", begin, end)
        event.input_shapes = [[4, 4], [4, 4]]
        return event

    marks = phases(*[(m.name.removeprefix(PREFIX), m.time_range.start) for m in MARKS[:-1]],
                   ("data", 100), ("step", 110), (END, 140))  # fmt: skip
    costs = {("aten::mm", ((4, 4), (4, 4))): Cost(128, 192, torch.float32)}
    (row,) = read([*marks, product(12, 30), product(82, 99), product(111, 113)], costs, False).rows
    assert (row.calls, row.seconds) == (1, pytest.approx(10e-6))


def test_shares_of_a_gpu_that_works_behind_its_host():
    gpu = torch.autograd.DeviceType.CUDA
    kernels = [Event("gemm", 8, 35, gpu), Event("ncclDevKernel", 30, 50, gpu)]
    launches = [Event("aten::mm", 11, 12), Event("aten::mul", 60, 61)]
    found = read([*MARKS, *kernels, *launches, Event("mul", 65, 72, gpu)], {}, gpu=True)
    wanted = {"compute": 27 + 7, "communication": 15, "gaps": 15, "data": 8, "host": 8}
    for part, micros in wanted.items():
        assert getattr(found.shares, part) == pytest.approx(micros / 80), part


def profiled(tmp_path, name, *flags, ranks=1):
    """Folders of a run with --profile and of the same without it, and what the first said."""
    common = [*toy(name, 8)[1], *QUICK, *flags, "--precision", "fp32"]
    said = train(name, *common, "--runs", str(tmp_path / "a"), "--profile", ranks=ranks)
    train(name, *common, "--runs", str(tmp_path / "b"), ranks=ranks)
    return run_folder(tmp_path / "a", name), run_folder(tmp_path / "b", name), said


@pytest.mark.parametrize(
    ("compiled", "ranks"), [("off", 1), pytest.param("required", 2, marks=pytest.mark.slow)]
)
def test_a_profiled_run_trains_the_same_and_leaves_trace_and_page(compiled, ranks, tmp_path):
    flags = [
        "--r1",
        "5",
        "--r1-every",
        "2",
        "--steps",
        "20",
        "--compile",
        compiled,
        "--sync-bn",
        "off",
    ]
    one, other, said = profiled(tmp_path, "dcgan_digits", *flags, ranks=ranks)
    assert not differences(final_state(one), final_state(other))
    page = (one / "profile" / "summary.md").read_text()
    assert str(one / "profile" / "summary.md") in said
    shares = [float(x) for x in re.findall(r"(?m)^\| ([\d.]+)% \| [\d,.]+ \| [a-z]", page)]
    assert len(shares) == 5 and sum(shares) == pytest.approx(100, abs=0.3)
    assert shares[0] > 5  # it computes
    assert (shares[1] > 0) == (ranks > 1)
    assert "aten::convolution_backward" in page and "## Advice" in page
    assert ("fused loops" in page.split("The roofline")[0]) == (compiled == "required")
    with gzip.open(one / "profile" / "trace.json.gz") as file:
        names = {event["name"] for event in json.load(file)["traceEvents"] if "name" in event}
    assert {PREFIX + doing for doing in ("data", "step", "generator")} <= names
    assert not (other / "profile").exists()


def test_a_run_that_is_too_short_says_so(tmp_path):
    flags = ["--runs", str(tmp_path), "--steps", "3", "--profile"]
    said = train("dcgan_digits", *toy("dcgan_digits", 8)[1], *QUICK, *flags)
    assert "--profile: nothing was written; it needs 6 iterations or more" in said
