"""RB: ranks keep their frames and exchange only the reference tokens' Q, K, V and their partial results; and the keys
and values of frames that are cut, or that another rank's frames have in their window.

A reference row's softmax over all keys is the merge of its partial results over each rank's keys, so every rank does
the same share of it, and no rank ever sees all keys. Per layer and rank 4 k S D e (P - 1) / P bytes and 4 bytes for
each row's lse, against Ulysses' 4 N D e (P - 1) / P^2.

Shapes: B batch, H heads, n this rank's tokens, g its shared tokens, G all shared tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ...attention.backends.partial import Partial, attend_lse, lse_dtype, merge
from ...attention.backends.spans import Span, put, take
from ...tiles import TilePattern
from .communicator import Communicator, Pending, form
from .layout import Shard
from .roles import Near, Roles, roles

QUERIES, KEYS, HALO, ROWS = "rb shared queries", "rb shared keys", "rb halo", "rb partial rows"

Source = tuple[int, Span]  # a rank, and what it has of a frame: of its own tokens, or of the halo that it sent here


@dataclass(frozen=True)
class Attended:
    """A rank's result out (B, H, n, D), its lse (B, H, n), and all ranks' shared q, k, v (B, H, G, D), () where there are
    none."""

    out: Tensor
    lse: Tensor
    shared: tuple[Tensor, ...] = ()


def reference_broadcast_attention(
    q: Tensor, k: Tensor, v: Tensor, shard: Shard, pattern: TilePattern, comm: Communicator
) -> Tensor:
    """Attention under ``pattern`` of this rank's q, k, v (B, H, n, D); returns (B, H, n, D). Forward only."""
    return attended(q, k, v, shard, pattern, comm).out


def attended(q: Tensor, k: Tensor, v: Tensor, shard: Shard, pattern: TilePattern, comm: Communicator) -> Attended:
    """``reference_broadcast_attention``, with what its gradient is made of.

    Each exchange travels beside work that does not need it: the shared queries while frames attend to themselves, the
    shared keys and values while the shared queries attend to this rank's keys, the partial rows while frames attend to
    the shared tokens. The queries go first because the longest of these, whose results must travel back, waits for
    nothing else.
    """
    every = roles(shard, pattern)
    mine, anything_shared = every[comm.rank], any(r.shared_tokens for r in every)
    queries = send_shared(QUERIES, (q,), every, comm) if anything_shared else None
    halo = send_halo(k, v, every, comm) if any(r.halo for r in every) else None
    keys = send_shared(KEYS, (k, v), every, comm) if anything_shared else None
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q))
    size = shard.layout.grid.tokens_per_frame
    for start, stop in mine.alone:
        o, logs = attend_lse(*(fold(x[:, :, start:stop], size) for x in (q, k, v)))
        out[:, :, start:stop] = unfold(o, q.shape[0])
        lse[:, :, start:stop] = unfold(logs[..., None], q.shape[0])[..., 0]
    received = halo.wait() if halo is not None else []
    here, held = sources(shard, every, comm), {**dict(enumerate(received)), comm.rank: [k, v]}
    for near in mine.near:
        start, stop = near.piece.local_span
        out[:, :, start:stop], lse[:, :, start:stop] = attend_lse(q[:, :, start:stop], *seen_by(near, here, held))
    if queries is None or keys is None:
        return Attended(out, lse)
    (all_q,) = joined_shared((q,), queries, every, comm)
    partial = attend_lse(all_q, k, v)
    rows = send_rows(partial, every, comm)
    all_k, all_v = joined_shared((k, v), keys, every, comm)
    if mine.others:
        to_shared = attend_lse(take(q, mine.others, 2), all_k, all_v)
        merged = merge([(take(out, mine.others, 2), take(lse, mine.others, 2)), to_shared])
        _write(out, lse, mine.others, merged)
    parts = [tuple(parts) for parts in rows.wait() if parts]
    if mine.shared_tokens:
        own = tuple(x[:, :, slice(*shared_rows(every, comm.rank))] for x in partial)
        _write(out, lse, mine.shared, merge([own, *parts]))  # pyright: ignore[reportArgumentType]
    return Attended(out, lse, (all_q, all_k, all_v))


def _write(out: Tensor, lse: Tensor, spans: Sequence[Span], done: Partial) -> None:
    put(out, spans, done[0], 2)
    put(lse, spans, done[1], 2)


