"""The dali pipeline: does it show what the others show, and survive what its files may be?"""

import gc
import os
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from pipelines import dali
from pipelines.batch import Batch, Clock
from pipelines.images import BadImage, Fit
from pipelines.open import Pipeline, open_pipeline
from pipelines.settings import Data
from pipelines.sources import ArraySet, FileSet
from tests.batches import CPU, KEY

LEVEL = 2 / 255  # a step of uint8, in images of [-1, 1]


@pytest.fixture
def data(tmp_path) -> Data:
    return Data(cache=tmp_path / "cache", batch=8, flip=True, workers=0, pipeline="dali")


def picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Colours that change smoothly, and some noise."""
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))
    noise = rng.integers(-12, 13, smooth.shape)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def files(folder: Path, fit: Fit, suffix="png", count=22, size=(20, 14), **options) -> FileSet:
    """A dataset of pictures of this (width, height), two classes."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        picture(rng, *size).save(folder / f"{i:02}.{suffix}")
    return dataset_of(folder, fit, **options)


def dataset_of(folder: Path, fit: Fit, **options) -> FileSet:
    names = np.array(sorted(os.fsencode(path.name) for path in folder.iterdir()))
    labels = np.arange(len(names)) % 2
    return FileSet("folder", "train", fit, labels, ("a", "b"), "", folder, names, **options)


def opened(dataset, data: Data, clock: Clock, say=lambda _: None) -> Pipeline:
    return open_pipeline(dataset, data, clock, 3, KEY.to(clock.device), say=say)


def some(dataset, data: Data, count: int, images=0, rank=0, world=1) -> list[Batch]:
    """Batches from a place in the stream on."""
    clock = Clock(data.batch, CPU, images, rank, world)
    pipeline = opened(dataset, data, clock)
    try:
        return following(pipeline, clock, count)
    finally:
        pipeline.close()


def following(pipeline: Pipeline, clock: Clock, count: int) -> list[Batch]:
    batches = []
    for _ in range(count):
        pipeline.ready(clock)
        batches.append(pipeline.batch(clock))
        clock.advance()
    return batches


def same(some: list[Batch], others: list[Batch]) -> bool:
    """Whether they are, bit for bit."""
    pairs = list(zip(some, others, strict=True))
    assert all(torch.equal(a.labels_N, b.labels_N) for a, b in pairs)
    return all(torch.equal(a.images_NCHW, b.images_NCHW) for a, b in pairs)


def assert_near(some: list[Batch], others: list[Batch]) -> None:
    """The same rows, and images that differ by two levels at most in the mean."""
    for batch, other in zip(some, others, strict=True):
        assert torch.equal(batch.labels_N, other.labels_N)
        assert (batch.images_NCHW - other.images_NCHW).abs().mean() < 2 * LEVEL
        if batch.pair_NCHW is not None:
            assert (batch.pair_NCHW - other.pair_NCHW).abs().mean() < 2 * LEVEL


@pytest.mark.parametrize("channels", [1, 3])
def test_pngs_at_the_training_resolution_are_those_of_the_others(tmp_path, data, channels):
    dataset = files(tmp_path / "set", Fit(14, channels), size=(14, 14))
    batches = some(dataset, data, 12)
    assert same(batches, some(dataset, replace(data, pipeline="torchvision"), 12))
    assert same(batches, some(dataset, replace(data, pipeline="resident"), 12))
    plain = some(dataset, replace(data, flip=False), 12)
    assert not same(batches, plain)


def test_jpegs_at_the_training_resolution_are_those_of_the_others(tmp_path, data):
    dataset = files(tmp_path / "set", Fit(16, 3), "jpg", size=(19, 16))
    assert same(some(dataset, data, 6), some(dataset, replace(data, pipeline="resident"), 6))


