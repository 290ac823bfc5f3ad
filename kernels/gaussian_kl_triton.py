"""Triton kernels of the Gaussian's sample and its KL divergence: one launch per direction.

A program takes ROWS images by COLUMNS latents; where the latents are more than a program takes,
each leaves a partial sum per image. Rows may lie apart (a chunk of the encoder's output): their
strides are given and nothing is copied. No loops and no atomics: the same numbers each time.

Shapes: N images, L latents; a stride is from one image to the next.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import launchable

TILE = 1024  # numbers of each tensor that a program takes
WIDEST = 4096  # latents of an image that a program takes


@triton.jit
def power_of_two(n):
    """2^n as float32, for -126 <= n <= 127: its exponent bits."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponentials(x):
    """e^x, e^x - 1 and e^x - 1 - x, each to a few units in the last place of float32.

    Below 1 in size by Taylor's series of (e^x - 1 - x) / x^2, since the subtractions would leave
    no digits there; above, x = n log 2 + r and the same series of r, since the hardware's
    exponential has errors of 1e-6 from x = 10 on. NaN stays NaN in every branch.
    """
    near = tl.abs(x) < 1.0
    bounded = tl.where(x > 89.0, 89.0, tl.where(x < -104.0, -104.0, x))
    n = tl.where(near, 0.0, tl.floor(bounded * 1.4426950408889634 + 0.5))
    # log 2 in two parts (Cody and Waite 1980): n times the first is exact
    r = (bounded - n * 0.693359375) + n * 2.12194440e-4
    series = 1 / 5040 + r * (1 / 40320 + r * (1 / 362880 + r * (1 / 3628800 + r * (1 / 39916800))))
    series = 1 / 2 + r * (1 / 6 + r * (1 / 24 + r * (1 / 120 + r * (1 / 720 + r * series))))
    rest = r * r * series
    minus_one = r + rest
    # in two factors: 2^128 and 2^-150 are beyond float32, their products with 1 + r need not be
    half = n.to(tl.int32) >> 1
    value = (1.0 + minus_one) * power_of_two(half) * power_of_two(n.to(tl.int32) - half)
    minus_one = tl.where(near, minus_one, value - 1.0)
    return value, minus_one, tl.where(near, rest, minus_one - x)