def fold(x: Tensor, size: int) -> Tensor:
    """Frames of ``size`` tokens (B, H, f s, D) as entries of the batch (B f, H, s, D)."""
    return rearrange(x, "b h (f s) d -> (b f) h s d", s=size)


def unfold(x: Tensor, batch: int) -> Tensor:
    """The inverse of ``fold``."""
    return rearrange(x, "(b f) h s d -> b h (f s) d", b=batch)


def send_shared(name: str, tensors: Sequence[Tensor], every: tuple[Roles, ...], comm: Communicator) -> Pending:
    """This rank's shared tokens of ``tensors`` (B, H, n[, D]) to all others, counted under ``name``."""
    own = [take(x, every[comm.rank].shared, 2) for x in tensors]
    others = [rank for rank in range(comm.size) if rank != comm.rank]
    sends = [own if rank in others else [] for rank in range(comm.size)]
    receives = [
        [form(x, 2, every[rank].shared_tokens) for x in tensors] if rank in others else [] for rank in range(comm.size)
    ]
    return comm.start(name, sends, receives, tensors[0].device)


def joined_shared(
    tensors: Sequence[Tensor], pending: Pending, every: tuple[Roles, ...], comm: Communicator
) -> list[Tensor]:
    """All ranks' shared tokens (B, H, G[, D]) of ``tensors``, rank by rank."""
    received = pending.wait()
    received[comm.rank] = [take(x, every[comm.rank].shared, 2) for x in tensors]
    return [torch.cat(parts, dim=2) for parts in zip(*received, strict=True)]


def shared_rows(every: tuple[Roles, ...], rank: int) -> Span:
    """Where a rank's shared tokens stand among all of them."""
    start = sum(r.shared_tokens for r in every[:rank])
    return start, start + every[rank].shared_tokens


def send_halo(k: Tensor, v: Tensor, every: tuple[Roles, ...], comm: Communicator) -> Pending:
    """Keys and values to the ranks that hold the other parts of a cut frame, or a frame with it in its window."""
    sends, receives = [], []
    for rank in range(comm.size):
        pieces = every[comm.rank].pieces_for(rank)
        sends.append([take(x, [p.local_span for p in pieces], 2) for x in (k, v)] if pieces else [])
        coming = sum(p.tokens for p in every[rank].pieces_for(comm.rank))
        receives.append([form(k, 2, coming)] * 2 if coming else [])
    return comm.start(HALO, sends, receives, k.device)


def sources(shard: Shard, every: tuple[Roles, ...], comm: Communicator) -> dict[int, list[Source]]:
    """Of each frame where its keys and values are that this rank has: among its own, and in what others send it."""
    found: dict[int, list[Source]] = {}
    for piece in shard.pieces[comm.rank]:
        if piece.frame is not None:
            found.setdefault(piece.frame, []).append((comm.rank, piece.local_span))
    for rank in range(comm.size):
        done = 0
        for piece in every[rank].pieces_for(comm.rank):
            assert piece.frame is not None
            found.setdefault(piece.frame, []).append((rank, (done, done + piece.tokens)))
            done += piece.tokens
    return found


def seen_by(near: Near, here: dict[int, list[Source]], held: dict[int, list[Tensor]]) -> list[Tensor]:
    """The keys and the values (B, H, m, D) that a piece of a frame sees beside the shared ones; ``held``: by rank."""
    where = [source for frame in near.seen for source in here[frame]]
    return [torch.cat([held[rank][i][:, :, start:stop] for rank, (start, stop) in where], dim=2) for i in range(2)]


def send_rows(tensors: Sequence[Tensor], every: tuple[Roles, ...], comm: Communicator) -> Pending:
    """What this rank found for the shared tokens (B, H, G[, D]) of other ranks, back to them."""
    sends, receives = [], []
    own = every[comm.rank].shared_tokens
    for rank, role in enumerate(every):
        rows, elsewhere = slice(*shared_rows(every, rank)), rank != comm.rank
        sends.append([x[:, :, rows] for x in tensors] if elsewhere and role.shared_tokens else [])
        receives.append([form(x, 2, own) for x in tensors] if elsewhere and own else [])
    return comm.start(ROWS, sends, receives, tensors[0].device)
