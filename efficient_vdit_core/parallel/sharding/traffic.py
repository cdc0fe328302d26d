"""How many bytes each scheme sends in a layer, and which scheme sends fewer."""

from __future__ import annotations

from functools import lru_cache

from ...head_patterns import LayerPattern
from ...tiles import TilePattern
from .layout import Shard
from .roles import roles

LSE_BYTES = 4


@lru_cache(maxsize=256)
def rb_bytes(
    shard: Shard, pattern: TilePattern, heads: int, head_dim: int, itemsize: int, batch: int = 1
) -> tuple[int, ...]:
    """Bytes that each rank sends in one layer by RB: shared q, k, v to all, partial rows and their lse, the keys
    and values of cut frames and of frames in another's window."""
    every = roles(shard, pattern)
    row, total = heads * head_dim * itemsize, sum(r.shared_tokens for r in every)
    sent = []
    for role in every:
        halo = sum(piece.tokens * len(peers) for piece, peers in role.halo)
        shared, rows = 3 * role.shared_tokens * (shard.ranks - 1), total - role.shared_tokens
        sent.append(batch * (row * (shared + rows + 2 * halo) + LSE_BYTES * heads * rows))
    return tuple(sent)


@lru_cache(maxsize=256)
def ulysses_bytes(shard: Shard, heads: int, head_dim: int, itemsize: int, batch: int = 1) -> tuple[int, ...]:
    """Bytes that each rank sends in one layer by Ulysses: q, k, v of the others' heads, the result of the others'
    tokens."""
    sent = []
    for tokens, (start, stop) in zip(shard.tokens, shard.shares_of(heads), strict=True):
        own = stop - start
        sent.append(batch * head_dim * itemsize * (3 * tokens * (heads - own) + own * (shard.layout.tokens - tokens)))
    return tuple(sent)


def scheme_of(asked: str, shard: Shard, pattern: LayerPattern, heads: int, head_dim: int, itemsize: int) -> str:
    """The scheme of a layer where ``rb``, ``ulysses`` or ``auto`` was asked for: the one that sends fewer bytes in all
    (``rb`` where k P < T on even shares).

    Full layers, layers whose heads differ and those with mean frames are always ``ulysses``: under RB all heads have the
    same reference frames, and nobody sends what is left out.
    """
    if pattern.is_full(shard.layout.grid.t) or len(pattern.kinds) != 1 or pattern.kinds[0].means:
        return "ulysses"
    if asked != "auto":
        return asked
    rb, ulysses = (
        rb_bytes(shard, pattern.kinds[0], heads, head_dim, itemsize),
        ulysses_bytes(shard, heads, head_dim, itemsize),
    )
    return "rb" if sum(rb) < sum(ulysses) else "ulysses"
