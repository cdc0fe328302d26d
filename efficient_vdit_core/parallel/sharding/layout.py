"""Which rank holds which tokens of the sequence: whole frames where that is balanced, parts of frames where it is not,
padding never.

Three layouts, so that every number of frames is shared out evenly:

- ``by_frames`` (L1): contiguous whole frames. The owner of a reference frame has a little less attention to do.
- ``by_references`` (L2): the tokens of the reference frames are split over all ranks, the other frames stay whole.
- ``by_tokens`` (L3): the reference tokens are split, and so are all others, across frame borders; a frame that is cut
  swaps its keys and values between the ranks that hold it.

Prefix and suffix tokens are split like reference tokens. Pure integer arithmetic: every rank computes the same answer.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ...attention import TokenLayout
from ...attention.backends.spans import Span
from ...attention.layout import global_spans
from ...plan.head_patterns import LayerPattern
from ...tiles import TilePattern


@dataclass(frozen=True)
class Split:
    """What is peculiar to a sequence and its ranks.

    Attributes:
        borders: where the sequence goes from one hidden state to the next; of each of them every rank gets a share of
            what is split to the token.
        weights: the ranks' shares of the work in whole numbers, () = even ones.
    """

    borders: tuple[int, ...] = ()
    weights: tuple[int, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Tokens ``start`` to ``stop`` (exclusive) of one frame (None: prefix or suffix), which a rank holds from its token
    ``local`` on."""

    frame: int | None
    start: int
    stop: int
    local: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    @property
    def local_span(self) -> Span:
        return self.local, self.local + self.tokens


@dataclass(frozen=True)
class Shard:
    """The tokens of every rank: ``spans[rank]`` are ascending ranges of the sequence, in the order in which the rank
    holds them.

    ``weights`` as of ``Split``. Raises ValueError where the spans do not cover every token exactly once.
    """

    layout: TokenLayout
    spans: tuple[tuple[Span, ...], ...]
    weights: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        covered = sorted(span for spans in self.spans for span in spans)
        borders = [0, *(stop for _, stop in covered)]
        whole = borders[-1] == self.layout.tokens and all(
            a == start for a, (start, _) in zip(borders, covered, strict=False)
        )
        ascending = all(list(spans) == sorted(spans) for spans in self.spans)
        if not whole or not ascending or any(start >= stop for start, stop in covered):
            raise ValueError(
                f"The shard's spans are {self.spans}, expected ascending ranges that cover the {self.layout.tokens} tokens once. "
                "Build a shard with by_frames, by_references or by_tokens."
            )

    @property
    def ranks(self) -> int:
        return len(self.spans)

    def shares_of(self, count: int) -> list[Span]:
        """``count`` things over the ranks by their weights."""
        return weighted_shares(count, self.weights or (1,) * self.ranks)

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """How many tokens each rank holds."""
        return tuple(sum(stop - start for start, stop in spans) for spans in self.spans)

    @cached_property
    def pieces(self) -> tuple[tuple[Piece, ...], ...]:
        """The spans of each rank cut at frame borders."""
        borders = _borders(self.layout)
        starts = [start for start, _ in borders]
        result = []
        for spans in self.spans:
            held, local = [], 0
            for start, stop in spans:
                while start < stop:
                    unit = bisect.bisect_right(starts, start) - 1
                    end = min(stop, borders[unit + 1][0] if unit + 1 < len(borders) else self.layout.tokens)
                    held.append(Piece(borders[unit][1], start, end, local))
                    local += end - start
                    start = end
            result.append(tuple(held))
        return tuple(result)

    @cached_property
    def holders(self) -> dict[int, tuple[int, ...]]:
        """The ranks that hold a part of each frame, ascending."""
        found: dict[int, list[int]] = {}
        for rank, pieces in enumerate(self.pieces):
            for frame in dict.fromkeys(piece.frame for piece in pieces if piece.frame is not None):
                found.setdefault(frame, []).append(rank)
        return {frame: tuple(ranks) for frame, ranks in found.items()}


EVEN = Split()


def by_frames(layout: TokenLayout, ranks: int, split: Split = EVEN) -> Shard:
    """Layout L1: contiguous whole frames, shares that differ by one frame at most (a rank may get none)."""
    return _two_part(layout, ranks, (), layout.grid.tokens_per_frame, split)


def by_references(layout: TokenLayout, ranks: int, pattern: TilePattern, split: Split = EVEN) -> Shard:
    """Layout L2: the reference frames' tokens split over all ranks, the other frames whole and contiguous."""
    return _two_part(layout, ranks, pattern.reference_frames(layout.grid.t), layout.grid.tokens_per_frame, split)


def by_tokens(layout: TokenLayout, ranks: int, pattern: TilePattern, split: Split = EVEN) -> Shard:
    """Layout L3: reference tokens and all other tokens each split to one token, across frame borders."""
    return _two_part(layout, ranks, pattern.reference_frames(layout.grid.t), 1, split)


