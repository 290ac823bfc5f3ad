"""FFCV's file: what of it is taken, what goes on after a kill, and who writes it?"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from pipelines import beton, decoding
from pipelines.beton import beton_path, load_beton, open_beton
from pipelines.beton_file import Encoded, Layout
from pipelines.datasets import find
from pipelines.journal import put
from pipelines.pack import CacheUnusable
from pipelines.settings import Data
from pipelines.sources import Dataset


def written(data: Data, say: Callable[[str], None] = lambda _: None) -> Path:
    """The .beton of a recipe."""
    dataset = find(data)
    return open_beton(dataset, data, beton_path(dataset, data), say, False).path


class Killed(BaseException):
    """Ends a writing as a kill does: nothing is tidied up."""


def killed_at(monkeypatch: pytest.MonkeyPatch, chunk: int) -> list[int]:
    """Have the writing of chunks of four images die at one of them; where chunks were put."""
    right, starts = Layout.put, []

    def dying(self: Layout, file: BinaryIO, images: list[Encoded | None], start: int) -> dict:
        starts.append(start)
        if len(starts) == chunk:
            right(self, file, images[:1], start)
            raise Killed
        return right(self, file, images, start)

    monkeypatch.setattr(decoding, "CHUNK", 4)
    monkeypatch.setattr(Layout, "put", dying)
    return starts


@pytest.mark.parametrize("form", ["raw", "jpeg"])
@pytest.mark.parametrize("damage", ["none", "torn payload", "torn journal", "other bytes"])
def test_a_killed_writing_goes_on_where_it_was(data, monkeypatch, form, damage):
    (data.path / "class0" / "00.png").write_bytes(b"")
    data = replace(data, beton=form, on_error="skip")
    whole = written(replace(data, cache=data.cache / "whole")).read_bytes()
    starts, lines = killed_at(monkeypatch, 4), []
    with pytest.raises(Killed):
        written(data)
    part = next(data.cache.glob("*.beton.part"))
    journal = Path(f"{part}.jsonl")
    facts = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [fact["rows"] for fact in facts] == [[0, 4], [4, 8], [8, 12]]
    if damage == "torn payload":
        os.truncate(part, starts[3] - 7)
    elif damage == "torn journal":
        os.truncate(journal, journal.stat().st_size - 3)
    elif damage == "other bytes":
        with part.open("r+b") as file:
            put(file, starts[1] + 9, memoryview(b"other"))
    path = written(data, lines.append)
    again = {"none": [], "other bytes": starts[1:2]}.get(damage, starts[2:3])
    assert f"{12 - 4 * len(again)} of them there already from a killed" in lines[-2]
    assert len(starts) == 4 + len(again) + 3 and starts[4 : 5 + len(again)] == [*again, starts[3]]
    assert path.read_bytes() == whole and not list(data.cache.glob("*.part*"))


def test_a_killed_writing_that_other_versions_go_on_with_begins_anew(data, monkeypatch):
    data = replace(data, beton="jpeg")
    starts = killed_at(monkeypatch, 4)
    with pytest.raises(Killed):
        written(data)
    with next(data.cache.glob("*.part")).open("r+b") as file:
        put(file, starts[1] + 9, memoryview(b"other"))
    monkeypatch.setattr(beton, "QUALITY", 50)
    with pytest.raises(CacheUnusable, match=r"another version .* same command again begins anew"):
        written(data)
    assert not list(data.cache.glob("*.beton*")) and load_beton(written(data), find(data))


def test_other_processes_help_where_it_takes_long(data, monkeypatch):
    data = replace(data, beton="jpeg")
    alone = written(replace(data, cache=data.cache / "alone")).read_bytes()
    monkeypatch.setattr(decoding, "CHUNK", 1)
    monkeypatch.setattr(decoding, "PATIENCE_S", 0)
    encode, mine = beton._encode, []

    def slowly(dataset: Dataset, row: int) -> Encoded:
        mine.append(row)
        time.sleep(0.5)  # the others, which see the true one, have time to start
        return encode(dataset, row)

    monkeypatch.setattr(beton, "_encode", slowly)
    assert written(replace(data, workers=3)).read_bytes() == alone
    assert 0 < len(mine) < 22 and not active_children()


@pytest.mark.parametrize(
    "damage", ["short", "no json", "half json", "other json", "pointer", "end"]
)
def test_a_damaged_file_is_not_taken(data, damage):
    path, dataset = written(data), find(data)
    good, about = path.read_bytes(), path.with_suffix(".json")
    facts = json.loads(about.read_text())
    assert load_beton(path, dataset) is not None
    wrong = {"pointer": facts["pixels"][0] - 4090, "end": facts["pixels"][1] + 9}
    if damage == "short":
        path.write_bytes(good[:-1])
    elif damage == "no json":
        about.unlink()
        path.unlink()
    elif damage == "half json":
        about.write_text(about.read_text()[:20])
    elif damage == "other json":
        about.write_text("[]")
    else:
        at = wrong[damage]
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    path.with_suffix(".beton.part").write_bytes(b"left by a killed writer")
    assert load_beton(path, dataset) is None
    lines = []
    written(data, lines.append)
    assert lines[0].startswith("writing 22 images") and path.read_bytes() == good
    assert not list(data.cache.glob("*.part")) and written(data, lines.append) and len(lines) == 2


def test_what_does_not_read_back_is_not_published(data, monkeypatch):
    finish = Layout.finish

    def torn(self: Layout, file: BinaryIO, *rest: np.ndarray) -> tuple[int, int]:
        pixels = finish(self, file, *rest)
        put(file, self.start + 500, memoryview(b"torn"))
        return pixels

    monkeypatch.setattr(Layout, "finish", torn)
    with pytest.raises(CacheUnusable, match="does not read back as it was written"):
        written(data)
    assert not list(data.cache.glob("*.beton*"))
