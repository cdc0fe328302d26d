"""The tile mask as two kinds of dense attention calls: exact, differentiable, on any dense backend.

(a) Every frame that is not a reference frame is a batch entry of its own: its queries see its own keys, those of its
    neighbours in the window, and the shared ones (prefix, reference frames, suffix). Frames that see as many neighbours
    go together.
(b) The queries of reference frames, prefix and suffix see all keys.

Shapes: B batch, H heads, N tokens, D head_dim, f frames in a chunk, s tokens a frame, c frames that each of them sees,
itself included, g shared keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...tiles import TilePattern
from ..layout import TokenLayout, frames_of, global_spans, result_like, runs, sliding_frames
from .spans import put, take
from .workspace import default_extra_bytes

Dense = Callable[[Tensor, Tensor, Tensor], Tensor]
Chunk = list[tuple[int, ...]]  # for each of its frames, those that it sees beside the shared ones; all see as many


def attend_frames(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    pattern: TilePattern,
    dense: Dense,
    max_extra_bytes: int | None = None,
) -> Tensor:
    """Attention of q over k, v (B, H, N, D) under ``pattern``.

    Memory beyond the output and what ``dense`` takes inside is at most ``max_extra_bytes`` (None:
    ``default_extra_bytes``), or what one frame of one head takes where that is more: as many heads at once as fit,
    and as many frames. For n heads these are, in elements, the larger of two. (b): the shared queries and their result,
    2 B n g D. (a): a chunk's keys, values, queries and result, n f (2 c s + 2 s + 2 g) D. Shared tokens that are
    neighbours are views, and so are the keys of frames one behind another where nothing is shared.
    Where gradients are wanted, autograd keeps every chunk's copies.
    """
    neighbours = pattern.neighbours(layout.grid.t)
    spans = global_spans(layout, pattern.reference_frames(layout.grid.t))
    shared = sum(stop - start for start, stop in spans)
    widest = max(map(len, neighbours.values()))
    frame_tokens = 2 * (widest + 1) * layout.grid.tokens_per_frame + 2 * shared
    chunk_bytes = frame_tokens * q.shape[3] * q.element_size()  # of a frame and head
    head_bytes = max(chunk_bytes, 2 * q.shape[0] * shared * q.shape[3] * q.element_size())
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    limit = max_extra_bytes
    if limit is None:
        limit = default_extra_bytes(q, head_bytes * q.shape[1], gradients=gradients)
    heads = min(q.shape[1], max(1, limit // head_bytes))
    chunks = list(_chunks(neighbours, max(1, limit // (chunk_bytes * heads))))
    out = result_like(q)
    reuse = not gradients  # the gradient of q is made of k and v
    for first in range(0, q.shape[1], heads):
        group = slice(first, first + heads)
        part = tuple(x[:, group] for x in (q, k, v))
        if spans:
            put(out[:, group], spans, dense(take(part[0], spans, 2), *part[1:]), 2)
        for b in range(q.shape[0]):
            queries, keys, values = (x[b] for x in part)
            _attend_own_frames(out[b, group], queries, keys, values, layout, spans, chunks, dense, reuse)
    return out


def _attend_own_frames(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    spans: list[tuple[int, int]],
    chunks: list[tuple[list[int], Chunk]],
    dense: Dense,
    reuse: bool,
) -> None:
    """(a), of one batch entry (H, N, D), into ``out``."""
    keys, values = (_NearAndShared(x, spans, layout, reuse) for x in (k, v))
    for frames, seen in chunks:
        # No name for the result: it would hold one chunk's memory while the next is computed.
        _put(out, layout, frames, dense(_take(q, layout, frames), keys.of(seen), values.of(seen)))


class _NearAndShared:
    """For each frame of a chunk the keys (or values) of the frames that it sees, followed by the shared ones:
    (f, H, c s + g, D).

    With ``reuse`` the chunks of one c share one buffer, and the shared keys are written into it once. These follow one
    another, the largest first.
    """

    def __init__(self, x: Tensor, spans: list[tuple[int, int]], layout: TokenLayout, reuse: bool) -> None:
        self.x, self.spans, self.layout, self.reuse = x, spans, layout, reuse
        self.width, self.buffer = 0, x[:0]

    def of(self, seen: Chunk) -> Tensor:
        first, width, size = seen[0][0], len(seen[0]), self.layout.grid.tokens_per_frame
        if not self.spans and seen == [tuple(range(f, f + width)) for f in range(first, first + len(seen))]:
            return sliding_frames(self.x, self.layout, first, len(seen), width)
        buffer = self._buffer(width, len(seen))
        for place in range(width):
            part = buffer[:, :, place * size : (place + 1) * size]
            for at, start, stop in runs([frames[place] for frames in seen]):
                part[at : at + stop - start] = frames_of(self.x, self.layout, start, stop)
        return buffer

    def _buffer(self, width: int, count: int) -> Tensor:
        """(f, H, c s + g, D) with the shared keys in their place."""
        if not self.reuse:
            return self._allocate(width, count)
        if width != self.width:
            self.buffer = self.x[:0]  # let go of before the next one is made
            self.width, self.buffer = width, self._allocate(width, count)
        return self.buffer[:count]

    def _allocate(self, width: int, count: int) -> Tensor:
        at, heads = width * self.layout.grid.tokens_per_frame, self.x.shape[0]
        shared = sum(stop - start for start, stop in self.spans)
        buffer = self.x.new_empty(count, heads, at + shared, self.x.shape[2])
        for start, stop in self.spans:
            buffer[:, :, at : at + stop - start] = self.x[:, start:stop]
            at += stop - start
        return buffer


def _take(x: Tensor, layout: TokenLayout, frames: list[int]) -> Tensor:
    """The frames (f, H, s, D) of x (H, N, D); a view where they stand one behind another."""
    parts = [frames_of(x, layout, first, last) for _, first, last in runs(frames)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _put(out: Tensor, layout: TokenLayout, frames: list[int], done: Tensor) -> None:
    for at, first, last in runs(frames):
        frames_of(out, layout, first, last).copy_(done[at : at + last - first])


def _chunks(neighbours: dict[int, tuple[int, ...]], most: int) -> Iterator[tuple[list[int], Chunk]]:
    """At most ``most`` frames at a time that see equally many, with what they see."""
    for width in sorted({len(seen) for seen in neighbours.values()}):
        frames = [frame for frame, seen in neighbours.items() if len(seen) == width]
        for first in range(0, len(frames), most):
            chunk = frames[first : first + most]
            yield chunk, [neighbours[frame] for frame in chunk]
