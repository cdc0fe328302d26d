"""Mean frames: the keys and values of the frames that a frame does not see, averaged over time at each place.

A query sees a mean of n frames as one key that counts n times: log n is added to its score, which as much is added to the
log-sum-exp of all the means of one length. The frames outside a stretch of time see the same mean of it. One within has a
mean of its own, since it leaves out itself and its neighbours; those of several frames are one product of the stretch with a
small matrix over frames.

Shapes: H heads, N tokens, D head_dim, T frames of s tokens, f means of a call.
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
from ..layout import TokenLayout, frames_of, runs_of_at_most

# A plain dict: torch.compile reads it while it traces, and would trace through a cache of functools.
_TABLES: dict[tuple[TilePattern, int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
_MOST_KEPT = 256


@dataclass(frozen=True)
class Means:
    """The ``place``-th mean of each of ``count`` frames from ``first`` on, under ``pattern``.

    ``rows``: the neighbouring frames (first, last exclusive) of each call that sees them: one run, a mean for each frame of it;
    or, of one mean, runs of any length.
    """

    pattern: TilePattern
    layout: TokenLayout
    place: int
    first: int
    count: int
    rows: tuple[tuple[int, int], ...]

    def of(self, x: Tensor) -> Tensor:
        """The means of keys (or values) x (H, N, D): (f, H, s, D)."""
        return _by_frame(self._weights(x), self._stretch_of(x), self.layout.grid.tokens_per_frame)

    def add_gradient(self, total: Tensor, gradient: Tensor) -> None:
        """Adds what ``gradient``, that of ``of``'s result, contributes to ``total``, that of x."""
        stretch, size = self._stretch_of(total), self.layout.grid.tokens_per_frame
        frames = rearrange(gradient, "f h s d -> h (f s) d")
        spread = _by_frame(self._weights(total).T, frames, size)
        stretch += rearrange(spread, "t h s d -> h (t s) d")

    def seeing(self, x: Tensor, run: tuple[int, int]) -> Tensor:
        """The rows of x (H, N, D) of a ``run`` of ``rows``, as a view: (f, H, s, D), or (1, H, n, D) where all see one mean."""
        if self.count > 1:
            return frames_of(x, self.layout, *run)
        return x[None, :, slice(*self.layout.span(*run))]

    def logs(self, lse: Tensor) -> Tensor:
        """The logarithm of how many frames each mean stands for: (f, 1, 1), in the dtype of ``lse``."""
        counts = _tables(self.pattern, self.layout.grid.t, lse.device, lse.dtype)[1]
        return counts[self.place, self.first : self.first + self.count, None, None]

    @property
    def stretch(self) -> tuple[int, int]:
        """The frames (first, last exclusive) that the means are of, and no others."""
        seen = self.pattern.mean_frames(self.layout.grid.t)
        means = [seen[frame][self.place] for frame in range(self.first, self.first + self.count)]
        return min(mean[0] for mean in means), max(mean[-1] for mean in means) + 1

    def _stretch_of(self, x: Tensor) -> Tensor:
        return x[:, slice(*self.layout.span(*self.stretch))]

    def _weights(self, like: Tensor) -> Tensor:
        """(f, frames of the stretch): the share of each in the mean."""
        weights = _tables(self.pattern, self.layout.grid.t, like.device, like.dtype)[0]
        return weights[self.place, self.first : self.first + self.count, slice(*self.stretch)]


def means_of(pattern: TilePattern, layout: TokenLayout, most: int, most_rows: int) -> Iterator[Means]:
    """All means of a call: those that several frames share, each seen by at most ``most_rows`` frames at once, then those
    that frames have of their own, at most ``most`` of them together."""
    seeing: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for frame, means in pattern.mean_frames(layout.grid.t).items():
        for place, mean in enumerate(means):
            seeing.setdefault(mean, []).append((place, frame))
    own: dict[int, list[int]] = {}
    for (place, first), *others in seeing.values():
        if not others:
            own.setdefault(place, []).append(first)
            continue
        rows = runs_of_at_most([first, *(frame for _, frame in others)], most_rows)
        yield Means(pattern, layout, place, first, 1, tuple(rows))
    for place, frames in own.items():
        for first, last in runs_of_at_most(sorted(frames), most):
            yield Means(pattern, layout, place, first, last - first, ((first, last),))


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
