"""A layer whose attention heads follow different tile patterns.

The paper gives a layer one pattern; heads of one layer differ far more than layers do. Where all heads are alike the
pattern is a plain ``TilePattern``, which fits any number of heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..tiles import TilePattern, TokenGrid


@dataclass(frozen=True)
class HeadPatterns:
    """One pattern for each head of a layer, in their order; made by ``by_head``."""

    patterns: tuple[TilePattern, ...]

    @cached_property
    def groups(self) -> dict[TilePattern, tuple[int, ...]]:
        """The heads of each pattern, ascending; patterns in the order of their first head."""
        found: dict[TilePattern, list[int]] = {}
        for head, pattern in enumerate(self.patterns):
            found.setdefault(pattern, []).append(head)
        return {pattern: tuple(heads) for pattern, heads in found.items()}

    def head_groups(self, heads: int) -> dict[TilePattern, tuple[int, ...]]:
        """The ``heads`` of a call by the pattern that they follow. Raises ValueError for another number of heads."""
        if len(self.patterns) != heads:
            raise ValueError(
                f"The layer's pattern is for {len(self.patterns)} heads, but its attention has {heads}. "
                "Choose a plan that was made for this model."
            )
        return self.groups

    def of_heads(self, start: int, count: int) -> LayerPattern:
        """The pattern of ``count`` heads from head ``start`` on."""
        return by_head(self.patterns[start : start + count])

    @property
    def kinds(self) -> tuple[TilePattern, ...]:
        """The different patterns of the heads, in the order of their first head."""
        return tuple(self.groups)

    def is_full(self, frames: int) -> bool:
        """True where no head leaves anything out of ``frames`` frames."""
        return all(pattern.is_full(frames) for pattern in self.kinds)

    def density(self, frames: int) -> float:
        """Mean share of the frame x frame tiles that is computed, 0 to 1."""
        return self.mean({pattern: pattern.density(frames) for pattern in self.kinds})

    def flop_density(self, grid: TokenGrid, extra: int = 0) -> float:
        """Mean over the heads, as of ``TilePattern``."""
        return self.mean({pattern: pattern.flop_density(grid, extra) for pattern in self.kinds})

    def mean(self, values: Mapping[TilePattern, float]) -> float:
        """The mean of ``values`` by pattern over the heads."""
        return sum(len(heads) * values[pattern] for pattern, heads in self.groups.items()) / len(self.patterns)

    def placed(self, placement: str, shift: int = 0) -> LayerPattern:
        """The same patterns, standing elsewhere. Raises ValueError for an unknown placement."""
        return by_head(pattern.placed(placement, shift) for pattern in self.patterns)

    def scaled(self, made_for: int | None, frames: int) -> LayerPattern:
        """Each head's pattern for a clip of ``frames``, as of ``TilePattern``."""
        return by_head(pattern.scaled(made_for, frames) for pattern in self.patterns)

    def name(self, frames: int) -> str:
        """Such as ``heads: 5 x 1:7~1, 3 x full``."""
        counts = (f"{len(heads)} x {pattern.name(frames)}" for pattern, heads in self.groups.items())
        return f"heads: {', '.join(counts)}"


# A worker may hold two copies of this package, whose classes are not the same: what computes asks the pattern, by the
# methods that both have, and never for its class.
LayerPattern = TilePattern | HeadPatterns


def join_heads(heads: tuple[int, ...]) -> str:
    """Ascending (0, 1, 2, 5) as ``0-2,5``."""
    every = set(heads)
    starts = [h for h in heads if h - 1 not in every]
    ends = [h for h in heads if h + 1 not in every]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def by_head(patterns: Iterable[TilePattern]) -> LayerPattern:
    """A layer's pattern from one for each head; a plain one where all heads are alike."""
    every = tuple(patterns)
    return every[0] if len(set(every)) == 1 else HeadPatterns(every)


def from_groups(groups: Iterable[tuple[Iterable[int], TilePattern]], heads: int | None = None) -> LayerPattern:
    """The same from patterns and their heads; of a layer of so many ``heads``, or up to the last that is named.

    Raises ValueError, to be finished as a sentence, where a head is named twice or left out.
    """
    found: dict[int, TilePattern] = {}
    for alike, pattern in groups:
        for head in alike:
            if head in found:
                raise ValueError(f"names head {head} twice")
            found[head] = pattern
    every = range(heads or max(found) + 1)
    missing = next((head for head in every if head not in found), None)
    if missing is not None:
        raise ValueError(f"leaves out head {missing}{f' of {heads}' if heads else ''}")
    return by_head(found[head] for head in every)
