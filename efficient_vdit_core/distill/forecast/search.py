"""What stage 2 will hold on its GPU and compute, found before it starts, by probing forwards on the meta device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ...attention.dense_call import Override
from ...search import make_probe_override
from ...search.errors import squared_errors
from ...search.record import OUTPUT
from ...training.live_bytes import LiveBytes, size_of
from ..config import DistillConfig
from ..families.cpu_offload import bytes_on_host
from ..runs.search_stage import SearchConfig, asked_times
from .memory import FusedAttention, MemoryPlan, meta_inputs, meta_student, opened
from .work import WorkPlan


def plan_search(
    search: SearchConfig, stage: DistillConfig, *, segments: int, steps: int, wears_lora: bool
) -> tuple[MemoryPlan, WorkPlan]:
    """Of a search on the model of ``stage``, which may wear an earlier stage's LoRA, with samples of ``steps`` steps."""
    model, batch = opened(stage.model), stage.training.batch
    module = meta_student(stage, model) if wears_lora else model.skeleton()  # the LoRA that it trains is as large
    frames = model.latent_shape(model.size(stage.data.frames, stage.data.height, stage.data.width))[1]
    record = search.settings().record(frames)
    attention = FusedAttention()
    probing = make_probe_override(record, previous=attention, compare=_compared)

    def probing_one_layer(*args: Any, **kwargs: Any) -> Tensor:
        return (attention if record.heads else probing)(*args, **kwargs)

    def forward(inputs: tuple[Tensor, Tensor, Any], override: Override) -> None:
        model.predict(module, *inputs, model.options_with(override)(inputs[0])).float()

    def work_of_one(override: Override) -> float:
        attention.flops = 0.0
        with FlopCounterMode(display=False) as products:
            forward(meta_inputs(stage, model, 1), override)
        return products.get_total_flops() + attention.flops

    with torch.no_grad():
        inputs = meta_inputs(stage, model, batch)
        with LiveBytes() as counter:
            before = torch.empty_like(inputs[0])  # what the network said in the step before
            # What it says in this one, beside what it says with a layer sparse.
            exact = [torch.empty_like(inputs[0])] if search.error == OUTPUT else []
            counter.count([inputs[0], inputs[2][0], before, *exact])
            forward(inputs, probing_one_layer)  # the next ones hold as much, after it has let go
        flops = work_of_one(probing)
        if search.error == OUTPUT:  # each of its further forwards is one as it is, but for a layer
            flops += model.layers * len(record.candidates) * work_of_one(attention)
    weights = size_of([*module.parameters(), *module.buffers()])
    held = {"weights": weights, "activations": counter.peak}
    examples = search.captions * len(asked_times(model, segments, steps))
    return MemoryPlan(held, {}, bytes_on_host(module)), WorkPlan(examples, flops)


def _compared(approximate: Tensor, exact: Tensor) -> tuple[float, np.ndarray]:
    """As `search.errors.relative_errors`, of tensors that have no values."""
    of_heads, _ = squared_errors(approximate, exact)
    return 0.0, np.zeros(len(of_heads))
