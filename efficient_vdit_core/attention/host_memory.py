"""Main memory that a GPU copies from and to.

PyTorch's own pinned memory (``pin_memory=True``) takes the next power of two of each tensor and keeps it for good. Here a
plain tensor is registered with the driver, which pins its pages, and taken off again at an end that its holder chooses.
"""

from __future__ import annotations

import logging
import weakref

import torch
from torch import Tensor

from ..timing import wait_for

log = logging.getLogger("efficient_vdit")

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU, where several share out a batch
_NOT_REGISTERED = 713
_UNAVAILABLE = -1  # no answer of the driver's
# What the driver knows, by address, with the device that asked. A tensor stands here from before it is registered until
# after it no longer is, whatever breaks off in between: freed while it is registered, its pages would be the GPU's still,
# and copies for whoever gets the address next would go to them.
_REGISTERED: dict[int, tuple[Tensor, torch.device]] = {}


class HostMemory:
    """Main memory for ``what``, which GPUs copy from and to at the bus's full rate until `close`.

    What cannot be registered (no CUDA or ROCm, or more than the system lets a process pin) is pageable: copies take longer
    and give the same. Registering takes as long as writing to all of it, so take tensors once and use them again.

    PyTorch's allocator does not know of these tensors and watches no copy of theirs. A copy that does not block is behind
    the stream's earlier ones, so a GPU may overwrite what it reads or wrote itself; the CPU may read or write a tensor
    only when it has waited for the device. `close` waits, so the memory is never taken off, nor freed, under a copy. It
    also happens where the holder is only dropped, and when Python ends. A tensor that lives on is pageable from then on.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._mine = set[int]()
        self._devices = set[torch.device]()
        self._refused = False
        weakref.finalize(self, _take_off, self._mine, self._mine, self._devices)

    def empty(self, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor in main memory with no values yet, for copies from and to ``device``."""
        value = torch.empty(size, dtype=dtype, device="cpu")
        self.used_on(device)
        if device.type == "cuda" and value.nbytes and not self._refused:
            code = _register(value, device, self._mine)
            if code != 0:  # the next one would be refused as well
                self._refused = True
                log.info(
                    "Efficient-vDiT: %s waits in main memory that the system does not pin (error %d): copies take longer.",
                    self.what, code,
                )  # fmt: skip
        return value

    def used_on(self, device: torch.device) -> None:
        """``device`` copies from and to these tensors too, so the end waits for it."""
        self._devices.add(device)

    def release(self, value: Tensor) -> None:
        """The end of one tensor of `empty`; waits for the devices where it is registered."""
        _take_off({value.data_ptr()} & self._mine, self._mine, self._devices)

    def close(self) -> None:
        """The end of all of them, once the devices are done. New ones may be taken afterwards."""
        _take_off(self._mine, self._mine, self._devices)
        self._refused = False


def _register(value: Tensor, device: torch.device, mine: set[int]) -> int:
    """The driver's code, 0 = the tensor is pinned and its address is among ``mine``."""
    address = value.data_ptr()
    _REGISTERED[address] = value, device
    mine.add(address)
    code = _ask("cudaHostRegister", device, address, value.nbytes, _PORTABLE)
    if code != 0:  # also where it was registered already (712), which is not ours to end
        mine.discard(address)
        del _REGISTERED[address]
    return code


def _take_off(addresses: set[int], mine: set[int], devices: set[torch.device]) -> None:
    """Waits for the ``devices`` and ends the registrations of ``addresses``, which are among ``mine``. What cannot be
    waited for, or taken off, stays in memory."""
    if not addresses:
        return
    try:
        for device in list(devices):
            wait_for(device)
    except RuntimeError as error:  # a computation broke the device, or is being recorded
        log.warning("Efficient-vDiT: memory stays pinned, the device could not be waited for: %s", error)
        return
    for address in list(addresses):
        code = _ask("cudaHostUnregister", _REGISTERED[address][1], address)
        mine.discard(address)  # before it is freed, and the address may be another's
        if code in (0, _NOT_REGISTERED):
            del _REGISTERED[address]
        else:
            log.warning("Efficient-vDiT: memory stays pinned, the driver does not let go of it (error %d).", code)


def _ask(call: str, device: torch.device, *about: int) -> int:
    """The code of a call of CUDA's or ROCm's runtime, 0 = done."""
    code = _UNAVAILABLE
    try:
        with torch.cuda.device(device):  # so that no other GPU is started for it
            code = int(getattr(torch.cuda.cudart(), call)(*about))
    except (RuntimeError, AssertionError, AttributeError):  # no CUDA in this PyTorch, or in a forked process
        pass
    if code not in (0, _UNAVAILABLE):
        _discard_error(device)
    return code


def _discard_error(device: torch.device) -> None:
    """The runtime holds a refusal until it is asked, and PyTorch asks behind its next kernel: this one bears it."""
    try:
        torch.ones(1, device=device).add_(1)
        wait_for(device)
    except (RuntimeError, AssertionError):
        pass
