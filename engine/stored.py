"""Tensors of a checkpoint by path, whole or in part, whatever number of ranks wrote them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SHARED = "shared.safetensors"
INDEX = "checkpoint.json"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or does not fit the run."""


def rank_part(rank: int) -> str:
    """File name of what a rank alone has."""
    return f"rank-{rank:05}.safetensors"


def shard_part(rank: int) -> str:
    """File name of a rank's pieces of tensors that are spread over the ranks."""
    return f"shard-{rank:05}.safetensors"


class Stored(Mapping[str, Tensor]):
    """The tensors that all ranks share. Pieces in the files of successive ranks are successive."""

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self._whole = safetensors.torch.load((folder / SHARED).read_bytes())
        self._shapes: dict[str, list[int]] = index.get("sharded", {})
        count = index["world_size"] if self._shapes else 0
        self._shards = [safe_open(folder / shard_part(rank), "pt") for rank in range(count)]

    def __getitem__(self, path: str) -> Tensor:
        if path not in self._shapes:
            return self._whole[path]
        return torch.cat([shard.get_tensor(path) for shard in self._shards]).view(
            self._shapes[path]
        )

    def __iter__(self) -> Iterator[str]:
        yield from self._whole
        yield from self._shapes

    def __len__(self) -> int:
        return len(self._whole) + len(self._shapes)

    def shape(self, path: str) -> tuple[int, ...]:
        """Of the whole tensor; KeyError if there is none."""
        return tuple(self._shapes[path] if path in self._shapes else self._whole[path].shape)

    def part(self, path: str, begin: int, count: int) -> Tensor:
        """(count,) values of the flattened tensor, read from the files that hold them."""
        if path not in self._shapes:
            return self._whole[path].reshape(-1)[begin : begin + count]
        found, start = [], 0
        for shard in self._shards:
            piece = shard.get_slice(path)
            length = piece.get_shape()[0]
            low, high = max(begin - start, 0), min(begin + count - start, length)
            if low < high:
                found.append(piece[low:high])
            start += length
        return torch.cat(found) if found else torch.empty(0)


class Loaded:
    """A verified checkpoint: its index, what all ranks share, and what this rank alone had."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        """A rank that was not there when it was written takes rank 0's part. Raises
        CheckpointError for a file that is no safetensors file."""
        self.folder = folder
        self.index: dict[str, Any] = json.loads((folder / INDEX).read_text())
        part = rank_part(rank if rank < self.index["world_size"] else 0)
        try:
            self.shared = Stored(folder, self.index)
            self.local = safetensors.torch.load((folder / part).read_bytes())
        except SafetensorError as error:
            raise CheckpointError(f"{folder}: {error}") from error

    @property
    def images(self) -> int:
        """Images seen when it was written."""
        return self.index["images"]
