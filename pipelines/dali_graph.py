"""The one DALI graph: encoded images to uint8 (N, H, W, C), on the GPU or on the CPU.

It decodes and cuts. A GPU then resizes in the graph, too; on a CPU torch does that in a third of
DALI's time (50 against 165 us an image of 178 pixels), and to the bits of all other pipelines.

It is fed by hand, batch by batch, rather than by a callback: what is shown when stays our affair,
and the graph holds nothing of ours that would keep it alive.
"""

from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.images import Fit, jpeg_frame, resize, resize_batch
from pipelines.index import PNG

AHEAD = 2
"""Batches in the graph at a time: one that is waited for, one that is decoded meanwhile."""


class Broken(Exception):
    """DALI gave up, and its graph is of no more use. The message is what DALI says, in one line."""

    def __init__(self, failure: RuntimeError) -> None:
        lines = [line.strip() for line in str(failure).splitlines()]
        if "encountered:" in lines:  # before that it quotes our source
            lines = lines[lines.index("encountered:") + 1 :]
        noise = ("C++ context", "Current pipeline", "Critical error")
        super().__init__(" ".join(line for line in lines if line and not line.startswith(noise)))


class Source(NamedTuple):
    """An encoded image, and the squares (left, top, side) of it that are shown: one, or two of a
    side-by-side pair."""

    content: bytes
    squares: list[tuple[int, int, int]]


def missing() -> str:
    """What to do so that DALI can be imported; "" if it can."""
    try:
        import_module("nvidia.dali")
    except (ImportError, OSError):  # OSError: a library that it loads is not there
        return "--data.pipeline dali needs NVIDIA DALI: pip install 'saddle[dali]'"
    return ""


def decodable(content: bytes, size: tuple[int, int], channels: int) -> bool:
    """Whether DALI may have these bytes, and makes of them what we would.

    A whole JPEG or PNG of this (width, height). Anything else is decoded by `Fit`: DALI can take
    the process down at what is no image, and rounds grey made from a colour PNG otherwise.
    """
    if content[:3] == b"\xff\xd8\xff":
        frame = jpeg_frame(content)
        whole = b"\xff\xd9" in content[-64:]
        return whole and frame is not None and frame[:2] == size and frame[2] in (1, 3)
    if not content.startswith(PNG) or b"IEND" not in content[-64:]:
        return False
    said = int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    colours = (0, 2) if channels == 3 else (0,)
    return said == size and content[24] == 8 and content[25] in colours


def raw(stored_HWC: np.ndarray) -> Source:
    """Pixels as they are to be shown, uint8 `fit.stored`, as a PNM that DALI hands through."""
    height, width, channels = stored_HWC.shape
    header = b"P%d\n%d %d\n255\n" % (5 if channels == 1 else 6, width, height)
    squares = [(left, 0, height) for left in range(0, width, height)]
    return Source(header + stored_HWC.tobytes(), squares)


class Graph:
    """Decode, cut and resize batches of `share` images with `threads` threads."""

    def __init__(self, fit: Fit, share: int, threads: int, device: torch.device) -> None:
        self._shape, self._device, self._side = (share, *fit.stored), device, fit.side
        number = torch.empty(0, device=device).device.index  # None on the CPU
        # depth 1 means that a first run does not wait for a second batch; a queue there still is
        self._pipe = _definition(fit, share, threads, number)
        self._pipe.build()

    def feed(self, sources: list[Source]) -> None:
        """Begin a batch, `share` images. Does not wait. Raises Broken."""
        encoded = [np.frombuffer(source.content, np.uint8) for source in sources]
        self._pipe.feed_input("encoded", encoded)
        squares_NK3 = np.array([source.squares for source in sources], np.int32)
        for k in range(squares_NK3.shape[1]):
            left_N, top_N, side_N = squares_NK3[:, k].T
            self._pipe.feed_input(f"start{k}", np.stack([top_N, left_N], 1))
            self._pipe.feed_input(f"shape{k}", np.stack([side_N, side_N], 1))
        try:
            self._pipe.schedule_run()
        except RuntimeError as failure:
            raise Broken(failure) from failure

    def take(self) -> Tensor:
        """Wait for the oldest batch: uint8 (share, *fit.stored), a tensor of its own, on the GPU
        in the order of the current stream. Raises Broken, above all at a corrupt image."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        gpu = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device) if gpu else None
        try:
            parts = self._pipe.share_outputs(cuda_stream=stream)
        except RuntimeError as failure:
            raise Broken(failure) from failure
        images_NHWC = torch.empty(self._shape, dtype=torch.uint8, device=self._device)
        if gpu:
            feed_ndarray(parts[0].as_tensor(), images_NHWC, cuda_stream=stream)
        else:
            for part, place_NHWC in zip(parts, images_NHWC.split(self._side, 2), strict=True):
                self._resize(part, place_NHWC)
        self._pipe.release_outputs()
        return images_NHWC

    def _resize(self, squares: Any, place_NHWC: Tensor) -> None:
        """Squares of the source, a DALI list on the CPU, to where they belong."""
        if squares.is_dense_tensor() and squares.at(0).shape[0] != self._side:
            squares_NHWC = torch.from_numpy(np.array(squares.as_tensor(), copy=False))
            place_NHWC.copy_(resize_batch(squares_NHWC, self._side))
            return
        for number, place_HWC in enumerate(place_NHWC):
            place_HWC.copy_(torch.from_numpy(resize(squares.at(number), self._side)))

    def close(self) -> None:
        """Stop the threads and free the buffers, at once: nothing else refers to DALI's pipeline.
        In a reference cycle it would hang any forked child that collects it (DALI 2.4)."""
        self._pipe = None


def _definition(fit: Fit, share: int, threads: int, number: int | None) -> Any:
    """The DALI pipeline; `number` of the GPU, or None: then the squares as they are."""
    from nvidia.dali import fn, pipeline_def, types

    decoding = {
        "device": "cpu" if number is None else "mixed",
        "output_type": types.GRAY if fit.channels == 1 else types.RGB,
        "jpeg_fancy_upsampling": True,  # as libjpeg does by itself, and so PIL
        "adjust_orientation": False,
    }

    @pipeline_def(batch_size=share, num_threads=threads, device_id=number, prefetch_queue_depth=1)
    def graph() -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        windows = [
            {
                name: fn.external_source(name=f"{name}{k}", dtype=types.INT32, ndim=1)
                for name in ("start", "shape")
            }
            for k in range(1 + fit.halves)
        ]
        if fit.halves:
            image = fn.decoders.image(encoded, **decoding)
            parts = [fn.slice(image, axes=[0, 1], **window) for window in windows]
        else:  # decodes the rows that are needed, to the same bits
            parts = [fn.decoders.image_slice(encoded, axes=[0, 1], **windows[0], **decoding)]
        if number is None:
            return tuple(parts)
        parts = [_resized(part, fit.side) for part in parts]
        return fn.cat(*parts, axis=1) if fit.halves else parts[0]

    return graph()


def _resized(image: Any, side: int) -> Any:
    """Triangular filter without half a pixel's shift, as PIL and torch do; the same size is kept to
    the bit."""
    from nvidia.dali import fn, types

    options = {"interp_type": types.INTERP_LINEAR, "antialias": True, "subpixel_scale": False}
    return fn.resize(image, size=(side, side), **options)
