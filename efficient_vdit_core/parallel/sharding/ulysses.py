"""Ulysses: each rank swaps its tokens of all heads for all tokens of its heads, attends, and swaps back.

Works for every pattern, full ones too; heads need not be divisible by the ranks. The heads go in two groups, so that
one travels while the other is computed.

Shapes: B batch, H heads, h a rank's heads of a group, n this rank's tokens, N all tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...attention.backends.spans import put, take
from .communicator import Communicator, Pending
from .layout import Shard, Span, even_shares

TO_HEADS, TO_TOKENS = "ulysses to heads", "ulysses to tokens"
GROUPS = 2

Inner = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # q, k, v and the first of their heads


def head_groups(heads: int, shard: Shard) -> list[list[Span]]:
    """For each group the range of heads of every rank, by the shard's weights to one head; a rank may get none."""
    shares = shard.shares_of(heads)
    halves = [[(start + a, start + b) for a, b in even_shares(stop - start, GROUPS)] for start, stop in shares]
    return [[half[group] for half in halves] for group in range(GROUPS)]


def ulysses_attention(q: Tensor, k: Tensor, v: Tensor, shard: Shard, comm: Communicator, inner: Inner) -> Tensor:
    """Attention of this rank's q, k, v (B, H, n, D); ``inner`` attends over whole sequences (B, h, N, D).

    Returns (B, H, n, D)."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    groups = head_groups(q.shape[1], shard)
    forward = [start_to_heads((q, k, v), shard, group, comm) for group in groups]
    back = []
    for group, pending in zip(groups, forward, strict=True):
        start, stop = group[comm.rank]
        whole_q, whole_k, whole_v = joined_heads((q, k, v), shard, group, pending, comm)
        done = inner(whole_q, whole_k, whole_v, start) if stop > start else whole_q
        back.append(start_to_tokens((done,), shard, group, comm))
        out[:, start:stop] = take(done, shard.spans[comm.rank], 2)
    for group, pending in zip(groups, back, strict=True):
        for (start, stop), tensors in zip(group, pending.wait(), strict=True):
            if tensors:
                out[:, start:stop] = tensors[0]
    return out


def start_to_heads(tensors: Sequence[Tensor], shard: Shard, group: list[Span], comm: Communicator) -> Pending:
    """Send this rank's tokens of ``tensors`` (B, H, n, D) to the ranks that have the heads of ``group``."""
    b, _, _, d = tensors[0].shape
    own = group[comm.rank][1] - group[comm.rank][0]
    sends, receives = [], []
    for rank, (start, stop) in enumerate(group):
        elsewhere = rank != comm.rank
        sends.append([x[:, start:stop] for x in tensors] if elsewhere else [])
        receives.append([((b, own, shard.tokens[rank], d), x.dtype) for x in tensors] if elsewhere else [])
    return comm.start(TO_HEADS, sends, receives, tensors[0].device)


def joined_heads(
    tensors: Sequence[Tensor], shard: Shard, group: list[Span], pending: Pending, comm: Communicator
) -> list[Tensor]:
    """``tensors`` (B, h, N, D) of this rank's heads in the order of the sequence."""
    b, _, _, d = tensors[0].shape
    start, stop = group[comm.rank]
    received = pending.wait()
    received[comm.rank] = [x[:, start:stop] for x in tensors]
    whole = [x.new_empty(b, stop - start, shard.layout.tokens, d) for x in tensors]
    for rank, parts in enumerate(received):
        for full, part in zip(whole, parts, strict=True):
            put(full, shard.spans[rank], part, 2)
    return whole


def start_to_tokens(whole: Sequence[Tensor], shard: Shard, group: list[Span], comm: Communicator) -> Pending:
    """Send the tokens of ``whole`` (B, h, N, D), of this rank's heads of ``group``, to the ranks that hold them."""
    b, _, _, d = whole[0].shape
    sends, receives = [], []
    for rank, (start, stop) in enumerate(group):
        elsewhere = rank != comm.rank
        sends.append([take(x, shard.spans[rank], 2) for x in whole] if elsewhere else [])
        form = (b, stop - start, shard.tokens[comm.rank], d)
        receives.append([(form, x.dtype) for x in whole] if elsewhere else [])
    return comm.start(TO_TOKENS, sends, receives, whole[0].device)
