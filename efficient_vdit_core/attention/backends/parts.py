"""The tile mask as dense attention over parts of the keys, merged by their log-sum-exp: no copies of frames' keys.

(a) The queries of prefix, suffix and reference frames see all keys.
(b) The queries of other frames see the shared keys (prefix, reference frames, suffix), gathered once.
(c) Frames see themselves and their neighbours: views, a batch of frames at a time.
(d) Frames see the means of the frames that they leave out, where the pattern has mean frames (``mean_frames``): one mean at
    a time that several frames see, and those of single frames together.

(b), (c) and (d) are over disjoint keys, so their merge is exact. The backward is that of the same calls, each with the
merged result and lse of its rows (FlashAttention-2, arXiv 2307.08691, section 3.1.2: a block of keys needs no more).

Shapes: B batch, H heads, N tokens, D head_dim, f frames, s tokens a frame, c neighbouring frames that each of them
sees, g shared keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...tiles import TilePattern
from ..layout import TokenLayout, frames_of, global_spans, result_like, runs, runs_of_at_most, sliding_frames
from .mean_frames import Means, means_of
from .merge import merge_into
from .partial import Partial, PartialAttention, lse_dtype
from .spans import in_rows, put, take
from .workspace import default_extra_bytes


@dataclass(frozen=True)
class Near:
    """``count`` frames from ``first`` on: each sees ``width`` frames, the first of them from ``seen`` on, the next from
    one frame further."""

    first: int
    count: int
    seen: int
    width: int


@dataclass(frozen=True)
class Rows:
    """Neighbouring frames ``first`` to ``last`` (exclusive), none a reference frame, and what they see beside the shared
    tokens."""

    first: int
    last: int
    near: tuple[Near, ...]


@dataclass(frozen=True)
class Schedule:
    """The calls of one pattern: ``spans`` of tokens that see all and are seen by all, the other rows, and the means that
    these see; for ``heads`` of each slice by itself."""

    layout: TokenLayout
    spans: tuple[tuple[int, int], ...]
    rows: tuple[Rows, ...]
    means: tuple[Means, ...]
    heads: tuple[slice, ...]

    def tokens(self, first: int, last: int) -> slice:
        """The tokens of frames ``first`` to ``last`` (exclusive)."""
        return slice(*self.layout.span(first, last))


def attend_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    pattern: TilePattern,
    partial: PartialAttention,
    max_extra_bytes: int | None = None,
) -> Tensor:
    """Attention of q over k, v (B, H, N, D) under ``pattern``, scaled by 1 / sqrt(D). Differentiable where ``partial``
    has a backward.

    Memory beyond the output, its lse and what ``partial`` and ``merge_into`` take inside is at most ``max_extra_bytes``
    (None: ``default_extra_bytes``), or what one head and one frame take where that is more: half for the shared queries
    and their result, or the shared keys and values, of as many heads at once as fit; half for results that are not
    merged yet; behind these all of it for mean frames. A CPU where no bound is given takes all heads at once. Autograd
    keeps q, k, v, the output and its lse, as it does for dense attention, and no copies. Raises ValueError where a
    gradient is wanted and there is no backward.
    """
    q, k, v = in_rows(q), in_rows(k), in_rows(v)
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if max_extra_bytes is None and q.device.type != "cpu":
        max_extra_bytes = default_extra_bytes(q, 0, gradients=gradients)
    schedule = schedule_for(q, layout, pattern, max_extra_bytes)
    if not gradients:
        return _forward(q, k, v, schedule, partial)[0]
    if partial.backward is None:
        raise ValueError(
            f"A gradient is wanted of the backend parts, and {partial.name} gives none by its parts. Choose auto or frames."
        )
    return _Parts.apply(q, k, v, schedule, partial)


def schedule_for(q: Tensor, layout: TokenLayout, pattern: TilePattern, max_extra_bytes: int | None) -> Schedule:
    """The calls for queries like q (B, H, N, D) within the bound of ``attend_parts``, None: the one for a CPU."""
    spans = tuple(global_spans(layout, pattern.reference_frames(layout.grid.t)))
    heads, token_bytes = q.shape[1], q.shape[0] * q.shape[3] * q.element_size()  # a token of one head
    shared_bytes = 2 * token_bytes * sum(stop - start for start, stop in spans)
    frame_bytes = 2 * token_bytes * layout.grid.tokens_per_frame  # of rows: a result that is not merged yet
    mean_bytes = 2 * frame_bytes  # a mean's keys and values lie beside its result
    if max_extra_bytes is None:  # a CPU's bound is that of a cache, which copies need not fit
        limit, at_once = default_extra_bytes(q, (mean_bytes if pattern.means else frame_bytes) * heads), heads
        at_end = limit
    else:
        limit, at_end = max_extra_bytes // 2, max_extra_bytes
        at_once = min(heads, max(1, limit // max(1, shared_bytes)))
        at_once = math.ceil(heads / math.ceil(heads / at_once))  # slices that are alike
    rows = _rows(layout, pattern, max(1, limit // (frame_bytes * at_once)))
    most, most_rows = at_end // (mean_bytes * at_once), at_end // (frame_bytes * at_once) - 1
    means = means_of(pattern, layout, max(1, most), max(1, most_rows))
    slices = (slice(h, h + at_once) for h in range(0, heads, at_once))
    return Schedule(layout, spans, tuple(rows), tuple(means), tuple(slices))


def _rows(layout: TokenLayout, pattern: TilePattern, most: int) -> Iterator[Rows]:
    """The rows under ``pattern`` that do not see all, at most ``most`` frames of them in one."""
    neighbours = pattern.neighbours(layout.grid.t)
    for first, last in runs_of_at_most(list(neighbours), most):
        yield Rows(first, last, tuple(_near(neighbours, first, last)))


def _near(neighbours: dict[int, tuple[int, ...]], first: int, last: int) -> Iterator[Near]:
    """What frames ``first`` to ``last`` see: one call for all that see as many frames at the same distance."""
    alike: dict[tuple[int, int], list[int]] = {}
    for frame in range(first, last):
        for _, start, stop in runs(neighbours[frame]):
            alike.setdefault((start - frame, stop - start), []).append(frame)
    for (distance, width), frames in alike.items():
        for _, start, stop in runs(frames):
            yield Near(start, stop - start, start + distance, width)


def _forward(q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, partial: PartialAttention) -> Partial:
    """(out, lse)."""
    out = result_like(q)
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q))
    for heads in schedule.heads:
        _attend_heads(*(x[:, heads] for x in (out, lse, q, k, v)), schedule=schedule, partial=partial)
    return out, lse


def _attend_heads(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, partial: PartialAttention
) -> None:
    """All calls, into ``out`` and ``lse``. Each row is written by its first call, and the others are merged into it."""
    spans = schedule.spans
    if spans:
        done = partial.forward(take(q, spans, 2), k, v)
        put(out, spans, done[0], 2)
        put(lse, spans, done[1], 2)
        del done
    _attend_rows(out, lse, q, k, v, schedule, partial)  # whose copies are gone behind it
    for means in schedule.means:
        for b in range(q.shape[0]):
            _attend_means(out[b], lse[b], q[b], k[b], v[b], means, partial)


def _attend_rows(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, partial: PartialAttention
) -> None:
    """(b) and (c) of all rows; where one call of (c) follows for all that are in one, (b) is written by its merge."""
    shared = (take(k, schedule.spans, 2), take(v, schedule.spans, 2))
    for rows in schedule.rows:
        at = schedule.tokens(rows.first, rows.last)
        first = partial.forward(q[:, :, at], *shared) if schedule.spans else None
        if first and len(rows.near) > 1:
            out[:, :, at], lse[:, :, at] = first
            first = None
        for near in rows.near:
            for b in range(q.shape[0]):
                of_entry = first and (first[0][b], first[1][b])
                _attend_near(out[b], lse[b], q[b], k[b], v[b], schedule, near, partial, of_entry)
                del of_entry
        del first


def _attend_near(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    schedule: Schedule,
    near: Near,
    partial: PartialAttention,
    first: Partial | None,
) -> None:
    """(c) of one batch entry (H, N, D), into ``out`` and ``lse``, merged with what stands there or with ``first``, of these
    rows alone."""
    queries, rows, row_logs = (_rows_of(x, schedule.layout, near) for x in (q, out, lse[..., None]))
    done, logs = partial.forward(queries, _seen(k, schedule.layout, near), _seen(v, schedule.layout, near))
    row_logs = row_logs[..., 0]
    if schedule.spans:
        before = first and (
            rearrange(first[0], "h (f s) d -> f h s d", f=near.count),
            rearrange(first[1], "h (f s) -> f h s", f=near.count),
        )
        merge_into(rows, row_logs, done, logs, before)
    else:  # no span parts a frame's neighbours: this is all that its rows see
        rows.copy_(done)
        row_logs.copy_(logs)


def _attend_means(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, means: Means, partial: PartialAttention
) -> None:
    """(d) of one batch entry (H, N, D), into ``out`` and ``lse``."""
    keys, values = means.of(k), means.of(v)
    for run in means.rows:
        queries, rows, row_logs = (means.seeing(x, run) for x in (q, out, lse[..., None]))
        done, logs = partial.forward(queries, keys, values)
        merge_into(rows, row_logs[..., 0], done, logs + means.logs(logs))


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, partial: PartialAttention) -> Tensor:
        out, lse = _forward(q, k, v, schedule, partial)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.schedule, ctx.partial = schedule, partial
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return *_backward(in_rows(dout), q, k, v, out, lse, ctx.schedule, ctx.partial), None, None


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    schedule: Schedule,
    partial: PartialAttention,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (B, H, N, D): what each call contributes, added up."""
    assert partial.backward is not None
    spans, dq = schedule.spans, torch.empty_like(q)
    if not spans:
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    else:  # all heads at once: the gradients of the keys are as large as they are, and stay
        of_spans = [take(x, spans, 2) for x in (dout, q, out, lse)]
        rows, dk, dv = partial.backward(of_spans[0], of_spans[1], k, v, *of_spans[2:])
        put(dq, spans, rows, 2)
        del of_spans, rows
    for heads in schedule.heads:
        totals, given = [[x[:, heads] for x in group] for group in ((dq, dk, dv), (dout, q, k, v, out, lse))]
        _row_gradients(totals, given, schedule, partial)
    return dq, dk, dv


