"""What a plan leaves out, put back as means over time: an idea that is measured here and that no backend computes yet.

Of each few neighbouring frames, those that a frame does not see are averaged, keys and values, at each place of the frame.
A query sees the mean as one key that stands for n, with log n added to its score. As many means as there are such groups
cost as much as so many frames.

Shapes: q, k, v (B, H, N, D).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import TokenLayout
from ..attention.frames import attend_frames
from ..attention.layout import global_spans
from ..attention.spans import take
from ..tiles import TilePattern


def attend_with_means(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, pattern: TilePattern, group: int) -> Tensor:
    """Attention under ``pattern`` with a mean for each ``group`` frames, by definition: (B, H, N, D), and slow."""
    out = attend_frames(q, k, v, layout, pattern, F.scaled_dot_product_attention)
    size = layout.grid.tokens_per_frame
    for frame, seen, left in _views(layout.grid.t, pattern):
        means = [part for part in _split(left, group) if part]
        spans = global_spans(layout, tuple(seen))
        keys, values = (
            torch.cat([take(x, spans, 2), *(_mean(x, layout, part) for part in means)], dim=2) for x in (k, v)
        )
        plain = torch.zeros(sum(stop - start for start, stop in spans))
        bias = torch.cat([plain, *(torch.full((size,), math.log(len(part))) for part in means)]).to(q)
        start, stop = _span(layout, frame)
        rows = q[:, :, start:stop]
        out[:, :, start:stop] = F.scaled_dot_product_attention(rows, keys, values, attn_mask=bias.expand(size, -1))
    return out


def density_with_means(frames: int, pattern: TilePattern, group: int) -> float:
    """The share of the frame x frame tiles that it costs, a mean as one tile."""
    means = sum(sum(map(bool, _split(left, group))) for _, _, left in _views(frames, pattern))
    return pattern.density(frames) + means / frames**2


def _views(frames: int, pattern: TilePattern) -> list[tuple[int, list[int], list[int]]]:
    """Each frame that is no reference frame, the frames that it sees and those that it does not."""
    references = pattern.reference_frames(frames)
    found = []
    for frame, near in pattern.neighbours(frames).items():
        seen = sorted({*references, *near})
        found.append((frame, seen, [f for f in range(frames) if f not in seen]))
    return found


def _split(left: list[int], group: int) -> list[list[int]]:
    last = max(left, default=-1)
    return [[f for f in left if first <= f < first + group] for first in range(0, last + 1, group)]


def _span(layout: TokenLayout, frame: int) -> tuple[int, int]:
    size = layout.grid.tokens_per_frame
    return layout.prefix + frame * size, layout.prefix + (frame + 1) * size


def _mean(x: Tensor, layout: TokenLayout, frames: list[int]) -> Tensor:
    return torch.stack([x[:, :, slice(*_span(layout, f))] for f in frames]).mean(0)
