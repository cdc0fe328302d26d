"""Where a call's time goes: what the device computes, kernel by kernel, when it waits, and what the host needs to hand the
call over."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..attention import tile_attention
from ..attention.call_shape import CallShape
from ..attention.selection import backend_candidates
from ..tiles import TilePattern
from ..timing import wait_for
from .attention import Shape, random_tensors
from .calls import calls_alone
from .failures import brief
from .turns import sustained

_CALLS = 3  # of one profile
_SHOWN = 8  # kernels of a row, those that take longest


def measure(shape: Shape, device: torch.device, *, seed: int) -> list[dict[str, Any]]:
    """For dense attention, the dense calls of `frames` alone, and each backend that ``auto`` would try for the patterns of
    ``shape``:

    milliseconds of a call among others without a pause; host_milliseconds that handing one over takes; of a profile
    kernel_milliseconds, the sum of what the device computes, span_milliseconds from its first to its last, and
    ``kernels``: name, calls and milliseconds of those that take longest. None where the profiler saw nothing. What fails
    has its ``error`` instead.
    """
    about = {
        "tokens_per_frame" if name == "tokens" else name: value
        for name, value in asdict(shape).items()
        if name != "references"
    }
    with torch.no_grad():
        return [
            {**about, "pattern": TilePattern(count).name(shape.frames), "backend": name, **_told(run, device)}
            for count, name, run in _runs(shape, device, seed)
        ]


def _runs(shape: Shape, device: torch.device, seed: int) -> Iterator[tuple[int | None, str, Callable[[], Any]]]:
    """One after another, since some keep copies of all keys."""
    q, k, v = random_tensors(shape, device, seed)
    yield None, "dense", lambda: F.scaled_dot_product_attention(q, k, v)
    for count in shape.references:
        pattern = TilePattern(count)
        yield count, "calls alone", calls_alone(q, k, v, shape.layout, pattern)
        for name in backend_candidates(CallShape.of(q)):
            if name != "dense":
                yield count, name, lambda: tile_attention(q, k, v, shape.layout, pattern, backend=name)  # noqa: B023


def _told(run: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    try:
        return _profiled(run, device)
    except Exception as error:
        return {"error": brief(error)}


def _profiled(run: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    run()  # tables, tuning and compilation, once
    host, milliseconds = 1000 * _host_seconds(run, device), 1000 * sustained(run, device)
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        for _ in range(_CALLS):
            run()
        wait_for(device)
    return {"milliseconds": milliseconds, "host_milliseconds": host, **_summed(found, device)}


def _summed(found: Any, device: torch.device) -> dict[str, Any]:
    """Of one call. On a CPU an operation's own time, without those that it calls."""
    on_gpu = device.type == "cuda"
    events = [e for e in found.events() if (e.device_type == DeviceType.CPU) != on_gpu]
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        taken = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        totals[event.name][0] += 1
        totals[event.name][1] += taken / 1000 / _CALLS
    if not events:
        return {"kernel_milliseconds": None, "span_milliseconds": None, "kernels": []}
    span = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
    longest = sorted(totals.items(), key=lambda entry: -entry[1][1])[:_SHOWN]
    return {
        "kernel_milliseconds": sum(taken for _, taken in totals.values()),
        "span_milliseconds": span / 1000 / _CALLS,
        "kernels": [{"name": name[:120], "calls": n / _CALLS, "milliseconds": taken} for name, (n, taken) in longest],
    }


def _host_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds until a call is handed over, the device idle before it."""
    taken = []
    for _ in range(_CALLS):
        wait_for(device)
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    wait_for(device)
    return min(taken)
