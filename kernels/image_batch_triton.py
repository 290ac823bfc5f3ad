"""Triton kernel of the batch of images: one launch, each byte read once, each float written once.

A program makes BLOCK consecutive floats of one image, 16 per thread: four loads of 4 bytes and four
stores of 16, all coalesced, straight from register to register. A mirrored image, and a window at
any corner, is read byte by byte, a warp from one or two lines of the cache: the stores are four
fifths of the traffic all the same. Sizes are compile-time values, so that divisions become
multiplications and the compiler knows what is aligned.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import launchable

BLOCK = 2048  # floats of a program, at most
# (H, W, C, size) of `variants`: square, small, large, a pair, and to be cropped.
SHAPES = [(64, 64, 3, 64), (28, 28, 1, 28), (256, 256, 3, 256), (64, 128, 3, 64), (72, 72, 3, 64)]


@triton.jit
def gather_kernel(
    images, rows, flip, top, left, out,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr,
    FLIP: tl.constexpr, CROP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (M, SIZE, SIZE, C) float32 of images (n, H, W, C) uint8; program (image, block)."""
    m = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = at < SIZE * SIZE * C
    window = images + tl.load(rows + m) * (H * W * C)  # 64 bits: a dataset exceeds 2 GB
    if CROP:
        window += (tl.load(top + m) * W + tl.load(left + m)) * C
    source = at if W == SIZE else at // (SIZE * C) * (W * C) + at % (SIZE * C)
    if W == SIZE or SIZE * C % 4 == 0:
        # no more bytes at a time than floats, which would else change threads before the store
        source = tl.max_contiguous(source, 4)
    if FLIP:
        if tl.load(flip + m):
            # pixel x of a line is SIZE - 1 - x, its channels stay in order
            ahead = (SIZE - 1) * C + 2 * (at % C - at % (SIZE * C))
            byte = tl.load(window + (source + ahead), exists, 0)
        else:
            byte = tl.load(window + source, exists, 0)
    else:
        byte = tl.load(window + source, exists, 0)
    value = (byte.to(tl.float32) - 127.5) * (1 / 127.5)
    tl.store(out + m * (SIZE * SIZE * C) + at, value, exists)


def block_of(numbers: int) -> tuple[int, int]:
    """Floats and warps of a program, for images of so many numbers."""
    block = 512
    while block < min(numbers, BLOCK):
        block *= 2
    return block, block // 512


def gather(
    images_NHWC: Tensor,
    rows_M: Tensor,
    size: int,
    flip_M: Tensor | None,
    top_M: Tensor | None,
    left_M: Tensor | None,
) -> Tensor:
    """float32 (M, C, size, size), channels_last."""
    m, (height, width, channels) = rows_M.shape[0], map(int, images_NHWC.shape[1:])
    size = int(size)  # a compile-time value, like the rest
    block, warps = block_of(size * size * channels)
    out = images_NHWC.new_empty((m, size, size, channels), dtype=torch.float32)
    flip, top, left = (rows_M if t is None else t.contiguous() for t in (flip_M, top_M, left_M))
    launchable(gather_kernel)[(m, triton.cdiv(size * size * channels, block))](
        images_NHWC, rows_M.contiguous(), flip, top, left, out,
        H=height, W=width, C=channels, SIZE=size,
        FLIP=flip_M is not None, CROP=top_M is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def variants() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, tuple[str, ...]]]:
    """(name, kernel, types of arguments, compile-time values, warps, multiples of 16) for common
    shapes, with and without a mirror, cropped where the window is lower than the images."""
    types = dict.fromkeys(("rows", "top", "left"), "*i64") | {"images": "*u8", "out": "*fp32"}
    found = []
    for height, width, channels, size in SHAPES:
        for flip in (False, True):
            block, warps = block_of(size * size * channels)
            constants = {"H": height, "W": width, "C": channels, "SIZE": size, "FLIP": flip}
            constants |= {"CROP": size < height, "BLOCK": block}
            name = f"image_batch {height}x{width}x{channels}{' flip' if flip else ''}"
            name += f" crop {size}" if size < height else ""
            mirrors = {"flip": "*i1" if flip else "*i64"}
            found.append((name, gather_kernel, types | mirrors, constants, warps, tuple(types)))
    return found
