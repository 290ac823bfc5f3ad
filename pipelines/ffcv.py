"""The FFCV pipeline: a .beton read and decoded by FFCV's compiled code, in the order of all others.

FFCV turns rows into uint8 images and nothing else. Its thread runs through our endless stream of
rows, so there are no epochs to begin anew; every batch has memory of its own and is checked to show
the rows that were asked for, and an exception in there comes out of `fetch`. FFCV's own way to a
GPU is left out: a batch goes over as those of every pipeline do.
"""

import copy
import functools
import os
import time
import weakref
from collections.abc import Iterator
from queue import Empty, Full, Queue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import Clock
from pipelines.beton import Beton, beton_path, missing, open_beton, threads_kept
from pipelines.feed import HostFed, Spec
from pipelines.order import Order
from pipelines.pack import say_skipped

__all__ = ["Ffcv", "missing", "open_ffcv"]

AHEAD = 3
"""Batches that wait to be fetched."""


class Ffcv(HostFed):
    """One FFCV loader for the whole run: numba compiles for seconds, once, beside the rest of the
    start."""

    name = "ffcv"

    def __init__(self, spec: Spec, beton: Beton) -> None:
        super().__init__(spec)
        self.skipped, self._path = len(beton.skipped), beton.path
        self._order = copy.deepcopy(spec.order)  # read by FFCV's thread alone
        with beton.path.open("rb") as file:  # read ahead: random first touches are slow on a disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        began = time.perf_counter()
        self._loader = _loader(beton, spec, self._share)
        self._compiling = [time.perf_counter() - began]
        self._said = False
        self._restart(spec.clock)

    def _restart(self, clock: Clock) -> None:
        self._stop()
        rows = _slices(
            self._order, clock.images + clock.rank * self._share, clock.batch, self._share
        )
        self._stream = _stream_class()(self._loader, rows, self._compiling)
        # a pipeline that nobody closed must not leave the thread behind
        self._forgotten = weakref.finalize(self, self._stream.terminate_event.set)
        self._next: int | None = clock.images

    def fetch(self, clock: Clock) -> tuple[Tensor, Tensor]:
        if clock.images != self._next:
            self._restart(clock)
        found = self._stream.output_queue.get()
        if isinstance(found, BaseException):
            self._next = None
            text = f"FFCV stopped in {self._path}: {type(found).__name__}: {found}"
            raise RuntimeError(text) from found
        if not self._said:
            self.spec.say(f"FFCV compiled its loader in {sum(self._compiling):.1f} s")
            self._said = True
        self._next = clock.images + clock.batch
        images_NHWC, rows_N = (torch.from_numpy(array) for array in found)
        if clock.device.type == "cuda":
            # not in FFCV's thread: no memory may be pinned while a graph is captured
            images_NHWC = images_NHWC.pin_memory()
        return images_NHWC, rows_N

    def _stop(self) -> None:
        stream = self.__dict__.pop("_stream", None)
        if stream is not None:
            self._forgotten.detach()
            stream.stop()

    def close(self) -> None:
        """Stop the thread, let go of the map."""
        self._stop()
        self._loader, self._next = None, None


def open_ffcv(spec: Spec) -> Ffcv:
    """Write or load the .beton of the dataset and read from it.

    Raises BadImage at a corrupt image, CacheUnusable if the cache folder cannot be written, and
    ValueError naming a setting, or what to install.
    """
    path = beton_path(spec.dataset, spec.data)
    beton = open_beton(spec.dataset, spec.data, path, spec.say, progress=spec.clock.rank == 0)
    say_skipped(beton.skipped, spec.say)
    spec.order.replace(beton.skipped)
    pipeline = Ffcv(spec, beton)
    pipeline.choice = f"{path.stat().st_size / 1e6:,.1f} MB .beton, {beton.form}"
    return pipeline


def _slices(order: Order, first: int, batch: int, share: int) -> Iterator[np.ndarray]:
    """This rank's rows, int64 (share,), batch after batch, without end."""
    while True:
        yield order.rows(np.arange(first, first + share))
        first += batch


def _loader(beton: Beton, spec: Spec, share: int) -> Any:
    """FFCV's loader of whole images, uint8 (share, H, W, C), and of the rows that they are."""
    import numba
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.ndarray import NDArrayDecoder
    from ffcv.loader import Loader
    from ffcv.memory_managers import OSCacheManager

    raw, side = beton.form == "raw", spec.dataset.fit.side
    threads = 1 if raw else max(1, min(spec.data.workers, numba.config.NUMBA_NUM_THREADS))
    image = NDArrayDecoder() if raw else _decoder_class()((side, side), 1.0)
    OSCacheManager.compile_reader = _compile_reader
    with threads_kept():
        loader = Loader(
            str(beton.path),
            batch_size=share,
            num_workers=threads,
            os_cache=True,
            # one set of buffers, for the images' is renewed for each batch
            batches_ahead=-1,
            pipelines={"image": [image], "index": [IntDecoder()]},
        )
    # lists for FFCV's other cache, some hundred bytes an image
    manager = loader.memory_manager
    manager.ptr_to_size = manager.sample_to_pages = manager.page_to_samples = None
    return loader


def _compile_reader(_manager: Any) -> Any:
    """In place of FFCV's own, which makes numba's one type of byte arrays immutable under the feet
    of all that is compiled for it: a second loader then breaks the tables of the first."""
    from ffcv.pipeline.compiler import Compiler

    def read(address, state):  # noqa: ANN001
        size = state[2][np.searchsorted(state[1], address)]
        return state[0][address : address + size]

    return Compiler.compile(read)


