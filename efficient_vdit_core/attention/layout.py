"""Where the video tokens stand in the sequence that a layer attends over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ..tiles import TokenGrid


@dataclass(frozen=True)
class TokenLayout:
    """``prefix`` tokens, then the video grid frame by frame, then ``suffix`` tokens.

    Prefix and suffix tokens (text, extra frames) attend to everything and are attended to by everything.
    """

    grid: TokenGrid
    prefix: int = 0
    suffix: int = 0

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid.tokens + self.suffix

    def span(self, first: int, last: int) -> tuple[int, int]:
        """The tokens [start, stop) of frames ``first`` to ``last`` (exclusive)."""
        size = self.grid.tokens_per_frame
        return self.prefix + first * size, self.prefix + last * size


def global_spans(layout: TokenLayout, references: tuple[int, ...]) -> list[tuple[int, int]]:
    """Token ranges [start, stop) that attend to all and are attended by all, neighbours joined, in order.

    These are the prefix, the frames named by ``references`` (ascending) and the suffix; empty ranges are left out.
    """
    ranges = [(0, layout.prefix)]
    ranges += [layout.span(f, f + 1) for f in references]
    ranges += [(layout.tokens - layout.suffix, layout.tokens)]
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        elif stop > start:
            joined.append((start, stop))
    return joined


def frames_of(x: Tensor, layout: TokenLayout, first: int, last: int) -> Tensor:
    """Frames ``first`` to ``last`` (exclusive) of x (H, N, D) as a view (f, H, s, D), s tokens a frame."""
    start, stop = layout.span(first, last)
    return rearrange(x[:, start:stop], "h (f s) d -> f h s d", s=layout.grid.tokens_per_frame)


def sliding_frames(x: Tensor, layout: TokenLayout, first: int, count: int, width: int) -> Tensor:
    """Frames ``first`` to ``first + width`` (exclusive) of x (H, N, D), then the same one frame on, ``count`` times, as a view
    (f, H, width s, D)."""
    size, (start, stop) = layout.grid.tokens_per_frame, layout.span(first, first + count - 1 + width)
    return rearrange(x[:, start:stop].unfold(1, width * size, size), "h f d s -> f h s d")


def result_like(q: Tensor) -> Tensor:
    """An empty (B, H, N, D) in the order of a sequence's tokens, as the model's next layer reads them."""
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def runs(indices: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(place in the list, first, last + 1) of each run of consecutive ones among ascending ``indices``: slices, where a
    list of indices would have to travel to the device."""
    start = 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or indices[i] != indices[i - 1] + 1:
            yield start, indices[start], indices[i - 1] + 1
            start = i


def runs_of_at_most(indices: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """The runs of ascending ``indices`` as ranges (first, last + 1) of at most ``most`` of them."""
    for _, start, stop in runs(indices):
        for first in range(start, stop, most):
            yield first, min(first + most, stop)


def spans_of(indices: Sequence[int]) -> list[tuple[int, int]]:
    """The runs of ascending ``indices`` as ranges [first, last + 1), for ``spans.take`` and ``put``."""
    return [(first, last) for _, first, last in runs(indices)]


def check_tensors(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> None:
    """Raise ValueError, naming the argument, unless q, k, v are alike and (batch, heads, ``layout.tokens``, head_dim),
    none empty."""
    if q.ndim != 4 or q.shape[2] != layout.tokens:
        raise ValueError(
            f"q has shape {tuple(q.shape)}, expected (batch, heads, {layout.tokens}, head_dim) for {layout}. "
            "The token layout does not describe this sequence."
        )
    if not q.is_floating_point():
        raise ValueError(f"q is {q.dtype}, expected a float dtype. Convert it first.")
    if q.numel() == 0:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected no empty dimension.")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, expected {tuple(q.shape)} as q has: this is self-attention."
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, expected {q.dtype} on {q.device} as q is.")
