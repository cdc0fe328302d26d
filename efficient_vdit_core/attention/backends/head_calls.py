"""How a layer's attention falls into calls of the backends, where its heads follow different patterns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...plan.head_patterns import LayerPattern, by_head
from ...tiles import TilePattern

MANY_PATTERNS = ("dense", "triton", "flex")  # what takes heads of different patterns in one call


@dataclass(frozen=True)
class Call:
    """One call of a backend: the ``heads`` of a layer that it takes, ascending, and their pattern."""

    backend: str
    pattern: LayerPattern
    heads: tuple[int, ...]


def calls_of(pattern: LayerPattern, heads: int, backends: Mapping[TilePattern, str], frames: int) -> list[Call]:
    """The calls that ``heads`` take, by the backend of each group of them that is alike: one for all groups that a backend
    takes at once, else one a group.

    Groups that leave nothing out join the others under ``flex`` where it computes all of those: where it is chosen it is
    not far from dense attention's rate, which the fused kernel is.
    """
    groups = pattern.head_groups(heads)
    if len(groups) == 1:
        return [Call(backends[alike], alike, of_group) for alike, of_group in groups.items()]
    members: dict[tuple[str, TilePattern | None], dict[int, TilePattern]] = {}
    only_flex = {backends[p] for p in groups if not p.is_full(frames)} == {"flex"}
    for alike, of_group in groups.items():
        name = "flex" if only_flex else backends[alike]
        one = members.setdefault((name, None if name in MANY_PATTERNS else alike), {})
        one.update(dict.fromkeys(of_group, alike))
    return [Call(name, by_head(one[h] for h in sorted(one)), tuple(sorted(one))) for (name, _), one in members.items()]
