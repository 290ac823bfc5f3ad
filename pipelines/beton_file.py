"""FFCV's file format, written and read back: header, fields, metadata, pages of pixels, table of
allocations.

The pixels come first, a chunk of rows at a time, each where the one before it ends; the tables
round them follow from the sizes of the images, whoever wrote these and when.
"""

import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pipelines.journal import put

IMAGE = np.dtype([(name, "<u4") for name in ("width", "height", "size", "crc")])
"""What the tables need of a stored image. size: its bytes, 0 if nothing is stored for that row."""


class Encoded(NamedTuple):
    """One image as it is stored; `pixels` is a JPEG, or uint8 rows."""

    pixels: bytes | memoryview
    width: int
    height: int


class Layout:
    """Where the parts of a file of `n` images come to lie; an image lies within one page.

    image: FFCV's field of the images. page: bytes. start: where the pixels begin.
    """

    def __init__(self, image: Any, n: int, page: int) -> None:
        from ffcv import types
        from ffcv.fields import IntField

        self._fields, self._page = {"image": image, "index": IntField()}, page
        self._metadata = np.zeros(n, types.get_metadata_type(list(self._fields.values())))
        tables = types.HeaderType.itemsize + len(self._fields) * types.FieldDescType.itemsize
        self.start = self._page_end(tables + self._metadata.nbytes)

    def put(self, file: BinaryIO, images: list[Encoded | None], start: int) -> dict[str, Any]:
        """Store a chunk of images from `start` on; what the journal is to note: place, bytes, CRC
        and, as hex, IMAGE of each. Raises OSError."""
        table = np.zeros(len(images), IMAGE)
        for place, image in enumerate(images):
            if image is not None:
                size = len(image.pixels)
                assert 0 < size <= self._page
                table[place] = image.width, image.height, size, zlib.crc32(image.pixels)
        addresses, end = self._lay(table["size"].tolist(), start)
        content = memoryview(bytearray(end - start))
        for image, address in zip(images, addresses, strict=True):
            if image is not None:
                content[address - start :][: len(image.pixels)] = image.pixels
        return put(file, start, content) | {"images": table.tobytes().hex()}

    def finish(self, file: BinaryIO, images_N: np.ndarray, shows_N: np.ndarray) -> tuple[int, int]:
        """Write the tables round the pixels; where these begin and end.

        images_N: IMAGE (n,). shows_N: the row whose image each row shows, int64 (n,).
        """
        from ffcv import types

        addresses, end = self._lay(images_N["size"].tolist(), self.start)
        end = self._page_end(end)
        self._describe(images_N, np.array(addresses, np.uint64), shows_N)
        stored = np.flatnonzero(images_N["size"])
        allocations = np.zeros(len(stored), types.ALLOC_TABLE_TYPE)
        allocations["sample_id"], allocations["size"] = stored, images_N["size"][stored]
        allocations["ptr"] = np.array(addresses)[stored]
        put(file, end, memoryview(allocations.tobytes()))
        described = self._described()
        header = np.zeros(1, types.HeaderType)
        n = len(self._metadata)
        header[0] = types.CURRENT_VERSION, len(described), self._page, n, end
        head = header.tobytes() + described.tobytes() + self._metadata.tobytes()
        put(file, 0, memoryview(head))
        return self.start, end

    def same(self, path: Path, crcs_N: np.ndarray) -> bool:
        """Does every row of a finished file read back as FFCV does it? crcs_N: CRC-32 of each."""
        from ffcv.reader import Reader

        reader = Reader(str(path))
        table = reader.alloc_table
        size_of = dict(zip(table["ptr"].tolist(), table["size"].tolist(), strict=True))
        image_N = reader.metadata["f0"]
        address_N = image_N["data_ptr"] if image_N.dtype.names else image_N
        content = np.memmap(path, np.uint8, "r")
        return np.array_equal(reader.metadata, self._metadata) and all(
            zlib.crc32(content[address : address + size_of[address]]) == crc
            for address, crc in zip(address_N.tolist(), crcs_N.tolist(), strict=True)
        )

    def _lay(self, sizes: list[int], start: int) -> tuple[list[int], int]:
        """Addresses of images of these sizes from `start` on, and where the last one ends."""
        addresses, end = [], start
        for size in sizes:
            if end // self._page != (end + size - 1) // self._page:
                end = self._page_end(end)
            addresses.append(end)
            end += size
        return addresses, end

    def _page_end(self, address: int) -> int:
        return -(-address // self._page) * self._page

    def _describe(self, images_N: np.ndarray, address_N: np.ndarray, shows_N: np.ndarray) -> None:
        """Fill in the metadata; a row that shows another points at the pixels of that one."""
        from ffcv.fields.rgb_image import IMAGE_MODES

        image_N = self._metadata["f0"]
        if image_N.dtype.names:
            image_N["mode"] = IMAGE_MODES["jpg"]
            for name in ("width", "height"):
                image_N[name] = images_N[name][shows_N]
            image_N["data_ptr"] = address_N[shows_N]
        else:
            image_N[:] = address_N[shows_N]
        self._metadata["f1"] = shows_N

    def _described(self) -> np.ndarray:
        """The table of fields."""
        from ffcv import types

        known = {kind: number for number, kind in types.TYPE_ID_HANDLER.items()}
        described = np.zeros(len(self._fields), types.FieldDescType)
        for about, (name, field) in zip(described, self._fields.items(), strict=True):
            about["type_id"] = known[type(field)]
            about["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
            about["arguments"][:] = field.to_binary()[0]
        return described
