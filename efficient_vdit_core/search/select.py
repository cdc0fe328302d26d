"""From errors to a plan: the sparsest pattern under a threshold (the paper's Algorithm 1), or the least error at a
speed-up.

Tables are lists over layers of {candidate: error}, in the order of the candidates; one whose error is not a number from
0 up is never chosen, and None stands for full attention.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np

C = TypeVar("C", bound=Hashable)  # candidates

FLOPS, MEASURED = "flops", "measured"
# Above this many partial plans, costs are rounded up to a grid of COST_STEPS a layer: still within the budget.
MAX_PARTIAL_PLANS, COST_STEPS = 50_000, 4096


def check_speedup(speedup: float) -> None:
    """Raise ValueError for what is no speed-up."""
    if not (math.isfinite(speedup) and speedup >= 1):
        raise ValueError(
            f"The target speed-up is {speedup}, expected a number from 1 up: how many times less attention."
        )


def check_threshold(threshold: float) -> None:
    """Raise ValueError for what is no relative error."""
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(
            f"The threshold is {threshold}, expected a relative error from 0 up; 0 keeps every layer full."
        )


def choose_under_threshold(
    errors: Sequence[dict[C, float]], costs: Sequence[dict[C, float]], threshold: float
) -> list[C | None]:
    """For each layer the cheapest candidate whose error is below ``threshold``, or full attention."""
    check_threshold(threshold)
    chosen: list[C | None] = []
    for layer, costs_here in zip(errors, costs, strict=True):
        fitting = [p for p in layer if layer[p] < threshold and costs_here[p] < 1.0]
        chosen.append(min(fitting, key=lambda p: (costs_here[p], layer[p]), default=None))
    return chosen


def choose_for_speedup(
    errors: Sequence[dict[C, float]], costs: Sequence[dict[C, float]], speedup: float
) -> list[C | None]:
    """The choice with the least summed error whose summed cost is at most layers / ``speedup`` (full attention costs
    1).

    Exact (a multiple-choice knapsack over the undominated partial plans), up to a cost grid of 1/4096 of a layer where
    there are very many of them. Raises ValueError where even the cheapest choice is too slow.
    """
    check_speedup(speedup)
    options = [_options(e, c) for e, c in zip(errors, costs, strict=True)]
    budget = len(options) / speedup * (1 + 1e-12)
    cheapest = [min(cost for cost, _, _ in layer) for layer in options]
    if sum(cheapest) > budget:
        raise ValueError(
            f"The target speed-up is {speedup:g}x, but these candidates reach at most {len(options) / sum(cheapest):.2f}x "
            "of the attention. Lower the target, or add candidates with fewer reference frames."
        )
    return _knapsack(options, budget, cheapest)


def _options(errors: dict[C, float], costs: dict[C, float]) -> list[tuple[float, float, C | None]]:
    usable = [(costs[p], errors[p], p) for p in errors if math.isfinite(errors[p]) and costs[p] < 1.0]
    return [*usable, (1.0, 0.0, None)]


def _knapsack(
    options: list[list[tuple[float, float, C | None]]], budget: float, cheapest: list[float]
) -> list[C | None]:
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
