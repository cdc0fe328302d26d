"""What a model's blocks allocate: a recorder such as ComfyUI's own compiler keeps on NVIDIA GPUs, for any device."""

from collections.abc import Iterator
from contextlib import contextmanager

from host import torch  # isort: skip
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationRecorder(TorchDispatchMode):
    """Notes every allocation within a block, what of it outlives the block, and the most that a block holds.

    ``sequences`` has one list of sizes (bytes) for each block that ran, in order; ``rogues`` the sizes of what a block
    left behind beside its result; ``peak`` the most bytes that were allocated and held within one block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sequences: list[list[int]] = []
        self.rogues: list[int] = []
        self.peak = 0
        self.made: dict[int, tuple[StorageWeakRef, int]] | None = None

    @contextmanager
    def block(self, *given: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        """Within it runs one block on ``given`` tensors; it puts its results into the list."""
        known = {x.untyped_storage()._cdata for x in given}
        self.made, results = {}, []
        self.sequences.append([])
        self.known = known
        yield results
        kept = {x.untyped_storage()._cdata for x in results}
        self.rogues += [size for at, (ref, size) in self.made.items() if at not in kept and not ref.expired()]
        self.made = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        if self.made is not None:
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in before | self.known:
                    self._note(x.untyped_storage())
            self.peak = max(self.peak, sum(size for ref, size in self.made.values() if not ref.expired()))
        return out

    def _note(self, storage) -> None:
        assert self.made is not None
        found = self.made.get(storage._cdata)
        if found is None or found[0].expired():
            # A freed storage's place may be taken by the next one: what it left is not held.
            self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.sequences[-1].append(storage.nbytes())