def _row_gradients(totals: list[Tensor], given: list[Tensor], schedule: Schedule, partial: PartialAttention) -> None:
    """What (b), (c) and (d) contribute for some heads, added to ``totals``: dq, dk, dv. ``given``: dout, q, k, v, out and
    lse of them."""
    assert partial.backward is not None
    spans, (dq, dk, dv), (dout, q, k, v, out, lse) = schedule.spans, totals, given
    shared = (take(k, spans, 2), take(v, spans, 2))
    dshared = [torch.zeros_like(x, dtype=lse.dtype) for x in shared]  # many calls add to them
    for rows in schedule.rows:
        at = schedule.tokens(rows.first, rows.last)
        if spans:
            dq[:, :, at], *ds = partial.backward(dout[:, :, at], q[:, :, at], *shared, out[:, :, at], lse[:, :, at])
            for total, d in zip(dshared, ds, strict=True):
                total += d
        for b in range(q.shape[0]):
            of_entry, into = [x[b] for x in given], (dq[b], dk[b], dv[b])
            for near in rows.near:
                _near_gradients(into, of_entry, schedule, near, partial)
    for total, d in ((dk, dshared[0]), (dv, dshared[1])):
        for (start, stop), part in zip(spans, d.split([stop - start for start, stop in spans], dim=2), strict=True):
            total[:, :, start:stop] += part
    del shared, dshared
    for means in schedule.means:
        for b in range(q.shape[0]):
            _mean_gradients((dq[b], dk[b], dv[b]), [x[b] for x in given], means, partial)