BOXES = np.array([[3, 2, 70 + i, 55 - i] for i in range(22)], np.int32)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize(
    ("fit", "options"),
    [
        (Fit(24, 3), {}),
        (Fit(64, 3), {}),
        (Fit(24, 1), {}),
        (Fit(24, 3, crop=40), {}),
        (Fit(24, 3), {"boxes": BOXES}),
        (Fit(24, 3, load=30), {}),
        (Fit(24, 3, halves=True), {}),
        (Fit(24, 1, halves=True, load=28), {}),
    ],
    ids=["down", "up", "grey", "crop", "boxes", "load", "halves", "grey halves"],
)
def test_what_it_decodes_and_resizes_is_near(tmp_path, data, fit, options, suffix):
    dataset = files(tmp_path / "set", fit, suffix, size=(110, 57), **options)
    batches = some(dataset, data, 4)
    assert_near(batches, some(dataset, replace(data, pipeline="torchvision"), 4))
    if fit.halves:
        assert (batches[0].pair_NCHW - batches[0].images_NCHW).abs().mean() > 10 * LEVEL


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("halves", [False, True])
def test_odd_files_are_decoded_as_by_the_others(tmp_path, data, channels, halves):
    folder, rng = tmp_path / "set", np.random.default_rng(1)
    folder.mkdir()
    for i in range(3):
        image = picture(rng, 40, 18)
        image.convert("P").save(folder / f"{i}palette.png")
        image.convert("P").save(folder / f"{i}key.png", transparency=3)
        image.convert("RGBA").save(folder / f"{i}alpha.png")
        image.convert("CMYK").save(folder / f"{i}cmyk.jpg")
        image.save(folder / f"{i}.bmp")
        image.save(folder / f"{i}.webp")
        image.convert("1").save(folder / f"{i}bits.png")
        wide = rng.integers(0, 65536, (18, 40)).astype(np.uint16)
        Image.fromarray(wide).save(folder / f"{i}wide.png")
    dataset = dataset_of(folder, Fit(12, channels, halves=halves))
    assert same(some(dataset, data, 7), some(dataset, replace(data, pipeline="torchvision"), 7))


def test_it_goes_on_at_any_place(tmp_path, data):
    dataset = files(tmp_path / "set", Fit(12, 3), "jpg")
    unbroken = some(dataset, data, 9)
    assert same(some(dataset, data, 4, images=40), unbroken[5:])
    clock = Clock(data.batch, CPU)
    pipeline = opened(dataset, data, clock)
    following(pipeline, clock, 3)
    for place in (48, 8, 0, 8):  # ahead, back, and where it is already
        clock.seek(place)
        at = place // 8
        assert same(following(pipeline, clock, 2), unbroken[at : at + 2])
    pipeline.close()


def test_two_ranks_of_4_are_one_of_8(tmp_path, data):
    dataset = files(tmp_path / "set", Fit(12, 3), "jpg")
    ranks = [some(dataset, data, 6, rank=rank, world=2) for rank in range(2)]
    for whole, *parts in zip(some(dataset, data, 6), *ranks, strict=True):
        images_NCHW = torch.cat([part.images_NCHW for part in parts])
        assert torch.equal(whole.images_NCHW, images_NCHW)


def test_what_it_handed_out_stays(tmp_path, data):
    dataset = files(tmp_path / "set", Fit(12, 3), "jpg")
    clock = Clock(data.batch, CPU)
    pipeline, kept = opened(dataset, data, clock), []
    for _ in range(8):
        images_NHWC, _rows = pipeline.fetch(clock)
        kept.append((images_NHWC, images_NHWC.clone()))
        clock.advance()
    assert all(torch.equal(images, copy) for images, copy in kept)
    pipeline.close()


def without_tables(content: bytes) -> bytes:
    """A JPEG whose Huffman tables are gone: both ends are as they should be."""
    at = content.index(b"\xff\xc4") + 4
    return content[:at] + bytes(40) + content[at + 40 :]


BAD = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "text": lambda content: b"no image at all " * 30,
    "text in disguise": lambda content: content[:3] + b"no image" * 30 + content[-2:],
    "damaged inside": without_tables,
}


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_images_stop_or_are_counted(tmp_path, data, kind, suffix):
    dataset = files(tmp_path / "set", Fit(12, 3), suffix)
    spoil = _broken_png if (kind, suffix) == ("damaged inside", "png") else BAD[kind]
    for row in (3, 4, 17):
        path = dataset.path(row)
        path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(BadImage, match=r"(03|04|17)\.(jpg|png)"):
        some(dataset, data, 3)
    _skips_like_torchvision(dataset, data, 3)


