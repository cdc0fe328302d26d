"""Times some blocks of a diffusers model with random weights: dense, and under uniform plans."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..attention.choose import seconds
from ..attention.cost import StepCost
from ..diffusers_models import apply_to_diffusers
from ..plan import TilePlan
from ..tiles import TilePattern


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
    times: dict[int | None, list[float]] = {k: [] for k in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for k, run in runs.items():
            times[k].append(seconds(run, device))
    dense, layout, rows = statistics.median(times[None]), cost.layout, []
    for k, values in times.items():
        pattern, taken = TilePattern(k), statistics.median(values)
        density = pattern.flop_density(layout.grid, layout.prefix + layout.suffix)
        rows.append({
            "pattern": pattern.name(layout.grid.t), "depth": cost.depth, "tokens": layout.tokens, "seconds": taken,
            "speedup": dense / taken, "bound": cost.bound(density),
        })  # fmt: skip
    return rows
