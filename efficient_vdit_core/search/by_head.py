"""A pattern for every head: the least error at a target speed-up, or the sparsest under a threshold.

Errors are squared ones relative to the whole layer, so that they add up over heads. A layer may use few different
patterns, since each group of heads that are alike costs a call; where that was measured, it counts.

Shapes: C candidates, the last of them full attention, H heads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

MAX_GROUPS = 4
_HALVINGS = 60  # of the logarithm of a price between 1e-12 and 1e12


@dataclass(frozen=True)
class HeadTable:
    """One layer: ``errors`` (C, H), squared, of each candidate in each head, inf where it may not be used, and ``costs``
    (C,), each candidate's share of the layer's dense cost where all heads follow it. ``calls`` (C,): what of that a call
    costs however few heads it has, default: nothing."""

    errors: np.ndarray
    costs: np.ndarray
    calls: np.ndarray = field(default_factory=lambda: np.zeros(1))

    @property
    def as_errors(self) -> _Sum:
        return _Sum(self.errors, np.zeros(len(self.costs)))

    @property
    def as_costs(self) -> _Sum:
        heads, calls = self.errors.shape[1], np.broadcast_to(self.calls, self.costs.shape)
        return _Sum(np.repeat((self.costs - calls)[:, None] / heads, heads, axis=1), calls)


@dataclass(frozen=True)
class _Sum:
    """What adds up over a layer: ``each`` (C, H), by candidate and head, and ``kinds`` (C,), once for each candidate
    that a head follows."""

    each: np.ndarray
    kinds: np.ndarray

    def of(self, chosen: np.ndarray) -> float:
        """Of the candidate of every head (H,)."""
        return float(self.each[chosen, np.arange(len(chosen))].sum()) + float(self.kinds[np.unique(chosen)].sum())


def heads_for_speedup(layers: Sequence[HeadTable], speedup: float, groups: int) -> list[np.ndarray]:
    """For each layer the candidate of every head (H,): the least summed error at a summed cost of layers / ``speedup``.

    The best up to what one head of one layer weighs, where calls cost something one group of one layer (a Lagrange
    multiplier, then whatever fits). Raises ValueError where the cheapest choice is too slow.
    """
    errors, costs = [t.as_errors for t in layers], [t.as_costs for t in layers]
    least, budget = _total(costs, _least_limited(errors, costs, groups)), len(layers) / speedup
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
    return _least([table.as_costs], [table.as_errors], math.nextafter(threshold**2, 0), groups)[0]


def _least(wanted: list[_Sum], limited: list[_Sum], budget: float, groups: int) -> list[np.ndarray]:
    """For each layer the candidate of every head with the least summed ``wanted`` at a summed ``limited`` of at most
    ``budget``."""
    low, high = -12.0, 12.0
    best = _least_limited(wanted, limited, groups)
    for _ in range(_HALVINGS):
        price = (low + high) / 2
        found = [_cheapest(w, u, 10.0**price, groups) for w, u in zip(wanted, limited, strict=True)]
        if _total(limited, found) <= budget:
            best, high = found, price
        else:
            low = price
    _spend_the_rest(wanted, limited, best, budget)
    return best


def _least_limited(wanted: list[_Sum], limited: list[_Sum], groups: int) -> list[np.ndarray]:
    """The same where only the limit counts; what may not be used, by an infinite ``wanted``, stays out."""
    free = [_Sum(np.where(np.isfinite(w.each), 0.0, math.inf), np.zeros_like(w.kinds)) for w in wanted]
    return [_cheapest(w, u, 1.0, groups) for w, u in zip(free, limited, strict=True)]


def _cheapest(wanted: _Sum, limited: _Sum, price: float, groups: int) -> np.ndarray:
    """The candidate of every head (H,) with the least ``wanted`` + ``price`` x ``limited``, of at most ``groups`` kinds,
    and of the fewest where that is all the same."""
    value = wanted.each + price * limited.each
    kinds = wanted.kinds + price * limited.kinds
    # A kind that costs nothing is never better left out.
    sizes = range(1, groups + 1) if kinds.any() else (groups,)
    best, chosen = math.inf, np.zeros(0, dtype=int)
    for sets in (_sets(len(value), size) for size in sizes):
        each = value[sets]  # (sets, size, H)
        totals = each.min(1).sum(1) + kinds[sets].sum(1)
        first = int(np.argmin(totals))
        if not len(chosen) or totals[first] < best:
            best, chosen = totals[first], sets[first][each[first].argmin(0)]
    return chosen


@lru_cache(maxsize=64)
def _sets(candidates: int, groups: int) -> np.ndarray:
    """All choices (sets, groups) of as many candidates, full attention among them like any other."""
    return np.array(list(itertools.combinations(range(candidates), min(groups, candidates))))


def _total(values: list[_Sum], chosen: list[np.ndarray]) -> float:
    return float(sum(v.of(c) for v, c in zip(values, chosen, strict=True)))


def _spend_the_rest(wanted: list[_Sum], limited: list[_Sum], chosen: list[np.ndarray], budget: float) -> None:
    """Moves single heads to other candidates of their layer while the budget lasts, the best bargains first, in
    place."""
    moves = []
    for layer, (w, u, now) in enumerate(zip(wanted, limited, chosen, strict=True)):
        for head, candidate in itertools.product(range(len(now)), sorted(set(now.tolist()))):
            gain = w.each[now[head], head] - w.each[candidate, head]
            more = u.each[candidate, head] - u.each[now[head], head]
            if gain > 0 and more > 0:
                moves.append((-gain / more, layer, head, candidate, more))
    left, moved = budget - _total(limited, chosen), set()
    for _, layer, head, candidate, more in sorted(moves):
        if more <= left and (layer, head) not in moved:
            chosen[layer][head] = candidate
            left -= more
            moved.add((layer, head))
