"""The arrow mask beside ComfyUI's own sparse attention at equal density: the error of each layer on live q, k, v.

The peer is comfy-kitchen's ``sol_attn`` in its eager form, which defines the algorithm in full precision and runs on a
CPU. It routes blocks of 64 keys for each block of 64 queries and head, by a threshold (sol-attn) or as the best share
(sla), and puts one pooled term in the place of every block that it leaves out. Density is the share of blocks that it
computes exactly; the pooled terms come on top. The arrow mask stands there as it is, with mean frames for what it leaves
out, which count as frames, and as the plan that a search by head finds on other prompts and noise.

Shapes: q, k, v (B, H, N, D).
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..attention import TokenLayout, simplest_backend, tile_attention
from ..plan import TilePlan
from ..plan.head_patterns import LayerPattern
from ..plan.tile_plan import ANY_FAMILY
from ..search.errors import relative_error
from ..search.plan_from_record import plan_from_record
from ..search.record import ProbeRecord
from ..search.settings import SearchSettings
from ..tiles import TilePattern

BLOCK = 64
SOL, SLA, ARROW = "sol-attn", "sla", "arrow"
MEANS = (1, 2, 3)  # mean frames, beside the arrow mask
SEARCHED = "plan by head"
CANDIDATES = "0,1,2,0~1,1~1,2~1,0~2,1~2,0+1,0+3,0~1+1,0~1+3,1~1+1,1~1+3,0~2+3,1~2+3"  # of its search
GROUPS = 3
# Coarse enough not to end on the very score of a block, where rounding would decide.
_BISECTIONS = 12
_LEAST_VARIANCE = 1e-6


def peer() -> Callable[..., Tensor]:
    """comfy-kitchen's eager ``sol_attn``. Raises ValueError where the package is missing or too old."""
    try:
        from comfy_kitchen.backends.eager.sol_attn import sol_attn
    except ImportError as error:
        raise ValueError(
            f"comfy-kitchen's sol_attn cannot be imported ({error}). Install comfy-kitchen 0.2.40 or newer beside this pack."
        ) from error
    return sol_attn


@dataclass
class PeerRecord:
    """Errors by (layer, reference frames, method), one for each call, and the densities that they stand at."""

    references: tuple[int, ...]
    attend: Callable[..., Tensor]
    plans: Mapping[int, TilePlan] = field(default_factory=dict)  # of the same cost as so many reference frames
    layout: TokenLayout | None = None
    errors: dict[tuple[int, int, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    densities: dict[tuple[int, str], list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, layer: int, q: Tensor, k: Tensor, v: Tensor, exact: Tensor, layout: TokenLayout) -> None:
        """Measures one call: ``exact`` is its dense result."""
        self.layout = layout
        for count in self.references:
            pattern = TilePattern(count)
            density = pattern.flop_density(layout.grid, layout.prefix + layout.suffix)
            for means in (0, *MEANS):
                ours = TilePattern(count, means=means)
                found = tile_attention(q, k, v, layout, ours, backend=simplest_backend(ours))
                share = ours.flop_density(layout.grid, layout.prefix + layout.suffix)
                method = f"{ARROW}, {means} mean frames" if means else ARROW
                self._note(layer, count, method, share, relative_error(found, exact))
            if count in self.plans:
                plan = self.plans[count]
                found = tile_attention(q, k, v, layout, plan.pattern(layer), backend=_exactly(plan.pattern(layer)))
                self._note(layer, count, SEARCHED, plan.density(layout.grid.t), relative_error(found, exact))
            for method in (SOL, SLA):
                setting = _setting(q, k, method, density)
                routed = _routed(self.attend, q, k, v, method, setting)
                self._note(layer, count, method, routed_share(q, k, method, setting), relative_error(routed, exact))

    def _note(self, layer: int, count: int, method: str, density: float, error: float) -> None:
        self.errors[layer, count, method].append(error)
        self.densities[count, method].append(density)

    def rows(self) -> list[dict[str, Any]]:
        """One row a pattern, layer and method: mean relative error over the calls."""
        return [
            {
                "reference_frames": count,
                "layer": layer,
                "method": method,
                "density": statistics.fmean(self.densities[count, method]),
                "error": statistics.fmean(values),
                "calls": len(values),
            }
            for (layer, count, method), values in sorted(self.errors.items())
        ]


def searched_plans(record: ProbeRecord, references: tuple[int, ...], layers: int, heads: int) -> dict[int, TilePlan]:
    """The plans by head of a finished probing run that cost as much as so many reference frames in every layer."""
    assert record.layout is not None
    grid, extra = record.layout.grid, record.layout.prefix + record.layout.suffix
    plans = {}
    for count in references:
        speedup = 1 / TilePattern(count).flop_density(grid, extra)
        settings = SearchSettings(record.candidates, speedup=speedup, head_groups=GROUPS)
        plans[count] = plan_from_record(record, settings, layers=layers, family=ANY_FAMILY, heads=heads)
    return plans


def _exactly(pattern: LayerPattern) -> dict[TilePattern, str]:
    return {alike: simplest_backend(alike) for alike in pattern.kinds}


def routed_share(q: Tensor, k: Tensor, method: str, setting: float) -> float:
    """The share of 64 x 64 blocks that the peer computes exactly, of all batch entries and heads.

    Scores of blocks are those of their means. ``sol-attn`` keeps what lies ``setting`` standard deviations above the
    mean score, ``sla`` the best ``setting`` of each row; the diagonal and its neighbours are always kept.
    """
    means_q, means_k = _block_means(q), _block_means(k)
    centred = means_k - means_k.mean(2, keepdim=True)
    scale = math.log2(math.e) / q.shape[-1] ** 0.5  # the peer's scores are powers of two
    scores = means_q @ centred.mT * scale
    count = scores.shape[-1]
    if method == SOL:
        variance = (means_q.square() * centred.square().mean(2, keepdim=True)).sum(-1, keepdim=True)
        kept = scores > setting * (variance * scale**2 + _LEAST_VARIANCE).sqrt()
    else:
        best = max(0, min(count - 1, max(1, round(setting * count))))
        kept = scores >= scores.topk(best, dim=-1).values[..., -1:] if best else torch.zeros_like(scores).bool()
    near = torch.arange(count, device=kept.device)
    return float((kept | ((near[:, None] - near).abs() <= 1)).float().mean())


def _block_means(x: Tensor) -> Tensor:
    """(B, H, ceil(N / 64), D): the mean of each block of 64 tokens, the last one's over those that it has."""
    return torch.stack([part.float().mean(2) for part in x.split(BLOCK, dim=2)], dim=2)


def _setting(q: Tensor, k: Tensor, method: str, density: float) -> float:
    """The threshold or share at which the peer computes ``density`` of the blocks, or as near as it comes."""
    low, high = (-4.0, 8.0) if method == SOL else (0.0, 1.0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        too_many = routed_share(q, k, method, middle) > density
        # A higher threshold keeps fewer blocks, a higher share more.
        low, high = (middle, high) if too_many == (method == SOL) else (low, middle)
    return high if method == SOL else low


def _routed(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, method: str, setting: float) -> Tensor:
    """The peer's result (B, H, N, D), a head at a time: its scores are whole matrices of N x N."""
    settings = {"tau": setting} if method == SOL else {"topk_ratio": max(setting, 1e-9)}
    heads = [
        attend(*(x[:, head : head + 1].transpose(1, 2) for x in (q, k, v)), **settings) for head in range(q.shape[1])
    ]
    return torch.cat(heads, dim=2).transpose(1, 2)
