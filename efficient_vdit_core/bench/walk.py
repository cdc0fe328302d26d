"""How near a teacher's walks come to the way that it goes in fine steps: what a number of steps, and their order, cost a
consistency distillation before its student has learnt anything.

From where the fine way passes the beginning of each segment the teacher walks to the segment's end, as it does for ``target =
"teacher"``; and from noise to the clip, as it does for samples of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distill.config import DistillConfig
from ..distill.data.clips import read_captions, video_captions
from ..distill.data.noise import numbered_noise
from ..distill.families.model import FamilyModel, read_plan
from ..distill.families.open_model import open_model
from ..distill.families.texts import TextBank
from ..distill.objectives.consistency import TEACHER, ConsistencyConfig, ConsistencyLoss
from ..distill.objectives.grid import sub_steps
from ..distill.objectives.rollout import guided, trajectory
from ..distill.runs.checks import check_no_guidance
from ..distill.runs.sequence_parallel import asking
from ..sampling.path import ddim_step
from ..tinyworld.worlds import MOVING

ORDERS = (1, 2)


@dataclass(frozen=True)
class _Batch:
    """Clips on the fine way: ``edges`` (segments + 1, B, ...) on the CPU from noise to data, and what the teacher is asked with."""

    edges: Tensor
    condition: Any


def measure(
    config: DistillConfig, device: torch.device, *, clips: int, steps: Sequence[int], fine: int, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """One row for each order and number of ``steps``, all rounded to multiples of the configuration's segments.

    ``ends`` are the root mean squares of the distances to the fine way at the ends of the segments, the noisiest first, and
    ``clip`` that of clips whose way was not joined to it in between; both over the deviation of the fine way's clips. A plan
    of the objective is followed everywhere.

    Raises:
        ValueError: the configuration is not of consistency or cannot be walked here, or ``fine`` is no finer than ``steps``.
    """
    from tqdm import tqdm

    _check_one_walk(config)
    segments = config.objective.segments
    counts = list(dict.fromkeys(sub_steps(n, segments) * segments for n in steps))
    per_segment = sub_steps(fine, segments)
    if max(counts) >= per_segment * segments:
        raise ValueError(
            f"The fine way has {per_segment * segments} steps, expected more than the {max(counts)} that are compared with it, all in "
            f"multiples of the {segments} segments. Raise --fine, or lower --steps."
        )
    model = open_model(config.model)
    if not model.guided:
        check_no_guidance(config)
    teacher = _Teacher(config, model, device, clips)
    numbers = [range(n, min(n + teacher.at_once, clips)) for n in range(0, clips, teacher.at_once)]
    batches = [teacher.fine_way(some, seed, per_segment) for some in tqdm(numbers, desc="fine ways", mininterval=5)]
    deviation = float(torch.cat([batch.edges[-1].flatten() for batch in batches]).std())
    weights = torch.tensor([len(some) / clips for some in numbers], dtype=torch.float64)
    for order in ORDERS:
        for count in counts:
            errors = torch.stack([teacher.errors(batch, count, order) for batch in batches])
            *ends, clip = ((errors * weights[:, None]).sum(0).sqrt() / deviation).tolist()
            yield {"order": order, "steps": count, "segments": segments, "fine": per_segment * segments,
                   "guidance": teacher.guidance, "clips": clips, "ends": ends, "clip": clip}  # fmt: skip


def _check_one_walk(config: DistillConfig) -> None:
    """Raises ValueError where no teacher walks, or this bench cannot walk it from noise to data."""
    model = config.model
    if not isinstance(config.objective, ConsistencyConfig):
        raise ValueError(
            f"The configuration is for method {config.method}, where no teacher walks. Give one of consistency or score."
        )
    if model.expert:
        raise ValueError(
            f"model.expert is {model.expert}, one of two networks, which does not go the whole way. This bench is for models of one."
        )
    if model.host_teacher:
        raise ValueError("model.host_teacher is set, but this bench holds the teacher on the device. Leave it out.")


class _Teacher:
    """The teacher of a configuration, its captions and its guidance; the highest where there is a range of it."""

    def __init__(self, config: DistillConfig, model: FamilyModel, device: torch.device, clips: int) -> None:
        self.model, self.objective, self.device, data = model, config.objective, device, config.data
        self.captions, self.negative = [data.prompt(text) for text in _captions(config)[:clips]], data.negative
        encoder = partial(model.text_encoder, device)
        self.bank = TextBank.build([*self.captions, self.negative], encoder, None, model.text_padding)
        self.shape = model.latent_shape(model.size(data.frames, data.height, data.width))
        self.at_once = min(config.training.batch, model.at_once)
        guidance = self.objective.guidance
        self.guidance = max(guidance) if isinstance(guidance, tuple) else 1.0 if guidance is None else guidance
        self.bf16 = config.training.precision == "bf16"
        self.ask = asking(model, read_plan(self.objective.plan) if self.objective.plan else None, None)
        self.network = model.load().eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def predict(self, z: Tensor, time: Tensor, condition: Any) -> Tensor:
        """The raw output, in the precision of the training."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.ask(self.network, z, time, condition)

    def fine_way(self, numbers: Sequence[int], seed: int, per_segment: int) -> _Batch:
        """Where clips of numbered noise pass the segments' edges, in steps of second order."""
        texts = [self.captions[number % len(self.captions)] for number in numbers]
        condition = self.bank.batch(texts, self.device), self.bank.batch([self.negative] * len(texts), self.device)
        edges = [torch.stack([numbered_noise(self.shape, "samples", number, seed) for number in numbers])]
        way = self._way(edges[0].to(self.device), condition, per_segment * self.objective.segments, 2)
        edges += [z.cpu() for step, (_, z) in enumerate(way, start=1) if step % per_segment == 0]
        return _Batch(torch.stack(edges), condition)

    def errors(self, batch: _Batch, steps: int, order: int) -> Tensor:
        """Mean squares (segments + 1,) float64: at the segments' ends, the noisiest first, and of the clips."""
        loss, segments = self._walking(steps, order), self.objective.segments
        found = []
        for place in range(segments):
            z = batch.edges[place].to(self.device)
            draw = loss.grid.beginning(torch.full((len(z),), segments - 1 - place))
            x = loss.target_of(z, batch.condition, draw)
            levels = (level[0].to(z) for level in (draw.at.a, draw.at.s, draw.end.a, draw.end.s))
            found.append(ddim_step(z, x, *levels).cpu() - batch.edges[place + 1])
        *_, (_, clip) = self._way(batch.edges[0].to(self.device), batch.condition, steps, order)
        return torch.stack([error.double().square().mean() for error in (*found, clip.cpu() - batch.edges[-1])])

    def _walking(self, steps: int, order: int) -> ConsistencyLoss:
        segments = self.objective.segments
        # In one step a segment there is none before, and both orders are one.
        order = order if steps > segments else 1
        asked = ConsistencyConfig(segments=segments, teacher_steps=steps, target=TEACHER, teacher_order=order)
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
        path, prediction = self.model.path, self.model.prediction
        return trajectory(self._network(condition), path, prediction, noise, segments=steps, order=order)


def _captions(config: DistillConfig) -> list[str]:
    """Of the configuration's videos or file, or some of the tiny world's that its models are trained on."""
    data = config.data
    if data.source == "videos":
        return list(video_captions(Path(data.folder)).values())
    if data.source != "tinyworld":
        return read_captions(data.captions)
    rng = np.random.default_rng(data.seed)
    return [MOVING.trained_on(MOVING.random_words, rng).caption(0) for _ in range(64)]
