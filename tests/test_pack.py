"""The packed cache: when is it taken, built again, waited for, and what if it cannot be written?"""

import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import pack
from pipelines.datasets import find
from pipelines.pack import CacheUnusable, pack_path
from pipelines.settings import Data
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


@pytest.mark.parametrize("damage", ["short", "no json", "half json", "other json", "other shape"])
def test_a_half_written_cache_is_not_taken(data, damage):
    path = packed(data)
    good, about = path.read_bytes(), path.with_suffix(".json")
    if damage == "short":
        path.write_bytes(good[:-1])
    elif damage == "no json":
        about.unlink()
    elif damage == "half json":
        about.write_text(about.read_text()[:20])
    elif damage == "other json":
        about.write_text("[]")
    else:
        np.save(path, np.zeros((22, 3, 12, 13), np.uint8))
        about.write_text(json.dumps({"format": 1, "bytes": path.stat().st_size, "skipped": {}}))
    path.with_suffix(".npy.tmp").write_bytes(b"left by a killed builder")
    lines = []
    opened(replace(data, pipeline="resident"), clock_of(data), lines.append)
    assert lines[0].startswith("packing 22 images")
    assert path.read_bytes() == good and not list(data.cache.glob("*.tmp"))


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
    assert len({one.images_NCHW.tobytes() for one in found}) == 1 and len(found) == 3


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
    def fill(file: object, _header: object) -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), file.fileno())

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", fill)
    with pytest.raises(CacheUnusable, match=r"No space left on device; --data\.cache"):
        opened(replace(data, pipeline="resident"), clock_of(data))
    assert not list(data.cache.glob("*.npy*"))
