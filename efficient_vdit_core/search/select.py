"""From errors to a plan: the sparsest pattern under a threshold (the paper's Algorithm 1), or the least error at a
speed-up.

Tables are lists over layers of {k: error}; a candidate whose error is not a number from 0 up is never chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..plan import TilePlan
from ..tiles import TilePattern
from .probe import ATTENTION, ProbeRecord

Choice = int | None  # reference frames, or None for full attention
Table = Sequence[dict[int, float]]

FLOPS, MEASURED = "flops", "measured"
COSTS = (FLOPS, MEASURED)
# Above this many partial plans, costs are rounded up to a grid of COST_STEPS a layer: still within the budget.
MAX_PARTIAL_PLANS, COST_STEPS = 50_000, 4096


def check_target(threshold: float, speedup: float, candidates: Sequence[int], frames: int) -> None:
    """Raise ValueError for a target that means nothing or is out of reach whatever the errors, before a model runs.

    ``speedup`` 0 stands for the ``threshold``; ``frames`` are latent ones. Extra tokens only make a pattern dearer.
    """
    if not speedup:
        choose_under_threshold([], [], threshold)
        return
    costs = {k: TilePattern(k).density(frames) for k in candidates}
    choose_for_speedup([dict.fromkeys(costs, 0.0)], [costs], speedup)


def choose_under_threshold(errors: Table, costs: Table, threshold: float) -> list[Choice]:
    """For each layer the cheapest candidate whose error is below ``threshold``, or full attention."""
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(
            f"The threshold is {threshold}, expected a relative error from 0 up; 0 keeps every layer full."
        )
    chosen: list[Choice] = []
    for layer, costs_here in zip(errors, costs, strict=True):
        fitting = [k for k in layer if layer[k] < threshold and costs_here[k] < 1.0]
        chosen.append(min(fitting, key=lambda k: (costs_here[k], layer[k], k), default=None))
    return chosen


def choose_for_speedup(errors: Table, costs: Table, speedup: float) -> list[Choice]:
    """The choice with the least summed error whose summed cost is at most layers / ``speedup`` (full attention costs
    1).

    Exact (a multiple-choice knapsack over the undominated partial plans), up to a cost grid of 1/4096 of a layer where
    there are very many of them. Raises ValueError where even the cheapest choice is too slow.
    """
    if not (math.isfinite(speedup) and speedup >= 1):
        raise ValueError(
            f"The target speed-up is {speedup}, expected a number from 1 up: how many times less attention."
        )
    options = [_options(e, c) for e, c in zip(errors, costs, strict=True)]
    budget = len(options) / speedup * (1 + 1e-12)
    cheapest = [min(cost for cost, _, _ in layer) for layer in options]
    if sum(cheapest) > budget:
        raise ValueError(
            f"The target speed-up is {speedup:g}x, but these candidates reach at most {len(options) / sum(cheapest):.2f}x "
            "of the attention. Lower the target, or add candidates with fewer reference frames."
        )
    return _knapsack(options, budget, cheapest)


def _options(errors: dict[int, float], costs: dict[int, float]) -> list[tuple[float, float, Choice]]:
    usable = [(costs[k], errors[k], k) for k in sorted(errors) if math.isfinite(errors[k]) and costs[k] < 1.0]
    return [*usable, (1.0, 0.0, None)]


def _knapsack(options: list[list[tuple[float, float, Choice]]], budget: float, cheapest: list[float]) -> list[Choice]:
    """Layer by layer, the partial plans of which no other is both as cheap and as good."""
    cost, error, history = np.zeros(1), np.zeros(1), []
    for i, layer in enumerate(options):
        still_to_pay = sum(cheapest[i + 1 :])
        new_cost = (cost[:, None] + np.array([o[0] for o in layer])).ravel()
        new_error = (error[:, None] + np.array([o[1] for o in layer])).ravel()
        if len(new_cost) > MAX_PARTIAL_PLANS:
            rounded = np.ceil(new_cost * COST_STEPS - 1e-6) / COST_STEPS
            new_cost = rounded if rounded.min() + still_to_pay <= budget else new_cost
        order = np.lexsort((np.arange(len(new_cost)), new_error, new_cost))
        order = order[new_cost[order] + still_to_pay <= budget + 1e-9]
        best_before = np.minimum.accumulate(np.concatenate([[np.inf], new_error[order]]))[:-1]
        kept = order[new_error[order] < best_before]
        history.append((kept // len(layer), kept % len(layer)))
        cost, error = new_cost[kept], new_error[kept]
    at, chosen = int(np.argmin(error)), []
    for layer, (parent, option) in zip(reversed(options), reversed(history), strict=True):
        chosen.append(layer[int(option[at])][2])
        at = int(parent[at])
    return chosen[::-1]


def plan_from_record(
    record: ProbeRecord,
    *,
    layers: int,
    family: str,
    heads: int | None = None,
    threshold: float = 0.0,
    speedup: float = 0.0,
    measure: str = ATTENTION,
    costs: str = FLOPS,
    about: dict[str, Any] | None = None,
) -> TilePlan:
    """The plan of a finished probing run, by ``threshold`` or, where it is not 0, by target ``speedup`` of the
    attention.

    ``measure``: attention or block errors; ``costs``: by FLOPs or as measured. A layer without a measurement, or with
    one that is not finite, stays full and is named in the provenance, which also holds all errors, the predicted FLOP
    density and speed-up, and what ``about`` adds (sigmas, seed, ...).
    """
    if record.layout is None:
        why = (
            ", ".join(f"{count} {reason}" for reason, count in record.dense.most_common())
            or "no attention call was seen"
        )
        raise ValueError(
            f"No self-attention over a video was found ({why}). The search needs a model whose tokens are known, and several frames."
        )
    grid, extra = record.layout.grid, record.layout.prefix + record.layout.suffix
    flops = {k: TilePattern(k).flop_density(grid, extra) for k in record.candidates}
    found = [{k: record.error(i, k, measure) for k in record.candidates} for i in range(layers)]
    errors = [e if all(map(math.isfinite, e.values())) else dict.fromkeys(e, math.inf) for e in found]
    measured = costs == MEASURED
    prices = [
        {k: record.cost(i, k) if measured and (i, k) in record.seconds else flops[k] for k in flops}
        for i in range(layers)
    ]
    chosen = (
        choose_for_speedup(errors, prices, speedup) if speedup else choose_under_threshold(errors, prices, threshold)
    )
    provenance: dict[str, Any] = {
        "method": "searched: least error at a target speed-up" if speedup else "searched: sparsest under a threshold",
        **({"target_speedup": speedup} if speedup else {"threshold": threshold}),
        "error": f"relative L2 of the {measure} output against dense, mean over calls",
        "costs": costs,
        "candidates": list(record.candidates),
        "grid": [grid.t, grid.h, grid.w],
        "extra_tokens": extra,
        **(about or {}),
        **_predictions(chosen, flops, prices),
        "errors": {str(k): [_jsonable(layer[k]) for layer in found] for k in record.candidates},
        "not_finite_layers": [i for i, layer in enumerate(found) if any(map(math.isinf, layer.values()))],
        "not_measured_layers": [i for i, layer in enumerate(found) if all(map(math.isnan, layer.values()))],
        **({"measured_costs": {str(k): [round(p[k], 4) for p in prices] for k in flops}} if measured else {}),
    }
    return TilePlan(
        patterns=tuple(map(TilePattern, chosen)), family=family, frames=grid.t, heads=heads, provenance=provenance
    )


def _predictions(chosen: list[Choice], flops: dict[int, float], prices: Table) -> dict[str, float]:
    density = [1.0 if k is None else flops[k] for k in chosen]
    spent = [1.0 if k is None else prices[i][k] for i, k in enumerate(chosen)]
    return {
        "attention_flop_density": round(sum(density) / len(density), 6),
        "attention_speedup": round(len(spent) / sum(spent), 4),
    }


def _jsonable(error: float) -> float | None:
    return float(f"{error:.6g}") if math.isfinite(error) else None
