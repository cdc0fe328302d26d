"""How many bytes each scheme sends in a layer, and which scheme sends fewer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ...plan.head_patterns import LayerPattern
from ...tiles import TilePattern
from .layout import Shard
from .roles import roles

LSE_BYTES = 4
ALONE = "alone"  # the scheme of one rank, which sends nothing


@dataclass(frozen=True)
class RbBytes:
    """Bytes that a rank sends in one layer by RB, in the order in which it does: shared q to all, the keys and values of
    cut frames and of frames in another's window, shared k and v to all, partial rows and their lse."""

    queries: int
    halo: int
    keys: int
    rows: int

    @property
    def total(self) -> int:
        return self.queries + self.halo + self.keys + self.rows


@lru_cache(maxsize=256)
def rb_exchanges(
    shard: Shard, pattern: TilePattern, heads: int, head_dim: int, itemsize: int, batch: int = 1
) -> tuple[RbBytes, ...]:
    """What each rank sends in one layer by RB."""
    every = roles(shard, pattern)
    row, total = batch * heads * head_dim * itemsize, sum(r.shared_tokens for r in every)
    sent = []
    for role in every:
        halo = sum(piece.tokens * len(peers) for piece, peers in role.halo)
        shared, rows = role.shared_tokens * (shard.ranks - 1), total - role.shared_tokens
        sent.append(RbBytes(row * shared, 2 * row * halo, 2 * row * shared, (row + batch * LSE_BYTES * heads) * rows))
    return tuple(sent)


def rb_bytes(
    shard: Shard, pattern: TilePattern, heads: int, head_dim: int, itemsize: int, batch: int = 1
) -> tuple[int, ...]:
    """Bytes that each rank sends in one layer by RB."""
    return tuple(sent.total for sent in rb_exchanges(shard, pattern, heads, head_dim, itemsize, batch))


@lru_cache(maxsize=256)
def ulysses_exchanges(
    shard: Shard, heads: int, head_dim: int, itemsize: int, batch: int = 1
) -> tuple[tuple[int, int], ...]:
    """Bytes that each rank sends in one layer by Ulysses: q, k, v of the others' heads, then the result of the others'
    tokens."""
    sent, row = [], batch * head_dim * itemsize
    for tokens, (start, stop) in zip(shard.tokens, shard.shares_of(heads), strict=True):
        own = stop - start
        sent.append((row * 3 * tokens * (heads - own), row * own * (shard.layout.tokens - tokens)))
    return tuple(sent)


def ulysses_bytes(shard: Shard, heads: int, head_dim: int, itemsize: int, batch: int = 1) -> tuple[int, ...]:
    """Bytes that each rank sends in one layer by Ulysses."""
    return tuple(sum(sent) for sent in ulysses_exchanges(shard, heads, head_dim, itemsize, batch))


def scheme_of(asked: str, shard: Shard, pattern: LayerPattern, heads: int, head_dim: int, itemsize: int) -> str:
    """The scheme of a layer where ``rb``, ``ulysses`` or ``auto`` was asked for: the one that sends fewer bytes in all
    (``rb`` where k P < T on even shares).

    Full layers, layers whose heads differ and those with mean frames are always ``ulysses``: under RB all heads have the
    same reference frames, and nobody sends what is left out. One rank is ``alone``.
    """
    if shard.ranks == 1:
        return ALONE
    if pattern.is_full(shard.layout.grid.t) or len(pattern.kinds) != 1 or pattern.kinds[0].means:
        return "ulysses"
    if asked != "auto":
        return asked
    rb, ulysses = (
        rb_bytes(shard, pattern.kinds[0], heads, head_dim, itemsize),
        ulysses_bytes(shard, heads, head_dim, itemsize),
    )
    return "rb" if sum(rb) < sum(ulysses) else "ulysses"
