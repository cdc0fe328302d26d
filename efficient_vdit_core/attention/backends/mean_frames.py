"""Mean frames: the keys and values of the frames that a frame does not see, averaged over time at each place.

A query sees a mean of n frames as one key that counts n times: log n is added to its score, which as much is added to the
log-sum-exp of all the means of one length. Each frame has means of its own, since it leaves out itself and its neighbours;
they are one product with a small matrix over frames.

Shapes: H heads, N tokens, D head_dim, T frames of s tokens, f frames of a call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ...tiles import TilePattern
from ..layout import TokenLayout, runs

# A plain dict: torch.compile reads it while it traces, and would trace through a cache of functools.
_TABLES: dict[tuple[TilePattern, int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
_MOST_KEPT = 256


@dataclass(frozen=True)
class Means:
    """The ``place``-th mean of ``count`` frames from ``first`` on, under ``pattern``."""

    pattern: TilePattern
    layout: TokenLayout
    place: int
    first: int
    count: int

    def of(self, x: Tensor) -> Tensor:
        """The mean of keys (or values) x (H, N, D) for each frame: (f, H, s, D)."""
        return _by_frame(self._weights(x), _video(x, self.layout), self.layout.grid.tokens_per_frame)

    def add_gradient(self, total: Tensor, gradient: Tensor) -> None:
        """Adds what ``gradient``, that of ``of``'s result, contributes to ``total``, that of x."""
        video, size = _video(total, self.layout), self.layout.grid.tokens_per_frame
        frames = rearrange(gradient, "f h s d -> h (f s) d")
        spread = _by_frame(self._weights(total).T, frames, size)
        video += rearrange(spread, "t h s d -> h (t s) d")

    def logs(self, lse: Tensor) -> Tensor:
        """The logarithm of how many frames each mean stands for: (f, 1, 1), in the dtype of ``lse``."""
        counts = _tables(self.pattern, self.layout.grid.t, lse.device, lse.dtype)[1]
        return counts[self.place, self.first : self.first + self.count, None, None]

    def _weights(self, like: Tensor) -> Tensor:
        """(f, T): the share of each frame of the clip in the mean."""
        weights = _tables(self.pattern, self.layout.grid.t, like.device, like.dtype)[0]
        return weights[self.place, self.first : self.first + self.count]


def means_of(pattern: TilePattern, layout: TokenLayout, first: int, last: int) -> Iterator[Means]:
    """The means that frames ``first`` to ``last`` (exclusive) see: one call for each place of neighbouring frames."""
    seen = pattern.mean_frames(layout.grid.t)
    for place in range(pattern.means if seen else 0):
        for _, start, stop in runs([f for f in range(first, last) if len(seen[f]) > place]):
            yield Means(pattern, layout, place, start, stop - start)


def make_tables(pattern: TilePattern, layout: TokenLayout, device: torch.device, dtype: torch.dtype) -> None:
    """Makes what calls of this kind keep on the device, so that none of them has to."""
    if pattern.mean_frames(layout.grid.t):
        for kind in (dtype, torch.promote_types(dtype, torch.float32)):
            _tables(pattern, layout.grid.t, device, kind)


def _tables(pattern: TilePattern, frames: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """By place: each frame's weights (places, T, T), rows that sum to 1, and the logarithms of its counts (places, T)."""
    key = (pattern, frames, device, dtype)
    tables = _TABLES.get(key)
    if tables is None:
        if len(_TABLES) >= _MOST_KEPT:
            _TABLES.clear()
        tables = _TABLES[key] = _made_tables(*key)
    return tables


def _made_tables(pattern: TilePattern, frames: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weights, logs = np.zeros((pattern.means, frames, frames)), np.zeros((pattern.means, frames))
    for frame, means in pattern.mean_frames(frames).items():
        for place, mean in enumerate(means):
            weights[place, frame, list(mean)] = 1 / len(mean)
            logs[place, frame] = math.log(len(mean))
    with torch.inference_mode(False):  # a table made in inference mode could not serve a training step later
        return torch.as_tensor(weights, dtype=dtype, device=device), torch.as_tensor(logs, dtype=dtype, device=device)


def _video(x: Tensor, layout: TokenLayout) -> Tensor:
    """The tokens of the frames of x (H, N, D)."""
    return x[:, slice(*layout.span(0, layout.grid.t))]


def _by_frame(weights: Tensor, x: Tensor, size: int) -> Tensor:
    """``weights`` (g, f) over the frames of x (H, f s, D), whose channels are neighbours: (g, H, s, D). Copies nothing of x,
    whatever the order of its heads and tokens: it may be a part of the heads, or of a tensor that holds q, k and v."""
    (heads, _, dim), (to_head, to_token, _) = x.shape, x.stride()
    if to_token == dim:  # a head's tokens are neighbours
        found = weights @ rearrange(x, "h (f s) d -> h f (s d)", s=size)
        return rearrange(found, "h g (s d) -> g h s d", s=size)
    if to_head == dim and to_token == heads * dim:  # a token's heads, and tokens
        found = weights @ rearrange(x, "h (f s) d -> f (s h d)", s=size)
        return rearrange(found, "g (s h d) -> g h s d", s=size, h=heads)
    if to_head == dim or heads == 1:  # a token's heads, and tokens stand apart
        found = weights @ rearrange(x, "h (f s) d -> s f (h d)", s=size)
        return rearrange(found, "s g (h d) -> g h s d", h=heads)
    out = x.new_empty(len(weights), heads, size, dim)
    for head in range(heads):
        out[:, head : head + 1] = _by_frame(weights, x[head : head + 1], size)
    return out
