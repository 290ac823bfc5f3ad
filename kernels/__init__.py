"""Operations that the engine and the pipelines share, one per file, each with its reference.

    import kernels
    kernels.explain()

prints which implementation serves each operation on this machine, and why.
"""

import torch

from kernels import dispatch


def explain(device: str | torch.device | None = None) -> None:
    """Print what serves each operation on a device (the GPU if there is one), and why."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for op, implementation, reason in dispatch.explain(device):
        print(f"{op:25} {implementation:8} {reason}")
