"""Stage 3: knowledge distillation from the dense consistency model to the same model under a tile plan (Efficient-vDiT,
section 4).

The student, which starts as the teacher's copy, is held to the teacher's attention outputs, MLP outputs and final
prediction. Hidden states differ in size from layer to layer, so each difference counts relative to the teacher's own:

    loss = attention mean_l |A_l - A'_l|^2 / |A'_l|^2 + mlp mean_l |M_l - M'_l|^2 / |M'_l|^2 + prediction |v - v'|^2 /
    |v'|^2

It is trained at the times at which the sampler will ask: the edges of the segments, and the sub-steps where there are
more; and at noised clips, as in the paper, or at the states that one of the two meets there on its own way down from noise.
Features are compared layer by layer, as `features` says; what has weight 0 is not looked at.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...limits.numbers import whole
from ...limits.quote import quoted
from ...parallel.sharding.communicator import Communicator
from ...sampling.path import NoisePath
from ...sampling.schedule import segment_edges
from ...training import StepLoss
from ..lora.files import changed
from .consistency import DATA, STUDENT, TEACHER, pick
from .features import FeatureTap, HostFeatures, LayerLosses, relative_square
from .rollout import trajectory

STATES = (DATA, TEACHER, STUDENT)


@dataclass(frozen=True)
class KnowledgeConfig:
    """plan: ``k:T-k`` or a plan file.
    segments: what the teacher was distilled for, 0 = as its metadata says.
    steps: the sampler's, 0 = as the metadata says of as many segments, else one in each.
    attention, mlp, prediction: the weights of the three losses; 0 leaves one out.
    states: where they are taken: at noised clips of the ``data``, or on the way down of the ``teacher`` or the ``student``.
    """

    plan: str = ""
    segments: int = 0
    steps: int = 0
    attention: float = 1.0
    mlp: float = 1.0
    prediction: float = 1.0
    states: str = DATA

    def __post_init__(self) -> None:
        weights = (self.attention, self.mlp, self.prediction)
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise ValueError(
                f"The losses' weights are {weights}, expected numbers from 0 up and one above. Correct the configuration."
            )
        whole(self.segments, "segments", 0, 1000, "0 = as the teacher says. Correct the configuration.")
        whole(
            self.steps, "steps", 0, 1000, "0 = as the teacher says, or one in each segment. Correct the configuration."
        )
        if self.states not in STATES:
            raise ValueError(
                f"states is {quoted(self.states)}, expected one of {', '.join(STATES)}. Correct the configuration."
            )


class KnowledgeLoss:
    """The loss of one batch, drawn from a generator: ``loss(x, condition, generator)``.

    Args:
        student, teacher: (z, network time (B,), condition) -> raw output.
        prediction: what the raw output means, as of ``NoisePath``; asked for where the states are not the data's.
        serves: tells of timesteps whether a step from there is the network's; others are not learnt at.
        student_tap, teacher_tap: their attention and MLP modules, under the names ``attention`` and ``mlp``.
        comm: as of ``LayerLosses``, where processes share out a clip; predictions are whole on each.
        alone: whether no other process trains along: those call the networks as often as this one, whatever each has drawn.
    """

    def __init__(
        self,
        config: KnowledgeConfig,
        path: NoisePath,
        *,
        segments: int,
        student: Callable[..., Tensor],
        teacher: Callable[..., Tensor],
        student_tap: FeatureTap,
        teacher_tap: FeatureTap,
        prediction: str = "",
        serves: Callable[[Tensor], Tensor] | None = None,
        comm: Communicator | None = None,
        alone: bool = True,
    ) -> None:
        self.comm, self.alone = comm, alone
        self.config, self.path, self.student, self.teacher = config, path, student, teacher
        self.student_tap, self.teacher_tap = student_tap, teacher_tap
        self.prediction, self.segments = prediction, segments
        self._host, self._listening = HostFeatures(), ExitStack()
        times = segment_edges(segments, config.steps or segments, start=path.start, clean=path.clean)[:-1]
        self.times = times if serves is None else times[serves(times)]
        self.a, self.s = path.coefficients(self.times)

    def __call__(self, x: Tensor, condition: Any, generator: torch.Generator) -> StepLoss:
        """``x`` (B, ...) float32 clean latents. The parts of the result are the losses before their weights."""
        weights = {"attention": self.config.attention, "mlp": self.config.mlp}
        names, layers = [name for name, weight in weights.items() if weight], LayerLosses(self.comm, self._host)
        self._listening.close()
        if self.config.states == DATA:
            z, time = self._noised(x, generator)
        else:
            z, time, condition = self._met(x, condition, generator)
        with torch.no_grad(), self.teacher_tap.open(layers.keep, names):
            expected = self.teacher(z, time, condition).float()
        # Until the gradient is taken, because checkpointed blocks run again on the way.
        self._listening.enter_context(self.student_tap.open(layers.compare, names))
        out = self.student(z, time, condition).float()
        parts = {name: layers.mean(name) for name in names}
        parts["prediction"] = relative_square(out, expected)
        # The prediction stays in with weight 0 too: processes that train together wait for a gradient of every weight.
        weights["prediction"] = self.config.prediction
        total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return StepLoss(total, parts, self._listening.close)

    def close(self) -> None:
        """Gives back the host's memory that the teacher's features waited in."""
        self._host.close()

    def _noised(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """z (B, ...) and the network's time (B,), each batch holding every time equally often."""
        count = len(self.times)
        u = (torch.rand(1, generator=generator) + torch.arange(len(x)) / len(x)) % 1
        index = (u * count).long().clamp(max=count - 1)
        noise = torch.randn(x.shape, generator=generator).to(x)
        shape = (-1, *[1] * (x.ndim - 1))
        z = self.a[index].to(x).view(shape) * x + self.s[index].to(x).view(shape) * noise
        return z, self.path.network_time(self.times[index]).to(x.device)

    def _met(self, x: Tensor, condition: Any, generator: torch.Generator) -> tuple[Tensor, Tensor, Any]:
        """z (B, ...) and the network's time (B,) on ways down from noise, and their condition.

        A way, of one of the batch's first captions, is met once at each time. The ways go as far as the last place where
        one is met: see `forwards_of_ways`.
        """
        count, entries = len(self.times), torch.arange(len(x))
        way, offset = entries // count, torch.randint(count, (1,), generator=generator)
        place, ways = (entries + offset) % count, way.unique()
        ask, own = (self.teacher if self.config.states == TEACHER else self.student), pick(condition, ways.to(x.device))
        noise = torch.randn((len(ways), *x.shape[1:]), generator=generator).to(x)
        down = trajectory(
            lambda z, time: ask(z, time, own).float(), self.path, self.prediction, noise,
            segments=self.segments, steps=self.config.steps or self.segments,
        )  # fmt: skip
        last = int(place.max()) if self.alone else count - 1
        states = torch.stack([noise, *(z for _, z in itertools.islice(down, last))])
        time = self.path.network_time(self.times[place]).to(x.device)
        return states[place.to(x.device), way.to(x.device)], time, pick(condition, way.to(x.device))


def forwards_of_ways(batch: int, times: int) -> float:
    """How many forwards an example costs, in the mean, to find the states that a network meets on its way, where one process
    trains with ``batch`` examples a step and the sampler has ``times`` steps."""
    lasts = [max((entry + offset) % times for entry in range(min(batch, times))) for offset in range(times)]
    return math.ceil(batch / times) * sum(lasts) / times / batch


def merge_deltas(base: dict[str, Tensor], *tuned: dict[str, Tensor]) -> dict[str, Tensor]:
    """base + sum of (tuned - base): stages that were trained apart, put together without training; precision as of
    `changed`.

    Raises ValueError where the weights belong to different models.
    """
    for weights in tuned:
        if weights.keys() != base.keys():
            odd = sorted(weights.keys() ^ base.keys())
            raise ValueError(
                f"The weights to merge belong to different models ({len(odd)} names differ, such as {odd[0]})."
            )
    merged = {}
    for name, value in base.items():
        change = sum(
            (w[name].float() - value.float() for w in tuned), start=torch.zeros_like(value, dtype=torch.float32)
        )
        merged[name] = changed(value, change) if value.is_floating_point() else value
    return merged
