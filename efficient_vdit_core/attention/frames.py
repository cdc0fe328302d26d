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


def attend_frames(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, pattern: TilePattern, dense: Dense, max_extra_bytes: int) -> Tensor:
    """Attention of q over k, v (B, H, N, D) under ``pattern``.

    Extra memory is the key and value copies of one chunk of frames, 2 B H f (s + g) D elements: at most
    ``max_extra_bytes``, or one frame's worth where that is more.
    """
    references = pattern.reference_frames(layout.grid.t)
    others = [f for f in range(layout.grid.t) if f not in set(references)]
    spans = global_spans(layout, references)
    out = torch.empty_like(q)
    if spans:
        rows = dense(_gather(q, spans), k, v)
        for (start, stop), part in zip(spans, rows.split([stop - start for start, stop in spans], dim=2), strict=True):
            out[:, :, start:stop] = part
    shared_k, shared_v = _gather(k, spans), _gather(v, spans)
    frame_bytes = 2 * q.shape[0] * q.shape[1] * (layout.grid.tokens_per_frame + shared_k.shape[2]) * q.shape[3] * q.element_size()
    for first, last in _chunks(others, max(1, max_extra_bytes // frame_bytes)):
        _attend_own_and_shared(q, k, v, shared_k, shared_v, out, layout, first, last, dense)
    return out


def _attend_own_and_shared(q: Tensor, k: Tensor, v: Tensor, shared_k: Tensor, shared_v: Tensor, out: Tensor, layout: TokenLayout,
                           first: int, last: int, dense: Dense) -> None:
    """Write the rows of frames ``first`` to ``last`` (exclusive), none of which is a reference frame."""
    size, frames = layout.grid.tokens_per_frame, last - first
    start, stop = layout.prefix + first * size, layout.prefix + last * size

    def fold(x: Tensor) -> Tensor:
        return rearrange(x[:, :, start:stop], "b h (f s) d -> (b f) h s d", f=frames)

    def own_and(shared: Tensor, x: Tensor) -> Tensor:
        if not shared.shape[2]:
            return fold(x)
        # Written once into its place: a repeat followed by a cat would copy the shared keys twice.
        keys = x.new_empty(x.shape[0], frames, x.shape[1], size + shared.shape[2], x.shape[3])
        keys[:, :, :, :size] = rearrange(x[:, :, start:stop], "b h (f s) d -> b f h s d", f=frames)
        keys[:, :, :, size:] = shared[:, None]
        return keys.flatten(0, 1)

    rows = dense(fold(q), own_and(shared_k, k), own_and(shared_v, v))
    out[:, :, start:stop] = rearrange(rows, "(b f) h s d -> b h (f s) d", f=frames)


def _gather(x: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    if len(spans) == 1:
        return x[:, :, spans[0][0] : spans[0][1]]
    return torch.cat([x[:, :, :0], *(x[:, :, start:stop] for start, stop in spans)], dim=2)


def _chunks(frames: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Runs of consecutive frames, none longer than ``most``, as (first, last + 1): slices, so that views suffice."""
    start = 0
    for i in range(1, len(frames) + 1):
        if i == len(frames) or frames[i] != frames[i - 1] + 1 or i - start == most:
            yield frames[start], frames[i - 1] + 1
            start = i
