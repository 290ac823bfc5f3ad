"""What can this device do? Measured on the spot: products of matrices, and copies."""

import time

import torch

from engine.stats import synchronize

SIDE = {"cpu": 1024, "cuda": 8192}
COPIED = {"cpu": 2**27, "cuda": 2**30}  # bytes
ROUNDS = 5


def flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Of a product of square matrices, the best of a few."""
    side = SIDE[device.type]
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _seconds(lambda: a @ b, device)


def bytes_per_s(device: torch.device) -> float:
    """Read and written by a copy, the best of a few."""
    given = torch.ones(COPIED[device.type], device=device, dtype=torch.uint8)
    target = torch.empty_like(given)
    return 2 * given.numel() / _seconds(lambda: target.copy_(given), device)


def _seconds(run, device: torch.device) -> float:  # noqa: ANN001
    found = []
    for _ in range(ROUNDS + 1):
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        found.append(time.perf_counter() - began)
    return min(found[1:])