@functools.cache
def _decoder_class() -> type:
    """FFCV's decoder of JPEGs with the resize of all other pipelines: its own averages boxes, which
    is 3 to 6 of 255 off where there is much detail."""
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.libffcv import imdecode
    from ffcv.pipeline.compiler import Compiler

    class Decoder(CenterCropRGBImageDecoder):
        """The largest centred square, resized."""

        def generate_code(self) -> Any:
            mem_read, my_range = self.memory_read, Compiler.get_iterator()
            decode_c, resize_c = Compiler.compile(imdecode), _compiled_resize()

            def decode(batch_indices, my_storage, metadata, storage_state):  # noqa: ANN001
                destination, temporary = my_storage
                for place in my_range(len(batch_indices)):
                    field = metadata[batch_indices[place]]
                    content = mem_read(field["data_ptr"], storage_state)
                    height, width = np.uint32(field["height"]), np.uint32(field["width"])
                    room = temporary[place]
                    decode_c(content, room, height, width, height, width, 0, 0, 1, 1, False, False)
                    side = min(height, width)
                    top, left = (height - side) // 2, (width - side) // 2
                    first = 3 * (top * width + left)
                    resize_c(room, first, 3 * width, side, destination[place])
                return destination[: len(batch_indices)]

            decode.is_parallel = True
            return decode

    return Decoder


@functools.cache
def _compiled_resize() -> Any:
    from ffcv.pipeline.compiler import Compiler

    weights_c = Compiler.compile(_weights)

    def resize(pixels, first, stride, size, small):  # noqa: ANN001
        """The square of `size` pixels that begins at byte `first` of an image with `stride` bytes a
        line, to uint8 (T, T, 3): bilinear with antialias, first over lines, then columns. Lines are
        flat, so that the compiler makes vectors of them."""
        target = small.shape[0]
        starts, counts, weights = weights_c(size, target)
        row = np.empty(3 * size, np.float32)
        for y in range(target):
            row[:] = np.float32(0.5)  # rounds
            for tap in range(counts[y]):
                weight, begin = weights[y, tap], first + (starts[y] + tap) * stride
                line = pixels[begin : begin + 3 * size]
                for place in range(3 * size):
                    row[place] += weight * np.float32(line[place])
            for x in range(target):
                red = green = blue = np.float32(0)
                for tap in range(counts[x]):
                    weight, at = weights[x, tap], 3 * (starts[x] + tap)
                    red += weight * row[at]
                    green += weight * row[at + 1]
                    blue += weight * row[at + 2]
                small[y, x, 0], small[y, x, 1], small[y, x, 2] = int(red), int(green), int(blue)

    return Compiler.compile(resize)


def _weights(size: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First source pixel and number of them, int64 (target,), and triangle weights, float32
    (target, taps), as PIL and torch have them: the triangle is as wide as the reduction."""
    scale = size / target
    width = max(scale, 1.0)
    starts, counts = np.zeros(target, np.int64), np.zeros(target, np.int64)
    weights = np.zeros((target, int(2 * width) + 3), np.float32)
    for place in range(target):
        centre = scale * (place + 0.5)
        start, end = max(int(centre - width + 0.5), 0), min(int(centre + width + 0.5), size)
        total = 0.0
        for source in range(start, end):
            weight = max(1.0 - abs(source + 0.5 - centre) / width, 0.0)
            weights[place, source - start] = weight
            total += weight
        starts[place], counts[place] = start, end - start
        weights[place] /= total
    return starts, counts, weights


@functools.cache
def _stream_class() -> type:
    """FFCV's thread, made to run through our rows; a class in here because FFCV is an extra."""
    import numba
    from ffcv.loader.epoch_iterator import EpochIterator

    class Stream(EpochIterator):
        """Puts (images, rows), numpy arrays, or an exception, on `output_queue`."""

        def __init__(self, loader: Any, rows: Iterator[np.ndarray], compiling: list) -> None:
            self._rows, self._compiling = rows, compiling
            self._image = loader.graph.leaf_nodes["image"].id
            super().__init__(loader, ())

        def start(self) -> None:
            self.output_queue = Queue(AHEAD)  # FFCV's __init__, which calls this, sets no bound
            super().start()

        def run(self) -> None:
            """In place of FFCV's own, whose exceptions die with the thread while all wait."""
            try:
                numba.set_num_threads(self.loader.num_workers)  # counts for this thread
                for number, rows_N in enumerate(self._rows):
                    if self.terminate_event.is_set():
                        return
                    began = time.perf_counter()
                    self._renew_buffer()
                    images_NHWC, index_N1 = self.run_pipeline(number, rows_N.astype("u8"), 0, None)
                    if number == 0:
                        self._compiling.append(time.perf_counter() - began)
                    assert np.array_equal(index_N1[:, 0], rows_N), "FFCV showed other rows"
                    self._put((images_NHWC, rows_N))
            except BaseException as error:
                self._put(error)

        def _renew_buffer(self) -> None:
            """Have FFCV decode into memory that nothing else holds: its few buffers come again."""
            buffers = self.memory_allocations["operation"]
            held = buffers[self._image]
            if isinstance(held, tuple):  # and room for a batch of sources
                buffers[self._image] = np.empty_like(held[0]), held[1]
            else:
                buffers[self._image] = np.empty_like(held)

        def _put(self, found: Any) -> None:
            while not self.terminate_event.is_set():
                try:
                    return self.output_queue.put(found, timeout=0.1)
                except Full:
                    continue

        def stop(self) -> None:
            """Have the thread end, and wait; while numba compiles this takes seconds."""
            self.terminate_event.set()
            while self.is_alive():
                try:
                    self.output_queue.get_nowait()  # so that a waiting `put` is over at once
                except Empty:
                    self.join(0.01)
            self.close()

    return Stream
