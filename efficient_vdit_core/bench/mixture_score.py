"""What the score's term adds to consistency on the 2-D mixture: samples at few steps against the true distribution."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..distill.objectives.rollout import roll_down
from ..distill.objectives.score import ScoreConfig, ScoreLoss
from .mixture import CENTRES, DEVIATION, MixtureShape, data, exact_network, network_of, new_student, objective_of, train

SAMPLES = 4000
SHAPE = MixtureShape(segments=2, pretraining=1000, steps=1000, batch=256)
STUDENT_STEPS = 1000  # of each continuation
WEIGHTS = (0.1, 1.0)


def compare(seed: int, shape: MixtureShape = SHAPE, weights: tuple[float, ...] = WEIGHTS) -> list[dict[str, Any]]:
    """The same consistency student, trained on in as many of its own steps: by consistency alone, and with the score's
    term in each of ``weights``."""
    student, generator = new_student(shape, seed)
    objective = objective_of(shape)
    train(student, replace(objective, segments=shape.teacher_steps), shape.pretraining, shape, generator)
    train(student, objective, shape.steps, shape, generator)
    rows = []
    for weight in (0.0, *weights):
        further = copy.deepcopy(student)
        state = torch.Generator().manual_seed(seed + 1)
        if weight:
            train_with_score(further, weight, STUDENT_STEPS, shape, state)
        else:
            train(further, objective, STUDENT_STEPS, replace(shape, rate=shape.rate / 2), state)
        rows.append({**asdict(shape), "seed": seed, "score_weight": weight, **spread(further, shape)})
    path, prediction = network_of(shape)
    undistilled = spread(exact_network(path, prediction), shape)
    return [*rows, {**asdict(shape), "seed": seed, "score_weight": None, **undistilled}]


def train_with_score(
    student: nn.Module, weight: float, steps: int, shape: MixtureShape, generator: torch.Generator
) -> None:
    """``steps`` steps of the student, with those of a fake score in between; it starts from the student, which knows the
    mixture's noise levels."""
    path, prediction = network_of(shape)
    teacher = exact_network(path, prediction)
    fake = copy.deepcopy(student)
    config = ScoreConfig(**asdict(objective_of(shape)), score_weight=weight)
    step = 0
    loss = ScoreLoss(
        config,
        path,
        prediction,
        student=student,
        fake=fake,
        teacher=lambda z, time, condition, guidance: (teacher(z, time),) * 2,
        students_step=lambda: config.students_step(step),
    )
    optimizers = [torch.optim.Adam(net.parameters(), lr=shape.rate / 2, betas=(0.5, 0.99)) for net in (fake, student)]
    turns = (steps * config.fake_steps, steps)
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count, eta_min=shape.rate / 40)
        for optimizer, count in zip(optimizers, turns, strict=True)
    ]
    for step in range(sum(turns)):
        turn = config.is_students_turn(step)
        learning = optimizers[turn]
        learning.zero_grad(set_to_none=True)
        loss(data(shape.batch, generator), None, generator).total.backward()
        for group in learning.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        learning.step()
        schedules[turn].step()


def spread(network: Any, shape: MixtureShape) -> dict[str, float]:
    """How the network's samples, one jump a segment, compare with the mixture: the energy distance (0 in the mean for the same
    distribution), how many (%) lie off every mode, and the deviation within a mode relative to the true one."""
    path, prediction = network_of(shape)
    noise = torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(99))
    end = roll_down(network, path, prediction, noise, segments=shape.segments)
    true = data(SAMPLES, torch.Generator().manual_seed(98))
    distance, nearest = torch.cdist(end, CENTRES).min(dim=1)
    near = distance <= 4 * DEVIATION
    within = (end - CENTRES[nearest])[near]
    return {
        "energy_distance": energy_distance(end, true),
        "off_percent": float((~near).float().mean() * 100),
        "deviation": float(within.square().mean().sqrt() / DEVIATION),
        "rarest_mode": float(torch.bincount(nearest[near], minlength=len(CENTRES)).min() * len(CENTRES) / SAMPLES),
    }


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|A - B| - E|A - A'| - E|B - B'| of the distributions that two samples (n, d) are from, unbiased: no point is a
    pair with itself, and samples of one distribution are now and then a little below 0."""
    within = [torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(2 * torch.cdist(a, b).mean() - within[0] - within[1])
