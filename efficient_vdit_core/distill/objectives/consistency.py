"""Stage 1: multi-step consistency distillation (Heek et al. 2024, arXiv 2403.06807, Algorithm 1; Efficient-vDiT section
4).

Diffusion time falls into segments. From a time t in one of them the teacher takes one deterministic step (DDIM, for
flow models Euler) to t', and the student must say at t what makes its jump to the segment's end land where its own jump
from t' lands. Written out, that target is a blend (a: signal, s: noise, "end": the segment's end):

    x* = lam x_teacher + (1 - lam) x_student(t'),   lam = s_end (s_t a_t' - s_t' a_t) / (s_t' (s_t a_end - s_end a_t))

and lam = 1 where t' is the end. The paper's own form inverts a DDIM step, which in bf16 loses all digits; the
blend is exact in float32. The target's weights are the student's own, without gradient.

Or the teacher answers at t' too, by its next step, and so on to the segment's end (``target = "teacher"``): then x* is
exact, where a student's own errors pile up from the segment's end to its beginning. It is as exact as the teacher's steps are,
which from the second on may be of second order (``teacher_order = 2``, see `half_a_step_on`).

Or the student learns where it will be asked and nowhere else: at the beginnings of the segments. On ways that the teacher
went from noise before the training (``states = "teacher"``), each of which tells its target too, the one jump to where it is
at the segment's end; the teacher is not asked again. Or on its own ways (``states = "student"``), where its own errors have
led it and the teacher walks on from there, as in DAgger (Ross et al. 2011, arXiv 1011.0686).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...generation.request import MAX_GUIDANCE
from ...limits.numbers import number, whole
from ...limits.quote import quoted
from ...sampling.path import EPSILON, NoisePath, clean_between, ddim_step, half_a_step_on, predict_x0
from ...training import StepLoss
from .grid import Draw, Place, SegmentGrid, sub_steps
from .rollout import Predict, trajectory

LOSSES = ("norm", "squared", "huber")
WEIGHTS = ("inverse_variance", "inverse_sigma", "snr", "none", "sqrt_snr")
SPACES = ("x", "z")
DATA, STUDENT, TEACHER = "data", "student", "teacher"
TARGETS, STATES = (STUDENT, TEACHER), (DATA, TEACHER, STUDENT)

log = logging.getLogger("efficient_vdit")


class Teacher(Protocol):
    """Raw outputs with guidance and without it; the same tensor where ``guidance`` (B,) is None."""

    def __call__(self, z: Tensor, time: Tensor, condition: Any, guidance: Tensor | None) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class ConsistencyConfig:
    """What is distilled. Segments are what the student is made for; the sampler may take more steps than that.

    steps: the sampler's steps, 0 for one in each segment; goes into the metadata and the sample videos.
    teacher_steps: sub-steps of the teacher over all segments; 48 to 64 for short trainings, finer for long ones.
    guidance: None, one scale, or a pair (low, high) drawn evenly for each example. The student needs none afterwards.
    loss: "norm" is the paper's un-squared norm as pseudo-Huber, "squared" its square, "huber" is taken element by
    element (as
        LCM and PCM do); ``loss_scale`` is the pseudo-Huber constant.
    weight: of the error in x, clipped at ``max_weight``: "inverse_variance" 1 / s^2, which is SNR + 1 for VP models;
        "inverse_sigma" 1 / s; "snr" (a / s)^2 and "sqrt_snr" a / s, for epsilon models, see `check_pair`; "none".
    space: "x", or "z" for the error at the segment's end (phased consistency models), which takes no weight.
    addim: correct the teacher's step for the variance that DDIM loses, as the paper does from 4 segments on (its Eq.
    12).
    data_side: how many times more often the hardest segment, next to the data, is drawn.
    plan: a tile plan (``k:T-k`` or a file) under which both networks run, where knowledge distillation came first. The ways of
        ``states`` are of the teacher as it is, without one.
    target: who answers from t' on: the student, or the teacher, who walks on to the segment's end. That is exact, and asks
        the teacher up to ``teacher_steps / segments`` times for each example, in the mean half as often.
    teacher_order: 1 for DDIM's steps, or 2 from a walk's second step on, where the teacher is the target; see `half_a_step_on`.
    states: where the student learns: at noised clips of the ``data``, all along each segment; or at the segments' beginnings
        on the ways of the ``teacher`` that ``data.ways`` keeps, whose target, guidance and steps are those of the samples; or
        there on the ``student``'s own ways, which ask no clips, with ``target`` the teacher.
    """

    segments: int = 8
    steps: int = 0
    teacher_steps: int = 64
    guidance: float | tuple[float, float] | None = None
    loss: str = "norm"
    loss_scale: float = 1e-4
    weight: str = "inverse_variance"
    max_weight: float = 20.0
    space: str = "x"
    addim: bool = False
    data_side: float = 1.0
    plan: str = ""
    target: str = STUDENT
    states: str = DATA
    teacher_order: int = 1

    def __post_init__(self) -> None:
        named = {"loss": LOSSES, "weight": WEIGHTS, "space": SPACES, "target": TARGETS, "states": STATES}
        for name, choices in named.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {quoted(getattr(self, name))}, expected one of {', '.join(choices)}. Correct the configuration."
                )
        for name, low, high in (("segments", 1, 1000), ("steps", 0, 1000), ("teacher_steps", 1, 10_000)):
            whole(getattr(self, name), name, low, high, "Correct the configuration.")
        if self.teacher_steps < self.segments and not self.on_ways:
            raise ValueError(
                f"There are {self.segments} segments and {self.teacher_steps} teacher_steps, expected one teacher step in each at "
                "least. Raise teacher_steps."
            )
        scales = self.guidance if isinstance(self.guidance, tuple) else (self.guidance or 0.0,)
        for scale in scales:
            number(scale, "guidance", 0, MAX_GUIDANCE, why="Correct the configuration.")
        for name in ("loss_scale", "max_weight", "data_side"):
            number(getattr(self, name), name, 0, above=True, why="Correct the configuration.")
        self._check_who_walks()

    def _check_who_walks(self) -> None:
        """Raises ValueError where the teacher is to walk, and there is nothing for it to walk, or the other way about."""
        whole(self.teacher_order, "teacher_order", 1, 2, "Correct the configuration.")
        if self.on_ways and (self.addim or self.target == TEACHER or self.teacher_order == 2):
            raise ValueError(
                f'states is "{TEACHER}", where the teacher\'s own way is the target: there is no step of it to correct (addim), none to '
                "walk on (target), and the order of its steps is that of the samples, data.teacher_order. Leave addim, target and "
                "teacher_order out of [objective]."
            )
        if self.states == STUDENT and (self.addim or self.target != TEACHER):
            raise ValueError(
                f'states is "{STUDENT}" with target "{self.target}" and addim {str(self.addim).lower()}, expected target "{TEACHER}" '
                f'and addim false: the student learns where segments begin, and nothing below. Set target = "{TEACHER}".'
            )
        walks = self.target == TEACHER and not self.addim and sub_steps(self.teacher_steps, self.segments) > 1
        if self.teacher_order == 2 and not walks:
            raise ValueError(
                f'teacher_order is 2 with target "{self.target}", addim {str(self.addim).lower()} and {self.teacher_steps} teacher_steps '
                f'for {self.segments} segments, expected target "{TEACHER}", addim false and two steps a segment at least: the first is '
                "DDIM's. Correct them, or leave teacher_order out."
            )

    @property
    def at_beginnings(self) -> bool:
        """Whether the student learns at the segments' beginnings alone, and is to be sampled there."""
        return self.states != DATA

    @property
    def on_ways(self) -> bool:
        """Whether the student learns on the teacher's ways, and the teacher need not be there."""
        return self.states == TEACHER


