"""A trial of backends: how long each takes for random tensors of a call's shape, of a size that takes a fraction of a second."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...tiles import TilePattern, TokenGrid
from ...timing import seconds
from ..call_shape import CallShape
from ..gpu import OUT_OF_MEMORY, one_out_of_memory
from ..layout import TokenLayout

# Over q, k, v under a layout and a TilePattern, or for some backends any LayerPattern.
Attend = Callable[[Tensor, Tensor, Tensor, TokenLayout, Any], Tensor]

log = logging.getLogger("efficient_vdit")

# FLOPs of one dense trial on a CPU, about a tenth of a second on two cores; on a GPU as many as it does in so many seconds,
# by a first try of a few. A tenth of what an H200 does in these, of short frames, picked backends that lost up to 27 %
# at the real size (bench/results/h200).
_TRIAL_FLOPS = 2e10
_PROBE_FLOPS, _TRIAL_SECONDS = 2e12, 0.1
_FEWEST_HEADS = 4  # of long frames, they give every part of a GPU many blocks of rows
_SHORTEST_FRAME = 128
# Calls without a pause in between, as the layers of a model follow one another: while a GPU is at work on one the next is
# handed over.
_CALLS = {"cuda": 2}
_REPEATS, _MOST_SECONDS = 3, 1.0  # rounds of a trial, and when no further one is begun


@dataclass(frozen=True)
class Choice:
    """The fastest backend of a shape class and the median milliseconds of every candidate in the trial.

    ``size``: the heads and tokens of the trial, which may be fewer than those of the calls.
    """

    backend: str
    milliseconds: dict[str, float]
    size: str = ""

    def times(self) -> str:
        """Milliseconds for a person, fastest first, and what took them."""
        ordered = sorted(self.milliseconds.items(), key=lambda entry: entry[1])
        times = ", ".join(f"{name} {ms:.2f}" for name, ms in ordered)
        return f"{times} ({self.size})" if self.size else times

    def sparse(self) -> str:
        """The fastest of those that follow the pattern; the backend itself where nothing was measured."""
        if not self.milliseconds:
            return self.backend
        return min((name for name in self.milliseconds if name != "dense"), key=lambda name: self.milliseconds[name])

    def paying(self, renewed: float) -> str:
        """The backend itself, and ``dense`` where dense attention, computed beside it in the share ``renewed`` of the calls,
        eats up what it wins."""
        if not self.milliseconds or not renewed:
            return self.backend
        dense, sparse = (self.milliseconds[name] for name in ("dense", self.sparse()))
        return self.sparse() if sparse + renewed * dense < dense else "dense"


def trial(
    candidates: Mapping[str, Attend], shape: CallShape, layout: TokenLayout, pattern: TilePattern, otherwise: str
) -> tuple[Choice, bool]:
    """The choice, and whether every candidate had the memory it needs. Where none of those that follow the pattern had it, the
    choice is ``otherwise``, without times."""
    try:
        with one_out_of_memory():
            return _measured(candidates, shape, layout, pattern)
    except OUT_OF_MEMORY:
        log.warning("Efficient-vDiT: there is no room to measure backends; the sparse attention runs by %s.", otherwise)
        return Choice(otherwise, {}), False


def _measured(
    candidates: Mapping[str, Attend], shape: CallShape, layout: TokenLayout, pattern: TilePattern
) -> tuple[Choice, bool]:
    heads, layout = trial_size(shape, layout, _affordable_flops(candidates["dense"], shape, layout, pattern))
    calls = _CALLS.get(shape.device.type, 1)
    with torch.inference_mode(False), torch.set_grad_enabled(shape.gradients):
        tensors = shape.tensors(heads, layout.tokens)
        runs = {name: _run(attend, tensors, layout, pattern, shape.gradients) for name, attend in candidates.items()}
        certain = set(runs) if pattern.means else {"dense", "frames"}
        cramped: list[str] = []
        times: dict[str, list[float]] = {n: [] for n, run in runs.items() if _runs(n, run, n in certain, cramped)}
        if cramped and set(times) <= {"dense"}:
            raise OUT_OF_MEMORY("no backend that follows the pattern has room for a trial")
        start = time.perf_counter()
        for done in range(_REPEATS):
            if done and time.perf_counter() - start > _MOST_SECONDS:
                break
            for name, values in times.items():
                values.append(seconds(runs[name], shape.device, calls))
    medians = {name: 1000 * statistics.median(values) for name, values in times.items()}
    size = f"{heads} heads, {layout.grid.t} frames of {layout.grid.tokens_per_frame} tokens"
    return Choice(min(medians, key=lambda name: medians[name]), medians, size), not cramped


def _affordable_flops(dense: Attend, shape: CallShape, layout: TokenLayout, pattern: TilePattern) -> float:
    """FLOPs of dense attention, there, that a trial is for: what the device does in ``_TRIAL_SECONDS``, the way back
    included where gradients are wanted."""
    if shape.device.type != "cuda":
        return _TRIAL_FLOPS
    heads, layout = trial_size(shape, layout, _PROBE_FLOPS)
    with torch.inference_mode(False), torch.set_grad_enabled(shape.gradients):
        run = _run(dense, shape.tensors(heads, layout.tokens), layout, pattern, shape.gradients)
        run()  # kernels are chosen and built
        return _TRIAL_SECONDS * _flops(shape, heads, layout) / seconds(run, shape.device, 3)


def _flops(shape: CallShape, heads: int, layout: TokenLayout) -> float:
    return 4.0 * shape.batch * heads * layout.tokens**2 * shape.head_dim


def _run(
    attend: Attend,
    tensors: tuple[Tensor, Tensor, Tensor],
    layout: TokenLayout,
    pattern: TilePattern,
    gradients: bool,
) -> Callable[[], Any]:
    """One call, and with ``gradients`` the way back through it."""
    if not gradients:
        return lambda: attend(*tensors, layout, pattern)
    dout = tensors[1].detach()  # as good as any: times do not hang on numbers

    def there_and_back() -> Any:
        out = attend(*tensors, layout, pattern)
        if not out.requires_grad:
            raise ValueError(
                "A gradient is wanted, and the dense attention gives none. Hand in a dense function with a backward, or call it "
                "under torch.no_grad()."
            )
        return torch.autograd.grad(out, tensors, dout)

    return there_and_back


def _runs(name: str, run: Callable[[], Any], certain: bool, cramped: list[str]) -> bool:
    """Whether a candidate runs here. The errors of one that has to are the caller's, but for those of memory: it is
    named in ``cramped`` then."""
    try:
        with one_out_of_memory():
            run()
    except OUT_OF_MEMORY:
        cramped.append(name)
        log.warning("Efficient-vDiT: the backend %s has no room for a trial and is left out of it.", name)
        return False
    except Exception as error:  # compilers raise anything
        if certain:
            raise
        kind = type(error).__name__
        log.warning("Efficient-vDiT: the backend %s fails here and is left out: %s: %s", name, kind, error)
        return False
    return True


def trial_size(shape: CallShape, layout: TokenLayout, budget: float) -> tuple[int, TokenLayout]:
    """How many heads and which layout a trial of ``budget`` FLOPs uses: fewer heads first, down to a few that still fill a
    large GPU, then shorter frames, then fewer heads again.

    The frames stay whole where they can: how well kernels do depends on their length, and a trial of short ones is over
    before the host has handed over the calls.
    """

    def affordable(layout: TokenLayout) -> int:
        return int(budget / _flops(shape, 1, layout))

    heads = min(shape.heads, max(_FEWEST_HEADS, affordable(layout)))
    if heads > affordable(layout) and layout.grid.tokens_per_frame > _SHORTEST_FRAME:
        shrink = math.sqrt(budget / _flops(shape, heads, layout))
        size = max(_SHORTEST_FRAME, int(layout.grid.tokens_per_frame * shrink))
        layout = TokenLayout(
            TokenGrid(layout.grid.t, 1, size), int(layout.prefix * shrink), int(layout.suffix * shrink)
        )
    return max(1, min(heads, affordable(layout))), layout
