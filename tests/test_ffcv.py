"""FFCV: does it feed what the others feed, and is what breaks in it held off?"""

import gc
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace

import numba
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from pipelines import beton
from pipelines.batch import Batch, Clock
from pipelines.beton import Beton, beton_path, open_beton
from pipelines.datasets import find
from pipelines.ffcv import Ffcv
from pipelines.images import BadImage
from pipelines.open import Pipeline
from pipelines.order import Order
from pipelines.settings import Data
from tests.batches import clock_of, folder_of_22, opened, some


def batches(pipeline: Pipeline, clock: Clock, count: int) -> list[Batch]:
    """The next batches of an open pipeline."""
    found = []
    for _ in range(count):
        pipeline.ready(clock)
        found.append(pipeline.batch(clock))
        clock.advance()
    return found


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    """Bit for bit."""
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.images_NCHW, b.images_NCHW)
        assert torch.equal(a.labels_N, b.labels_N) and torch.equal(a.position_N, b.position_N)


def written(data: Data, lines: list[str] | None = None) -> Beton:
    """The .beton of a recipe, without a loader."""
    dataset = find(data)
    say = (lambda _: None) if lines is None else lines.append
    return open_beton(dataset, data, beton_path(dataset, data), say, False)


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Iterator[tuple[Data, Clock, Ffcv, list[str]]]:
    """A folder of 22 images at batch 8, and the pipeline that reads it raw: compiled once."""
    data = replace(folder_of_22(tmp_path_factory.mktemp("raw")), pipeline="ffcv")
    clock, lines = clock_of(data), []
    pipeline = opened(data, clock, lines.append)
    yield data, clock, pipeline, lines
    pipeline.close()


@pytest.fixture
def faces(tmp_path) -> Data:
    """A folder of 16 JPEGs of soft shapes, and beside them what cannot be stored as it is: a PNG
    with transparency, a grey JPEG and one too large."""
    folder, rng = tmp_path / "faces" / "one", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(19):
        detail = 60 if i == 15 else 6
        shape = (detail, detail, 4 if i == 16 else 3)
        small = rng.integers(0, 256, shape, dtype=np.uint8)
        size = (900, 1000) if i == 18 else (89, 109)
        image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
        image = image.convert("L") if i == 17 else image
        kind = {} if i == 16 else {"quality": 75}
        image.save(folder / (f"{i:02}.png" if i == 16 else f"{i:02}.jpg"), **kind)
    return Data(
        name="folder",
        path=tmp_path / "faces",
        cache=tmp_path / "cache",
        resolution=32,
        batch=8,
        flip=True,
        workers=2,
        pipeline="ffcv",
        beton="jpeg",
    )


# the same batches as all others


