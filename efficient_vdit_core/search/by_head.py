"""A pattern for every head: the least error at a target speed-up, or the sparsest under a threshold.

Errors are squared ones relative to the whole layer, so that they add up over heads. A layer may use few different
patterns, since each group of heads that are alike costs a call.

Shapes: C candidates, the last of them full attention, H heads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

MAX_GROUPS = 4
_HALVINGS = 60  # of the logarithm of a price between 1e-12 and 1e12


@dataclass(frozen=True)
class HeadTable:
    """One layer: ``errors`` (C, H), squared, of each candidate in each head, inf where it may not be used, and ``costs``
    (C,), each candidate's share of the layer's dense cost where all heads follow it."""

    errors: np.ndarray
    costs: np.ndarray

    @property
    def cost_of_heads(self) -> np.ndarray:
        """(C, H)"""
        heads = self.errors.shape[1]
        return np.repeat(self.costs[:, None] / heads, heads, axis=1)


def heads_for_speedup(layers: Sequence[HeadTable], speedup: float, groups: int) -> list[np.ndarray]:
    """For each layer the candidate of every head (H,): the least summed error at a summed cost of layers / ``speedup``.

    The best up to what one head of one layer weighs (a Lagrange multiplier, then whatever fits). Raises ValueError where
    the cheapest choice is too slow.
    """
    errors, costs = [t.errors for t in layers], [t.cost_of_heads for t in layers]
    least, budget = _sum(costs, _least_limited(errors, costs, groups)), len(layers) / speedup
    if least > budget * (1 + 1e-12):
        raise ValueError(
            f"The target speed-up is {speedup:g}x, but these candidates reach at most {len(layers) / least:.2f}x of the attention. "
            "Lower the target, or add candidates with fewer reference frames."
        )
    return _least(errors, costs, budget, groups)


def heads_under_threshold(table: HeadTable, threshold: float, groups: int) -> np.ndarray:
    """The candidate of every head (H,) of one layer: the least cost at a relative error of the layer below
    ``threshold``."""
    if threshold <= 0:
        return np.full(table.errors.shape[1], len(table.costs) - 1)
    return _least([table.cost_of_heads], [table.errors], math.nextafter(threshold**2, 0), groups)[0]


def _least(wanted: list[np.ndarray], limited: list[np.ndarray], budget: float, groups: int) -> list[np.ndarray]:
    """For each layer the candidate of every head with the least summed ``wanted`` (C, H) at a summed ``limited`` of at
    most ``budget``."""
    low, high = -12.0, 12.0
    best = _least_limited(wanted, limited, groups)
    for _ in range(_HALVINGS):
        price = (low + high) / 2
        found = [_cheapest(w, u, 10.0**price, groups) for w, u in zip(wanted, limited, strict=True)]
        if _sum(limited, found) <= budget:
            best, high = found, price
        else:
            low = price
    _spend_the_rest(wanted, limited, best, budget)
    return best


def _least_limited(wanted: list[np.ndarray], limited: list[np.ndarray], groups: int) -> list[np.ndarray]:
    """The same where only the limit counts; what may not be used, by an infinite ``wanted``, stays out."""
    return [_cheapest(w * 0, u, 1.0, groups) for w, u in zip(wanted, limited, strict=True)]


def _cheapest(wanted: np.ndarray, limited: np.ndarray, price: float, groups: int) -> np.ndarray:
    """The candidate of every head (H,) with the least ``wanted`` + ``price`` x ``limited``, of at most ``groups``
    kinds."""
    value = np.nan_to_num(wanted + price * limited, nan=np.inf)
    sets = _sets(len(value), groups)
    each = value[sets]  # (sets, groups, H)
    chosen = int(np.argmin(each.min(1).sum(1)))
    return sets[chosen][each[chosen].argmin(0)]


@lru_cache(maxsize=64)
def _sets(candidates: int, groups: int) -> np.ndarray:
    """All choices (sets, groups) of as many candidates, full attention among them like any other."""
    return np.array(list(itertools.combinations(range(candidates), min(groups, candidates))))


def _sum(values: list[np.ndarray], chosen: list[np.ndarray]) -> float:
    return float(sum(v[c, np.arange(v.shape[1])].sum() for v, c in zip(values, chosen, strict=True)))


def _spend_the_rest(
    wanted: list[np.ndarray], limited: list[np.ndarray], chosen: list[np.ndarray], budget: float
) -> None:
    """Moves single heads to other candidates of their layer while the budget lasts, the best bargains first, in
    place."""
    moves = []
    for layer, (w, u, now) in enumerate(zip(wanted, limited, chosen, strict=True)):
        for head, candidate in itertools.product(range(w.shape[1]), sorted(set(now.tolist()))):
            gain, more = w[now[head], head] - w[candidate, head], u[candidate, head] - u[now[head], head]
            if gain > 0 and more > 0:
                moves.append((-gain / more, layer, head, candidate, more))
    left, moved = budget - _sum(limited, chosen), set()
    for _, layer, head, candidate, more in sorted(moves):
        if more <= left and (layer, head) not in moved:
            chosen[layer][head] = candidate
            left -= more
            moved.add((layer, head))
