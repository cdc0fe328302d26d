"""Score distillation beside consistency: the student's clips at the end of each segment are drawn towards those that the
teacher would leave there (Yin et al. 2024, DMD2, arXiv 2405.14867; on parts of diffusion time: Fan et al. 2025, Phased
DMD, arXiv 2510.27684; beside a consistency loss: Zheng et al. 2025, rCM, arXiv 2510.08431).

A second network, the fake score, learns what the student makes. Both it and the teacher are asked about a student's
sample with noise on top; where they differ, the sample is unlikely, and the difference is the way to go.

A segment ends at noise level (a_e, s_e), not at clean data. From a sample z_e there, noise up to (a, s) makes

    z = a' z_e + d e,   a' = a / a_e,   d^2 = s^2 - a'^2 s_e^2,   e unit noise,

and a network that says x of z says of z_e, by Tweedie's formula for this part of the way alone,

    E[z_e | z] = (z - (d / s)^2 (z - a x)) / a',

which is x itself where the segment ends at the data. The fake score learns it by the same noise: (d / s) times its noise
(z - a x) / s is to be e.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...limits.numbers import number, whole
from ...limits.quote import quoted
from ...sampling.path import NoisePath, predict_x0
from ...sampling.schedule import segment_edges
from ...training import StepLoss
from .consistency import ConsistencyConfig, ConsistencyLoss, Predict, Teacher
from .rollout import trajectory

# The noise on top of a sample is drawn over diffusion time from the segment's end to pure noise, without so much of it
# at either side: next to the end both networks agree, and pure noise says nothing.
MARGIN = 0.02
FLAT = 1e-3  # least scale of a difference, in units of the latents' deviation


@dataclass(frozen=True)
class ScoreConfig(ConsistencyConfig):
    """As for consistency, and:

    score_weight: of the score's term beside the consistency loss.
    fake_steps: steps of the fake score before each step of the student. ``training.steps`` counts both.
    plan: the student's alone; teacher and fake score stay dense.
    """

    score_weight: float = 0.1
    fake_steps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.at_beginnings:
            raise ValueError(
                f"states is {quoted(self.states)}, but score distillation learns all along the segments. Leave it out, and start from "
                "such a student with model.init."
            )
        number(self.score_weight, "score_weight", 0, 1000, why="Correct the configuration.")
        whole(self.fake_steps, "fake_steps", 1, 100, "Correct the configuration.")

    def students_step(self, step: int) -> int:
        """Which of its own steps, counted from 1, the student takes at the run's step, counted from 0; 0 where the fake
        score learns."""
        turns, rest = divmod(step + 1, self.fake_steps + 1)
        return 0 if rest else turns

    def is_students_turn(self, step: int) -> bool:
        """Whether the student learns at the run's step."""
        return self.students_step(step) > 0


@dataclass(frozen=True)
class _Draw:
    """Where examples stand, each (B, 1, ...) but ``time`` (B,), the network's: at noise level (a, s), reached from the end
    of a segment by keeping ``signal`` of it, a', and adding ``noise``, d."""

    a: Tensor
    s: Tensor
    signal: Tensor
    noise: Tensor
    time: Tensor


