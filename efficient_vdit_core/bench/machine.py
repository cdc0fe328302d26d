"""Names the machine that a figure was measured on, and reads its memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, for the head of a results file."""
    found: dict[str, Any] = {
        "device": device.type,
        "hardware": _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {"efficient-vdit": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    with contextlib.suppress(PackageNotFoundError):
        found["versions"]["triton"] = version("triton")
    if device.type == "cuda":
        found["hardware"] = torch.cuda.get_device_name(device)
        found["versions"]["cuda"] = torch.version.cuda
        found["versions"]["driver"] = _nvidia_driver()
    return found


def _cpu_name() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {cores} cores"


def _nvidia_driver() -> str | None:
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0].split("  ")[1]
    except (OSError, IndexError):
        return None


def peak_extra_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """The most memory that ``run()`` held beyond what was held before, or None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the kernel's way to reset the peak
    except OSError:  # some containers have no such file
        return None
    before = _resident("VmRSS")
    run()
    return max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}; memory cannot be measured on this system.")