@triton.jit
def place(N, L, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's rows (ROWS, 1), columns (1, COLUMNS), and which elements exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < N) & (column < L)


@triton.jit
def forward_kernel(
    mean, log_variance, noise, z, part, N, L, mean_stride, log_variance_stride, noise_stride,
    SAMPLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """z (N, L) where SAMPLE; part (N, programs along L) float32, whose row sums are the KL."""
    row, column, exists = place(N, L, ROWS, COLUMNS)
    m = tl.load(mean + row * mean_stride + column, exists, 0.0).to(tl.float32)
    v = tl.load(log_variance + row * log_variance_stride + column, exists, 0.0).to(tl.float32)
    if SAMPLE:
        e = tl.load(noise + row * noise_stride + column, exists, 0.0).to(tl.float32)
        tl.store(z + row * L + column, m + exponentials(0.5 * v)[0] * e, exists)
    kl = tl.sum(0.5 * (exponentials(v)[2] + m * m), 1, keep_dims=True)
    tl.store(part + row * tl.num_programs(1) + tl.program_id(1), kl, row < N)


@triton.jit
def backward_kernel(
    dz, dkl, mean, log_variance, noise, dmean, dlog_variance, N, L, dz_stride, dkl_stride,
    mean_stride, log_variance_stride, noise_stride,
    SAMPLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dmean = dz + dkl mean; dlog_variance = (dz noise e^(v/2) + dkl (e^v - 1)) / 2: (N, L)."""
    row, column, exists = place(N, L, ROWS, COLUMNS)
    m = tl.load(mean + row * mean_stride + column, exists, 0.0).to(tl.float32)
    v = tl.load(log_variance + row * log_variance_stride + column, exists, 0.0).to(tl.float32)
    g = tl.load(dkl + row * dkl_stride, row < N, 0.0).to(tl.float32)
    # no gradient of the KL stays none where e^v is beyond float32
    of_mean, of_variance = g * m, tl.where(g == 0, 0.0, g * exponentials(v)[1])
    if SAMPLE:
        d = tl.load(dz + row * dz_stride + column, exists, 0.0).to(tl.float32)
        e = tl.load(noise + row * noise_stride + column, exists, 0.0).to(tl.float32)
        of_mean += d
        of_variance += d * e * exponentials(0.5 * v)[0]
    tl.store(dmean + row * L + column, of_mean, exists)
    tl.store(dlog_variance + row * L + column, 0.5 * of_variance, exists)


def tile_of(latents: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program."""
    columns = 16
    while columns < min(latents, WIDEST):
        columns *= 2
    return max(TILE // columns, 1), columns, 4 if columns <= TILE else 8


def rows_of(x_NL: Tensor) -> Tensor:
    """x where the numbers of a row lie side by side, else a contiguous copy."""
    return x_NL if x_NL.stride(1) == 1 else x_NL.contiguous()


def forward(
    mean_NL: Tensor, log_variance_NL: Tensor, noise_NL: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(z, KL): (N, L) in the mean's dtype, or (0, L) without noise, and (N,) float32."""
    sample, (n, latents) = noise_NL is not None, mean_NL.shape
    mean_NL, log_variance_NL = rows_of(mean_NL), rows_of(log_variance_NL)
    noise_NL = rows_of(noise_NL) if noise_NL is not None else mean_NL
    rows, columns, warps = tile_of(latents)
    across = triton.cdiv(latents, columns)
    z = mean_NL.new_empty((n if sample else 0, latents))
    part = mean_NL.new_empty((n, across) if across > 1 else (n,), dtype=torch.float32)
    launchable(forward_kernel)[(triton.cdiv(n, rows), across)](
        mean_NL, log_variance_NL, noise_NL, z, part, n, latents, mean_NL.stride(0),
        log_variance_NL.stride(0), noise_NL.stride(0), SAMPLE=sample, ROWS=rows, COLUMNS=columns,
        num_warps=warps,
    )  # fmt: skip
    return z, part.sum(1) if across > 1 else part


def backward(
    dz_NL: Tensor,
    dkl_N: Tensor,
    mean_NL: Tensor,
    log_variance_NL: Tensor,
    noise_NL: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of mean and log variance, contiguous, in their dtypes."""
    sample, (n, latents) = noise_NL is not None, mean_NL.shape
    mean_NL, log_variance_NL, dz_NL = (rows_of(x) for x in (mean_NL, log_variance_NL, dz_NL))
    noise_NL = rows_of(noise_NL) if noise_NL is not None else mean_NL
    rows, columns, warps = tile_of(latents)
    outs = mean_NL.new_empty((n, latents)), log_variance_NL.new_empty((n, latents))
    launchable(backward_kernel)[(triton.cdiv(n, rows), triton.cdiv(latents, columns))](
        dz_NL, dkl_N, mean_NL, log_variance_NL, noise_NL, *outs, n, latents, dz_NL.stride(0),
        dkl_N.stride(0), mean_NL.stride(0), log_variance_NL.stride(0), noise_NL.stride(0),
        SAMPLE=sample, ROWS=rows, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    return outs


def variants() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, tuple[str, ...]]]:
    """(name, kernel, types of arguments, compile-time values, warps, multiples of 16) of each
    kernel, with and without a sample, for few and for many latents, in each dtype."""
    sums = {"part": "*fp32", "dkl": "*fp32"}
    numbers = dict.fromkeys(("N", "L"), "i32")
    found = []
    for dtype in ("fp32", "bf16", "fp16"):
        for kernel in (forward_kernel, backward_kernel):
            strides = {a: "i32" for a in kernel.arg_names if a.endswith("_stride")}
            known = sums | numbers | strides
            types = {a: known.get(a, f"*{dtype}") for a in kernel.arg_names if not a.isupper()}
            types |= numbers
            for sample, latents in ((s, n) for s in (True, False) for n in (128, WIDEST)):
                rows, columns, warps = tile_of(latents)
                constants = {"SAMPLE": sample, "ROWS": rows, "COLUMNS": columns}
                name = f"gaussian_kl {kernel.__name__} {latents} {dtype}"
                name += "" if sample else " without sample"
                aligned = tuple(a for a in types if a not in ("N", "dkl_stride"))
                found.append((name, kernel, types, constants, warps, aligned))
    return found
