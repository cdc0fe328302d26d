"""Which devices the compiled backends can run on, and when a GPU records what it is told."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

OUT_OF_MEMORY: type[RuntimeError] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)  # until torch 2.5
OLDEST = (8, 0)  # Ampere: the first with bf16 in hardware
# What the allocator of PyTorch does not ask for, such as kernels' code and libraries' workspaces, the driver refuses in
# words of its own: Triton's, CUDA's, cuBLAS's and cuDNN's.
_OTHER_WORDS = ("out of memory", "alloc_failed", "allocation_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that a device's memory is full."""
    said = str(error).lower()
    return isinstance(error, OUT_OF_MEMORY) or (
        isinstance(error, RuntimeError) and any(words in said for words in _OTHER_WORDS)
    )


@contextmanager
def one_out_of_memory() -> Iterator[None]:
    """Within it every error of a full device's memory is ``OUT_OF_MEMORY``."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, OUT_OF_MEMORY) or not is_out_of_memory(error):
            raise
        raise OUT_OF_MEMORY(str(error)) from error


def too_old(device: torch.device) -> str:
    """Why a CUDA device is too old for Triton's kernels; an empty text where it is not. AMD's count differently and
    pass."""
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability >= OLDEST:
        return ""
    return f"the GPU has compute capability {capability[0]}.{capability[1]}, expected {OLDEST[0]}.{OLDEST[1]} (Ampere) or later"


def missing_triton() -> str:
    """That the package triton is not there and which one brings it; an empty text where it is there. Only others build it
    for Windows."""
    if importlib.util.find_spec("triton") is not None:
        return ""
    return "the package triton is not installed" + (" (triton-windows brings it)" if sys.platform == "win32" else "")


def triton_status(device: torch.device | str | None = None) -> tuple[bool, str]:
    """Whether this pack's Triton kernels run on ``device`` (default: this machine's GPU), and the reason, in plain words.

    With TRITON_INTERPRET=1 set before the first use it runs on any device through Triton's interpreter, for tests.
    """
    if reason := missing_triton():
        return False, reason
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True, "Triton's interpreter (TRITON_INTERPRET=1): exact but very slow, for tests"
    if not torch.cuda.is_available():
        return False, "no CUDA GPU was found"
    where = torch.device("cuda" if device is None else device)
    if where.type != "cuda":
        return False, f"Triton kernels need a CUDA GPU, the tensors are on {where.type}"
    if reason := too_old(where):
        return False, reason
    return True, f"Triton kernels on {torch.cuda.get_device_name(where)}"


def arrow_kernels_status(device: torch.device | str | None = None) -> tuple[bool, str]:
    """As ``triton_status``, of the fused kernels of the mask: their tiles spill on AMD's RDNA."""
    available, reason = triton_status(device)
    if available and torch.version.hip is not None and torch.cuda.is_available():
        name = torch.cuda.get_device_properties(torch.device("cuda" if device is None else device)).gcnArchName
        if not name.startswith("gfx9"):
            return False, f"the kernels were not made for {name}, AMD's CDNA (gfx9) is expected"
    return available, reason


def is_recording(device: torch.device) -> bool:
    """Whether the calls on ``device`` are being recorded into a CUDA graph: then nothing may be timed or waited for."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
