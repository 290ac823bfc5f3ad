"""Rows of a packed dataset as a batch of floats: gather, window, mirror, scale, as one operation.

On a GPU one launch, which reads each byte of the batch once and writes each float once. A CPU has
no such pass: it gathers and mirrors bytes, a fourth of the size, and makes floats of a few images
at a time, which its cache holds from the first of three passes to the last.

Every implementation gives the same bits: x - 127.5 is exact, so the product alone is rounded, and
no compiler can fuse the two into one multiply-add. 0 and 255 become -1 and 1 exactly.

Shapes: n images of the dataset, M of the batch, H, W, C as stored.
"""

import torch
from torch import Tensor

from kernels import dispatch

NAME = "image_batch"
MIDDLE = 127.5
SCALE = 1 / MIDDLE  # rounded to float32 where it meets one
CACHED = 1 << 18  # floats that a CPU converts at a time: 1 MB, half of a core's second cache


def image_batch(
    images_NHWC: Tensor,
    rows_M: Tensor,
    size: int,
    flip_M: Tensor | None = None,
    top_M: Tensor | None = None,
    left_M: Tensor | None = None,
) -> Tensor:
    """The rows as float32 (M, C, size, size), channels_last, in [-1, 1].

    images_NHWC: uint8, contiguous. rows_M: int64 in [0, n). flip_M: bool, images to mirror left to
    right. top_M, left_M: int64 corners of the windows, inside the images, of size x size pixels;
    without them size is H and the windows begin in column 0, whatever W. All on one device.

    Rows and corners are not checked, which would wait for the GPU; out of range there they read
    beyond the dataset. Raises ValueError for a wrong dtype, shape or device.
    """
    _check(images_NHWC, rows_M, size, flip_M, top_M, left_M)
    given = (images_NHWC, rows_M, size, flip_M, top_M, left_M)
    if not dispatch.choose(NAME, images_NHWC.device).fused:
        return reference(*given)
    if torch.compiler.is_compiling() or type(images_NHWC) is not Tensor:  # or a fake tensor
        return image_batch_op(*given)
    with torch.cuda.device_of(images_NHWC), dispatch.eagerly():
        return _launch(*given)


def reference(
    images_NHWC: Tensor,
    rows_M: Tensor,
    size: int,
    flip_M: Tensor | None = None,
    top_M: Tensor | None = None,
    left_M: Tensor | None = None,
) -> Tensor:
    """`image_batch` in plain PyTorch, the quickest way that the tensors allow."""
    given = (images_NHWC, rows_M, size, flip_M, top_M, left_M)
    real = type(images_NHWC) is Tensor and images_NHWC.device.type == "cpu"  # and no fake tensor
    if real and not torch.compiler.is_compiling():
        return _floats(_bytes(*given)).permute(0, 3, 1, 2)
    return _indexed(*given).float().sub(MIDDLE).mul(SCALE).permute(0, 3, 1, 2)


def _indexed(
    images: Tensor,
    rows: Tensor,
    size: int,
    flip: Tensor | None,
    top: Tensor | None,
    left: Tensor | None,
) -> Tensor:
    """uint8 (M, size, size, C) without a shape that depends on data: for compilers and GPUs."""
    if flip is None and top is None:
        return images[:, :, :size].index_select(0, rows)
    y = x = torch.arange(size, device=images.device)
    if flip is not None:
        x = torch.where(flip[:, None], size - 1 - x, x)
    if top is not None:
        y, x = y + top[:, None], x + left[:, None]
    return images[rows[:, None, None], y[..., :, None], x[..., None, :]]


def _bytes(
    images: Tensor,
    rows: Tensor,
    size: int,
    flip: Tensor | None,
    top: Tensor | None,
    left: Tensor | None,
) -> Tensor:
    """uint8 (M, size, size, C) by the quickest ways on a CPU: rows of pixels are moved whole, and
    NumPy puts images into place in a twentieth of PyTorch's time."""
    if top is None:
        batch = images[:, :, :size].index_select(0, rows)
    else:
        batch = _windows(images, rows, size, top, left)
    if flip is not None:
        mirrored = flip.nonzero()[:, 0]
        batch.numpy()[mirrored.numpy()] = batch.index_select(0, mirrored).flip(2).numpy()
    return batch


def _windows(images: Tensor, rows: Tensor, size: int, top: Tensor, left: Tensor) -> Tensor:
    """Each window read where it lies: by index in the view of all windows of all images."""
    n, height, width, channels = images.shape
    line = width * channels
    shape = (n, height - size + 1, width - size + 1, size, size * channels)
    every = images.as_strided(shape, (height * line, line, channels, line, 1)).numpy()
    found = every[rows.numpy(), top.numpy(), left.numpy()]
    return torch.from_numpy(found).view(len(rows), size, size, channels)


def _floats(batch: Tensor) -> Tensor:
    """float32 of bytes, a few images at a time."""
    out = torch.empty(batch.shape)
    images = max(1, CACHED // max(1, batch[:1].numel()))
    for values, part in zip(out.split(images), batch.split(images), strict=True):
        values.copy_(part).sub_(MIDDLE).mul_(SCALE)
    return out


def _check(
    images: Tensor,
    rows: Tensor,
    size: int,
    flip: Tensor | None,
    top: Tensor | None,
    left: Tensor | None,
) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or not images.is_contiguous():
        raise ValueError(f"images must be contiguous uint8 (n, H, W, C), not {_told(images)}")
    if rows.dtype != torch.int64 or rows.ndim != 1:
        raise ValueError(f"rows must be int64 (M,), not {_told(rows)}")
    if (top is None) != (left is None):
        raise ValueError("a window's corner needs both top and left")
    per_image = {"flip": (flip, torch.bool), "top": (top, torch.int64), "left": (left, torch.int64)}
    for name, (t, dtype) in per_image.items():
        if t is not None and (t.dtype != dtype or t.shape != rows.shape):
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(f"{name} must be {kind} ({rows.shape[0]},), not {_told(t)}")
    for t in (rows, flip, top, left):
        if t is not None and t.device != images.device:
            raise ValueError(f"one device for all: images on {images.device}, {_told(t)}")
    _, height, width, _ = images.shape
    if not 1 <= size <= min(height, width) or (top is None and size != height):
        remedy = "; a window lower than the images needs top and left" if size < height else ""
        raise ValueError(f"size {size} does not fit images of {height} x {width} pixels{remedy}")


def _told(t: Tensor) -> str:
    dense = "" if t.is_contiguous() else ", not contiguous"
    return f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)} on {t.device}{dense}"


def _launch(
    images: Tensor,
    rows: Tensor,
    size: int,
    flip: Tensor | None,
    top: Tensor | None,
    left: Tensor | None,
) -> Tensor:
    from kernels import image_batch_triton

    return image_batch_triton.gather(images, rows, size, flip, top, left)


def _fake(
    images: Tensor,
    rows: Tensor,
    size: int,
    flip: Tensor | None,
    top: Tensor | None,
    left: Tensor | None,
) -> Tensor:
    m, channels = rows.shape[0], images.shape[3]
    return images.new_empty((m, size, size, channels), dtype=torch.float32).permute(0, 3, 1, 2)


image_batch_op = dispatch.register(NAME, _launch, _fake)
