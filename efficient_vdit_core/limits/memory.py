"""What a request would take, against what there is: asked before anything is allocated."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path


def free_bytes(device: str = "cpu") -> int | None:
    """Memory that a new allocation on ``device`` may take; None where this system does not tell."""
    if device.startswith("cuda"):
        import torch

        # What PyTorch's allocator holds and nobody uses counts as taken for the driver.
        stats = torch.cuda.memory_stats(device)
        idle = stats.get("reserved_bytes.all.current", 0) - stats.get("active_bytes.all.current", 0)
        return torch.cuda.mem_get_info(device)[0] + idle
    if device != "cpu":
        return None
    found = [size for size in (_meminfo(), *_cgroups()) if size is not None]
    if found:
        return min(found)
    others: tuple[Callable[[], int | None], ...] = (_psutil, _windows, _sysconf)
    return next((size for size in (ask() for ask in others) if size is not None), None)


def check_memory(needed: int, what: str, advice: str, device: str = "cpu") -> None:
    """Raises ValueError where ``what`` needs more bytes than are free: it names both, and the ``advice``."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise ValueError(f"{what} takes about {in_words(needed)} of memory, {in_words(free)} are free. {advice}")


def in_words(size: int) -> str:
    """Bytes for people."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:,.0f} {name}" if size >= 10 * unit else f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def _meminfo() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _psutil() -> int | None:
    """Of any system; ComfyUI brings it, the engine alone need not have it."""
    try:
        import psutil

        return int(psutil.virtual_memory().available)
    except (ImportError, OSError, RuntimeError):
        return None


class _WindowsMemory(ctypes.Structure):
    """MEMORYSTATUSEX, whose first field is its own size."""

    _fields_ = (
        ("dwLength", ctypes.c_uint32),
        ("dwMemoryLoad", ctypes.c_uint32),
        ("ullTotalPhys", ctypes.c_uint64),
        ("ullAvailPhys", ctypes.c_uint64),
        ("ullTotalPageFile", ctypes.c_uint64),
        ("ullAvailPageFile", ctypes.c_uint64),
        ("ullTotalVirtual", ctypes.c_uint64),
        ("ullAvailVirtual", ctypes.c_uint64),
        ("ullAvailExtendedVirtual", ctypes.c_uint64),
    )


def _windows() -> int | None:
    system = getattr(ctypes, "windll", None)
    if system is None:
        return None
    status = _WindowsMemory(dwLength=ctypes.sizeof(_WindowsMemory))
    return int(status.ullAvailPhys) if system.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else None


def _sysconf() -> int | None:
    """All memory of the machine, where nothing tells what of it is free."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, others not these names
        return None


def _cgroups() -> list[int | None]:
    """What a container has left, in both versions of Linux's control groups."""
    folders = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
    return [_left(*(Path("/sys/fs/cgroup") / name for name in names)) for names in folders]


def _left(limit: Path, used: Path) -> int | None:
    try:
        # Pages of files count as used there, but give way; the machine's own figure knows that.
        cached = _cached(limit.parent / "memory.stat")
        return max(0, int(limit.read_text()) - int(used.read_text()) + cached)
    except (OSError, ValueError):  # no such group, or "max"
        return None


def _cached(stat: Path) -> int:
    values = dict(line.split()[:2] for line in stat.read_text().splitlines())
    return int(values.get("inactive_file", 0))
