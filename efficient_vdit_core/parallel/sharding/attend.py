"""Attention over a sequence whose tokens are sharded over ranks: the entry, and the choice of the scheme."""

from __future__ import annotations

import torch
from torch import Tensor

from ...attention import tile_attention
from ...plan.head_patterns import LayerPattern
from .communicator import Communicator
from .layout import Shard
from .reference_broadcast import reference_broadcast_attention
from .reference_broadcast_training import trained_reference_broadcast
from .traffic import ALONE, scheme_of
from .ulysses import Inner, ulysses_attention
from .ulysses_training import trained_ulysses

SCHEMES = ("auto", "rb", "ulysses")


def sharded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: Shard,
    pattern: LayerPattern,
    comm: Communicator,
    *,
    scheme: str = "auto",
    inner: Inner | None = None,
) -> Tensor:
    """Attention under ``pattern`` of this rank's tokens; every rank calls it for the same layer. Where one rank wants
    gradients all do, and each calls their backward.

    Args:
        q, k, v: (B, H, n, D) with n = ``shard.tokens[comm.rank]``.
        scheme: as of ``scheme_of``.
        inner: what Ulysses, and a rank alone, call on whole sequences (B, h, N, D) from a head on, default
            ``tile_attention`` under the pattern of these heads.

    Returns:
        (B, H, n, D).

    Raises:
        ValueError: a tensor has another length than the shard says, or the scheme is unknown.
    """
    _check(q, k, v, shard, comm, scheme)
    scheme = scheme_of(scheme, shard, pattern, q.shape[1], q.shape[3], q.element_size())
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if scheme == "rb":
        by_rb = trained_reference_broadcast if trained else reference_broadcast_attention
        return by_rb(q, k, v, shard, pattern.kinds[0], comm)

    def under_the_pattern(q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
        return tile_attention(q, k, v, shard.layout, pattern.of_heads(first, q.shape[1]))

    inner = inner or under_the_pattern
    if scheme == ALONE:
        return inner(q, k, v, 0)
    by_ulysses = trained_ulysses if trained else ulysses_attention
    return by_ulysses(q, k, v, shard, comm, inner)


def _check(q: Tensor, k: Tensor, v: Tensor, shard: Shard, comm: Communicator, scheme: str) -> None:
    if scheme not in SCHEMES:
        raise ValueError(f"scheme is {scheme!r}, expected one of {', '.join(SCHEMES)}.")
    if shard.ranks != comm.size:
        raise ValueError(f"The shard has {shard.ranks} parts, expected {comm.size}: one for each rank of the group.")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.shape[2] != shard.tokens[comm.rank] or x.shape != q.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, expected (batch, heads, {shard.tokens[comm.rank]}, head_dim) on rank {comm.rank}. "
                "Slice the hidden state with the same shard."
            )
