"""Where a call's time goes: what the device computes, kernel by kernel, and what the host needs to hand it over."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..attention import available_backends, tile_attention
from ..attention.choose import CallShape, wait_for
from ..attention.dispatch import fits
from ..tiles import TilePattern
from .attention import Shape, random_tensors, sustained
from .calls import calls_alone

_CALLS = 3  # of one profile
_SHOWN = 8  # kernels of a row, those that take longest


def measure(shape: Shape, device: torch.device, *, seed: int) -> list[dict[str, Any]]:
    """For dense attention, the dense calls of `frames` alone, and each backend that follows the patterns of ``shape``:

    milliseconds of a call among others without a pause, host_milliseconds that handing one over takes,
    kernel_milliseconds, the sum of all kernels, and ``kernels``: name, calls and milliseconds of those that take
    longest. What is left between the first and the sum of the kernels is the device waiting.
    """
    q, k, v = random_tensors(shape, device, seed)
    backends = [b.name for b in available_backends(device) if b.available and fits(b.name, CallShape.of(q))]
    runs: dict[tuple[int | None, str], Callable[[], Any]] = {
        (None, "dense"): lambda: F.scaled_dot_product_attention(q, k, v)
    }
    for count in shape.references:
        runs[count, "calls alone"] = calls_alone(q, k, v, shape.layout, TilePattern(count))
        for name in backends:
            runs[count, name] = _call(q, k, v, shape, count, name)
    about = {
        "tokens_per_frame" if name == "tokens" else name: value
        for name, value in asdict(shape).items()
        if name != "references"
    }
    with torch.no_grad():
        return [
            {**about, "pattern": TilePattern(count).name(shape.frames), "backend": name, **_profiled(run, device)}
            for (count, name), run in runs.items()
        ]


def _call(q: Tensor, k: Tensor, v: Tensor, shape: Shape, count: int, backend: str) -> Callable[[], Tensor]:
    return lambda: tile_attention(q, k, v, shape.layout, TilePattern(count), backend=backend)


def _profiled(run: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    run()  # tables, tuning and compilation, once
    milliseconds, host = 1000 * sustained(run, device), 1000 * _host_seconds(run, device)
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        for _ in range(_CALLS):
            run()
        wait_for(device)
    times = {e.key: (e.count / _CALLS, _own_milliseconds(e, device)) for e in found.key_averages()}
    longest = sorted(times.items(), key=lambda entry: -entry[1][1])[:_SHOWN]
    return {
        "milliseconds": milliseconds,
        "host_milliseconds": host,
        "kernel_milliseconds": sum(time for _, time in times.values()),
        "kernels": [{"name": name[:120], "calls": calls, "milliseconds": time} for name, (calls, time) in longest],
    }


def _own_milliseconds(event: Any, device: torch.device) -> float:
    """Of one call, without what it called in turn."""
    microseconds = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
    return microseconds / 1000 / _CALLS


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
