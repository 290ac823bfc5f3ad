"""Which implementation of an operation serves where, and why; how Triton launches are registered.

Each operation has a plain PyTorch reference and Triton kernels (`<op>_triton.py`, imported only
where they serve). CUDA tensors take Triton, CPU tensors the reference; under TRITON_INTERPRET=1
Triton's interpreter runs the kernels on CPU tensors, which is how tests see them without a GPU.
"""

import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Setting = Literal["auto", "fused", "reference"]

TRITON = importlib.util.find_spec("triton") is not None
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
OPS = (
    "batchnorm_leaky_relu",
    "sync_batchnorm_leaky_relu",
    "gan_bce",
    "gaussian_kl",
    "image_batch",
)
# What `auto` takes: operations for which bench/bench_kernels.py has shown a gain on a GPU; the
# synchronised one, whose plain form is a chain of some twenty operations; and the batch of images,
# whose plain form is index arithmetic, a gather and three passes over floats (to float, sub, mul):
# 23 bytes moved per number, where one launch moves 5.
GAINS = frozenset({"sync_batchnorm_leaky_relu", "image_batch"})
# Triton 3.9 warns that its next version will not fuse multiply-adds unless told to.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_setting: Setting = "fused"
_thread = threading.local()


@dataclass(frozen=True)
class Choice:
    """Whether Triton serves an operation, and the reason."""

    fused: bool
    reason: str


def use(setting: Setting) -> None:
    """Which implementations this process takes: fused (the default of the library) wherever there
    is one, auto only where a bench has shown a gain, reference never."""
    if setting not in get_args(Setting):
        raise ValueError(f"kernels={setting!r} must be one of {', '.join(get_args(Setting))}")
    global _setting
    _setting = setting


@contextmanager
def using(setting: Setting) -> Iterator[None]:
    """`use` for a while."""
    before = _setting
    use(setting)
    try:
        yield
    finally:
        use(before)


def choose(op: str, device: torch.device) -> Choice:
    """What serves an operation on a device under the present setting."""
    if _setting == "reference":
        return Choice(False, "the setting is reference")
    if device.type != "cuda" and not (INTERPRET and device.type == "cpu"):
        return Choice(False, f"tensors on {device.type} take plain PyTorch")
    if not TRITON:
        return Choice(False, "Triton is not installed")
    if INTERPRET:
        return Choice(True, "TRITON_INTERPRET=1: Triton's interpreter")
    if _setting == "fused":
        return Choice(True, "the setting is fused")
    if op in GAINS:
        return Choice(True, "faster than the plain form")
    return Choice(False, "no bench on a GPU has shown a gain yet; --kernels fused takes it")


def serves(op: str, *tensors: Tensor) -> bool:
    """Whether Triton serves an operation on these tensors: one device, a float dtype of 16 or 32
    bits."""
    return all(t.dtype in FLOATS for t in tensors) and choose(op, tensors[0].device).fused


def wide(x: Tensor) -> Tensor:
    """float64 as it is, anything else as float32."""
    return x if x.dtype == torch.float64 else x.float()


def explain(device: torch.device) -> list[tuple[str, str, str]]:
    """(operation, what serves it, why) for every operation."""
    rows = []
    for op in OPS:
        choice = choose(op, device)
        rows.append((op, "Triton" if choice.fused else "PyTorch", choice.reason))
    return rows


def register(name: str, fn: Callable, fake: Callable) -> Any:
    """`fn` as the operation saddle::name, which torch.compile sees from outside.

    On a GPU a triton_op, through which the compiler sees which kernels are launched on what; under
    the interpreter an opaque operation whose shapes `fake` tells, since an interpreted kernel needs
    real data.
    """
    if not INTERPRET:
        return torch.library.triton_op(f"saddle::{name}", fn, mutates_args=())
    op = torch.library.custom_op(f"saddle::{name}", fn, mutates_args=())
    op.register_fake(fake)
    return op


def launchable(kernel: Any) -> Any:
    """A kernel as it is launched inside a registered operation; as it is in `eagerly`, where the
    wrapper would cost 0.2 ms a launch for nothing."""
    if INTERPRET or getattr(_thread, "eager", False):
        return kernel
    return torch.library.wrap_triton(kernel)


@contextmanager
def eagerly() -> Iterator[None]:
    """Launches inside, by this thread, are not seen by a compiler."""
    _thread.eager = True
    try:
        yield
    finally:
        _thread.eager = False
