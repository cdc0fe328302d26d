"""What each of a rank's tokens is under a pattern: a shared one, part of a frame that needs nobody, or part of a frame
whose keys lie elsewhere too.

Pure integer arithmetic on the shard, the same on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ...tiles import TilePattern
from .layout import Piece, Shard, Span, join_spans


@dataclass(frozen=True)
class Near:
    """A piece of a frame that sees the frames ``seen``: its own, which may lie on other ranks in part, and its
    neighbours in the window."""

    piece: Piece
    seen: tuple[int, ...]


@dataclass(frozen=True)
class Roles:
    """One rank's tokens, as ranges of its own tokens (0 = its first one).

    ``shared`` tokens (prefix, reference frames, suffix) attend to everything; ``alone`` are runs of frames that lie here
    entirely and see themselves only; ``near`` are all others. ``halo`` are the pieces whose keys and values other ranks
    need, each with these ranks.
    """

    shared: tuple[Span, ...]
    alone: tuple[Span, ...]
    near: tuple[Near, ...]
    halo: tuple[tuple[Piece, tuple[int, ...]], ...]

    @property
    def shared_tokens(self) -> int:
        return sum(stop - start for start, stop in self.shared)

    @property
    def others(self) -> list[Span]:
        """The tokens that are not shared ones."""
        return join_spans(sorted([*self.alone, *(near.piece.local_span for near in self.near)]))

    def pieces_for(self, peer: int) -> list[Piece]:
        """The pieces whose keys and values ``peer`` needs, in order."""
        return [piece for piece, peers in self.halo if peer in peers]


@lru_cache(maxsize=256)
def roles(shard: Shard, pattern: TilePattern) -> tuple[Roles, ...]:
    """The roles of every rank's tokens under ``pattern``."""
    neighbours = pattern.neighbours(shard.layout.grid.t)
    return tuple(_roles_of(shard, rank, neighbours) for rank in range(shard.ranks))


def _roles_of(shard: Shard, rank: int, neighbours: dict[int, tuple[int, ...]]) -> Roles:
    shared, alone, near, halo = [], [], [], []
    for piece in shard.pieces[rank]:
        if piece.frame is None or piece.frame not in neighbours:
            shared.append(piece.local_span)
            continue
        seen = neighbours[piece.frame]
        if seen == (piece.frame,) and piece.tokens == shard.layout.grid.tokens_per_frame:
            alone.append(piece.local_span)
        else:
            near.append(Near(piece, seen))
        # The window is symmetric: whoever holds what this frame sees, sees this frame.
        peers = {other for frame in seen for other in shard.holders[frame]} - {rank}
        if peers:
            halo.append((piece, tuple(sorted(peers))))
    return Roles(tuple(join_spans(shared)), tuple(join_spans(alone)), tuple(near), tuple(halo))
