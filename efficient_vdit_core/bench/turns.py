"""Median times of runs that take turns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

from ..timing import seconds

_LEAST_SECONDS = 0.05  # of a turn on a GPU, and of what goes before it


def sustained(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call; on a GPU among calls without a pause in between, as the layers of a model follow one another,
    after so many that its clock is the one at which they keep it, not at which another's run left it."""
    first = seconds(run, device)
    if device.type != "cuda":
        return first
    calls = math.ceil(_LEAST_SECONDS / first)
    if calls > 1:  # a longer one has brought the clock there itself
        seconds(run, device, calls)
    return seconds(run, device, max(1, calls))


def medians(
    runs: dict[Any, Callable[[], Any]],
    device: torch.device,
    repeats: int,
    time: Callable[[Callable[[], Any], torch.device], float] = sustained,
) -> dict[Any, float]:
    """Median seconds of each run, by ``time``; they take turns, so that what else the machine does meets all alike."""
    times: dict[Any, list[float]] = {key: [] for key in runs}
    for _ in range(repeats):
        for key, run in runs.items():
            times[key].append(time(run, device))
    return {key: statistics.median(values) for key, values in times.items()}
