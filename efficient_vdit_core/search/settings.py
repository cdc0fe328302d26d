"""What a search tries, what it measures and what it aims at."""

from __future__ import annotations

from dataclasses import dataclass

from ..attention import TokenLayout
from ..tiles import TilePattern
from .by_head import MAX_GROUPS
from .candidates import sparse_candidates
from .record import ATTENTION, BLOCK, ProbeRecord
from .select import FLOPS, MEASURED, check_speedup, check_threshold, choose_for_speedup


@dataclass(frozen=True)
class SearchSettings:
    """A search for one target: the ``speedup`` of the attention or, where that is 0, the ``threshold``.

    Attributes:
        candidates: patterns to try in each layer, as ``parse_candidates`` reads them.
        threshold: largest relative error of a layer.
        speedup: how many times less attention.
        error: where errors are measured: "attention", "block" or "output".
        costs: what a pattern costs: "flops", its share of dense attention's, or "measured", that of its time.
        head_groups: at most as many different patterns in a layer, over its heads; 1 is the paper's search by layer.

    Raises ValueError where heads cannot be told apart as asked.
    """

    candidates: tuple[TilePattern, ...]
    threshold: float = 0.0
    speedup: float = 0.0
    error: str = ATTENTION
    costs: str = FLOPS
    head_groups: int = 1

    def __post_init__(self) -> None:
        groups = self.head_groups
        if type(groups) is not int or not 1 <= groups <= MAX_GROUPS:
            raise ValueError(
                f"head_groups is {groups!r}, expected 1 to {MAX_GROUPS}; 1 gives all heads of a layer one pattern."
            )
        if groups > 1 and self.error == BLOCK:
            raise ValueError(
                f"head_groups is {groups} and the error is that of the {self.error}, which no head has of its own. "
                "Measure the attention or the output, or set head_groups to 1."
            )

    @property
    def measured(self) -> bool:
        """Whether a pattern costs its time."""
        return self.costs == MEASURED

    @property
    def by_head(self) -> bool:
        """Whether the heads of a layer may differ."""
        return self.head_groups > 1

    def record(self, frames: int) -> ProbeRecord:
        """What a run over ``frames`` latent frames fills. Raises ValueError as `check` does."""
        self.check(frames)
        return ProbeRecord(sparse_candidates(self.candidates, frames), timed=self.measured, by_head=self.by_head)

    def check(self, frames: int) -> None:
        """Raises ValueError, before a model runs, where no candidate leaves anything out of ``frames`` latent frames, and for a
        target that means nothing or is out of reach whatever the errors.

        Extra tokens only make a pattern dearer, of which `check_reach` tells once they are known. By the clock a pattern may
        take less than its share of FLOPs, so that nothing is out of reach before it is timed.
        """
        candidates = sparse_candidates(self.candidates, frames)
        if not self.speedup:
            check_threshold(self.threshold)
        elif self.measured:
            check_speedup(self.speedup)
        else:
            self._check_reach({pattern: pattern.density(frames) for pattern in candidates})

    def check_reach(self, layout: TokenLayout) -> None:
        """As `check`, where a run has shown what stands beside the video."""
        if self.speedup and not self.measured:
            extra = layout.prefix + layout.suffix
            self._check_reach({pattern: pattern.flop_density(layout.grid, extra) for pattern in self.candidates})

    def _check_reach(self, costs: dict[TilePattern, float]) -> None:
        choose_for_speedup([dict.fromkeys(costs, 0.0)], [costs], self.speedup)
