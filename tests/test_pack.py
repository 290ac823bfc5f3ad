"""The packed cache: when is it taken, built again, waited for, and what if it cannot be written?"""

import errno
import json
import os
import threading
import time
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import decoding, pack
from pipelines.datasets import find
from pipelines.images import BadImage
from pipelines.journal import put
from pipelines.pack import FORMAT, CacheUnusable, pack_path
from pipelines.settings import Data
from pipelines.sources import FileSet
from tests.batches import clock_of, opened


def packed(data: Data) -> Path:
    """Open the resident pipeline once; the cache that it leaves."""
    opened(replace(data, pipeline="resident"), clock_of(data))
    path = pack_path(find(data), data)
    assert path.is_file() and path.with_suffix(".json").is_file()
    return path


def test_the_cache_is_taken_and_follows_content_and_settings(data):
    path = packed(data)
    lines = []
    opened(replace(data, pipeline="resident"), clock_of(data), lines.append)
    assert lines == []  # nothing packed again
    assert not list(data.cache.glob("*.tmp"))
    changed = [replace(data, resolution=8), replace(data, channels=1), replace(data, crop=9)]
    keys = {pack_path(find(other), other) for other in changed}
    Image.new("RGB", (14, 20)).save(data.path / "class0" / "00.png")
    keys |= {path, pack_path(find(data), data)}
    assert len(keys) == 5


@pytest.mark.parametrize("damage", ["short", "half json", "other json", "other shape"])
def test_a_half_written_cache_is_not_taken(data, damage):
    path = packed(data)
    good, about = path.read_bytes(), path.with_suffix(".json")
    if damage == "short":
        path.write_bytes(good[:-1])
    elif damage == "half json":
        about.write_text(about.read_text()[:20])
    elif damage == "other json":
        about.write_text("[]")
    else:
        np.save(path, np.zeros((22, 12, 13, 3), np.uint8))
        about.write_text(
            json.dumps({"format": FORMAT, "bytes": path.stat().st_size, "skipped": {}})
        )
    Path(f"{path}.part").write_bytes(b"left by a killed builder")
    lines = []
    opened(replace(data, pipeline="resident"), clock_of(data), lines.append)
    assert lines[0].startswith("packing 22 images")
    assert path.read_bytes() == good and not list(data.cache.glob("*.part*"))


def test_what_was_not_made_here_is_not_overwritten(data):
    path = packed(data)
    path.with_suffix(".json").unlink()
    path.write_bytes(b"someone's")
    with pytest.raises(CacheUnusable, match=r"was not made here .*--data\.cache"):
        opened(replace(data, pipeline="resident"), clock_of(data))
    assert path.read_bytes() == b"someone's"


class Killed(BaseException):
    """Ends a packing as a kill does: nothing is tidied up."""


@pytest.mark.parametrize("damage", ["none", "torn payload", "torn journal", "other bytes"])
def test_a_killed_packing_goes_on_where_it_was(data, monkeypatch, damage):
    whole = packed(replace(data, cache=data.cache / "whole")).read_bytes()
    monkeypatch.setattr(decoding, "CHUNK", 4)
    decode, seen = FileSet.decode, []

    def dying(self, row: int) -> np.ndarray:
        seen.append(row)
        if len(seen) == 14:
            raise Killed
        return decode(self, row)

    monkeypatch.setattr(FileSet, "decode", dying)
    with pytest.raises(Killed):
        opened(replace(data, pipeline="resident"), clock_of(data))
    part = next(data.cache.glob("*.part"))
    journal = Path(f"{part}.jsonl")
    assert len(journal.read_text().splitlines()) == 3
    if damage == "torn payload":
        os.truncate(part, 128 + 12 * 12 * 12 * 3 - 7)
    elif damage == "torn journal":
        os.truncate(journal, journal.stat().st_size - 3)
    elif damage == "other bytes":
        with part.open("r+b") as file:
            file.seek(128 + 11 * 12 * 12 * 3)
            file.write(b"other")
    seen, lines = [], []
    seen += range(20)  # past the end of the first one's life
    opened(replace(data, pipeline="resident"), clock_of(data), lines.append)
    kept = 12 if damage == "none" else 8
    assert f"{kept} of them there already" in lines[0] and sorted(seen[20:]) == list(
        range(kept, 22)
    )
    assert pack_path(find(data), data).read_bytes() == whole
    assert not list(data.cache.glob("*.part*"))


