"""What do operations cost, by their shapes? FLOPs and bytes, counted as iterations run.

Counting changes no number: every operation is called as it would be, also those that a compiled
function calls (its own fused loops are not seen). Double backward passes are operations like any
other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Key = tuple[str, tuple[tuple[int, ...], ...]]
"""An operation's name, as "aten::convolution", and the shapes of its tensors that have axes."""


@dataclass(frozen=True)
class Cost:
    """Of one call."""

    flops: float
    """2 per multiply-add."""
    bytes: float
    """Of what it reads and writes, each tensor once; 0 for a view."""
    dtype: torch.dtype
    """Of its first tensor."""


class Tally(TorchDispatchMode):
    """The cost of every operation called below it; of those that are alike in name and shapes, and
    differ in strides or in which gradients are wanted, the mean."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: dict[Key, list[Cost]] = {}

    @property
    def costs(self) -> dict[Key, Cost]:
        """Of one call each."""
        return {key: _mean(calls) for key, calls in self._calls.items()}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions stay compiled below it."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = list(tensors((args, kwargs)))
        if given:
            name = func._schema.name
            key = name, tuple(tuple(t.shape) for t in given if t.ndim)
            counter = flop_registry.get(func._overloadpacket)
            flops = counter(*args, **kwargs, out_val=out) if counter else 0
            moved = _moved(func, given, list(tensors(out)), args, kwargs)
            self._calls.setdefault(key, []).append(Cost(flops, moved, given[0].dtype))
        return out


def _mean(calls: list[Cost]) -> Cost:
    count = len(calls)
    flops, moved = sum(c.flops for c in calls) / count, sum(c.bytes for c in calls) / count
    return Cost(flops, moved, calls[0].dtype)


def tensors(value: Any) -> Iterator[Tensor]:
    """Those in nested arguments, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def _moved(func: Any, given: list[Tensor], made: list[Tensor], args: tuple, kwargs: dict) -> int:
    """Bytes read and written; none where nothing but a view is made."""
    known = {_place(t) for t in given}
    fresh = [t for t in made if _place(t) not in known]
    arguments = func._schema.arguments
    written = [v for a, v in zip(arguments, args, strict=False) if _is_written(a)]
    written += [kwargs[a.name] for a in arguments if a.name in kwargs and _is_written(a)]
    if not fresh and not written:
        return 0
    return sum(map(_size, [*given, *fresh, *tensors(written)]))


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.numel() else id(tensor)


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor; those that it repeats by a stride of 0 once."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else 1
    return size
