"""Consistency distillation where the truth is known: a 2-D mixture of Gaussians, whose exact denoiser is the teacher.

Eight modes on a ring. The student is a small MLP. Its endpoints are compared with the exact ODE's from the same noise,
which no choice of metric can flatter, beside the undistilled teacher in as many steps.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..distill.consistency import ConsistencyConfig, ConsistencyLoss
from ..distill.rollout import roll_down
from ..sampling.path import FLOW, FlowPath, NoisePath, V, VPPath

MODES, DEVIATION = 8, 0.06
CENTRES = torch.tensor([[math.cos(2 * math.pi * i / MODES), math.sin(2 * math.pi * i / MODES)] for i in range(MODES)])


@dataclass(frozen=True)
class MixtureShape:
    """path: flow (shift 3) or vp. pretraining, steps: optimiser steps before and during distillation."""

    path: str = "flow"
    segments: int = 4
    teacher_steps: int = 64
    loss: str = "norm"
    weight: str = "inverse_variance"
    space: str = "x"
    max_weight: float = 100.0
    width: int = 128
    pretraining: int = 1500
    steps: int = 3000
    batch: int = 512
    rate: float = 1e-3
    exact_steps: int = 400


class Student(nn.Module):
    """(z (B, 2), time (B,)) -> raw output (B, 2)."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.pi * 2.0 ** torch.arange(6))
        self.scale = scale
        layers: list[nn.Module] = [nn.Linear(2 + 12, width), nn.SiLU()]
        for _ in range(3):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, z: Tensor, time: Tensor, condition: Any = None) -> Tensor:
        angles = (time / self.scale)[:, None] * self.frequencies  # pyright: ignore[reportOperatorIssue]
        return self.layers(torch.cat([z, angles.sin(), angles.cos()], dim=-1))


def data(count: int, generator: torch.Generator) -> Tensor:
    """Points of the mixture (n, 2)."""
    modes = torch.randint(MODES, (count,), generator=generator)
    return CENTRES[modes] + DEVIATION * torch.randn(count, 2, generator=generator)


def exact_clean(z: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """E[x | z] of the mixture; a and s (B, 1)."""
    variance = a**2 * DEVIATION**2 + s**2
    gap = z[:, None] - a[..., None] * CENTRES.to(z)
    weight = torch.softmax(-gap.square().sum(-1) / (2 * variance), dim=-1)
    means = CENTRES.to(z) + (a * DEVIATION**2 / variance)[..., None] * gap
    return (weight[..., None] * means).sum(1)


def exact_network(path: NoisePath, prediction: str) -> Any:
    """The exact denoiser as a network: (z, time, condition) -> raw output."""

    def network(z: Tensor, time: Tensor, condition: Any = None) -> Tensor:
        if prediction == FLOW:
            s = (time.to(z) / path.start)[:, None]
            a = 1 - s
        else:
            a, s = (c.to(z)[:, None] for c in path.coefficients(time))
        x = exact_clean(z, a, s)
        noise = (z - a * x) / s
        return noise - x if prediction == FLOW else a * noise - s * x

    return network


def run(shape: MixtureShape, seed: int = 0) -> dict[str, Any]:
    """Pretrain, distil, compare: root mean square error of the endpoints and share (%) of samples off every mode."""
    torch.manual_seed(seed)
    path: NoisePath = FlowPath(3.0) if shape.path == "flow" else VPPath()
    prediction = FLOW if shape.path == "flow" else V
    teacher, student = exact_network(path, prediction), Student(shape.width, path.start)
    config = ConsistencyConfig(segments=shape.segments, teacher_steps=shape.teacher_steps, loss=shape.loss, weight=shape.weight,
                               space=shape.space, max_weight=shape.max_weight)  # fmt: skip
    regression = replace(config, segments=shape.teacher_steps)  # one step a segment: plain learning from the teacher
    generator = torch.Generator().manual_seed(seed)

    def unguided(z: Tensor, time: Tensor, condition: Any, guidance: Tensor | None) -> tuple[Tensor, Tensor]:
        raw = teacher(z, time)
        return raw, raw

    for objective, steps in ((regression, shape.pretraining), (config, shape.steps)):
        loss = ConsistencyLoss(objective, path, prediction, student=student, teacher=unguided)
        _train(student, loss, steps, shape, generator)
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(99))
    exact = roll_down(lambda z, t: teacher(z, t), path, prediction, noise, segments=shape.exact_steps)
    jumps = {"distilled": student, "undistilled": teacher}
    ends = {name: roll_down(net, path, prediction, noise, segments=shape.segments) for name, net in jumps.items()}
    return {**asdict(shape), "seed": seed, **{name: _figures(end, exact) for name, end in ends.items()}}


def _train(
    student: Student, loss: ConsistencyLoss, steps: int, shape: MixtureShape, generator: torch.Generator
) -> None:
    optimizer = torch.optim.Adam(student.parameters(), lr=shape.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1), eta_min=shape.rate / 20)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss(data(shape.batch, generator), None, generator).total.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def _figures(end: Tensor, exact: Tensor) -> dict[str, float]:
    nearest = torch.cdist(end, CENTRES).min(dim=1).values
    return {
        "endpoint_error": float((end - exact).square().sum(1).mean().sqrt()),
        "off_percent": float((nearest > 4 * DEVIATION).float().mean() * 100),
    }
