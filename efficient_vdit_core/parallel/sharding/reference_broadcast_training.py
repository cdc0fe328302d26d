"""RB with a way back: the gradient of every exchanged key and value returns to the rank that owns it.

The backward is that of the same partial calls, each with the merged result and lse of its rows (FlashAttention-2, arXiv
2307.08691, section 3.1.2: a block of keys needs no more). For its share of the shared rows' keys a rank is told their dO,
O and lse; what it finds for other ranks' shared tokens and for their halo it sends back, and they add it up. Kept from the
forward are q, k, v, the result, its lse, and the shared tokens of all ranks.

Shapes as in ``reference_broadcast``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...attention.backends.partial import attend_backward
from ...attention.backends.spans import Span, in_rows, take
from ...tiles import TilePattern
from .communicator import Communicator, form
from .layout import Shard
from .reference_broadcast import (
    Attended,
    attended,
    fold,
    joined_shared,
    seen_by,
    send_halo,
    send_rows,
    send_shared,
    shared_rows,
    sources,
    unfold,
)
from .roles import Roles, roles

SHARED_ROWS, HALO_BACK = "rb gradients of the shared rows", "rb gradients of the halo"


def trained_reference_broadcast(
    q: Tensor, k: Tensor, v: Tensor, shard: Shard, pattern: TilePattern, comm: Communicator
) -> Tensor:
    """``reference_broadcast_attention`` with gradients."""
    return _ReferenceBroadcast.apply(q, k, v, shard, pattern, comm)  # pyright: ignore[reportReturnType]


class _ReferenceBroadcast(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, shard: Shard, pattern: TilePattern, comm: Communicator
    ) -> Tensor:
        q, k, v = in_rows(q), in_rows(k), in_rows(v)
        found = attended(q, k, v, shard, pattern, comm)
        ctx.save_for_backward(q, k, v, found.out, found.lse, *found.shared)
        ctx.shard, ctx.every, ctx.comm = shard, roles(shard, pattern), comm
        return found.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *shared = ctx.saved_tensors
        found = Attended(out, lse, tuple(shared))
        return *_gradients(in_rows(dout), (q, k, v), found, ctx.shard, ctx.every, ctx.comm), None, None, None


def _gradients(
    dout: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    found: Attended,
    shard: Shard,
    every: tuple[Roles, ...],
    comm: Communicator,
) -> list[Tensor]:
    """Of q, k and v (B, H, n, D): what each call contributes, added up in the precision of the lse."""
    mine, rows, (q, k, v) = every[comm.rank], (dout, found.out, found.lse), qkv
    pending = send_shared(SHARED_ROWS, rows, every, comm) if found.shared else None
    totals = [torch.zeros_like(x, dtype=found.lse.dtype) for x in qkv]
    _frames_alone(totals, qkv, rows, mine, shard.layout.grid.tokens_per_frame)
    if any(role.near for role in every):  # of all ranks alike: each takes part in the exchange
        _near_frames(totals, qkv, rows, shard, every, comm)
    if pending is not None:
        all_q, all_k, all_v = found.shared
        shared = joined_shared(rows, pending, every, comm)
        dq, dk, dv = attend_backward(shared[0], all_q, k, v, shared[1].contiguous(), shared[2])
        totals[1] += dk
        totals[2] += dv
        back = [dq.to(totals[0].dtype), *(torch.zeros_like(x, dtype=totals[0].dtype) for x in (all_k, all_v))]
        if mine.others:
            do, rest, o, row_lse = (take(x, mine.others, 2) for x in (dout, q, found.out, found.lse))
            dq, *ds = attend_backward(do, rest, all_k, all_v, o.contiguous(), row_lse)
            _add(totals[0], mine.others, dq)
            for total, d in zip(back[1:], ds, strict=True):
                total += d
        own = [x[:, :, slice(*shared_rows(every, comm.rank))] for x in back]
        for parts in [own, *(parts for parts in send_rows(back, every, comm).wait() if parts)]:
            for total, part in zip(totals, parts, strict=True):
                _add(total, mine.shared, part)
    return [total.to(x.dtype) for total, x in zip(totals, qkv, strict=True)]


def _frames_alone(
    totals: list[Tensor], qkv: tuple[Tensor, ...], rows: tuple[Tensor, ...], mine: Roles, size: int
) -> None:
    for start, stop in mine.alone:
        dout, out, lse = (x[:, :, start:stop] for x in (*rows[:2], rows[2][..., None]))
        of_rows = (fold(x, size) for x in (dout, *(x[:, :, start:stop] for x in qkv), out, lse))
        do, q, k, v, o, row_lse = of_rows
        for total, d in zip(totals, attend_backward(do, q, k, v, o, row_lse[..., 0]), strict=True):
            total[:, :, start:stop] += unfold(d, dout.shape[0])


def _near_frames(
    totals: list[Tensor],
    qkv: tuple[Tensor, ...],
    rows: tuple[Tensor, ...],
    shard: Shard,
    every: tuple[Roles, ...],
    comm: Communicator,
) -> None:
    """Pieces of frames over the frames that they see; the gradients of the halo go back to those who sent it."""
    q, k, v = qkv
    received, here = send_halo(k, v, every, comm).wait(), sources(shard, every, comm)
    held = {**dict(enumerate(received)), comm.rank: [k, v]}
    halos = {rank: [torch.zeros_like(x, dtype=totals[0].dtype) for x in parts] for rank, parts in enumerate(received)}
    halos[comm.rank] = totals[1:]
    for near in every[comm.rank].near:
        start, stop = near.piece.local_span
        dout, out, lse = (x[:, :, start:stop] for x in rows)
        keys, values = seen_by(near, here, held)
        dq, *ds = attend_backward(dout, q[:, :, start:stop], keys, values, out.contiguous(), lse)
        totals[0][:, :, start:stop] += dq
        done = 0
        for rank, (first, last) in (source for frame in near.seen for source in here[frame]):
            for total, d in zip(halos[rank], ds, strict=True):
                total[:, :, first:last] += d[:, :, done : done + last - first]
            done += last - first
    sends = [[] if rank == comm.rank else halos[rank] for rank in range(comm.size)]
    spans = [[piece.local_span for piece in every[comm.rank].pieces_for(rank)] for rank in range(comm.size)]
    receives = [[form(totals[1], 2, sum(b - a for a, b in mine))] * 2 if mine else [] for mine in spans]
    for mine, parts in zip(spans, comm.start(HALO_BACK, sends, receives, k.device).wait(), strict=True):
        for total, part in zip(totals[1:], parts, strict=False):
            _add(total, mine, part)


def _add(total: Tensor, spans: list[Span] | tuple[Span, ...], part: Tensor) -> None:
    """Add ``part`` to the tokens ``spans`` of ``total`` (B, H, n, D)."""
    done = 0
    for start, stop in spans:
        total[:, :, start:stop] += part[:, :, done : done + stop - start]
        done += stop - start
