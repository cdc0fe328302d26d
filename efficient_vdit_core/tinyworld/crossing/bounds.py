"""What the judge of the crossing world says of clips that no model made: the most that a model can get, and chance."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..moving.figures import Progress
from .judge import CrossingReading, crossing_figures, read_crossing
from .scene import held_out_scenes, render

SEED = 56_001
# About what a VAE leaves: the deviation of a Gaussian in pixels, and of noise in grey levels.
BLUR, NOISE = 0.7, 4.0


def bounds(count: int, progress: Progress | None = None) -> dict[str, dict[str, Any]]:
    """`crossing_figures` by row, of the clips of ``count`` held-out scenes: as they are; blurred and with noise; and judged
    by one another's captions, which is what chance gets. ``progress`` is called after each, with what tells the same of the
    clips so far."""
    scenes, rng = held_out_scenes(count), np.random.default_rng(SEED)
    others = scenes[1:] + scenes[:1]
    pairs: list[tuple[CrossingReading, CrossingReading]] = []  # of each clip, and of the same blurred

    def so_far() -> dict[str, dict[str, Any]]:
        true, soft = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        return {
            "true clips": crossing_figures(true, scenes[: len(pairs)]),
            "true clips, blurred": crossing_figures(soft, scenes[: len(pairs)]),
            "chance": crossing_figures(true, others[: len(pairs)]),
        }

    for scene in scenes:
        clip = render(scene)
        pairs.append((read_crossing(clip), read_crossing(blurred(clip, rng))))
        if progress:
            progress(so_far)
    return so_far()


def blurred(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A uint8 clip (F, H, W, 3), blurred and with noise."""
    weights = np.exp(-(np.arange(-3, 4) ** 2) / (2 * BLUR**2))
    weights /= weights.sum()
    smooth = np.pad(clip.astype(np.float32), ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
    for axis in (1, 2):
        smooth = np.lib.stride_tricks.sliding_window_view(smooth, len(weights), axis=axis) @ weights
    return np.clip(np.round(smooth + rng.normal(0, NOISE, clip.shape)), 0, 255).astype(np.uint8)
