"""Two LoRAs of one module that learn in turn: the student's, and the fake score's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...training import StepLoss
from ..config import DistillConfig
from ..lora.layers import FAKE, STUDENT, add_lora, belongs_to, set_active
from ..objectives.score import ScoreLoss


def add_learners(module: nn.Module, config: DistillConfig) -> list[str]:
    """Put the LoRAs that a run trains on ``module``: the student's, and the fake score's for score distillation; returns
    the names of its layers."""
    learners = (STUDENT, FAKE) if config.method == "score" else (STUDENT,)
    return add_lora(module, config.model.lora_rank, config.model.lora_alpha or None, learners=learners)


class AlternatingLoss:
    """``loss`` as a step of a training run: the LoRA whose turn it is counts until the gradient is taken, since
    checkpointed blocks run again on the way, and its optimisers alone take the step.

    Args:
        bare: the module with both.
        optimizers: how many the student has; the fake score's come after these, as many.
        data_parallel: other processes wait for a gradient of every weight.
    """

    def __init__(self, loss: ScoreLoss, bare: nn.Module, optimizers: int, *, data_parallel: bool) -> None:
        self.loss, self.bare, self.data_parallel = loss, bare, data_parallel
        self.optimizers = {STUDENT: range(optimizers), FAKE: range(optimizers, 2 * optimizers)}

    def __call__(self, x: Tensor, condition: Any, generator: torch.Generator) -> StepLoss:
        learner, idle = (STUDENT, FAKE) if self.loss.students_step() else (FAKE, STUDENT)
        set_active(self.bare, learner)
        result = self.loss(x, condition, generator)
        total = result.total + self._nothing(idle) if self.data_parallel else result.total
        release = lambda: set_active(self.bare, STUDENT)  # noqa: E731
        return StepLoss(total, result.parts, release, self.optimizers[learner], result.averaged)

    def _nothing(self, learner: str) -> Tensor:
        weights = [p for name, p in self.bare.named_parameters() if belongs_to(learner, name)]
        return 0.0 * torch.stack([p.sum() for p in weights]).sum()
