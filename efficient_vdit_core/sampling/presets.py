"""The noise levels that published few-step flow models were distilled for, and levels written by hand.

Levels are rectified-flow sigmas from 1 (noise) to 0 (clean). Sources: LightX2V's Wan2.2-Lightning LoRAs, timesteps
1000, 937.5, 833.33, 625 and their 8-step form (shift 5); FastVideo's FastWan, timesteps 1000, 757, 522 (shift 8);
NVIDIA's rCM, TrigFlow angles atan(80), 1.5, 1.4, 1.0; Lightricks' distilled LTX-Video 2, the sigmas of its workflow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..limits.quote import quoted
from .schedule import shifted_time

RCM_ANGLES = (math.atan(80.0), 1.5, 1.4, 1.0)


@dataclass(frozen=True)
class Preset:
    """sigmas: all levels, the last 0. gamma: the share of fresh noise that the model was made for, 0 deterministic, 1
    re-noise."""

    sigmas: tuple[float, ...]
    gamma: float


def shifted(steps: int, shift: float) -> tuple[float, ...]:
    """Equal pieces of unshifted flow time, shifted: s u / (1 + (s - 1) u), from 1 down to 0."""
    if steps < 1 or not shift > 0:
        raise ValueError(f"There are {steps} steps and shift {shift}, expected at least 1 step and a shift above 0.")
    return tuple(shifted_time((steps - i) / steps, shift) for i in range(steps + 1))


def rcm(steps: int) -> tuple[float, ...]:
    """rCM's levels for 1 to 4 steps: the first angle, then the next ones of its list, as flow sigmas sin / (sin +
    cos)."""
    return (*(math.sin(t) / (math.sin(t) + math.cos(t)) for t in RCM_ANGLES[:steps]), 0.0)


PRESETS: dict[str, Preset] = {
    "LightX2V 4 steps": Preset(shifted(4, 5.0), 0.0),
    "LightX2V 8 steps": Preset(shifted(8, 5.0), 0.0),
    "FastWan 3 steps": Preset((1.0, 0.757, 0.522, 0.0), 1.0),
    **{f"rCM {n} step{'s' * (n > 1)}": Preset(rcm(n), 1.0) for n in (1, 2, 3, 4)},
    "LTX distilled 8 steps": Preset((1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0), 0.0),
}


def preset_of(sigmas: Sequence[float]) -> str | None:
    """The preset whose levels these are, all or one expert's part of them; None where there is none."""
    for name, preset in PRESETS.items():
        for start in range(len(preset.sigmas) - len(sigmas) + 1):
            part = preset.sigmas[start : start + len(sigmas)]
            if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(part, sigmas, strict=True)):
                return name
    return None


def parse_sigmas(text: str) -> Tensor:
    """Read levels such as ``1, 0.9375, 0.8333, 0.625, 0`` as (N,) float32. Raises ValueError unless they descend to 0
    or above."""
    try:
        values = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(
            f"The sigmas {quoted(text)} cannot be read, expected numbers such as '1, 0.75, 0.5, 0'."
        ) from None
    if not 2 <= len(values) <= 1001 or not all(map(math.isfinite, values)):
        raise ValueError(f"There are {len(values)} sigmas, expected 2 to 1001 finite numbers, from noise down to 0.")
    sigmas = torch.tensor(values, dtype=torch.float32)
    if values[-1] < 0 or not bool((sigmas[1:] < sigmas[:-1]).all()):
        raise ValueError(f"The sigmas {quoted(text)} do not descend strictly to 0 or above. Correct their order.")
    return sigmas


def cut(sigmas: Tensor, start: int, end: int) -> Tensor:
    """The levels of the steps ``start`` to ``end`` (counted from 0, end left out), for models with two experts.

    Raises ValueError where no step is left.
    """
    steps = len(sigmas) - 1
    end = min(end, steps)
    if not 0 <= start < end:
        raise ValueError(
            f"start_step is {start} and end_step {end} of {steps} steps: no step is left. Let start_step be below end_step."
        )
    return sigmas[start : end + 1]
