"""What the judge of the crossing world says of clips that no model made: the most that a model can get, and chance."""

from __future__ import annotations

from typing import Any

import numpy as np

from .judge import crossing_figures
from .scene import held_out_scenes, render

SEED = 56_001
# About what a VAE leaves: the deviation of a Gaussian in pixels, and of noise in grey levels.
BLUR, NOISE = 0.7, 4.0


def bounds(count: int) -> dict[str, dict[str, Any]]:
    """`crossing_figures` by row, of the clips of ``count`` held-out scenes: as they are; blurred and with noise; and judged
    by one another's captions, which is what chance gets."""
    scenes, rng = held_out_scenes(count), np.random.default_rng(SEED)
    clips = [render(scene) for scene in scenes]
    return {
        "true clips": crossing_figures(clips, scenes),
        "true clips, blurred": crossing_figures([blurred(clip, rng) for clip in clips], scenes),
        "chance": crossing_figures(clips, scenes[1:] + scenes[:1]),
    }


def blurred(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A uint8 clip (F, H, W, 3), blurred and with noise."""
    weights = np.exp(-(np.arange(-3, 4) ** 2) / (2 * BLUR**2))
    weights /= weights.sum()
    smooth = np.pad(clip.astype(np.float32), ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
    for axis in (1, 2):
        smooth = np.lib.stride_tricks.sliding_window_view(smooth, len(weights), axis=axis) @ weights
    return np.clip(np.round(smooth + rng.normal(0, NOISE, clip.shape)), 0, 255).astype(np.uint8)
