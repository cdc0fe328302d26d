"""How near a teacher's walks come to the way that it goes in fine steps: what a number of steps, and their order, cost a
consistency distillation before its student has learnt anything.

From where the fine way passes the beginning of each segment the teacher walks to the segment's end, as it does for ``target =
"teacher"``; and from noise to the clip, as it does for samples of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distill.config import DistillConfig
from ..distill.data.clips import read_captions
from ..distill.data.noise import numbered_noise
from ..distill.families.model import FamilyModel
from ..distill.families.open_model import open_model
from ..distill.families.texts import TextBank
from ..distill.objectives.consistency import TEACHER, ConsistencyConfig, ConsistencyLoss
from ..distill.objectives.rollout import guided, trajectory
from ..sampling.path import ddim_step
from ..tinyworld.worlds import MOVING

ORDERS = (1, 2)


@dataclass(frozen=True)
class _Batch:
    """Clips on the fine way: ``edges`` (segments + 1, B, ...) from noise to data, and what the teacher is asked with."""

    edges: Tensor
    condition: Any


def measure(
    config: DistillConfig, device: torch.device, *, clips: int, steps: Sequence[int], fine: int, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """One row for each order and number of ``steps``, all rounded to multiples of the configuration's segments.

    ``ends`` are the root mean squares of the distances to the fine way at the ends of the segments, the noisiest first, and
    ``clip`` that of clips whose way was not joined to it in between; both over the deviation of the fine way's clips.
    """
    model, objective = open_model(config.model), config.objective
    if model.expert:
        raise ValueError(
            f"model.expert is {model.expert}, one of two networks, which does not go the whole way. This bench is for models of one."
        )
    ask = _Teacher(config, model, device)
    per_segment = max(1, round(fine / objective.segments))
    batches = [
        ask.fine_way(numbers, per_segment)
        for numbers in _shares(clips, min(config.training.batch, model.at_once), seed)
    ]
    deviation = float(torch.cat([batch.edges[-1].flatten() for batch in batches]).std())
    for order in ORDERS:
        for count in dict.fromkeys(max(1, round(n / objective.segments)) * objective.segments for n in steps):
            errors = [ask.errors(batch, count, order) for batch in batches]
            weights = torch.tensor([batch.edges.shape[1] for batch in batches], dtype=torch.float64)
            mean = (torch.stack(errors) * weights[:, None]).sum(0) / weights.sum()
            *ends, clip = (mean.sqrt() / deviation).tolist()
            yield {"order": order, "steps": count, "segments": objective.segments, "fine": per_segment * objective.segments,
                   "clips": clips, "ends": ends, "clip": clip}  # fmt: skip


def _shares(clips: int, batch: int, seed: int) -> Iterator[list[tuple[int, int]]]:
    for start in range(0, clips, batch):
        yield [(n, seed) for n in range(start, min(start + batch, clips))]


class _Teacher:
    """The teacher of a configuration, its captions and its guidance; the highest where there is a range of it."""

    def __init__(self, config: DistillConfig, model: FamilyModel, device: torch.device) -> None:
        self.model, self.objective, self.device, data = model, config.objective, device, config.data
        captions = [data.prompt(text) for text in _captions(config)]
        self.bank = TextBank.build(
            [*captions, data.negative], partial(model.text_encoder, device), None, model.text_padding
        )
        self.captions, self.negative = captions, data.negative
        self.shape = model.latent_shape(model.size(data.frames, data.height, data.width))
        guidance = self.objective.guidance
        self.guidance = max(guidance) if isinstance(guidance, tuple) else 1.0 if guidance is None else guidance
        module = model.load().eval().requires_grad_(False).to(device)
        self.predict = lambda z, time, condition: model.predict(module, z, time, condition)

    def fine_way(self, numbers: list[tuple[int, int]], per_segment: int) -> _Batch:
        """Where clips of numbered noise pass the segments' edges, in steps of second order."""
        texts = [self.captions[number % len(self.captions)] for number, _ in numbers]
        condition = self.bank.batch(texts, self.device), self.bank.batch([self.negative] * len(texts), self.device)
        noise = torch.stack([numbered_noise(self.shape, "samples", *number) for number in numbers]).to(self.device)
        steps = per_segment * self.objective.segments
        way = [z for _, z in self._way(noise, condition, steps, 2)]
        return _Batch(torch.stack([noise, *way[per_segment - 1 :: per_segment]]), condition)

    @torch.no_grad()
    def errors(self, batch: _Batch, steps: int, order: int) -> Tensor:
        """Mean squares (segments + 1,) float64: at the segments' ends, the noisiest first, and of the clips."""
        loss, segments = self._walking(steps, order), self.objective.segments
        found = []
        for place in range(segments):
            z, exact = batch.edges[place], batch.edges[place + 1]
            draw = loss.grid.beginning(torch.full((len(z),), segments - 1 - place))
            x = loss.target_of(z, batch.condition, draw)
            levels = (level[0].to(z) for level in (draw.at.a, draw.at.s, draw.end.a, draw.end.s))
            found.append(ddim_step(z, x, *levels) - exact)
        *_, (_, clip) = self._way(batch.edges[0], batch.condition, steps, order)
        return torch.stack([error.double().square().mean().cpu() for error in (*found, clip - batch.edges[-1])])

    def _walking(self, steps: int, order: int) -> ConsistencyLoss:
        asked = ConsistencyConfig(
            segments=self.objective.segments, teacher_steps=steps, target=TEACHER, teacher_order=order
        )
        return ConsistencyLoss(
            asked, self.model.path, self.model.prediction, student=self.predict, teacher=self._answers
        )

    def _answers(self, z: Tensor, time: Tensor, condition: Any, guidance: Tensor | None) -> tuple[Tensor, Tensor]:
        out = self._network(condition)(z, time)
        return out, out

    def _network(self, condition: Any) -> Callable[[Tensor, Tensor], Tensor]:
        words, none = condition
        return guided(self.predict, words, none, self.guidance)

    def _way(self, noise: Tensor, condition: Any, steps: int, order: int) -> Iterator[tuple[float, Tensor]]:
        return trajectory(
            self._network(condition), self.model.path, self.model.prediction, noise, segments=steps, order=order
        )


def _captions(config: DistillConfig) -> list[str]:
    """Of the configuration's file, or some of the tiny world's that its models are trained on."""
    if config.data.captions or config.data.source != "tinyworld":
        return read_captions(config.data.captions)
    rng = np.random.default_rng(config.data.seed)
    return [MOVING.trained_on(MOVING.random_words, rng).caption(0) for _ in range(64)]
