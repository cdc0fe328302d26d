"""The plan of a finished probing run, with all that it rests on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..head_patterns import LayerPattern, by_head
from ..plan import TilePlan
from ..tiles import TilePattern
from .by_head import MAX_GROUPS, HeadTable, heads_for_speedup, heads_under_threshold
from .probe import ATTENTION, ProbeRecord
from .select import FLOPS, MEASURED, choose_for_speedup, choose_under_threshold

FULL = TilePattern(None)
Costs = list[dict[TilePattern, float]]  # or errors, of each layer


def check_groups(groups: int, measure: str) -> None:
    """Raise ValueError where heads cannot be told apart as asked."""
    if type(groups) is not int or not 1 <= groups <= MAX_GROUPS:
        raise ValueError(
            f"head_groups is {groups!r}, expected 1 to {MAX_GROUPS}; 1 gives all heads of a layer one pattern."
        )
    if groups > 1 and measure != ATTENTION:
        raise ValueError(
            f"head_groups is {groups} and the error is that of the {measure}, which no head has of its own. "
            "Measure the attention, or set head_groups to 1."
        )


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
    groups: int = 1,
    about: dict[str, Any] | None = None,
) -> TilePlan:
    """The plan of a finished probing run, by ``threshold`` or, where it is not 0, by target ``speedup`` of the
    attention.

    ``measure``: attention or block errors; ``costs``: by FLOPs or as measured; ``groups``: at most as many different
    patterns in a layer, over its heads (1: the paper's search by layer). A layer without a measurement, or with one that
    is not finite, stays full and is named in the provenance, which also holds all errors, the predicted FLOP density and
    speed-up, and what ``about`` adds (sigmas, seed, ...).
    """
    check_groups(groups, measure)
    if record.layout is None:
        why = (
            ", ".join(f"{count} {reason}" for reason, count in record.dense.most_common())
            or "no attention call was seen"
        )
        raise ValueError(
            f"No self-attention over a video was found ({why}). The search needs a model whose tokens are known, and several frames."
        )
    grid, extra = record.layout.grid, record.layout.prefix + record.layout.suffix
    flops = {p: p.flop_density(grid, extra) for p in record.candidates}
    found = [{p: record.error(i, p, measure) for p in record.candidates} for i in range(layers)]
    errors = [e if all(map(math.isfinite, e.values())) else dict.fromkeys(e, math.inf) for e in found]
    measured = costs == MEASURED
    prices = [
        {p: record.cost(i, p) if measured and (i, p) in record.seconds else flops[p] for p in flops}
        for i in range(layers)
    ]
    patterns: list[LayerPattern]
    if groups > 1:
        patterns = _by_head(record, errors, prices, threshold, speedup, groups)
        heads = heads or next(iter(record.heads.values())).mean.shape[0]
    else:
        choices = (
            choose_for_speedup(errors, prices, speedup)
            if speedup
            else choose_under_threshold(errors, prices, threshold)
        )
        patterns = [p or FULL for p in choices]
    provenance: dict[str, Any] = {
        "method": "searched: least error at a target speed-up" if speedup else "searched: sparsest under a threshold",
        **({"target_speedup": speedup} if speedup else {"threshold": threshold}),
        **({"head_groups": groups} if groups > 1 else {}),
        "error": f"relative L2 of the {measure} output against dense, mean over calls",
        "costs": costs,
        "candidates": [p.short_name if p.window else p.k for p in record.candidates],
        "grid": [grid.t, grid.h, grid.w],
        "extra_tokens": extra,
        **(about or {}),
        **_predictions(patterns, flops, prices),
        **({"plan_errors": _plan_errors(record, patterns)} if groups > 1 else {}),
        "errors": {p.short_name: [_jsonable(layer[p]) for layer in found] for p in record.candidates},
        "not_finite_layers": [i for i, layer in enumerate(found) if any(map(math.isinf, layer.values()))],
        "not_measured_layers": [i for i, layer in enumerate(found) if all(map(math.isnan, layer.values()))],
        **(
            {"measured_costs": {p.short_name: [round(price[p], 4) for price in prices] for p in flops}}
            if measured
            else {}
        ),
    }
    return TilePlan(patterns=tuple(patterns), family=family, frames=grid.t, heads=heads, provenance=provenance)


def _by_head(
    record: ProbeRecord, errors: Costs, prices: Costs, threshold: float, speedup: float, groups: int
) -> list[LayerPattern]:
    """A layer that was not measured well stays full, as in the search by layer."""
    known = [i for i, layer in enumerate(errors) if all(map(math.isfinite, layer.values()))]
    tables = [_table(record, i, prices[i]) for i in known]
    if speedup:
        # The others stay full, and what they cost is not left for these.
        budget = len(errors) / speedup - (len(errors) - len(known))
        chosen = heads_for_speedup(tables, len(tables) / budget if budget > 0 else math.inf, groups) if tables else []
    else:
        choose_under_threshold([], [], threshold)
        chosen = [heads_under_threshold(table, threshold, groups) for table in tables]
    options = [*record.candidates, FULL]
    patterns: list[LayerPattern] = [FULL] * len(errors)
    for layer, heads in zip(known, chosen, strict=True):
        patterns[layer] = by_head(options[candidate] for candidate in heads)
    return patterns


def _table(record: ProbeRecord, layer: int, prices: dict[TilePattern, float]) -> HeadTable:
    squared = [record.heads[layer, p].mean for p in record.candidates]
    # What is as dear as dense attention, by the clock, is not worth an error.
    usable = [row if prices[p] < 1.0 else row + math.inf for p, row in zip(record.candidates, squared, strict=True)]
    costs = [min(prices[p], 1.0) for p in record.candidates]
    return HeadTable(np.stack([*usable, np.zeros_like(squared[0])]), np.array([*costs, 1.0]))


def _plan_errors(record: ProbeRecord, patterns: list[LayerPattern]) -> list[float | None]:
    """Each layer's relative error under its heads' patterns."""
    found = []
    for layer, pattern in enumerate(patterns):
        every = {pattern: None} if isinstance(pattern, TilePattern) else {p: list(h) for p, h in pattern.groups.items()}
        parts = [record.heads[layer, p].mean[h].sum() for p, h in every.items() if p.k is not None]
        found.append(_jsonable(math.sqrt(sum(map(float, parts)))))
    return found


def _predictions(patterns: list[LayerPattern], flops: dict[TilePattern, float], prices: Costs) -> dict[str, float]:
    density = [_mean(pattern, flops) for pattern in patterns]
    spent = [_mean(pattern, prices[i]) for i, pattern in enumerate(patterns)]
    return {
        "attention_flop_density": round(sum(density) / len(density), 6),
        "attention_speedup": round(len(spent) / sum(spent), 4),
    }


def _mean(pattern: LayerPattern, values: dict[TilePattern, float]) -> float:
    """Over a layer's heads; full attention counts 1."""
    if isinstance(pattern, TilePattern):
        return values.get(pattern, 1.0)
    return sum(values.get(p, 1.0) for p in pattern.patterns) / len(pattern.patterns)


def _jsonable(error: float) -> float | None:
    return float(f"{error:.6g}") if math.isfinite(error) else None
