"""The times of multi-step consistency distillation: segments of diffusion time, each walked by the teacher in
sub-steps.

The edges come from `segment_edges`, as those of the sampler do. A time on an edge belongs to the segment below it: from
there the student jumps to that segment's end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...sampling.path import NoisePath
from ...sampling.schedule import segment_edges


@dataclass(frozen=True)
class Place:
    """a and s (B,) float64 at timesteps ``time`` (B,) float64."""

    time: Tensor
    a: Tensor
    s: Tensor


@dataclass(frozen=True)
class Draw:
    """Where each of B examples stands: at ``at``, one teacher step above ``below``, in ``segment`` (0 = data) that ends
    at ``end``.

    ``first`` marks those whose step already ends at the segment's end; ``index`` is the grid point that they stand on.
    """

    index: Tensor
    segment: Tensor
    at: Place
    below: Place
    end: Place
    first: Tensor


def sub_steps(teacher_steps: int, segments: int) -> int:
    """How many sub-steps a segment has, of ``teacher_steps`` over all: the nearest number, at least one."""
    return max(1, round(teacher_steps / segments))


class SegmentGrid:
    """``teacher_steps`` sub-steps in all, shared out to the segments by `sub_steps`.

    ``data_side``: how many times more often than the others the segment next to the data is drawn. ``serves``: tells of
    timesteps whether a step from there is the network's; segments that begin elsewhere are not drawn.
    """

    def __init__(
        self,
        path: NoisePath,
        segments: int,
        teacher_steps: int,
        data_side: float = 1.0,
        serves: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.segments, self.per_segment = segments, sub_steps(teacher_steps, segments)
        edges = segment_edges(segments, segments * self.per_segment, start=path.start, clean=path.clean)
        self.times = edges.flip(0)  # ascending from the clean data
        self.a, self.s = path.coefficients(self.times)
        weight = torch.ones(segments, dtype=torch.float64)
        weight[0] = data_side
        if serves is not None:
            weight *= serves(self.times[self.per_segment :: self.per_segment])
        if not weight.any():
            raise ValueError(
                f"None of the {segments} segments begins where this network is asked. Raise segments, or train the other."
            )
        self.bounds = (weight / weight.sum()).cumsum(0)

    @property
    def steps(self) -> int:
        return self.segments * self.per_segment

    def draw(self, batch: int, generator: torch.Generator) -> Draw:
        """Times for a batch, stratified: each batch covers the whole range evenly."""
        u = (torch.rand(1, generator=generator, dtype=torch.float64) + torch.arange(batch) / batch) % 1
        segment = torch.searchsorted(self.bounds, u, right=True).clamp(max=self.segments - 1)
        low = torch.where(segment > 0, self.bounds[(segment - 1).clamp(min=0)], 0.0)
        within = ((u - low) / (self.bounds[segment] - low) * self.per_segment).long().clamp(0, self.per_segment - 1)
        return self.at(segment * self.per_segment + within + 1)

    def at(self, index: Tensor) -> Draw:
        """The draw at grid points ``index`` (B,), 1 to ``steps``."""
        segment = (index - 1) // self.per_segment
        end = segment * self.per_segment
        return Draw(index, segment, self._place(index), self._place(index - 1), self._place(end), index - 1 == end)

    def beginning(self, segment: Tensor) -> Draw:
        """The draw at the noisy edges of ``segment`` (B,), where the sampler asks."""
        return self.at((segment + 1) * self.per_segment)

    def _place(self, index: Tensor) -> Place:
        return Place(self.times[index], self.a[index], self.s[index])