def test_raw_equals_resident_bit_for_bit_and_compiles_once(raw):
    data, clock, pipeline, lines = raw
    whole = some(replace(data, pipeline="resident"), 24)
    for images in (0, 40, 8, 88, 16, 16):  # mid epoch, forwards, backwards, the same again
        clock.seek(images)
        assert_same(batches(pipeline, clock, 12), whole[images // 8 : images // 8 + 12])
    assert sum("FFCV compiled its loader in" in line for line in lines) == 1
    assert pipeline.choice.startswith("ffcv: ") and pipeline.choice.endswith("raw")


def test_two_ranks_share_the_batches_of_one(raw):
    data, _, _, _ = raw
    whole = some(replace(data, pipeline="resident"), 5, images=16)
    for rank in range(2):
        half = slice(4 * rank, 4 * rank + 4)
        for part, batch in zip(some(data, 5, images=16, rank=rank, world=2), whole, strict=True):
            assert torch.equal(part.images_NCHW, batch.images_NCHW[half])
            assert torch.equal(part.labels_N, batch.labels_N[half])


def test_one_channel_with_room_for_a_random_crop(raw):
    data = replace(raw[0], channels=1, load=14)
    assert_same(some(data, 4), some(replace(data, pipeline="resident"), 4))


def test_jpegs_are_stored_as_they_are_and_decode_to_nearly_the_same(faces):
    got, wanted = some(faces, 4), some(replace(faces, pipeline="resident"), 4)
    for a, b in zip(got, wanted, strict=True):
        difference = (a.images_NCHW - b.images_NCHW).abs().mean((1, 2, 3)) * 127.5
        assert difference.max() < 2
        assert torch.equal(a.position_N, b.position_N)
    content = written(faces).path.read_bytes()
    paths = sorted((faces.path / "one").iterdir())
    assert [path.read_bytes() in content for path in paths] == [True] * 16 + [False] * 3


@pytest.mark.timeout(120)
def test_two_loaders_at_once(raw, faces):
    data, clock, pipeline, _ = raw
    other_clock = clock_of(faces)
    other = opened(faces, other_clock)
    clock.seek(0)
    mixed, others = [], []
    for _ in range(20):
        mixed += batches(pipeline, clock, 1)
        others += batches(other, other_clock, 1)
    other.close()
    assert_same(mixed, some(replace(data, pipeline="resident"), 20))
    assert len({batch.images_NCHW.sum().item() for batch in others}) == 20


# what breaks in FFCV


def test_what_was_fetched_stays_as_it_is(raw):
    data, clock, pipeline, _ = raw
    dataset, kept = find(data), []
    for images in range(0, 8 * 30, 8):
        clock.seek(images)
        kept.append(pipeline.fetch(clock))
    wanted = Order(22, seed=3).rows(np.arange(8 * 30)).reshape(30, 8)
    for (images_NHWC, rows_N), wanted_N in zip(kept, wanted, strict=True):
        assert np.array_equal(rows_N, wanted_N)
        for image, row in zip(images_NHWC.numpy(), wanted_N, strict=True):
            assert np.array_equal(image, dataset.decode(int(row)))


@pytest.mark.timeout(60)
def test_an_exception_in_the_thread_comes_out_and_leaves_it_usable(raw, monkeypatch):
    _, clock, pipeline, _ = raw

    def fail(*_args: object) -> None:
        raise ZeroDivisionError("in a stage")

    clock.seek(8)
    with monkeypatch.context() as patch:
        patch.setattr(type(pipeline._stream), "run_pipeline", fail)
        for _ in range(2):
            clock.seek(clock.images + 800)
            with pytest.raises(RuntimeError, match=r"\.beton: ZeroDivisionError: in a stage"):
                pipeline.ready(clock)
    assert_same(
        batches(pipeline, clock, 2), batches(pipeline, clock_of(raw[0], clock.images - 16), 2)
    )


@pytest.mark.timeout(60)
def test_other_rows_than_asked_for_are_found_out(raw, monkeypatch):
    _, clock, pipeline, _ = raw
    stream = type(pipeline._stream)
    right = stream.run_pipeline
    monkeypatch.setattr(
        stream,
        "run_pipeline",
        lambda self, number, rows, *rest: right(self, number, rows[::-1], *rest),
    )
    clock.seek(clock.images + 800)
    with pytest.raises(RuntimeError, match="AssertionError: FFCV showed other rows"):
        pipeline.ready(clock)


def streams() -> int:
    """FFCV's threads that run."""
    return sum(type(thread).__name__ == "Stream" for thread in threading.enumerate())


@pytest.mark.timeout(120)
@pytest.mark.parametrize("end", ["closed", "closed at once", "forgotten"])
def test_no_thread_is_left_and_torch_keeps_its_own(raw, end):
    data, before, threads = raw[0], streams(), torch.get_num_threads()
    clock = clock_of(data)
    pipeline = opened(data, clock)
    assert streams() == before + 1 and torch.get_num_threads() == threads
    if end != "closed at once":
        batches(pipeline, clock, 2)
    if end == "forgotten":
        left = pipeline._stream
        del pipeline
        gc.collect()
        left.join(10)
        assert not left.is_alive()
    else:
        pipeline.close()
        pipeline.close()
    assert streams() == before and torch.get_num_threads() == threads


def test_host_memory_does_not_grow(raw):
    _, clock, pipeline, _ = raw

    def private() -> int:
        gc.collect()
        memory = psutil.Process().memory_info()
        return memory.rss - memory.shared  # less the pages of the mapped file

    def epochs(count: int) -> None:
        clock.seek(0)
        for _ in range(count):
            batches(pipeline, clock, 11)  # four epochs
            clock.seek(clock.images + 8)  # begins the thread anew

    epochs(30)
    before = private()
    epochs(90)
    assert private() - before < 4e6


def test_what_to_install_is_said(data, monkeypatch):
    asked = replace(data, pipeline="ffcv")
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "ffcv.loader", raising=False)
        patch.setitem(sys.modules, "ffcv", None)
        with pytest.raises(
            ValueError, match=r"pip install 'saddle\[ffcv\]' after apt-get install g"
        ):
            opened(asked, clock_of(asked))
    monkeypatch.setattr(numba, "threading_layer", lambda: "workqueue")
    with pytest.raises(ValueError, match=r"tbb or omp \(workqueue\): apt-get install libtbb12"):
        opened(asked, clock_of(asked))


# the file


@pytest.mark.parametrize("form", ["raw", "jpeg"])
def test_a_corrupt_image_stops_the_writing_or_is_skipped(faces, form):
    faces = replace(faces, beton=form)
    path = faces.path / "one" / "05.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(BadImage, match=r"05\.jpg"):
        written(faces)
    assert not list(faces.cache.glob("*.beton*"))
    skipping, lines = replace(faces, on_error="skip"), []
    found = written(skipping, lines)
    assert list(found.skipped) == [5] and "05.jpg" in found.skipped[5]
    assert found.rows.tolist() == [*range(5), 6, *range(6, 19)]
    with pytest.raises(BadImage, match=r"05\.jpg"):
        written(faces)  # also once it is written
    pipeline = opened(skipping, clock_of(skipping), lines.append)
    other = opened(replace(skipping, pipeline="resident"), clock_of(skipping))
    assert pipeline.skipped == 1 and sum("1 corrupt images skipped" in line for line in lines) == 1
    pairs = zip(
        batches(pipeline, clock_of(faces), 5), batches(other, clock_of(faces), 5), strict=True
    )
    for a, b in pairs:
        assert ((a.images_NCHW - b.images_NCHW).abs().mean() * 127.5) < (
            2 if form == "jpeg" else 0.1
        )
    pipeline.close()


def test_all_images_corrupt(faces):
    for path in (faces.path / "one").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(BadImage, match="every image of folder is corrupt"):
        written(replace(faces, on_error="skip"))


def test_jpegs_cannot_hold_one_channel(faces):
    with pytest.raises(ValueError, match=r"--data\.beton jpeg .* take --data\.beton raw"):
        written(replace(faces, channels=1))


def test_one_process_writes_while_others_wait(faces):
    lines, threads = [], [threading.Thread(target=lambda: written(faces, lines)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(line.startswith("writing") for line in lines) == 1


def test_a_folder_that_cannot_be_written_is_named(faces):
    faces.cache.write_text("a file where the folder should be")
    with pytest.raises(beton.CacheUnusable, match=r"--data\.cache"):
        written(faces)
