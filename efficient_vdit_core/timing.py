"""Wall-clock times that include what the device still had to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Out = TypeVar("Out")


def seconds(run: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Wall-clock seconds of ``run()``, the device's work included: of one among ``calls`` without a pause in between."""

    def run_all() -> None:
        for _ in range(calls):
            run()

    return timed(run_all, device)[1] / calls


def timed(run: Callable[[], Out], device: torch.device) -> tuple[Out, float]:
    """What ``run()`` gives, and its wall-clock seconds, the device's work included."""
    wait_for(device)
    start = time.perf_counter()
    out = run()
    wait_for(device)
    return out, time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Returns when ``device`` has done all that it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type in ("mps", "xpu"):
        getattr(torch, device.type).synchronize()