def _skips_like_torchvision(dataset: FileSet, data: Data, bad: int) -> None:
    data, said, clock = replace(data, on_error="skip"), [], Clock(data.batch, CPU)
    pipeline = opened(dataset, data, clock, said.append)
    batches = following(pipeline, clock, 10)
    pipeline.close()
    assert pipeline.skipped == bad and "corrupt image" in said[0]
    assert_near(batches, some(dataset, replace(data, pipeline="torchvision"), 10))


def _broken_png(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(9) + content[middle + 9 :]


CHANGES = {
    "gone": lambda path: path.unlink(),
    "text": lambda path: path.write_bytes(b"no image at all " * 30),
    "damaged inside": lambda path: path.write_bytes(without_tables(path.read_bytes())),
}


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_under_a_run(tmp_path, data, change, on_error):
    dataset = files(tmp_path / "set", Fit(12, 3), "jpg", count=64)
    said, clock = [], Clock(data.batch, CPU)
    pipeline = opened(dataset, replace(data, on_error=on_error), clock, said.append)
    following(pipeline, clock, 1)
    path = dataset.path(int(pipeline.spec.order.rows(np.array([60]))[0]))
    CHANGES[change](path)
    if on_error == "skip":
        following(pipeline, clock, 17)
        assert pipeline.skipped == 1 and len(said) == 1 and path.name in said[0]
    else:
        with pytest.raises(BadImage, match=path.name):
            following(pipeline, clock, 7)
        assert clock.images == 56  # no sooner than it is asked for
        with pytest.raises(BadImage, match=path.name):
            pipeline.ready(clock)
    pipeline.close()


def test_an_image_of_another_size_may_take_a_files_place(tmp_path, data):
    dataset = files(tmp_path / "set", Fit(9, 3), "jpg")
    pipeline = opened(dataset, data, clock := Clock(data.batch, CPU))
    for row in range(22):
        picture(np.random.default_rng(row), 9 + row, 9).save(dataset.path(row))
    batches = following(pipeline, clock, 6)
    pipeline.close()
    assert same(batches, some(dataset, replace(data, pipeline="torchvision"), 6))


def test_every_image_bad(tmp_path, data):
    dataset = files(tmp_path / "set", Fit(12, 3), "jpg", count=9)
    for row in range(9):
        path = dataset.path(row)
        path.write_bytes(without_tables(path.read_bytes()))
    with pytest.raises(BadImage, match="every image"):
        some(dataset, replace(data, on_error="skip"), 2)


def test_what_only_dali_cannot_decode_is_named(tmp_path, data):
    dataset = files(tmp_path / "set", Fit(12, 3), "jpg", count=8)
    pipeline = opened(dataset, data, clock := Clock(data.batch, CPU))
    healthy = dataset.encoded
    dataset.encoded = lambda row: without_tables(healthy(row)) if row == 5 else healthy(row)
    dataset.decode = lambda row: np.zeros(dataset.fit.stored, np.uint8)
    with pytest.raises(BadImage, match=r"05\.jpg.*pipeline torchvision can; DALI says: \w") as said:
        pipeline.ready(clock)
    assert "\n" not in str(said.value)
    pipeline.close()


def test_a_crop_larger_than_an_image_is_named(tmp_path, data):
    dataset = files(tmp_path / "set", Fit(12, 3, crop=14), "jpg", count=8)
    picture(np.random.default_rng(0), 20, 13).save(dataset.path(5))
    with pytest.raises(ValueError, match=r"data\.crop=14.*05\.jpg"):
        some(dataset, data, 1)


@pytest.mark.parametrize("batches", [0, 1, 5])
def test_close_leaves_no_thread(tmp_path, data, batches):
    dataset = files(tmp_path / "set", Fit(12, 3), "jpg")
    some(dataset, data, 1)
    threads, tasks = set(threading.enumerate()), psutil.Process().num_threads()
    some(dataset, replace(data, workers=3), batches)
    dataset.path(5).write_bytes(without_tables(dataset.path(5).read_bytes()))
    with pytest.raises(BadImage):
        some(dataset, replace(data, workers=2), 4)
    assert set(threading.enumerate()) == threads and psutil.Process().num_threads() <= tasks


def test_no_graph_waits_for_the_garbage_collector(tmp_path, data):
    """Collected in a forked child, it would hang that."""
    dataset, clock = files(tmp_path / "set", Fit(12, 3), "jpg", count=8), Clock(data.batch, CPU)
    pipeline = opened(dataset, data, clock)
    following(pipeline, clock, 1)
    graph = weakref.ref(pipeline._graph._pipe)
    gc.disable()
    pipeline.close()
    gc.enable()
    assert graph() is None


def test_two_at_once(tmp_path, data):
    first = files(tmp_path / "a", Fit(12, 3), "jpg")
    second = files(tmp_path / "b", Fit(16, 1), "png", count=9)
    alone = some(first, data, 6), some(second, data, 6)
    clocks = Clock(data.batch, CPU), Clock(data.batch, CPU)
    pipelines = [opened(*pair) for pair in ((first, data, clocks[0]), (second, data, clocks[1]))]
    together = [], []
    for _ in range(6):
        for found, pipeline, clock in zip(together, pipelines, clocks, strict=True):
            found.extend(following(pipeline, clock, 1))
    for pipeline in pipelines:
        pipeline.close()
    assert all(same(*pair) for pair in zip(alone, together, strict=True))


def test_two_domains(tmp_path, data):
    dataset = files(tmp_path / "a", Fit(14, 3), size=(14, 14))
    dataset.second = files(tmp_path / "b", Fit(14, 3), size=(14, 14), count=9)
    batches = some(dataset, data, 6)
    others = some(dataset, replace(data, pipeline="torchvision"), 6)
    assert same(batches, others)
    assert all(torch.equal(*pair) for pair in zip(_pairs(batches), _pairs(others), strict=True))


def _pairs(batches: list[Batch]) -> list[torch.Tensor]:
    return [batch.pair_NCHW for batch in batches]


def test_a_missing_package_is_named(tmp_path, data, monkeypatch):
    assert dali.missing() == ""
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert "pip install 'saddle[dali]'" in dali.missing()
    with pytest.raises(ValueError, match=r"--data\.pipeline dali needs NVIDIA DALI"):
        some(files(tmp_path / "set", Fit(12, 3)), data, 1)


def test_arrays_are_not_for_dali(data):
    images_NHWC = np.zeros((9, 12, 12, 3), np.uint8)
    dataset = ArraySet("digits", "train", Fit(12, 3), images_NHWC=images_NHWC)
    with pytest.raises(ValueError, match=r"--data\.pipeline dali.*resident"):
        some(dataset, data, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "batches"), [(0, 40), (50, 10)], ids=["on", "breaks"])
