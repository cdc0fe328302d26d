"""How much any choice of tiles could still win: the error where each head and query frame keeps its own best ones.

No plan can know them before the run, and finding them costs dense attention; it is a bound for those that try.
Shapes: B batch, H heads, N tokens of which T frames of s are video, D head_dim.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from ..attention import TokenLayout
from ..search.errors import relative_error

MAX_TOKENS = 4096  # scores are whole matrices of N x N


@dataclass
class OracleRecord:
    """Relative errors of the best tiles by (layer, density), one for each call."""

    densities: tuple[float, ...]
    errors: dict[tuple[int, float], list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, layer: int, q: Tensor, k: Tensor, v: Tensor, exact: Tensor, layout: TokenLayout) -> None:
        """Measures one call: ``exact`` is its dense result."""
        for density in self.densities:
            self.errors[layer, density].append(relative_error(best_tiles(q, k, v, layout, density), exact))

    def squared(self, density: float) -> float:
        """The squared error, a mean over calls and layers."""
        found = [[e**2 for e in values] for (_, d), values in self.errors.items() if d == density]
        return sum(sum(values) / len(values) for values in found) / len(found)


def best_tiles(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, density: float) -> Tensor:
    """Attention (B, H, N, D) over the share ``density`` of each batch entry's tiles that hold the most of its mass, of
    all heads and query frames together. Text and other tokens see all and are seen by all.

    Raises ValueError beyond 4096 tokens.
    """
    if layout.tokens > MAX_TOKENS:
        raise ValueError(f"There are {layout.tokens} tokens, expected at most {MAX_TOKENS}: choose a smaller clip.")
    frames, size = layout.grid.t, layout.grid.tokens_per_frame
    scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
    video = slice(layout.prefix, layout.prefix + layout.grid.tokens)
    mass = reduce(
        scores.softmax(-1)[:, :, video, video], "b h (t i) (u j) -> b h t u", "sum", t=frames, u=frames, i=size
    )
    ordered = rearrange(mass, "b h t u -> b (h t u)").sort(-1, descending=True).values
    least = ordered[:, max(round(density * ordered.shape[1]) - 1, 0)]
    kept = (mass >= least[:, None, None, None]) | (mass == mass.amax(-1, keepdim=True))
    visible = torch.ones_like(scores, dtype=torch.bool)
    visible[:, :, video, video] = repeat(kept, "b h t u -> b h (t i) (u j)", i=size, j=size)
    return (scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v.float()).to(q.dtype)
