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

from ..distill.objectives.consistency import ConsistencyConfig, ConsistencyLoss
from ..distill.objectives.rollout import roll_down
from ..sampling.path import EPSILON, FLOW, FlowPath, NoisePath, V, VPPath

MODES, DEVIATION = 8, 0.06
CENTRES = torch.tensor([[math.cos(2 * math.pi * i / MODES), math.sin(2 * math.pi * i / MODES)] for i in range(MODES)])


@dataclass(frozen=True)
class MixtureShape:
    """path: flow (shift 3) or vp. pretraining, steps: optimiser steps before and during distillation.

    prediction: of `PREDICTIONS`, "" for the path's usual one: flow, or v for vp.
    """

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
    prediction: str = ""


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


def network_of(shape: MixtureShape) -> tuple[NoisePath, str]:
    """The noise path, and what its networks predict."""
    path: NoisePath = FlowPath(3.0) if shape.path == "flow" else VPPath()
    return path, shape.prediction or (FLOW if shape.path == "flow" else V)


def exact_network(path: NoisePath, prediction: str) -> Any:
    """The exact denoiser as a network: (z, time, condition) -> raw output."""

    def network(z: Tensor, time: Tensor, condition: Any = None) -> Tensor:
        if path.kind == "flow":
            s = (time.to(z) / path.start)[:, None]
            a = 1 - s
        else:
            a, s = (c.to(z)[:, None] for c in path.coefficients(time))
        x = exact_clean(z, a, s)
        noise = (z - a * x) / s
        return {EPSILON: noise, V: a * noise - s * x, FLOW: noise - x}[prediction]

    return network


def objective_of(shape: MixtureShape) -> ConsistencyConfig:
    """What the student is distilled by."""
    return ConsistencyConfig(segments=shape.segments, teacher_steps=shape.teacher_steps, loss=shape.loss, weight=shape.weight,
                             space=shape.space, max_weight=shape.max_weight)  # fmt: skip


def new_student(shape: MixtureShape, seed: int) -> tuple[Student, torch.Generator]:
    """An untrained student, and the random numbers of its trainings."""
    torch.manual_seed(seed)
    return Student(shape.width, network_of(shape)[0].start), torch.Generator().manual_seed(seed)


def run(shape: MixtureShape, seed: int = 0) -> dict[str, Any]:
    """Pretrain, distil, compare: root mean square error of the endpoints and share (%) of samples off every mode."""
    student, generator = new_student(shape, seed)
    objective = objective_of(shape)
    # With one step a segment it is plain learning from the teacher.
    train(student, replace(objective, segments=shape.teacher_steps), shape.pretraining, shape, generator)
    train(student, objective, shape.steps, shape, generator)
    jumps = {"distilled": student, "undistilled": exact_network(*network_of(shape))}
    return {**asdict(shape), "seed": seed, **{name: figures(net, shape) for name, net in jumps.items()}}


def train(
    student: Student, objective: ConsistencyConfig, steps: int, shape: MixtureShape, generator: torch.Generator
) -> None:
    """Optimiser steps of the student under an objective, with the exact denoiser as teacher."""
    path, prediction = network_of(shape)
    teacher = exact_network(path, prediction)
    loss = ConsistencyLoss(
        objective,
        path,
        prediction,
        student=student,
        teacher=lambda z, time, condition, guidance: (teacher(z, time),) * 2,
    )
    optimizer = torch.optim.Adam(student.parameters(), lr=shape.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1), eta_min=shape.rate / 20)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss(data(shape.batch, generator), None, generator).total.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def figures(network: Any, shape: MixtureShape) -> dict[str, float]:
    """How far the network's endpoints, one jump a segment, lie from the exact ODE's (root mean square), and how many (%)
    off every mode."""
    path, prediction = network_of(shape)
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(99))
    exact = roll_down(exact_network(path, prediction), path, prediction, noise, segments=shape.exact_steps)
    end = roll_down(network, path, prediction, noise, segments=shape.segments)
    nearest = torch.cdist(end, CENTRES).min(dim=1).values
    return {
        "endpoint_error": float((end - exact).square().sum(1).mean().sqrt()),
        "off_percent": float((nearest > 4 * DEVIATION).float().mean() * 100),
    }