def test_host_memory_does_not_grow(tmp_path, data, step, batches):
    """By less than a third of what its batches come to; other tests of the process leave some."""
    dataset = files(tmp_path / "set", Fit(64, 3), "jpg", count=500, size=(178, 218))
    clock, memory = Clock(50, CPU), []
    pipeline = opened(dataset, replace(data, batch=50), clock)
    for _ in range(6):
        for _ in range(batches):
            following(pipeline, clock, 1)
            clock.seek(clock.images + step)
        memory.append(psutil.Process().memory_info().rss)
    pipeline.close()
    assert max(memory[3:]) < memory[2] + (40e6 if step else batches * 50 * 64 * 64 * 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="decodes on a GPU")
def test_on_a_gpu_it_is_near_and_pngs_are_equal(tmp_path, data):
    device = torch.device("cuda")
    jpegs = files(tmp_path / "jpegs", Fit(24, 3), "jpg", size=(110, 57))
    pngs = files(tmp_path / "pngs", Fit(14, 3), "png", size=(14, 14))
    for dataset, most in ((jpegs, 2 * LEVEL), (pngs, 0)):
        found = []
        for name in ("dali", "torchvision"):
            clock = Clock(data.batch, device)
            pipeline = opened(dataset, replace(data, pipeline=name), clock)
            found.append(following(pipeline, clock, 8))
            pipeline.close()
        for batch, other in zip(*found, strict=True):
            assert (batch.images_NCHW - other.images_NCHW).abs().mean() <= most
    path = jpegs.path(4)
    path.write_bytes(without_tables(path.read_bytes()))
    pipeline = opened(jpegs, data, clock := Clock(data.batch, device))
    with pytest.raises(BadImage, match=path.name):
        following(pipeline, clock, 3)
    pipeline.close()