class ScoreLoss:
    """The loss of one batch, drawn from a generator: ``loss(x, condition, generator)``.

    Args:
        student, fake: raw outputs; each is asked with gradient in its own turn alone.
        teacher: gives the guided and the unguided output.
        students_step: which of its own steps the student takes now, 0 where the fake score learns.
        own_samples: the consistency loss learns from the student's own clips; ``x`` only gives their size.
    """

    def __init__(
        self,
        config: ScoreConfig,
        path: NoisePath,
        prediction: str,
        *,
        student: Predict,
        fake: Predict,
        teacher: Teacher,
        students_step: Callable[[], int],
        own_samples: bool = False,
        alone: bool = True,
    ) -> None:
        self.config, self.path, self.prediction = config, path, prediction
        self.student, self.fake, self.teacher = student, fake, teacher
        self.students_step, self.own_samples = students_step, own_samples
        self.consistency = ConsistencyLoss(config, path, prediction, student=student, teacher=teacher, alone=alone)
        self.edges = segment_edges(config.segments, start=path.start, clean=path.clean)  # from noise to data

    def __call__(self, x: Tensor, condition: Any, generator: torch.Generator) -> StepLoss:
        """``x`` (B, ...) float32 clean latents. In each turn the networks are asked equally often, whatever is drawn."""
        stops = self._rollout(torch.randn(x.shape, generator=generator).to(x), condition)
        segment = self._segments(len(x), generator)
        draw = self._draw(segment, generator, x)
        extra = torch.randn(x.shape, generator=generator).to(x)
        rows = torch.arange(len(x), device=x.device)
        begin, end = stops[segment.to(x.device), rows], stops[segment.to(x.device) + 1, rows]
        number = self.students_step()
        if not number:
            loss = self._fakes_error(end, extra, draw, condition)
            return StepLoss(loss, {"fake score": loss}, averaged=0)
        result = self.consistency(stops[-1] if self.own_samples else x, condition, generator)
        score = self._towards_teacher(begin, end, segment, extra, draw, condition, generator)
        parts = {**result.parts, "consistency": result.total, "score": score}
        return StepLoss(result.total + self.config.score_weight * score, parts, averaged=number)

    def _rollout(self, noise: Tensor, condition: Any) -> Tensor:
        """The student's samples (segments + 1, B, ...) at all edges, the noise first."""
        way = trajectory(
            lambda z, time: self.student(z, time, condition).float(), self.path, self.prediction, noise,
            segments=self.config.segments,
        )  # fmt: skip
        return torch.stack([noise, *(z for _, z in way)])

    def _segments(self, batch: int, generator: torch.Generator) -> Tensor:
        """A segment (B,) for each example, 0 the noisiest; each batch covers them evenly."""
        u = (torch.rand(1, generator=generator) + torch.arange(batch) / batch) % 1
        return (u * self.config.segments).long().clamp(max=self.config.segments - 1)

    def _draw(self, segment: Tensor, generator: torch.Generator, z: Tensor) -> _Draw:
        end = self.edges[segment + 1]
        share = MARGIN + (1 - 2 * MARGIN) * torch.rand(len(segment), generator=generator, dtype=torch.float64)
        time = end + share * (self.edges[0] - end)
        (a_end, s_end), (a, s) = (self.path.coefficients(place) for place in (end, time))
        signal = a / a_end
        noise = (s**2 - (signal * s_end) ** 2).sqrt()
        a, s, signal, noise = (value.to(z).view(-1, *[1] * (z.ndim - 1)) for value in (a, s, signal, noise))
        return _Draw(a, s, signal, noise, self.path.network_time(time).to(z.device))

    def _fakes_error(self, end: Tensor, extra: Tensor, draw: _Draw, condition: Any) -> Tensor:
        """How far the fake score is from the student's samples ``end`` (B, ...)."""
        z = draw.signal * end + draw.noise * extra
        x = predict_x0(self.prediction, z, self.fake(z, draw.time, condition).float(), draw.a, draw.s)
        noise = (z - draw.a * x) / draw.s
        return (draw.noise / draw.s * noise - extra).square().mean()

    def _towards_teacher(
        self,
        begin: Tensor,
        end: Tensor,
        segment: Tensor,
        extra: Tensor,
        draw: _Draw,
        condition: Any,
        generator: torch.Generator,
    ) -> Tensor:
        """A loss whose gradient by the student's clean prediction at ``begin`` is the direction from the teacher's samples
        to its own, as large as DMD makes it."""
        way = self._way(end, extra, draw, condition, generator)
        a, s = (c.to(begin).view(draw.a.shape) for c in self.path.coefficients(self.edges[segment]))
        time = self.path.network_time(self.edges[segment]).to(begin.device)
        x = predict_x0(self.prediction, begin, self.student(begin, time, condition).float(), a, s)
        return 0.5 * (x - (x - way).detach()).square().mean()

    @torch.no_grad()
    def _way(self, end: Tensor, extra: Tensor, draw: _Draw, condition: Any, generator: torch.Generator) -> Tensor:
        z = draw.signal * end + draw.noise * extra
        guidance = self.consistency.guidance(len(end), generator, end.device)
        real = self._end_of(z, self.teacher(z, draw.time, condition, guidance)[0], draw)
        fake = self._end_of(z, self.fake(z, draw.time, condition), draw)
        scale = (end - real).abs().flatten(1).mean(1).clamp(min=FLAT)
        return (fake - real) / scale.view(draw.a.shape)

    def _end_of(self, z: Tensor, out: Tensor, draw: _Draw) -> Tensor:
        """E[z_e | z] by a network's raw output at z."""
        x = predict_x0(self.prediction, z, out.float(), draw.a, draw.s)
        return (z - (draw.noise / draw.s).square() * (z - draw.a * x)) / draw.signal
