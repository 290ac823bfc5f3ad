"""What stands in for a CUDA graph where there is no GPU: the same operations on the same tensors,
again."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Records operations with their very tensors and constants, and undoes what they did, since a
    CUDA graph that is recorded does nothing yet."""

    made: ClassVar[list["Tape"]] = []

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.replays = 0
        self._own: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        Tape.made.append(self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in _written(func, args, kwargs):
            place = tensor.untyped_storage()._cdata
            if place not in self._own | self._before.keys():
                base = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self._before[place] = base, base.clone()
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        self._own |= {t.untyped_storage()._cdata for t in _tensors(out)} - given
        self.calls.append((func, args, kwargs, out))
        return out

    def record(self, work: Callable[[], Any]) -> Any:
        try:
            with self:
                return work()
        finally:
            with torch.no_grad():
                for tensor, before in self._before.values():
                    tensor.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(out), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes to, by its schema."""
    if func is torch.ops.aten.native_batch_norm.default:  # which does not say so
        return [t for t in args[3:5] if t is not None]
    known = func._schema.arguments
    given = [
        *zip(known, args, strict=False),
        *((a, kwargs[a.name]) for a in known if a.name in kwargs),
    ]
    return _tensors([v for a, v in given if a.alias_info is not None and a.alias_info.is_write])