class ConsistencyLoss:
    """The loss of one batch, drawn from a generator: ``loss(x, condition, generator)``.

    Args:
        prediction: what both networks predict, of `PREDICTIONS`.
        student, target: the same weights; ``target`` runs without gradient, and not at all where the teacher walks on.
        teacher: gives the guided and the unguided output.
        serves: as `SegmentGrid` has it.
        alone: nobody need be asked where no example wants it. False among processes that compute together, each of which
            waits in every call of a network for the others.
    """

    def __init__(
        self,
        config: ConsistencyConfig,
        path: NoisePath,
        prediction: str,
        *,
        student: Predict,
        teacher: Teacher,
        target: Predict | None = None,
        alone: bool = True,
        serves: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.alone = alone
        self.config, self.path, self.prediction = config, path, prediction
        self.student, self.teacher, self.target = student, teacher, target or student
        steps = config.segments if config.on_ways else config.teacher_steps
        self.grid = SegmentGrid(path, config.segments, steps, config.data_side, serves)

    def __call__(self, x: Tensor, condition: Any, generator: torch.Generator) -> StepLoss:
        """``x`` (B, ...) float32 clean latents, or (B, segments + 1, ...) the teacher's ways from noise to these; ``condition``
        is indexable by a bool mask (B,) through ``pick``."""
        draw = self.grid.draw(len(x), generator)
        if self.config.on_ways:
            z, target = self._on_way(x, draw)
        else:
            noise = torch.randn(x.shape, generator=generator).to(x)
            guidance = self.guidance(len(x), generator, x.device)
            if self.config.states == STUDENT:
                draw = self.grid.beginning(draw.segment)
                z = self._own_way(noise, condition, draw)
            else:
                z = _like(draw.at.a, x) * x + _like(draw.at.s, x) * noise
            target = self.target_of(z, condition, draw, guidance)
        out = self.student(z, self._time(draw.at, z), condition)
        return self.compare(self._clean(z, out, draw.at), target, draw)

    def _on_way(self, ways: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """z (B, ...) at the beginning of each example's segment, and the clean data that lead to the way's next edge."""
        begins = (self.config.segments - 1 - draw.segment).to(ways.device)
        rows = torch.arange(len(ways), device=ways.device)
        z, z_end = ways[rows, begins], ways[rows, begins + 1]
        return z, clean_between(z, z_end, *_pair(draw.at, z), *_pair(draw.end, z))

    @torch.no_grad()
    def _own_way(self, noise: Tensor, condition: Any, draw: Draw) -> Tensor:
        """z (B, ...) where the student's own jumps from ``noise`` lead, at the beginning of each example's segment."""
        places = self.config.segments - 1 - draw.segment
        down = trajectory(
            lambda z, time: self.target(z, time, condition).float(), self.path, self.prediction, noise,
            segments=self.config.segments,
        )  # fmt: skip
        # Without others as far as somebody needs it; all processes ask equally often.
        last = int(places.max()) if self.alone else self.config.segments - 1
        states = torch.stack([noise, *(z for _, z in itertools.islice(down, last))])
        return states[places.to(noise.device), torch.arange(len(noise), device=noise.device)]

    @torch.no_grad()
    def target_of(
        self,
        z: Tensor,
        condition: Any,
        draw: Draw,
        guidance: Tensor | None = None,
        further: int | None = None,
        before: Tensor | None = None,
    ) -> Tensor:
        """x* (B, ...) float32 for z at ``draw.at``. ``further``: how many more steps of the teacher can follow there,
        by itself as many as a segment has. ``before`` (B, ...): its answer one step earlier, where it counts."""
        further = self.grid.per_segment - 1 if further is None else further
        guided, _ = self.teacher(z, self._time(draw.at, z), condition, guidance)
        answer = self._clean(z, guided, draw.at)
        x_teacher = half_a_step_on(answer, before)
        lam = _like(blend(draw), z)
        if not self.config.addim:
            z_below = ddim_step(z, x_teacher, *_pair(draw.at, z), *_pair(draw.below, z))
            extra = None
        else:
            z_below, extra = addim(z, x_teacher, draw)
        asked = ~draw.first  # below it somebody is asked only where the answer counts
        if not asked.any():
            if self.alone or (self.config.target == TEACHER and not further):
                return x_teacher if extra is None else x_teacher + extra
            asked[0] = True  # its answer counts nothing, lam being 1
        rest = asked.to(z.device)
        x_below = x_teacher.clone()
        x_below[rest] = self._below(
            z_below[rest], pick(condition, rest), self.grid.at((draw.index[asked] - 1).clamp(min=1)),
            pick(guidance, rest), further - 1, answer[rest] if self.config.teacher_order == 2 else None,
        )  # fmt: skip
        target = lam * x_teacher + (1 - lam) * x_below
        return target if extra is None else target + extra

    def _below(
        self, z: Tensor, condition: Any, draw: Draw, guidance: Tensor | None, further: int, before: Tensor | None
    ) -> Tensor:
        """The clean data that lead from ``draw.at`` to the segment's end: at once as the student says, or as the teacher
        gets there."""
        if self.config.target == TEACHER:
            return self.target_of(z, condition, draw, guidance, further, before)
        return self._clean(z, self.target(z, self._time(draw.at, z), condition), draw.at)

    def compare(self, x: Tensor, target: Tensor, draw: Draw) -> StepLoss:
        """The weighted loss of the student's clean prediction x, and its mean in each segment."""
        config = self.config
        error = x - target
        if config.space == "z":
            share = draw.end.a - draw.at.a * draw.end.s / draw.at.s
            error = error * _like(share, error)
        weight = 1.0 if config.space == "z" else loss_weight(config, draw.at).to(error.device, torch.float32)
        losses = weight * example_losses(error, config)
        parts = {
            f"segment {k}": losses[(draw.segment == k).to(losses.device)].mean() for k in draw.segment.unique().tolist()
        }
        return StepLoss(losses.mean(), parts)

    def _clean(self, z: Tensor, out: Tensor, place: Place) -> Tensor:
        return predict_x0(self.prediction, z, out.float(), *_pair(place, z))

    def _time(self, place: Place, z: Tensor) -> Tensor:
        return self.path.network_time(place.time).to(z.device)

    def guidance(self, batch: int, generator: torch.Generator, device: torch.device) -> Tensor | None:
        guidance = self.config.guidance
        if guidance is None:
            return None
        low, high = guidance if isinstance(guidance, tuple | list) else (guidance, guidance)
        return (low + (high - low) * torch.rand(batch, generator=generator)).to(device)


def blend(draw: Draw) -> Tensor:
    """lam (B,) float64: the teacher's share of the target."""
    t, below, end = draw.at, draw.below, draw.end
    # Where the step ends at the end, both would be 0 / 0 in the segment next to the data.
    low = torch.where(draw.first, 1.0, below.s * (t.s * end.a - end.s * t.a))
    return torch.where(draw.first, 1.0, end.s * (t.s * below.a - below.s * t.a) / low)


def addim(z: Tensor, x: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """The teacher's step with the noise level mended (Eq. 12, variance of x by the analytic 0.1 / (2 + (a / s)^2)).

    Returns z at ``draw.below`` and what the target gains by it.
    """
    t, below, end = draw.at, draw.below, draw.end
    noise = (z - _like(t.a, z) * x) / _like(t.s, z)
    dims = z[0].numel()
    size = noise.flatten(1).square().sum(1).double().cpu()
    variance = 0.1 / (2.0 + (t.a / t.s) ** 2)
    level = (below.s**2 + dims / size * (below.a - t.a * below.s / t.s) ** 2 * variance).sqrt()
    moved = _like(below.a, z) * x + _like(level, z) * noise
    ratio = torch.where(draw.first, 1.0, end.s / torch.where(draw.first, 1.0, below.s))
    return moved, _like(ratio * (level - below.s) / (end.a - t.a * end.s / t.s), z) * noise


def example_losses(error: Tensor, config: ConsistencyConfig) -> Tensor:
    """The loss (B,) of errors (B, ...), a mean over elements, so that it means the same for every size."""
    c = config.loss_scale
    if config.loss == "huber":
        return ((error.square() + c**2).sqrt() - c).flatten(1).mean(1)
    mean = error.square().flatten(1).mean(1)
    return mean if config.loss == "squared" else (mean + c**2).sqrt() - c


def check_pair(config: ConsistencyConfig, prediction: str) -> None:
    """Refuse a weight that fails under its loss, and warn of one that does not help.

    A network that predicts epsilon errs in x by s / a times as much as in its output. Weighted by (a / s)^2 the squared
    loss is that of the output; the others, which grow with the error itself, are by a / s. SNR makes of them a loss
    that hardly sees the noisy times, where the composition is decided. `evdit bench mixture --pairs`, three seeds:
    under the right pairs alone the student beats the undistilled teacher in as many steps (0.16 and 0.20 against 0.23);
    under the refused one it errs by 0.29 to 1.14, in two of three seeds more than twice as much as before.
    """
    right = "snr" if config.loss == "squared" else "sqrt_snr"
    if prediction != EPSILON or config.space == "z" or config.weight == right:
        return
    what = f'weight is "{config.weight}" with loss "{config.loss}"'
    if config.weight == "snr":
        raise ValueError(
            f'{what}, expected "{right}" for a model that predicts epsilon: with SNR this loss hardly sees the noisiest '
            f'times and the student becomes worse than its teacher. Set weight = "{right}", or loss = "squared".'
        )
    log.warning('%s, but "%s" is what helps a model that predicts epsilon. Set weight = "%s".', what, right, right)


def loss_weight(config: ConsistencyConfig, place: Place) -> Tensor:
    """The weight (B,) of the error in x."""
    weight = {
        "inverse_variance": lambda: place.s**-2,
        "inverse_sigma": lambda: 1.0 / place.s,
        "snr": lambda: (place.a / place.s) ** 2,
        "none": lambda: torch.ones_like(place.s),
        "sqrt_snr": lambda: place.a / place.s,
    }[config.weight]()
    return weight.clamp(max=config.max_weight)


def pick(condition: Any, rows: Tensor) -> Any:
    """The rows of a condition, by a mask or by their numbers: a tensor, None, or a tuple or list of these."""
    if isinstance(condition, tuple | list):
        return type(condition)(pick(c, rows) for c in condition)
    return None if condition is None else condition[rows]


def _like(value: Tensor, z: Tensor) -> Tensor:
    """(B,) float64 as a factor of z, which is float32 in training."""
    return value.to(z).view(-1, *[1] * (z.ndim - 1))


def _pair(place: Place, z: Tensor) -> tuple[Tensor, Tensor]:
    return _like(place.a, z), _like(place.s, z)