def choose_shard(layout: TokenLayout, ranks: int, patterns: Iterable[LayerPattern], split: Split = EVEN) -> Shard:
    """One shard for all layers: L1 where whole frames share out evenly, else L2, else L3, for the commonest sparse
    pattern.

    Full layers, those whose heads differ and those with mean frames run on any shard, so the others count. L3 cuts
    frames, which costs a halo, so it comes last; without such a layer there is none, and tokens are simply split evenly.
    Whole frames are too coarse for shares that are not even.
    """
    frames = layout.grid.t
    alike = (p.kinds[0] for p in patterns if len(p.kinds) == 1 and not p.is_full(frames))
    sparse = Counter(p for p in alike if not p.means)
    if frames % _checked(ranks) == 0 and not split.weights:
        return by_frames(layout, ranks, split)
    if not sparse:
        return by_tokens(layout, ranks, TilePattern(None), split)
    most = max(sparse.values())
    pattern = min((p for p, count in sparse.items() if count == most), key=lambda p: p.density(frames))
    whole = not split.weights and (frames - len(pattern.reference_frames(frames))) % ranks == 0
    return (by_references if whole else by_tokens)(layout, ranks, pattern, split)


def even_shares(count: int, ranks: int) -> list[Span]:
    """``count`` things over ``ranks`` as contiguous ranges whose sizes differ by one at most."""
    return weighted_shares(count, (1,) * ranks)


def weighted_shares(count: int, weights: Sequence[int]) -> list[Span]:
    """``count`` things as contiguous ranges in proportion to ``weights``, to one thing; where there are enough, none is
    empty."""
    each = int(count >= len(weights))
    spread = count - each * len(weights)
    ends = [
        each * rank + spread * done // sum(weights)
        for rank, done in enumerate(itertools.accumulate(weights, initial=0))
    ]
    return list(itertools.pairwise(ends))


def join_spans(spans: Iterable[Span]) -> list[Span]:
    """Ascending spans with neighbours joined and empty ones dropped."""
    joined: list[Span] = []
    for start, stop in spans:
        if start == stop:
            continue
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def cut_spans(spans: Sequence[Span], start: int, stop: int) -> list[Span]:
    """The things number ``start`` to ``stop`` of those that ``spans`` list."""
    cut, before = [], 0
    for low, high in spans:
        first, last = max(start - before, 0), min(stop - before, high - low)
        if first < last:
            cut.append((low + first, low + last))
        before += high - low
    return cut


def _two_part(layout: TokenLayout, ranks: int, references: tuple[int, ...], unit: int, split: Split) -> Shard:
    """Prefix, ``references`` and suffix split to the token, all other frames in units of ``unit`` tokens.

    The spare units of the two parts go to different ranks (the others are dealt out from the last rank on).
    """
    shared, size = global_spans(layout, references), layout.grid.tokens_per_frame
    others = [layout.span(f, f + 1) for f in range(layout.grid.t) if f not in set(references)]
    count = len(others) * size // unit
    edges = [0, *sorted(split.borders), layout.tokens]
    parts = [[(a + low, b + low) for a, b in within(shared, low, high)] for low, high in itertools.pairwise(edges)]
    weights = split.weights or (1,) * _checked(ranks)
    first = [weighted_shares(sum(stop - start for start, stop in part), weights) for part in parts]
    second = [(count - stop, count - start) for start, stop in reversed(weighted_shares(count, weights[::-1]))]
    held = []
    for rank, rest in enumerate(second):
        spans = [span for part, shares in zip(parts, first, strict=True) for span in cut_spans(part, *shares[rank])]
        spans += cut_spans(others, rest[0] * unit, rest[1] * unit)
        held.append(tuple(join_spans(sorted(spans))))
    return Shard(layout, tuple(held), split.weights)


def within(spans: Iterable[Span], start: int, stop: int) -> list[Span]:
    """The parts of ``spans`` between ``start`` and ``stop``, counted from ``start``."""
    cut = ((max(a, start) - start, min(b, stop) - start) for a, b in spans)
    return [(a, b) for a, b in cut if a < b]


def _borders(layout: TokenLayout) -> list[tuple[int, int | None]]:
    """Where each unit of the sequence begins, and its frame (None: prefix or suffix)."""
    size = layout.grid.tokens_per_frame
    frames: list[tuple[int, int | None]] = [(layout.prefix + f * size, f) for f in range(layout.grid.t)]
    end = layout.prefix + layout.grid.tokens
    return [*([(0, None)] if layout.prefix else []), *frames, *([(end, None)] if layout.suffix else [])]


def _checked(ranks: int) -> int:
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise ValueError(f"ranks is {ranks!r}, expected a whole number from 1: one for each device.")
    return ranks
