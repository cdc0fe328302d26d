"""RB: ranks keep their frames and exchange only the reference tokens' Q, K, V and their partial results; and the keys
and values of frames that are cut, or that another rank's frames have in their window.

A reference row's softmax over all keys is the merge of its partial results over each rank's keys, so every rank does
the same share of it, and no rank ever sees all keys. Per layer and rank 4 k S D e (P - 1) / P bytes and 4 bytes for
each row's lse, against Ulysses' 4 N D e (P - 1) / P^2.

Shapes: B batch, H heads, n this rank's tokens, g its shared tokens, G all shared tokens, D head_dim.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from ...attention.partial import Partial, attend_lse, merge
from ...attention.spans import put, take
from ...tiles import TilePattern
from .layout import Shard
from .roles import Roles, roles
from .wire import Pending, Wire, form

SHARED, HALO, ROWS = "rb shared tokens", "rb halo", "rb partial rows"


def reference_broadcast_attention(
    q: Tensor, k: Tensor, v: Tensor, shard: Shard, pattern: TilePattern, wire: Wire
) -> Tensor:
    """Attention under ``pattern`` of this rank's q, k, v (B, H, n, D); returns (B, H, n, D).

    While the shared tokens travel, frames attend to themselves; while the partial rows travel, frames attend to the
    shared tokens.
    """
    every = roles(shard, pattern)
    mine = every[wire.rank]
    shared = _send_shared(q, k, v, every, wire) if any(r.shared_tokens for r in every) else None
    halo = _send_halo(k, v, every, wire) if any(r.halo for r in every) else None
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    _frames_alone(q, k, v, shard.layout.grid.tokens_per_frame, mine, out, lse)
    if mine.near:
        _near_frames(q, _held_and_received(k, v, shard, every, halo, wire), mine, out, lse)
    elif halo is not None:
        halo.wait()
    if shared is None:
        return out
    all_q, all_k, all_v = _join_shared(q, k, v, mine, shared.wait(), wire)
    partial = attend_lse(all_q, k, v)
    rows = _send_rows(partial, every, wire)
    if mine.others:
        to_shared = attend_lse(take(q, mine.others, 2), all_k, all_v)
        merged, _ = merge([(take(out, mine.others, 2), take(lse, mine.others, 2)), to_shared])
        put(out, mine.others, merged, 2)
    received = [tuple(parts) for parts in rows.wait() if parts]
    start = sum(r.shared_tokens for r in every[: wire.rank])
    own = tuple(x[:, :, start : start + mine.shared_tokens] for x in partial)
    if mine.shared_tokens:
        put(out, mine.shared, merge([own, *received])[0], 2)  # pyright: ignore[reportArgumentType]
    return out


def _send_shared(q: Tensor, k: Tensor, v: Tensor, every: tuple[Roles, ...], wire: Wire) -> Pending:
    own = [take(x, every[wire.rank].shared, 2) for x in (q, k, v)]
    others = [rank for rank in range(wire.size) if rank != wire.rank]
    sends = [own if rank in others else [] for rank in range(wire.size)]
    receives = [[form(q, 2, every[rank].shared_tokens)] * 3 if rank in others else [] for rank in range(wire.size)]
    return wire.start(SHARED, sends, receives, q.device)


def _join_shared(
    q: Tensor, k: Tensor, v: Tensor, mine: Roles, received: list[list[Tensor]], wire: Wire
) -> list[Tensor]:
    """All ranks' shared q, k, v (B, H, G, D), rank by rank."""
    received = list(received)
    received[wire.rank] = [take(x, mine.shared, 2) for x in (q, k, v)]
    return [torch.cat([tensors[i] for tensors in received], dim=2) for i in range(3)]


def _send_halo(k: Tensor, v: Tensor, every: tuple[Roles, ...], wire: Wire) -> Pending:
    """Keys and values to the ranks that hold the other parts of a cut frame, or a frame with it in its window."""
    sends, receives = [], []
    for rank in range(wire.size):
        pieces = every[wire.rank].pieces_for(rank)
        sends.append([take(x, [p.local_span for p in pieces], 2) for x in (k, v)] if pieces else [])
        coming = sum(p.tokens for p in every[rank].pieces_for(wire.rank))
        receives.append([form(k, 2, coming)] * 2 if coming else [])
    return wire.start(HALO, sends, receives, k.device)


def _frames_alone(q: Tensor, k: Tensor, v: Tensor, size: int, mine: Roles, out: Tensor, lse: Tensor) -> None:
    """Frames of ``size`` tokens that see themselves only; written into ``out`` and ``lse``."""
    for start, stop in mine.alone:
        frames = [rearrange(x[:, :, start:stop], "b h (f s) d -> (b f) h s d", s=size) for x in (q, k, v)]
        o, logs = attend_lse(*frames)
        out[:, :, start:stop] = rearrange(o, "(b f) h s d -> b h (f s) d", b=q.shape[0])
        lse[:, :, start:stop] = rearrange(logs, "(b f) h s -> b h (f s)", b=q.shape[0])


def _held_and_received(
    k: Tensor, v: Tensor, shard: Shard, every: tuple[Roles, ...], halo: Pending | None, wire: Wire
) -> dict[int, list[tuple[Tensor, Tensor]]]:
    """Of each frame the pieces of keys and values that are here: this rank's own and those that the others sent."""
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for piece in shard.pieces[wire.rank]:
        if piece.frame is not None:
            start, stop = piece.local_span
            found.setdefault(piece.frame, []).append((k[:, :, start:stop], v[:, :, start:stop]))
    received = halo.wait() if halo is not None else []
    for rank, tensors in enumerate(received):
        done = 0
        for piece in every[rank].pieces_for(wire.rank):
            assert piece.frame is not None
            keys, values = (x[:, :, done : done + piece.tokens] for x in tensors)
            found.setdefault(piece.frame, []).append((keys, values))
            done += piece.tokens
    return found


def _near_frames(
    q: Tensor, here: dict[int, list[tuple[Tensor, Tensor]]], mine: Roles, out: Tensor, lse: Tensor
) -> None:
    """Pieces of frames attend to the frames that they see; written into ``out`` and ``lse``."""
    for near in mine.near:
        start, stop = near.piece.local_span
        seen = [pair for frame in near.seen for pair in here[frame]]
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*seen, strict=True))
        out[:, :, start:stop], lse[:, :, start:stop] = attend_lse(q[:, :, start:stop], keys, values)


def _send_rows(partial: Partial, every: tuple[Roles, ...], wire: Wire) -> Pending:
    """The partial results of other ranks' shared rows back to them."""
    out, lse = partial
    sends, receives, start = [], [], 0
    own = every[wire.rank].shared_tokens
    for rank, role in enumerate(every):
        stop = start + role.shared_tokens
        elsewhere = rank != wire.rank
        sends.append([out[:, :, start:stop], lse[:, :, start:stop]] if elsewhere and role.shared_tokens else [])
        receives.append([form(out, 2, own), form(lse, 2, own)] if elsewhere and own else [])
        start = stop
    return wire.start(ROWS, sends, receives, out.device)
