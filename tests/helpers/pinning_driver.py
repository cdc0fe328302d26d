"""A stand-in for CUDA's runtime on a machine without: what it was asked to pin, and whether that is still in memory."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch.multiprocessing.reductions import StorageWeakRef

GPU, SECOND_GPU = torch.device("cuda:0"), torch.device("cuda:1")


class PinningDriver:
    """Answers in place of ``torch.cuda.cudart()``.

    Attributes:
        room: bytes that may be pinned, then it refuses (code 2).
        pinned: bytes by address.
        memory: what tells of each of them, by address, whether it was freed.
        asked: calls, waits and errors that were taken up, in their order.
        unregister_code: what it answers instead of letting go, 0 = it lets go.
        register_code: what it answers instead of pinning.
        interrupts: raise KeyboardInterrupt when something has been pinned.
    """

    def __init__(self, monkeypatch, room=2**40):
        self.room, self.pinned, self.memory, self.asked = room, {}, {}, []
        self.register_code = self.unregister_code = 0
        self.interrupts, self.pending = False, 0
        functions = SimpleNamespace(cudaHostRegister=self.register, cudaHostUnregister=self.unregister)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: functions)
        monkeypatch.setattr(torch.cuda, "device", nullcontext)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.asked.append(f"wait {device}"))
        ones = torch.ones

        def kernel(*size, device="cpu", **about):
            if torch.device(device).type != "cuda":
                return ones(*size, device=device, **about)
            code, self.pending = self.pending, 0
            self.asked.append("error taken up")
            if code:
                raise RuntimeError(f"CUDA error {code}")
            return ones(*size)

        monkeypatch.setattr(torch, "ones", kernel)

    def register(self, address, size, flags):
        assert flags == 1, "for all GPUs"
        self.asked.append("register")
        code = self.register_code or (2 if sum(self.pinned.values()) + size > self.room else 0)
        if any(address < at + held and at < address + size for at, held in self.pinned.items()):
            code = 712
        if code:
            self.pending = code
            return code
        (storage,) = {x.untyped_storage() for x in gc.get_objects() if type(x) is torch.Tensor and at(x) == address}
        assert storage.nbytes() == size, "all of it, and nothing beside it"
        self.pinned[address], self.memory[address] = size, StorageWeakRef(storage)
        if self.interrupts:
            raise KeyboardInterrupt
        return 0

    def unregister(self, address):
        self.asked.append("unregister")
        code = self.unregister_code or (0 if address in self.pinned else 713)
        if code:
            self.pending = code
            return code
        assert not self.memory.pop(address).expired(), "it was freed while the driver had it"
        del self.pinned[address]
        return 0

    def none_was_freed(self):
        """Whether all that is pinned now is in memory."""
        return not any(memory.expired() for memory in self.memory.values())


class OnGpu(torch.Tensor):
    """A tensor that says that it is a GPU's: ``x.as_subclass(OnGpu)``."""

    device = property(lambda self: GPU)  # pyright: ignore[reportAssignmentType]
    is_cuda = property(lambda self: True)  # pyright: ignore[reportAssignmentType]


def at(value):
    """The address of a tensor in main memory; 0 for others."""
    return value.data_ptr() if value.device.type == "cpu" and value.layout == torch.strided else 0
