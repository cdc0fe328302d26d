"""How a batch of guidance branches goes over the ranks: as one sequence that all of them share, or a part of the batch to
each of several groups, which share out its sequence among themselves.

CFG evaluates a prompt and a negative one; where both come in one batch, half of the ranks can take each. They then
exchange half as much, and two ranks nothing. What is better is a question of costs: with an odd number of like ranks the
groups are uneven, and the smaller one is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...attention.backends.spans import Span
from .layout import even_shares, weighted_shares

AUTO, SEQUENCE, BRANCHES = DIVISIONS = ("auto", "sequence", "branches")


@dataclass(frozen=True)
class Division:
    """``groups``: the ranks of each, ascending; ``parts``: the branches [start, stop) of the batch that each computes.

    Raises ValueError where a group is empty, a rank stands in two, or a branch in none or in two.
    """

    groups: tuple[tuple[int, ...], ...]
    parts: tuple[Span, ...]

    def __post_init__(self) -> None:
        ranks = sorted(rank for group in self.groups for rank in group)
        ends = [0, *(stop for _, stop in self.parts)]
        whole = all(start == end < stop for (start, stop), end in zip(self.parts, ends, strict=False))
        if ranks != list(range(len(ranks))) or not all(self.groups) or not whole or len(self.groups) != len(self.parts):
            raise ValueError(
                f"A division has the groups {self.groups} for the branches {self.parts}, expected each rank and each branch in one."
            )

    @property
    def branches(self) -> int:
        return self.parts[-1][1]

    @property
    def by_branches(self) -> bool:
        return len(self.groups) > 1

    def group_of(self, rank: int) -> int:
        """The number of the rank's group."""
        return next(number for number, group in enumerate(self.groups) if rank in group)

    def text(self) -> str:
        """Such as ``ranks 0+1 and 2+3``."""
        return f"ranks {' and '.join('+'.join(map(str, group)) for group in self.groups)}"


def by_sequence(ranks: int, branches: int) -> Division:
    """All ranks share out the sequence of all branches."""
    return Division((tuple(range(ranks)),), ((0, branches),))


# Seconds of one forward over so many branches on these ranks.
Seconds = Callable[[int, tuple[int, ...]], float]


def seconds_of(division: Division, seconds: Seconds) -> float:
    """How long the slowest group takes."""
    return max(
        seconds(stop - start, group) for group, (start, stop) in zip(division.groups, division.parts, strict=True)
    )


def choose_division(asked: str, rates: Sequence[float], branches: int, seconds: Seconds) -> Division:
    """The fastest division of so many branches that ``asked``, one of ``DIVISIONS``, allows.

    ``rates``: FLOPs a second of each rank. Where several are equally fast it is that of the fewest groups, so that every
    process comes to the same one.
    """
    ranks, sequence = len(rates), by_sequence(len(rates), branches)
    most = min(branches, ranks)
    if asked == SEQUENCE or most < 2:
        return sequence
    found = [d for number in range(2, most + 1) for d in _groupings(rates, even_shares(branches, number))]
    return min([*([sequence] if asked == AUTO else []), *found], key=lambda d: seconds_of(d, seconds))


def _groupings(rates: Sequence[float], parts: Sequence[Span]) -> list[Division]:
    """Neighbours together, who may be nearer to one another; and, for ranks that are not alike, the groups whose loads
    are the most even."""
    counts = [stop - start for start, stop in parts]
    shares = weighted_shares(len(rates), counts)
    neighbours = tuple(tuple(range(start, stop)) for start, stop in shares)
    groups: list[list[int]] = [[] for _ in counts]
    for rank in sorted(range(len(rates)), key=lambda rank: -rates[rank]):
        waits = [count / (sum(rates[r] for r in group) or 1e-30) for count, group in zip(counts, groups, strict=True)]
        groups[waits.index(max(waits))].append(rank)
    balanced = tuple(tuple(sorted(group)) for group in groups)
    return [Division(found, tuple(parts)) for found in dict.fromkeys((neighbours, balanced))]
