"""Counts the bytes of tensors that are alive, those that only autograd holds too: on the CPU what a GPU's allocator tells."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """``live`` and ``peak`` of all storages that operations inside the mode made, each counted once."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._counted = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in before:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage):
        if id(storage) in self._counted:
            return
        self._counted.add(id(storage))
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, id(storage), storage.nbytes())

    def _gone(self, key, size):
        self._counted.discard(key)
        self.live -= size