def _near_gradients(
    totals: tuple[Tensor, Tensor, Tensor],
    of_entry: list[Tensor],
    schedule: Schedule,
    near: Near,
    partial: PartialAttention,
) -> None:
    """What (c) of one batch entry contributes, added to ``totals``: dq, dk, dv (H, N, D)."""
    assert partial.backward is not None
    layout, (dout, q, k, v, out, lse) = schedule.layout, of_entry
    douts, queries, outs, lses = (_rows_of(x, layout, near) for x in (dout, q, out, lse[..., None]))
    keys, values = (_seen(x, layout, near) for x in (k, v))
    dq, *ds = partial.backward(douts, queries, keys, values, outs, lses[..., 0])
    rows, size = _rows_of(totals[0], layout, near), layout.grid.tokens_per_frame
    if schedule.spans:
        rows += dq
    else:
        rows.copy_(dq)
    for total, d in zip(totals[1:], ds, strict=True):
        for place in range(near.width):  # the frames' keys overlap: one frame of each at a time
            first = near.seen + place
            seen = total[:, schedule.tokens(first, first + near.count)]
            seen += rearrange(d[:, :, place * size : (place + 1) * size], "f h s d -> h (f s) d")


def _mean_gradients(
    totals: tuple[Tensor, Tensor, Tensor], of_entry: list[Tensor], means: Means, partial: PartialAttention
) -> None:
    """What (d) of one batch entry contributes, added to ``totals``: dq, dk, dv (H, N, D)."""
    assert partial.backward is not None
    dout, q, k, v, out, lse = of_entry
    keys, values = means.of(k), means.of(v)
    dmeans = [torch.zeros_like(x, dtype=lse.dtype) for x in (keys, values)]  # many calls may add to them
    for run in means.rows:
        douts, queries, outs, lses = (means.seeing(x, run) for x in (dout, q, out, lse[..., None]))
        # The kernel's scores lack the logarithm of the count, so it is taken off the log-sum-exp instead.
        lses = lses[..., 0] - means.logs(lses)
        d, *ds = partial.backward(douts, queries, keys, values, outs, lses)
        rows = means.seeing(totals[0], run)
        rows += d
        for total, of_run in zip(dmeans, ds, strict=True):
            total += of_run
    for total, dmean in zip(totals[1:], dmeans, strict=True):
        means.add_gradient(total, dmean.to(total.dtype))


def _rows_of(x: Tensor, layout: TokenLayout, near: Near) -> Tensor:
    """The rows of x (H, N, D) of the frames that see so, as a view (f, H, s, D)."""
    return frames_of(x, layout, near.first, near.first + near.count)


def _seen(x: Tensor, layout: TokenLayout, near: Near) -> Tensor:
    """The keys (or values) that ``near`` frames see, of x (H, N, D), as a view (f, H, c s, D)."""
    return sliding_frames(x, layout, near.seen, near.count, near.width)
