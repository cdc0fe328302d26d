"""Counts the bytes of tensors that are alive, those that only autograd holds too: on any device, the meta device
included, what a GPU's allocator would tell."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """``live`` and ``peak`` of all storages that operations inside the mode made, each counted once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        before = {id(t.untyped_storage()) for t in _tensors([*args, *kwargs.values()])}
        self.count(t for t in _tensors(out) if id(t.untyped_storage()) not in before)
        return out

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made elsewhere too."""
        for storage in (t.untyped_storage() for t in tensors):
            if id(storage) in self._counted:
                continue
            self._counted.add(id(storage))
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, id(storage), storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.live -= size


def _tensors(value: Any) -> Iterator[Tensor]:
    """Of what an operation takes or returns. PyTorch's own walk over trees takes a third of a count's time, and a storage would be
    walked byte by byte."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of their storages, each counted once."""
    return sum({id(s): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())
