"""The plan of a finished probing run, with all that it rests on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..attention import TokenLayout
from ..plan import TilePlan
from ..plan.head_patterns import LayerPattern, by_head
from ..tiles import TilePattern
from .by_head import HeadTable, heads_for_speedup, heads_under_threshold
from .record import ATTENTION, BLOCK, OUTPUT, ProbeRecord
from .select import check_threshold, choose_for_speedup, choose_under_threshold
from .settings import SearchSettings

FULL = TilePattern(None)
_ERRORS = {
    ATTENTION: "relative L2 of the attention output against dense, mean over calls",
    BLOCK: "relative L2 of the block output against dense, mean over calls",
    OUTPUT: "relative L2 of the model's output against dense, that layer alone under the pattern, mean over forwards",
}
Costs = list[dict[TilePattern, float]]  # or errors, of each layer


def plan_from_record(
    record: ProbeRecord,
    settings: SearchSettings,
    *,
    layers: int,
    family: str,
    heads: int | None = None,
    about: dict[str, Any] | None = None,
) -> TilePlan:
    """The plan that ``settings`` ask for, from a finished probing run of a model of so many ``layers`` and ``heads``.

    A layer without a measurement, or with one that is not finite, stays full and is named in the provenance, which also
    holds all errors, the predicted FLOP density and speed-up, and what ``about`` adds (sigmas, seed, ...). Raises ValueError
    where nothing was seen, the model's own results are not finite in any layer, or the target is out of reach.
    """
    layout = _layout(record)
    figures = _figures(record, layout, layers, settings)
    _check_finite(record, figures)
    own_errors = {}
    if settings.by_head:
        heads = every = int(heads or next(iter(record.heads.values())).mean.shape[0])
        patterns = _by_head(record, figures, every, settings)
        own_errors = {"plan_errors": [_jsonable(e) for e in layer_errors(record, patterns, every, settings.error)]}
    else:
        patterns = _by_layer(figures, settings)
    provenance = {
        **_aim(settings),
        "candidates": [p.short_name if p.window or p.means else p.k for p in record.candidates],
        "grid": [layout.grid.t, layout.grid.h, layout.grid.w],
        "extra_tokens": layout.prefix + layout.suffix,
        **(about or {}),
        **_predictions(patterns, figures),
        **own_errors,
        **_told(figures),
        **({"left_out_forwards": {str(t): count for t, count in record.left_out.items()}} if record.left_out else {}),
    }
    return TilePlan(patterns=tuple(patterns), family=family, frames=layout.grid.t, heads=heads, provenance=provenance)


def _aim(settings: SearchSettings) -> dict[str, Any]:
    """What was asked for, for the provenance."""
    speedup, groups = settings.speedup, settings.head_groups
    return {
        "method": "searched: least error at a target speed-up" if speedup else "searched: sparsest under a threshold",
        **({"target_speedup": speedup} if speedup else {"threshold": settings.threshold}),
        **({"head_groups": groups} if settings.by_head else {}),
        "error": _ERRORS[settings.error],
        "costs": settings.costs,
    }


@dataclass(frozen=True)
class _Figures:
    """What the run found of each pattern, by layer.

    Attributes:
        found: errors as measured: nan where nothing was, inf where something was not finite.
        prices: of all heads under one pattern, as a share of dense attention.
        calls: what a call costs whatever the number of its heads, as the same share; zeros where that is not known.
        flops: of each candidate, as a share of dense attention's.
        measured, by_head: whether prices and calls are times, and whether heads may differ.
    """

    found: Costs
    prices: Costs
    calls: Costs
    flops: dict[TilePattern, float]
    measured: bool
    by_head: bool

    @property
    def errors(self) -> Costs:
        """As found; all inf in a layer that was not measured well, so that it stays full."""
        return [e if all(map(math.isfinite, e.values())) else dict.fromkeys(e, math.inf) for e in self.found]


def _figures(record: ProbeRecord, layout: TokenLayout, layers: int, settings: SearchSettings) -> _Figures:
    flops = {p: p.flop_density(layout.grid, layout.prefix + layout.suffix) for p in record.candidates}
    found = [{p: record.error(i, p, settings.error) for p in record.candidates} for i in range(layers)]
    measured, by_head = settings.measured, settings.by_head
    prices = [
        {p: record.cost(i, p) if measured and (i, p) in record.seconds else flops[p] for p in flops}
        for i in range(layers)
    ]
    calls: Costs = [dict.fromkeys([*flops, FULL], 0.0) for _ in range(layers)]
    if measured and by_head:
        calls = [{p: record.call_cost(i, None if p == FULL else p) for p in layer} for i, layer in enumerate(calls)]
    return _Figures(found, prices, calls, flops, measured, by_head)


def _told(figures: _Figures) -> dict[str, Any]:
    """The figures for the provenance."""
    found, flops = figures.found, figures.flops
    told: dict[str, Any] = {
        "errors": {p.short_name: [_jsonable(layer[p]) for layer in found] for p in flops},
        "not_finite_layers": [i for i, layer in enumerate(found) if any(map(math.isinf, layer.values()))],
        "not_measured_layers": [i for i, layer in enumerate(found) if all(map(math.isnan, layer.values()))],
    }
    if figures.measured:
        told["measured_costs"] = {p.short_name: [round(price[p], 4) for price in figures.prices] for p in flops}
    if figures.measured and figures.by_head:
        options = [*flops, FULL]
        told["measured_call_costs"] = {p.short_name: [round(call[p], 4) for call in figures.calls] for p in options}
    return told


def _layout(record: ProbeRecord) -> TokenLayout:
    """Where the video stood in the run. Raises ValueError where no attention over one was seen."""
    if record.layout is not None:
        return record.layout
    why = ", ".join(f"{count} {reason}" for reason, count in record.dense.most_common()) or "no attention call was seen"
    raise ValueError(
        f"No self-attention over a video was found ({why}). The search needs a model whose tokens are known, and several frames."
    )


def _check_finite(record: ProbeRecord, figures: _Figures) -> None:
    """Raises ValueError where no layer was measured well because dense attention is no better: no candidate is to blame."""
    well_measured = any(map(math.isfinite, (error for layer in figures.errors for error in layer.values())))
    if record.dense_not_finite and not well_measured:
        raise ValueError(
            "In every layer something is NaN or infinite, with full attention too: the model itself gives no numbers here, so "
            "nothing can be measured. Look at what the model is given (a start image or latent that is NaN) and at its precision "
            "(float16 weights, a quantised attention such as SageAttention)."
        )


def _by_layer(figures: _Figures, settings: SearchSettings) -> list[LayerPattern]:
    errors, prices = figures.errors, figures.prices
    if settings.speedup:
        found = choose_for_speedup(errors, prices, settings.speedup)
    else:
        found = choose_under_threshold(errors, prices, settings.threshold)
    return [pattern or FULL for pattern in found]


def _by_head(record: ProbeRecord, figures: _Figures, heads: int, settings: SearchSettings) -> list[LayerPattern]:
    tables = [_table(record, layer, figures, heads, settings.error) for layer in range(len(figures.found))]
    if settings.speedup:
        chosen = heads_for_speedup(tables, settings.speedup, settings.head_groups)
    else:
        check_threshold(settings.threshold)
        chosen = [heads_under_threshold(table, settings.threshold, settings.head_groups) for table in tables]
    options = [*record.candidates, FULL]
    return [by_head(options[candidate] for candidate in of_heads) for of_heads in chosen]


def _table(record: ProbeRecord, layer: int, figures: _Figures, heads: int, measure: str) -> HeadTable:
    """A layer that was not measured well has no candidate that may be used, as in the search by layer; nor is one worth an
    error that is as dear as dense attention, by the clock."""
    errors, prices, calls = (of_layers[layer] for of_layers in (figures.errors, figures.prices, figures.calls))
    usable = [
        record.of_heads(layer, p, measure) if prices[p] < 1.0 and math.isfinite(errors[p]) else np.full(heads, math.inf)
        for p in record.candidates
    ]
    costs = np.array([*(min(prices[p], 1.0) for p in record.candidates), 1.0])
    of_calls = np.array([calls[p] for p in [*record.candidates, FULL]])
    return HeadTable(np.stack([*usable, np.zeros(heads)]), costs, np.minimum(of_calls, costs))


def layer_errors(
    record: ProbeRecord, patterns: Sequence[LayerPattern], heads: int, measure: str = ATTENTION
) -> list[float]:
    """Each layer's relative error under its heads' patterns, as measured in the run of ``record``."""
    found = []
    for layer, pattern in enumerate(patterns):
        sparse = {p: members for p, members in pattern.head_groups(heads).items() if p.k is not None}
        parts = (float(record.of_heads(layer, p, measure)[list(members)].sum()) for p, members in sparse.items())
        found.append(math.sqrt(sum(parts)))
    return found


def _predictions(patterns: list[LayerPattern], figures: _Figures) -> dict[str, float]:
    density = [pattern.mean({**figures.flops, FULL: 1.0}) for pattern in patterns]
    # A call's cost is within what all heads cost, and each group has it once.
    spent = [
        pattern.mean({**price, FULL: 1.0}) + sum(call[p] for p in pattern.kinds) - pattern.mean(call)
        for pattern, price, call in zip(patterns, figures.prices, figures.calls, strict=True)
    ]
    return {
        "attention_flop_density": round(sum(density) / len(density), 6),
        "attention_speedup": round(len(spent) / sum(spent), 4),
    }


def _jsonable(error: float) -> float | None:
    return float(f"{error:.6g}") if math.isfinite(error) else None
