"""A large file that is written in parts and goes on after a kill: payload, and a journal of parts.

`X.part` grows by whole parts; `X.part.jsonl` has a line for each with its length and CRC-32. After
a kill, what the journal vouches for is kept and the rest is cut off.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK = 1 << 22


@dataclass
class Journal:
    """An unfinished file. facts: what was noted with each whole part, in order."""

    path: Path
    facts: list[dict[str, Any]]

    @classmethod
    def open(cls, target: Path, header: bytes) -> "Journal":
        """Begin the file that is to become `target`, or go on with it. The header must be the same
        each time. Raises OSError."""
        journal = cls(target.with_name(target.name + ".part"), [])
        end = len(header)
        if journal.path.exists() and journal.notes.exists():
            journal.facts, end = journal._whole(header)
        mode = "r+b" if journal.facts else "w+b"
        journal._file = journal.path.open(mode)
        journal._file.truncate(end if journal.facts else 0)
        journal._file.seek(0)
        journal._file.write(header)
        journal._file.seek(end)
        journal._lines = journal.notes.open("w")
        for fact in journal.facts:
            journal._lines.write(json.dumps(fact) + "\n")
        journal._lines.flush()
        return journal

    @property
    def notes(self) -> Path:
        """The journal beside the payload."""
        return self.path.with_name(self.path.name + ".jsonl")

    def append(self, content: memoryview | bytes, **facts: Any) -> None:
        """Write one part; it counts once its line is written after it."""
        self._file.write(content)
        self._file.flush()
        fact = {"bytes": len(memoryview(content).cast("B")), "crc": zlib.crc32(content), **facts}
        self._lines.write(json.dumps(fact) + "\n")
        self._lines.flush()
        self.facts.append(fact)

    def finish(self, header: bytes) -> None:
        """Bring it to the disk and read it back. Raises OSError if it is not what was written."""
        self._file.flush()
        os.fsync(self._file.fileno())
        wrong = len(self._whole(header)[0]) != len(self.facts)
        self.close()
        if wrong:
            raise OSError(f"{self.path} does not hold what was written to it")

    def close(self) -> None:
        """Close the files; they stay."""
        self._file.close()
        self._lines.close()

    def remove(self) -> None:
        """Delete both files."""
        with contextlib.suppress(OSError):  # a full disk refuses what is still in the buffer
            self.close()
        self.path.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)

    def _whole(self, header: bytes) -> tuple[list[dict[str, Any]], int]:
        """Facts of the parts that are whole, and where the last of them ends."""
        facts, end = [], len(header)
        with self.path.open("rb") as file:
            if file.read(len(header)) != header:
                return [], end
            for fact in _lines(self.notes):
                if _crc(file, fact["bytes"]) != fact["crc"]:
                    break
                facts.append(fact)
                end += fact["bytes"]
        return facts, end


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a journal; a torn last one ends it."""
    with path.open() as file:
        for line in file:
            try:
                fact = json.loads(line)
            except ValueError:
                return
            if not (isinstance(fact, dict) and {"bytes", "crc"} <= fact.keys()):
                return
            yield fact


def _crc(file: Any, count: int) -> int | None:
    """CRC-32 of the next bytes; None if there are fewer."""
    crc = 0
    while count:
        block = file.read(min(count, BLOCK))
        if not block:
            return None
        crc, count = zlib.crc32(block, crc), count - len(block)
    return crc
