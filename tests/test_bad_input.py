"""Images that are none, in every pipeline: named, or skipped and counted; no hang, no crash."""

import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.datasets import DatasetMissing, find
from pipelines.images import BadImage
from pipelines.index import open_index
from pipelines.pack import pack_path
from pipelines.settings import Data
from tests.batches import clock_of, opened, some

KINDS = ("resident", "torchvision", "dali", "ffcv")
GOOD = 9


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("<html>404 Not Found</html>" * 50)


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def pipe(path: Path) -> None:
    """Reading it would wait for ever."""
    path.unlink()
    os.mkfifo(path)


def bomb(path: Path) -> None:
    """A PNG of 20,000 x 20,000 white pixels in a few bytes."""
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * 1000)
    chunks = ((b"IHDR", head), (b"IDAT", rows), (b"IEND", b""))
    png = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + png)


DAMAGES: dict[Callable, str] = {
    truncated: "cannot decode",
    empty: "the file is empty",
    text: "not an image",
    dangling: "cannot read",
    pipe: "not a regular file",
    bomb: "decompression bomb",
}


@pytest.fixture
def faces(tmp_path):
    """JPEGs of smooth colours in two classes; at batch 3."""
    for i in range(GOOD):
        path = tmp_path / "set" / f"class{i % 2}" / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        ramp = np.linspace(0, 20 * i, 20 * 16 * 3).reshape(20, 16, 3).astype(np.uint8)
        Image.fromarray(ramp).save(path, quality=95)
    data = Data(name="folder", path=tmp_path / "set", cache=tmp_path / "cache", resolution=12)
    return replace(data, batch=3, workers=1)


def add(data: Data, damage: Callable) -> Path:
    """A bad image among the good ones."""
    path = data.path / "class0" / f"03-{damage.__name__}.jpg"
    path.write_bytes((data.path / "class0" / "04.jpg").read_bytes())
    damage(path)
    return path


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_named_before_training_begins(faces, kind, damage):
    path = add(faces, damage)
    with pytest.raises(BadImage, match=DAMAGES[damage]) as caught:
        opened(replace(faces, pipeline=kind), clock_of(faces))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    left = [p.name for p in faces.cache.glob("*") if p.suffix not in (".lock", ".npz")]
    assert not left


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_them_are_skipped_and_counted(faces, kind):
    paths = [add(faces, damage) for damage in DAMAGES]
    data, lines = replace(faces, on_error="skip", pipeline=kind), []
    clock = clock_of(data)
    pipeline = opened(data, clock, lines.append)
    assert pipeline.images == GOOD + len(DAMAGES)
    shown = []
    for _ in range(2 * pipeline.images // 3):
        pipeline.ready(clock)
        shown.append(pipeline.batch(clock).images_NCHW.clone())
        clock.advance()
    assert pipeline.skipped == len(DAMAGES)
    pipeline.close()
    told = " ".join(lines)
    assert (
        f"{len(DAMAGES)} corrupt images skipped" in told and sum(str(p) in told for p in paths) == 5
    )
    reference = some(replace(data, pipeline="torchvision", workers=0), len(shown))
    wanted = torch.cat([batch.images_NCHW for batch in reference])
    difference = (torch.cat(shown) - wanted).abs().mean() * 127.5
    assert difference < 2  # the same rows in the same places, decoded by each in its way


def test_an_index_is_made_once_and_looks_again_at_what_could_not_be_read(faces, monkeypatch):
    data, dataset = replace(faces, on_error="skip"), find(faces)
    index = open_index(dataset, data)
    assert index.sizes_N2.tolist() == [[16, 20]] * GOOD and index.plain_N.all() and not index.bad
    monkeypatch.setattr("pipelines.index._look", None)  # would fail if called
    assert open_index(dataset, data).sizes_N2.tolist() == index.sizes_N2.tolist()
    monkeypatch.undo()
    path = add(faces, dangling)
    assert "cannot read" in open_index(find(faces), data).bad[2]
    path.unlink()
    path.write_bytes((data.path / "class0" / "04.jpg").read_bytes())
    assert not open_index(find(faces), data).bad


def test_a_trailer_after_the_end_marker_is_no_damage(faces):
    path = faces.path / "class0" / "04.jpg"
    path.write_bytes(path.read_bytes() + b"\0" * 500)
    assert not open_index(find(faces), faces).bad


@pytest.mark.parametrize("kind", ["torchvision", "dali"])
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_file_that_goes_while_it_is_in_use(faces, kind, on_error):
    data, lines = replace(faces, pipeline=kind, on_error=on_error), []
    clock = clock_of(data)
    pipeline = opened(data, clock, lines.append)
    pipeline.ready(clock)
    (faces.path / "class1" / "05.jpg").unlink()

    def on() -> None:
        for _ in range(8):
            clock.advance()
            pipeline.ready(clock)

    if on_error == "stop":
        with pytest.raises(BadImage, match=r"05\.jpg: No such file .*did the data folder change"):
            on()
    else:
        on()
        assert pipeline.skipped == 1 and sum("05.jpg" in line for line in lines) == 1
    pipeline.close()


def test_what_is_packed_needs_its_files_no_more(faces):
    whole = some(replace(faces, pipeline="resident"), 5)
    clock = clock_of(faces)
    pipeline = opened(replace(faces, pipeline="resident"), clock)
    (faces.path / "class1" / "05.jpg").unlink()
    for wanted in whole:
        pipeline.ready(clock)
        assert torch.equal(pipeline.batch(clock).images_NCHW, wanted.images_NCHW)
        clock.advance()


def test_a_cache_of_another_version_is_not_taken(faces, monkeypatch):
    some(replace(faces, pipeline="resident"), 1)
    path = pack_path(find(faces), faces)
    monkeypatch.setattr("pipelines.pack.FORMAT", 99)
    lines = []
    opened(replace(faces, pipeline="resident"), clock_of(faces), lines.append)
    assert lines[0].startswith("packing 9 images") and path.exists()
    assert pack_path(find(faces), faces) != path


def test_a_class_folder_without_images(faces):
    os.mkdir(faces.path / "class9")
    with pytest.raises(DatasetMissing, match=r"class9 holds no images: .*--data\.on-error skip"):
        find(faces)
    dataset = find(replace(faces, on_error="skip"))
    assert dataset.note == "1 class folders without images left out: class9"
    assert dataset.classes == ("class0", "class1")


def test_an_empty_folder(tmp_path):
    with pytest.raises(DatasetMissing, match=f"looked for: images .*\n  in: {tmp_path}"):
        find(Data(name="folder", path=tmp_path))
