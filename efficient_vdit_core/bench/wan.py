"""Wan 14B's step: a measurement of some of its blocks (2.1 and each expert of 2.2 text to video)."""

from __future__ import annotations

from typing import Any

import torch

from ..attention.report.cost import StepCost
from .blocks import drawn, time_plans
from .bounds import MODELS

CHANNELS, TEXT, TEXT_WIDTH = 16, 512, 4096


def measure(
    clip: str, depth: int, device: torch.device, *, references: tuple[int, ...], dtype: str, repeats: int, seed: int
) -> list[dict[str, Any]]:
    """Times ``depth`` of diffusers' own 40 blocks with random weights on a clip of `bounds.MODELS`, dense and under
    uniform plans (`time_plans`)."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    whole, kind = MODELS["wan_14b"], getattr(torch, dtype)
    cost = StepCost(whole.clips[clip], whole.heads, whole.head_dim, depth, whole.weights // whole.depth * depth)
    with drawn(device, kind):
        model = WanTransformer3DModel(num_layers=depth).to(kind).eval()
    grid = cost.layout.grid
    inputs = {
        "hidden_states": torch.randn(1, CHANNELS, grid.t, 2 * grid.h, 2 * grid.w, device=device, dtype=kind),
        "timestep": torch.full((1,), 500, device=device),
        "encoder_hidden_states": torch.randn(1, TEXT, TEXT_WIDTH, device=device, dtype=kind),
    }
    rows = time_plans(model, inputs, cost, device, references=references, repeats=repeats)
    return [{**row, "dtype": dtype} for row in rows]
