"""A large file that is written in parts, by several processes, and goes on after a kill.

`X.part` is the file so far, of its full size if that is known; `X.part.jsonl` has a line for each
part that is there, with its place, length and CRC-32. After a kill, only what the journal vouches
for counts.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

BLOCK = 1 << 22
FLUSH = 1 << 27
"""Bytes after which a thread brings what is written to the disk: for CelebA at 64 pixels the end
would otherwise wait 8 s for a disk of 300 MB/s."""
READERS = 4


def put(file: BinaryIO, start: int, content: memoryview) -> dict[str, int]:
    """Write a part at its place, in whatever process; what the journal is to note. Raises OSError.

    A write, not a memory map: on a full disk a map kills the process by SIGBUS.
    """
    left, at = content.cast("B"), start
    while len(left):
        count = os.pwrite(file.fileno(), left, at)
        left, at = left[count:], at + count
    return {"start": start, "bytes": content.nbytes, "crc": zlib.crc32(content)}


@dataclass
class Journal:
    """An unfinished file. facts: what was noted with each part that is whole."""

    path: Path
    facts: list[dict[str, Any]]
    file: BinaryIO
    _lines: TextIO
    _flusher: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _flushes: list[Future] = field(default_factory=list)
    _unflushed: int = 0

    @classmethod
    def open(cls, target: Path, header: bytes = b"", size: int | None = None) -> "Journal":
        """Begin the file that is to become `target`, or go on with it. Raises OSError.

        size: bytes after the header; None: as many as its parts come to.
        """
        path = target.with_name(target.name + ".part")
        path.touch()
        file = path.open("r+b", buffering=0)
        facts = list(_whole(file, _notes(path)))
        ends = [fact["start"] + fact["bytes"] for fact in facts]
        os.truncate(path, max(ends, default=0) if size is None else len(header) + size)
        put(file, 0, memoryview(header))
        lines = _notes(path).open("w")
        journal = cls(path, [], file, lines)
        for fact in facts:
            journal.note(fact)
        return journal

    def note(self, fact: dict[str, Any]) -> None:
        """A part counts once it is noted."""
        self._lines.write(json.dumps(fact) + "\n")
        self._lines.flush()
        self.facts.append(fact)
        self._unflushed += fact["bytes"]
        if self._unflushed > FLUSH:
            self._unflushed = 0
            self._flushes.append(self._flusher.submit(os.fdatasync, self.file.fileno()))

    def finish(self) -> None:
        """Bring it to the disk and read it back. Raises OSError if it is not what was written."""
        for flush in self._flushes:
            flush.result()  # the kernel tells of a failed write once
        os.fsync(self.file.fileno())
        if sum(1 for _ in _whole(self.file, _notes(self.path))) != len(self.facts):
            raise OSError(f"{self.path} does not hold what was written to it")
        self.close()

    def close(self) -> None:
        """Close the files; they stay."""
        self._flusher.shutdown(cancel_futures=True)
        self.file.close()
        self._lines.close()

    def remove(self) -> None:
        """Delete both files."""
        with contextlib.suppress(OSError):  # a full disk refuses what is still in the buffer
            self.close()
        self.path.unlink(missing_ok=True)
        _notes(self.path).unlink(missing_ok=True)


def _notes(path: Path) -> Path:
    return path.with_name(path.name + ".jsonl")


def _whole(file: BinaryIO, notes: Path) -> Iterator[dict[str, Any]]:
    """Facts of the parts that are there as they were written."""
    facts = list(_facts(notes))
    with ThreadPoolExecutor(READERS) as pool:  # both the disk and zlib let go of the interpreter
        wholes = pool.map(lambda fact: _crc(file, fact["start"], fact["bytes"]), facts)
        yield from (f for f, crc in zip(facts, wholes, strict=True) if crc == f["crc"])


def _facts(notes: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal; a torn one ends it."""
    if not notes.exists():
        return
    with notes.open() as lines:
        for line in lines:
            try:
                fact = json.loads(line)
            except ValueError:
                return
            if not (isinstance(fact, dict) and {"start", "bytes", "crc"} <= fact.keys()):
                return
            yield fact


def _crc(file: BinaryIO, start: int, count: int) -> int | None:
    """CRC-32 of a part; None if there are fewer bytes."""
    crc = 0
    while count:
        block = os.pread(file.fileno(), min(count, BLOCK), start)
        if not block:
            return None
        crc, count, start = zlib.crc32(block, crc), count - len(block), start + len(block)
    return crc
