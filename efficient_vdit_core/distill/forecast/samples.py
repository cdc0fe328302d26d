"""What the teacher's own samples, the data of source "teacher", will hold on a GPU and compute, found before a run starts, by
one guided step on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ...training.live_bytes import LiveBytes, size_of
from ..config import DistillConfig
from ..families.cpu_offload import bytes_on_host
from ..objectives.rollout import guided
from .memory import FusedAttention, MemoryPlan, meta_inputs, opened
from .work import WorkPlan


def plan_samples(stage: DistillConfig) -> tuple[MemoryPlan, WorkPlan]:
    """Of all samples that the model of ``stage`` makes, as if none stood in the cache yet; the work's examples are forwards."""
    model, data = opened(stage.model), stage.data
    module, attention = model.skeleton(), FusedAttention()

    def predict(z: Tensor, time: Tensor, condition: Any) -> Tensor:
        return model.predict(module, z, time, condition, model.options_with(attention)(z))

    def one_step(batch: int) -> None:
        z, time, condition = meta_inputs(stage, model, batch)
        guided(predict, condition, condition, data.guidance)(z, time)

    with torch.no_grad():
        with LiveBytes() as counter:
            one_step(min(stage.training.batch, data.clips))
        attention.flops = 0.0
        with FlopCounterMode(display=False) as products:
            one_step(1)
    weights = size_of([*module.parameters(), *module.buffers()])
    held = {"weights": weights, "activations": counter.peak}
    forwards = 1 if data.guidance == 1 else 2
    work = WorkPlan(
        data.clips * data.teacher_steps * forwards, (products.get_total_flops() + attention.flops) / forwards
    )
    return MemoryPlan(held, {}, bytes_on_host(module)), work
