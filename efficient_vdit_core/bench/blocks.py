"""Times some blocks of a diffusers model with random weights: dense, and under uniform plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..attention.report.cost import StepCost
from ..diffusers_models import apply_to_diffusers
from ..plan import TilePlan
from ..tiles import TilePattern
from ..timing import seconds
from .turns import medians


@contextmanager
def drawn(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within it models are made there and of that dtype: the host takes minutes for as many random weights, and in float32
    they take twice the room before they are cast."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def time_plans(
    model: Any,
    inputs: dict[str, Any],
    cost: StepCost,
    device: torch.device,
    *,
    references: tuple[int, ...],
    repeats: int,
) -> list[dict[str, Any]]:
    """One row for the dense forward of ``model`` and one for each number of reference frames, which take turns.

    ``cost`` is that of the blocks that the model has; each row has Amdahl's bound by FLOPs beside the speed-up that was
    seen.
    """

    def forward(count: int | None) -> Tensor:
        if count is None:
            return model(**inputs, return_dict=False)[0]
        with apply_to_diffusers(model, TilePlan.uniform(count)):
            return model(**inputs, return_dict=False)[0]

    runs: dict[int | None, Callable[[], Tensor]] = {k: (lambda k=k: forward(k)) for k in (None, *references)}
    for run in runs.values():
        run()
    times, layout, rows = medians(runs, device, repeats, seconds), cost.layout, []
    for k, taken in times.items():
        pattern = TilePattern(k)
        density = pattern.flop_density(layout.grid, layout.prefix + layout.suffix)
        rows.append({
            "pattern": pattern.name(layout.grid.t), "depth": cost.depth, "tokens": layout.tokens, "seconds": taken,
            "speedup": times[None] / taken, "bound": cost.bound(density),
        })  # fmt: skip
    return rows
