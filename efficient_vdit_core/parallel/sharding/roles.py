"""What each of a rank's tokens is under a pattern: global, part of a whole frame, or part of a cut frame.

Pure integer arithmetic on the shard, the same on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ...tiles import TilePattern
from .layout import Piece, Shard, Span, join_spans


@dataclass(frozen=True)
class Roles:
    """One rank's tokens, as ranges of its own tokens (0 = its first one).

    ``shared`` tokens (prefix, reference frames, suffix) attend to everything; ``whole`` are runs of frames that lie
    here entirely; ``cut`` are pieces of frames whose other parts lie on the ranks ``cut_peers[i]``.
    """

    shared: tuple[Span, ...]
    whole: tuple[Span, ...]
    cut: tuple[Piece, ...]
    cut_peers: tuple[tuple[int, ...], ...]

    @property
    def shared_tokens(self) -> int:
        return sum(stop - start for start, stop in self.shared)

    @property
    def others(self) -> list[Span]:
        """The tokens that are not shared ones."""
        return join_spans(sorted([*self.whole, *(piece.local_span for piece in self.cut)]))

    def pieces_for(self, peer: int) -> list[Piece]:
        """The cut pieces whose keys and values ``peer`` needs, in order."""
        return [piece for piece, peers in zip(self.cut, self.cut_peers, strict=True) if peer in peers]


@lru_cache(maxsize=256)
def roles(shard: Shard, pattern: TilePattern) -> tuple[Roles, ...]:
    """The roles of every rank's tokens under ``pattern``."""
    references = set(pattern.reference_frames(shard.layout.grid.t))
    return tuple(_roles_of(shard, rank, references) for rank in range(shard.ranks))


def _roles_of(shard: Shard, rank: int, references: set[int]) -> Roles:
    shared, whole, cut = [], [], []
    for piece in shard.pieces[rank]:
        if piece.frame is None or piece.frame in references:
            shared.append(piece.local_span)
        elif piece.tokens == shard.layout.grid.tokens_per_frame:
            whole.append(piece.local_span)
        else:
            cut.append(piece)
    peers = [tuple(r for r in shard.holders[piece.frame] if r != rank) for piece in cut if piece.frame is not None]
    return Roles(tuple(join_spans(shared)), tuple(join_spans(whole)), tuple(cut), tuple(peers))