def test_other_processes_help_where_it_takes_long(data, monkeypatch):
    alone = packed(replace(data, cache=data.cache / "alone"))
    monkeypatch.setattr(decoding, "CHUNK", 2)
    monkeypatch.setattr(decoding, "PATIENCE_S", 0)
    decode, mine = FileSet.decode, []

    def slowly(self, row: int) -> np.ndarray:
        mine.append(row)
        time.sleep(0.5)  # the others, which see the true one, have time to start
        return decode(self, row)

    monkeypatch.setattr(FileSet, "decode", slowly)
    helped = packed(replace(data, workers=3))
    assert helped.read_bytes() == alone.read_bytes() and 0 < len(mine) < 22
    assert not active_children()


def test_what_fails_in_another_process_is_said_as_here(data, monkeypatch):
    monkeypatch.setattr(decoding, "CHUNK", 1)
    monkeypatch.setattr(decoding, "PATIENCE_S", 0)
    bad = [f"class1/{number:02}.png" for number in range(1, 22, 2)]
    for name in bad:
        (data.path / name).write_bytes(b"")
    decode = FileSet.decode
    monkeypatch.setattr(
        FileSet, "decode", lambda self, row: time.sleep(1) or decode(self, min(row, 10))
    )
    with pytest.raises(BadImage, match="the file is empty"):
        packed(replace(data, workers=2))
    assert not list(data.cache.glob("*.npy*")) and not active_children()


def test_a_disk_that_fails_behind_our_back_is_named(data, monkeypatch):
    def fail(_number: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("pipelines.journal.FLUSH", 1)
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(CacheUnusable, match=r"cannot write .*Input/output error"):
        packed(data)
    assert not list(data.cache.glob("*.npy*"))


def test_one_process_builds_while_others_wait(data, monkeypatch):
    dataset, lines, found = find(data), [], []
    decode = type(dataset).decode

    def slowly(self, row: int) -> np.ndarray:
        time.sleep(0.01)
        return decode(self, row)

    def build() -> None:
        found.append(pack.open_pack(dataset, data, pack_path(dataset, data), lines.append, False))

    monkeypatch.setattr(type(dataset), "decode", slowly)
    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(line.startswith("packing") for line in lines) == 1
    assert sum(line.startswith("waiting for another process") for line in lines) == 2
    assert len({one.images_NHWC.tobytes() for one in found}) == 1 and len(found) == 3


def test_a_cache_that_cannot_be_written_is_named(data, monkeypatch):
    data.cache.write_text("a file where the folder should be")
    with pytest.raises(CacheUnusable, match=r"cannot write the packed cache .*--data\.cache"):
        opened(replace(data, pipeline="resident"), clock_of(data))
    data.cache.unlink()
    usage = type(pack.shutil.disk_usage("/"))(100, 99, 1)
    monkeypatch.setattr(pack.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CacheUnusable, match=r"0 MB wanted, 0 MB free; --data\.cache"):
        opened(replace(data, pipeline="resident"), clock_of(data))
    pipeline = opened(data, clock_of(data))  # auto
    assert pipeline.name == "torchvision" and "--data.cache" in pipeline.choice


def test_a_disk_that_fills_up_while_packing_is_named(data, monkeypatch):
    def full(file: object, start: int, content: memoryview) -> dict:
        with open("/dev/full", "wb", buffering=0) as disk:
            return put(disk, start, content)

    monkeypatch.setattr(decoding, "put", full)
    with pytest.raises(CacheUnusable, match=r"No space left on device; --data\.cache"):
        opened(replace(data, pipeline="resident"), clock_of(data))
    assert not list(data.cache.glob("*.npy*"))
