"""Times one forward of the Open-Sora-Plan v1.2 transformer with random weights: dense, and under uniform plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..attention import TokenLayout
from ..attention.hook.override import make_attention_override
from ..attention.hook.state import FORWARD_KEY, ForwardState
from ..attention.report.report import AttentionReport
from ..attention.sdpa import OVERRIDE_KEY
from ..limits.memory import check_memory
from ..models.opensora_plan.config import OSP_29X720P, DiTConfig
from ..models.opensora_plan.transformer import OpenSoraT2V
from ..plan import TilePlan
from ..tiles import TokenGrid
from ..timing import seconds
from .turns import medians

# name -> latent frames, height and width
SIZES = {
    "9x128p": (3, 16, 16),  # for a CPU
    "29x240p": (8, 30, 54),
    "29x480p": (8, 60, 80),
    "29x720p": (8, 90, 160),
    "93x240p": (24, 30, 54),
    "93x720p": (24, 90, 160),
}
TEXT_TOKENS = 100


@dataclass(frozen=True)
class StepShape:
    """A forward to time: a name of ``SIZES`` and the number of blocks; the real model has 32."""

    size: str
    depth: int
    references: tuple[int, ...]
    dtype: str = "bfloat16"

    @property
    def grid(self) -> TokenGrid:
        t, h, w = SIZES[self.size]
        return TokenGrid(t, h // 2, w // 2)

    @property
    def config(self) -> DiTConfig:
        return replace(OSP_29X720P, num_layers=self.depth)


@torch.no_grad()
def measure(shape: StepShape, device: torch.device, *, repeats: int, seed: int) -> list[dict[str, Any]]:
    """One row for the dense forward and one for each plan. Raises ValueError where the weights would not fit."""
    torch.manual_seed(seed)
    _check_memory(shape, device)
    model = OpenSoraT2V(shape.config, dtype=getattr(torch, shape.dtype), device=device).eval()
    x = torch.randn(1, 4, *SIZES[shape.size], dtype=model.dtype, device=device)
    text = torch.randn(1, TEXT_TOKENS, shape.config.caption_channels, dtype=model.dtype, device=device)
    timestep = torch.full((1,), 500.0, device=device)

    def forward(options: dict[str, Any]) -> Tensor:
        return model(x, timestep, text, transformer_options=options)

    plans: dict[int | None, Callable[[], Tensor]] = {None: lambda: forward({})}
    for count in shape.references:
        plans[count] = lambda count=count: forward(_sparse_options(shape, count))
    for run in plans.values():
        run()
    times = medians(plans, device, repeats, seconds)
    share = _attention_share(forward, shape, device)
    return [_row(shape, count, taken, times[None], share) for count, taken in times.items()]


def _sparse_options(shape: StepShape, count: int) -> dict[str, Any]:
    override = make_attention_override(TilePlan.uniform(count), AttentionReport())
    return {OVERRIDE_KEY: override, FORWARD_KEY: ForwardState(TokenLayout(shape.grid))}


def _attention_share(forward: Callable[[dict[str, Any]], Tensor], shape: StepShape, device: torch.device) -> float:
    """The share of a dense forward spent in self-attention, projections not counted."""
    spent = 0.0

    def timed(func: Callable[..., Tensor], q: Tensor, k: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        nonlocal spent
        if k.shape != q.shape:
            return func(q, k, *rest, **kwargs)
        result: list[Tensor] = []
        spent += seconds(lambda: result.append(func(q, k, *rest, **kwargs)), device)
        return result[0]

    whole = seconds(lambda: forward({OVERRIDE_KEY: timed}), device)
    return spent / whole


def _row(shape: StepShape, count: int | None, taken: float, dense: float, share: float) -> dict[str, Any]:
    plan = TilePlan.uniform(count)
    ideal = 1 / plan.density(shape.grid.t)
    return {
        "size": shape.size,
        "depth": shape.depth,
        "dtype": shape.dtype,
        "tokens": shape.grid.tokens,
        "pattern": plan.pattern(0).name(shape.grid.t),
        "seconds": taken,
        "speedup": dense / taken,
        "attention_share": share,
        "amdahl_bound": 1 / ((1 - share) + share / ideal),
        "ideal_attention_speedup": ideal,
    }


def _check_memory(shape: StepShape, device: torch.device) -> None:
    with torch.device("meta"):
        weights = sum(p.numel() for p in OpenSoraT2V(shape.config).parameters())
    activations = 16 * shape.grid.tokens * shape.config.hidden_size
    needed = (weights + activations) * getattr(torch, shape.dtype).itemsize
    check_memory(needed, f"{shape.depth} blocks at {shape.size}", "Lower --depth.", str(device))
