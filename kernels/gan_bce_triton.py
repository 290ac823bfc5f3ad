"""Triton kernels of the adversarial losses: one launch per direction, both groups of logits.

The forward kernel reads each logit once and leaves one partial mean per program (the loss itself
where one program is enough); the backward kernel derives the terms again from the logits and
multiplies by the loss's gradient in float32, so that under loss scaling no unscaled gradient is
ever rounded to float16. No loops and no atomics: the same numbers each time.

KIND names a term of `kernels.gan_bce`, t its number; `second` is read only where PAIR.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import launchable

FEW, MANY = 1024, 8192  # logits of each group that a program takes


@triton.jit
def logistic(x):
    """log(1 + e^-|x|) and 1 / (1 + e^|x|), to the last digits however small they are.

    log(1 + u) = 2 atanh(s), s = u / (2 + u) <= 1/3, by its series: log(1 + u) taken literally
    loses u's digits in the sum.
    """
    u = tl.exp(-tl.abs(x))
    s = u / (2.0 + u)
    w = s * s
    series = 1 / 7 + w * (1 / 9 + w * (1 / 11 + w * (1 / 13)))
    series = 1.0 + w * (1 / 3 + w * (1 / 5 + w * series))
    return 2.0 * s * series, u / (1.0 + u)


@triton.jit
def term(x, t, KIND: tl.constexpr):
    """The loss of each logit, float32. Comparisons are turned so that NaN stays NaN."""
    if KIND == "bce":
        return logistic(x)[0] + tl.where(x > 0, (1.0 - t) * x, -t * x)
    elif KIND == "saturating":
        return -logistic(x)[0] - tl.where(x <= 0, 0.0, x)
    elif KIND == "hinge":
        margin = 1.0 - t * x
        return tl.where(margin <= 0, 0.0, margin)
    elif KIND == "square":
        return 0.5 * (x - t) * (x - t)
    else:
        return t * x


@triton.jit
def slope(x, t, KIND: tl.constexpr):
    """The derivative of `term`, float32."""
    if KIND == "bce":
        rest = logistic(x)[1]
        return tl.where(x > 0, (1.0 - t) - rest, rest - t)
    elif KIND == "saturating":
        rest = logistic(x)[1]
        return tl.where(x > 0, rest - 1.0, -rest)
    elif KIND == "hinge":
        return tl.where(1.0 - t * x <= 0, 0.0, -t)
    elif KIND == "square":
        return x - t
    else:
        return t + tl.zeros_like(x)


@triton.jit
def partial_mean(logits, t, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """This program's part of the mean of a group's terms."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + at, at < n, 0.0).to(tl.float32)
    return tl.sum(tl.where(at < n, term(x, t, KIND), 0.0)) / n


@triton.jit
def loss_kernel(
    first, second, part, t_first, t_second, n_first, n_second,
    KIND: tl.constexpr, PAIR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """part: (programs,) float32, whose sum is the loss."""
    mean = partial_mean(first, t_first, n_first, KIND, BLOCK)
    if PAIR:
        mean += partial_mean(second, t_second, n_second, KIND, BLOCK)
    tl.store(part + tl.program_id(0), mean)


@triton.jit
def store_gradient(logits, out, grad, t, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """grad * slope / n of this program's logits, rounded once, to the logits' dtype."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + at, at < n, 0.0).to(tl.float32)
    tl.store(out + at, slope(x, t, KIND) * (grad / n), at < n)


@triton.jit
def gradient_kernel(
    grad, first, second, first_out, second_out, t_first, t_second, n_first, n_second,
    KIND: tl.constexpr, PAIR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of both groups; grad () float32 stays on the device."""
    scale = tl.load(grad).to(tl.float32)
    store_gradient(first, first_out, scale, t_first, n_first, KIND, BLOCK)
    if PAIR:
        store_gradient(second, second_out, scale, t_second, n_second, KIND, BLOCK)


def forward(logits: Sequence[Tensor], kind: str, targets: Sequence[float]) -> Tensor:
    """The loss, () float32."""
    logits = [x.contiguous() for x in logits]
    most = max(x.numel() for x in logits)
    block = FEW if most <= FEW else MANY
    programs = triton.cdiv(most, block)
    part = logits[0].new_empty((programs,) if programs > 1 else (), dtype=torch.float32)
    launchable(loss_kernel)[(programs,)](
        logits[0], logits[-1], part, targets[0], targets[-1], logits[0].numel(),
        logits[-1].numel(), KIND=kind, PAIR=len(logits) == 2, BLOCK=block,
        num_warps=4 if block == FEW else 8,
    )  # fmt: skip
    return part.sum() if programs > 1 else part


def backward(
    grad: Tensor, logits: Sequence[Tensor], kind: str, targets: Sequence[float]
) -> list[Tensor]:
    """Its gradients, contiguous, of the logits' shapes and dtypes."""
    logits = [x.contiguous() for x in logits]
    outs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in logits]
    most = max(x.numel() for x in logits)
    launchable(gradient_kernel)[(triton.cdiv(most, FEW),)](
        grad, logits[0], logits[-1], outs[0], outs[-1], targets[0], targets[-1],
        logits[0].numel(), logits[-1].numel(), KIND=kind, PAIR=len(logits) == 2, BLOCK=FEW,
        num_warps=4,
    )  # fmt: skip
    return outs


def variants() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, tuple[str, ...]]]:
    """(name, kernel, types of arguments, compile-time values, warps, multiples of 16) of each
    kernel, group or pair of groups, term and dtype, at its larger block."""
    terms = [(True, k) for k in ("bce", "hinge", "square", "linear")]
    terms += [(False, k) for k in ("bce", "saturating", "square", "linear")]
    found = []
    for dtype in ("fp32", "bf16", "fp16"):
        tensors = dict.fromkeys(("first", "second", "first_out", "second_out"), f"*{dtype}")
        tensors |= {"part": "*fp32", "grad": "*fp32"}
        counts = {"n_first": "i32", "n_second": "i32"}
        numbers = {"t_first": "fp32", "t_second": "fp32", **counts}
        for pair, kind in terms:
            for kernel, block, warps in ((loss_kernel, MANY, 8), (gradient_kernel, FEW, 4)):
                types = {a: t for a, t in (tensors | numbers).items() if a in kernel.arg_names}
                constants = {"KIND": kind, "PAIR": pair, "BLOCK": block}
                aligned = tuple(a for a in types if a in tensors | counts)
                side = "discriminator" if pair else "generator"
                name = f"gan_bce {kernel.__name__} {side} {kind} {dtype}"
                found.append((name, kernel, types, constants, warps, aligned))
    return found
