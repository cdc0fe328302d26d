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
_GPU_MOST, _GPU_LEAST = 2**30, 64 * 2**20


def default_extra_bytes(device: torch.device) -> int:
    """The bound on key and value copies (bytes) where the caller gives none: from the cache, or from free GPU
    memory."""
    if device.type == "cpu":
        return _CPU_BYTES
    if device.type != "cuda" or torch.compiler.is_compiling():
        return _GPU_LEAST
    free, _ = torch.cuda.mem_get_info(device)
    return max(_GPU_LEAST, min(free // 8, _GPU_MOST))


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

    Memory beyond the output and what ``dense`` takes inside, in elements, is the larger of two. (b): the shared queries
    and their result, 2 B H g D. (a): the shared keys and values, 2 B H g D, one chunk's result, H f s D, and its keys
    and values, 2 H f (s + g) D: at most ``max_extra_bytes`` (None: ``default_extra_bytes``), or one frame's worth where
    that is more. Shared tokens that are neighbours are views. Where gradients are wanted, autograd keeps every chunk's
    copies.
    """
    references = pattern.reference_frames(layout.grid.t)
    others = [f for f in range(layout.grid.t) if f not in set(references)]
    spans = global_spans(layout, references)
    out = torch.empty_like(q)
    if spans:
        _scatter(out, dense(_gather(q, spans), k, v), spans)
    shared_k, shared_v = _gather(k, spans), _gather(v, spans)
    limit = default_extra_bytes(q.device) if max_extra_bytes is None else max_extra_bytes
    frame_bytes = 2 * q.shape[1] * (layout.grid.tokens_per_frame + shared_k.shape[2]) * q.shape[3] * q.element_size()
    chunks = list(_chunks(others, max(1, limit // frame_bytes)))
    reuse = not (
        torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    )  # the slope of q is made of k and v
    for b in range(q.shape[0]):
        keys = _OwnAndShared(k[b], shared_k[b], layout, chunks, reuse)
        values = _OwnAndShared(v[b], shared_v[b], layout, chunks, reuse)
        for first, last in chunks:
            # No name for the result: it would hold one chunk's memory while the next is computed.
            own = _frames(out[b], layout, first, last)
            own.copy_(dense(_frames(q[b], layout, first, last), keys.of(first, last), values.of(first, last)))
        del keys, values  # likewise
    return out


class _OwnAndShared:
    """For each frame of a chunk its own keys (or values) followed by the shared ones: (f, H, s + g, D).

    With ``reuse`` all chunks share one buffer, and the shared keys are written into it once.
    """

    def __init__(
        self, x: Tensor, shared: Tensor, layout: TokenLayout, chunks: list[tuple[int, int]], reuse: bool
    ) -> None:
        self.x, self.shared, self.layout = x, shared, layout
        self.buffer = (
            self._allocate(max([last - first for first, last in chunks])) if reuse and shared.shape[1] else None
        )

    def _allocate(self, frames: int) -> Tensor:
        own, heads = self.layout.grid.tokens_per_frame, self.x.shape[0]
        buffer = self.x.new_empty(frames, heads, own + self.shared.shape[1], self.x.shape[2])
        buffer[:, :, own:] = self.shared
        return buffer

    def of(self, first: int, last: int) -> Tensor:
        own = _frames(self.x, self.layout, first, last)
        if not self.shared.shape[1]:
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
