"""The most that a whole step gains under the plans that ship, by FLOPs, and what several GPUs add to it by a model: a
table of models and of the clips people make.

Weights are elements of the matrices that every video token meets, counted on each model's own class in ComfyUI.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..assets import preset_path
from ..attention import TokenLayout
from ..attention.report.cost import StepCost
from ..parallel.sharding.forecast import GPU_RATES, LayerShape, forward_speedup
from ..plan import TilePlan
from ..plan.head_patterns import LayerPattern
from ..tiles import TilePattern, TokenGrid
from . import minimax_h3

# INT8 attention (SageAttention, Comfy Kitchen) beside bf16 matrices runs at about twice their rate.
INT8_RATE = 2.0


@dataclass(frozen=True)
class Model:
    """A model's blocks, the clips by name, and the presets that ship for it."""

    heads: int
    head_dim: int
    depth: int
    weights: int
    clips: dict[str, TokenLayout]
    presets: tuple[str, ...]

    def cost(self, clip: str) -> StepCost:
        return StepCost(self.clips[clip], self.heads, self.head_dim, self.depth, self.weights)


def _clip(frames: int, width: int, height: int, pixels: int) -> TokenLayout:
    """``frames`` latent frames of ``width`` x ``height`` pixels, ``pixels`` to a token's side."""
    return TokenLayout(TokenGrid(frames, height // pixels, width // pixels))


MODELS = {
    "minimax_h3": Model(
        minimax_h3.HEADS,
        minimax_h3.HEAD_DIM,
        minimax_h3.DEPTH,
        minimax_h3.DEPTH * minimax_h3.WEIGHTS_PER_BLOCK,
        {name: clip.layout for name, clip in minimax_h3.CLIPS.items()},
        ("minimax_h3", "minimax_h3_strong", "minimax_h3_means"),
    ),
    "wan_14b": Model(
        40,
        128,
        40,
        11_953_766_400,
        {"832x480-81f": _clip(21, 832, 480, 16), "1280x720-81f": _clip(21, 1280, 720, 16)},
        ("wan", "wan_means"),
    ),
    "ltx2": Model(
        32,
        128,
        48,
        12_884_901_888,
        {
            "1280x704-121f": _clip(16, 1280, 704, 32),
            "1920x1088-121f": _clip(16, 1920, 1088, 32),
            "1920x1088-241f": _clip(31, 1920, 1088, 32),
        },
        ("ltx_av", "ltx_av_means"),
    ),
}


def preset_bounds(name: str, clip: str) -> list[dict[str, Any]]:
    """One row for each preset of the model: what it leaves of the attention, all layers counted, and Amdahl's bound.

    ``int8_alone`` is what INT8 attention gains without a plan, ``with_int8`` what the plan adds to it.
    """
    model = MODELS[name]
    cost, layout, rows = model.cost(clip), model.clips[clip], []
    for preset in model.presets:
        patterns = _patterns(model, clip, preset)
        left = sum(p.flop_density(layout.grid, layout.prefix + layout.suffix) for p in patterns) / model.depth
        rows.append(
            {
                "preset": preset,
                "pattern": patterns[model.depth // 2].name(layout.grid.t),
                "tokens": layout.tokens,
                "attention_share": cost.attention_share(),
                "attention_left": left,
                "bound": cost.bound(left),
                "int8_alone": 1 / (1 - cost.attention_share() * (1 - 1 / INT8_RATE)),
                "with_int8": cost.bound(left, INT8_RATE),
            }
        )
    return rows


def gpu_forecasts(name: str, clip: str) -> list[dict[str, Any]]:
    """One row for each plan (the presets, and none), number of GPUs and stated rates: how many times faster a step is
    than on one of them under the same plan: with nothing overlapped, and with the exchanges beside the attention as they
    run. A model, not a measurement."""
    model = MODELS[name]
    shape = LayerShape(model.clips[clip], model.heads, model.head_dim, text=0, weights=model.weights // model.depth)
    plans = {"none": [TilePattern(None)] * model.depth, **{p: _patterns(model, clip, p) for p in model.presets}}
    return [
        {
            "plan": plan,
            "gpus": gpus,
            "rates": rates.name,
            "speedup": forward_speedup(shape, patterns, gpus, "auto", rates),
            "speedup_overlapped": forward_speedup(shape, patterns, gpus, "auto", rates, overlapped=True),
        }
        for plan, patterns in plans.items()
        for gpus in (2, 4)
        for rates in GPU_RATES
    ]


def _patterns(model: Model, clip: str, preset: str) -> list[LayerPattern]:
    """The pattern of each layer under a preset, on the frames of the clip."""
    plan, frames = TilePlan.load(preset_path(preset)), model.clips[clip].grid.t
    return [plan.pattern(layer, model.depth).scaled(plan.frames, frames) for layer in range(model.depth)]
