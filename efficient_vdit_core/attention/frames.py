"""The arrow mask as two kinds of dense attention calls: exact, differentiable, on any dense backend.

(a) Every frame that is not a reference frame is a batch entry of its own: its queries see its own keys and the
    shared ones (prefix, reference frames, suffix).
(b) The queries of reference frames, prefix and suffix see all keys.

Shapes: B batch, H heads, N tokens, D head_dim, f frames in a chunk, s tokens a frame, g shared keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from einops import rearrange
from torch import Tensor

from ..tiles import TilePattern
from .layout import TokenLayout, global_spans

Dense = Callable[[Tensor, Tensor, Tensor], Tensor]

# What fits a CPU core's share of the last-level cache: chunks beyond it wait for memory, and fresh pages cost more than
# the attention of a small frame.
_CPU_BYTES = 4 * 2**20
# Elsewhere a share of the output, which dense attention needs too. Never by the memory that is free at the moment: the
# same call must allocate the same at every step.
_SHARE_OF_OUTPUT, _LEAST_BYTES = 4, 64 * 2**20


def default_extra_bytes(q: Tensor, frame_bytes: int) -> int:
    """The bound on copies (bytes) where the caller gives none, for queries like q (B, H, N, D).

    ``frame_bytes`` is one frame's worth of all heads, which a CPU takes at once.
    """
    if q.device.type == "cpu":
        return max(_CPU_BYTES, frame_bytes)
    return max(_LEAST_BYTES, q.numel() * q.element_size() // _SHARE_OF_OUTPUT)


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
    2 B n g D. (a): a chunk's keys, values and result, n f (3 s + 2 g) D. Shared tokens that are neighbours are views.
    Where gradients are wanted, autograd keeps every chunk's copies.
    """
    references = pattern.reference_frames(layout.grid.t)
    others = [f for f in range(layout.grid.t) if f not in set(references)]
    spans = global_spans(layout, references)
    shared = sum(stop - start for start, stop in spans)
    chunk_bytes = (3 * layout.grid.tokens_per_frame + 2 * shared) * q.shape[3] * q.element_size()  # of a frame and head
    head_bytes = max(chunk_bytes, 2 * q.shape[0] * shared * q.shape[3] * q.element_size())
    limit = default_extra_bytes(q, head_bytes * q.shape[1]) if max_extra_bytes is None else max_extra_bytes
    heads = min(q.shape[1], max(1, limit // head_bytes))
    chunks = list(_chunks(others, max(1, limit // (chunk_bytes * heads))))
    # In the order of a sequence's tokens, as the model's next layer reads them.
    out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    reuse = not (
        torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    )  # the slope of q is made of k and v
    for first in range(0, q.shape[1], heads):
        group = slice(first, first + heads)
        part = tuple(x[:, group] for x in (q, k, v))
        if spans:
            _scatter(out[:, group], dense(_gather(part[0], spans), *part[1:]), spans)
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
    chunks: list[tuple[int, int]],
    dense: Dense,
    reuse: bool,
) -> None:
    """(a), of one batch entry (H, N, D), into ``out``."""
    keys, values = (_OwnAndShared(x, spans, layout, chunks, reuse) for x in (k, v))
    for first, last in chunks:
        # No name for the result: it would hold one chunk's memory while the next is computed.
        own = _frames(out, layout, first, last)
        own.copy_(dense(_frames(q, layout, first, last), keys.of(first, last), values.of(first, last)))


class _OwnAndShared:
    """For each frame of a chunk its own keys (or values) followed by the shared ones: (f, H, s + g, D).

    With ``reuse`` all chunks share one buffer, and the shared keys are written into it once.
    """

    def __init__(
        self,
        x: Tensor,
        spans: list[tuple[int, int]],
        layout: TokenLayout,
        chunks: list[tuple[int, int]],
        reuse: bool,
    ) -> None:
        self.x, self.spans, self.layout = x, spans, layout
        self.buffer = self._allocate(max([last - first for first, last in chunks])) if reuse and spans else None

    def _allocate(self, frames: int) -> Tensor:
        own, heads = self.layout.grid.tokens_per_frame, self.x.shape[0]
        shared = sum(stop - start for start, stop in self.spans)
        buffer, at = self.x.new_empty(frames, heads, own + shared, self.x.shape[2]), own
        for start, stop in self.spans:
            buffer[:, :, at : at + stop - start] = self.x[:, start:stop]
            at += stop - start
        return buffer

    def of(self, first: int, last: int) -> Tensor:
        own = _frames(self.x, self.layout, first, last)
        if not self.spans:
            return own
        buffer = self._allocate(last - first) if self.buffer is None else self.buffer[: last - first]
        buffer[:, :, : own.shape[2]] = own
        return buffer


def _frames(x: Tensor, layout: TokenLayout, first: int, last: int) -> Tensor:
    """Frames ``first`` to ``last`` (exclusive) of x (H, N, D) as a view (f, H, s, D)."""
    size = layout.grid.tokens_per_frame
    start = layout.prefix + first * size
    return rearrange(x[:, start : start + (last - first) * size], "h (f s) d -> f h s d", s=size)


def _gather(x: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    if len(spans) == 1:
        return x[:, :, spans[0][0] : spans[0][1]]
    return torch.cat([x[:, :, :0], *(x[:, :, start:stop] for start, stop in spans)], dim=2)


def _scatter(out: Tensor, rows: Tensor, spans: list[tuple[int, int]]) -> None:
    for (start, stop), part in zip(spans, rows.split([stop - start for start, stop in spans], dim=2), strict=True):
        out[:, :, start:stop] = part


def _chunks(frames: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Runs of consecutive frames, none longer than ``most``, as (first, last + 1): slices, so that views suffice."""
    start = 0
    for i in range(1, len(frames) + 1):
        if i == len(frames) or frames[i] != frames[i - 1] + 1 or i - start == most:
            yield frames[start], frames[i - 1] + 1
            start = i
