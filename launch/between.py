"""Checks between ranks: do they meet, how fast is the network, do clocks agree, is the folder of
runs one?"""

import contextlib
import datetime
import os
import statistics
import time
import uuid
from pathlib import Path

import torch
import torch.distributed as dist

from launch import environment
from launch.checks import nearest
from launch.findings import FAIL, OK, WARN, Case, Finding

MEETING_S = 120
SIZES = {"cpu": (4 * 2**10, 2**20, 32 * 2**20), "cuda": (4 * 2**10, 2**20, 256 * 2**20)}
REPEATS = 5
# Bus bandwidth (GB/s) below which something is amiss, and what is usual. NVLink 4 reaches some 450
# within a node of eight, PCIe some 20; a network gives its rate in bits over eight.
PLAUSIBLE = {
    ("cuda", False): (5.0, "20 over PCIe, 100 to 450 over NVLink"),
    ("cuda", True): (1.0, "a network's Gbit/s over 8, times its adapters per node: 12 to 400"),
    ("cpu", False): (0.1, "0.3 to 5 within a host"),
    ("cpu", True): (0.05, "0.1 over 1 Gbit/s Ethernet, 1 over 10 Gbit/s"),
}
SKEW_WARN_S, SKEW_FAIL_S = 0.5, 60.0


def meet(device: torch.device, patience_s: float) -> dist.ProcessGroup:
    """Join the process group; the group over which ranks tell each other what they found, which
    waits `patience_s` for the slowest."""
    environment.set_meeting_place()
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # a hang is for us to name
    _select(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=MEETING_S))
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=patience_s))


def _select(device: torch.device) -> None:
    """Make it the thread's device: each check has a thread of its own."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def bandwidth(case: Case, several_hosts: bool) -> list[Finding]:
    """Time of an all-reduce of each size: that of the smallest is latency, that of the largest
    tells the bandwidth."""
    _select(case.device)
    kind = case.device.type
    group = dist.new_group(backend="nccl" if kind == "cuda" else "gloo")
    sizes = SIZES[kind]
    times = torch.tensor([_all_reduce_s(size, case.device, group) for size in sizes])
    times = times.to(case.device)
    dist.all_reduce(times, op=dist.ReduceOp.MAX, group=group)
    seconds = times.tolist()
    world = dist.get_world_size()
    rates = [size / s for size, s in zip(sizes, seconds, strict=True)]
    bus = rates[-1] * 2 * (world - 1) / world / 1e9  # what each link carries, whatever the ring
    shown = ", ".join(
        f"{size / 2**20:g} MiB {rate / 1e9:.2f} GB/s"
        for size, rate in zip(sizes[1:], rates[1:], strict=True)
    )
    least, usual = PLAUSIBLE[kind, several_hosts]
    backend = "NCCL" if kind == "cuda" else "gloo"
    text = (
        f"{backend}, {world} ranks: latency {seconds[0] * 1e6:,.0f} us, {shown}; bus {bus:.2f} GB/s"
        f" (plausible: {usual})"
    )
    if bus >= least:
        return [Finding("all-reduce", OK, text)]
    name = "NCCL_SOCKET_IFNAME" if kind == "cuda" else "GLOO_SOCKET_IFNAME"
    remedy = f"{name} names the fast interface; NCCL_DEBUG=INFO tells the path that was taken"
    return [Finding("all-reduce", WARN, text, remedy)]


def _all_reduce_s(size: int, device: torch.device, group: dist.ProcessGroup) -> float:
    """Median seconds of summing so many bytes over the ranks."""
    values = torch.zeros(size // 4, device=device)
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        dist.all_reduce(values, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def clocks(_case: Case, group: dist.ProcessGroup, rounds: int = 8) -> list[Finding]:
    """How far this rank's clock is from rank 0's, from question and answer as NTP does it (Mills
    1991, "Internet time synchronization", section II): of the quickest of several."""
    skew = _skew(group, rounds)
    skews: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(skews, skew, group=group)
    if abs(skew) < SKEW_WARN_S:
        good = max(abs(s) for s in skews if abs(s) < SKEW_WARN_S)
        return [Finding("clocks", OK, f"within {good * 1e3:.1f} ms of rank 0's")]
    status = FAIL if abs(skew) >= SKEW_FAIL_S else WARN
    way = "behind" if skew > 0 else "ahead of"
    text = f"{abs(skew):,.1f} s {way} rank 0's: times in logs and of files mislead"
    return [Finding("clocks", status, text, "run chrony or ntpd on every host")]


def _skew(group: dist.ProcessGroup, rounds: int) -> float:
    """Seconds by which rank 0's clock is ahead of this one; all ranks call it."""
    now, best = torch.zeros(1, dtype=torch.float64), (float("inf"), 0.0)
    rank, others = dist.get_rank(), range(1, dist.get_world_size())
    for turn in [r for r in others for _ in range(rounds)]:
        if rank == 0:
            dist.recv(now, src=turn, group=group)
            dist.send(now.fill_(time.time()), dst=turn, group=group)
        elif rank == turn:
            asked, began = time.time(), time.perf_counter()
            dist.send(now, dst=0, group=group)
            dist.recv(now, src=0, group=group)
            took = time.perf_counter() - began
            best = min(best, (took, now.item() - asked - took / 2))
    return best[1]


def one_folder(case: Case, group: dist.ProcessGroup) -> list[Finding]:
    """Whether every host sees rank 0's folder of runs, where ranks find each other's checkpoint."""
    there = nearest(case.runs)
    name = [_mark(there) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(name, src=0, group=group)
    if not name[0]:
        return []  # it cannot be written, as another check says
    seen = (there / name[0]).exists()
    dist.barrier(group=group)
    if dist.get_rank() == 0:
        (there / name[0]).unlink()
    if seen:
        return [Finding("shared runs folder", OK, "all hosts see rank 0's")]
    remedy = "--runs names a folder on storage that all hosts share"
    return [Finding("shared runs folder", FAIL, f"{there} is not rank 0's", remedy)]


def _mark(folder: Path) -> str:
    """Leave an empty file there; its name, "" if that is not possible."""
    name = f".doctor-{uuid.uuid4().hex}"
    with contextlib.suppress(OSError):
        (folder / name).touch()
        return name
    return ""
