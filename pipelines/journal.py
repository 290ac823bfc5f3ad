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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

BLOCK = 1 << 22


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

    def finish(self) -> None:
        """Bring it to the disk and read it back. Raises OSError if it is not what was written."""
        os.fsync(self.file.fileno())
        if sum(1 for _ in _whole(self.file, _notes(self.path))) != len(self.facts):
            raise OSError(f"{self.path} does not hold what was written to it")
        self.close()

    def close(self) -> None:
        """Close the files; they stay."""
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
    if not notes.exists():
        return
    with notes.open() as lines:
        for line in lines:
            try:
                fact = json.loads(line)
                whole = _crc(file, fact["start"], fact["bytes"]) == fact["crc"]
            except (ValueError, KeyError, TypeError):
                return  # the last line, torn
            if whole:
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
