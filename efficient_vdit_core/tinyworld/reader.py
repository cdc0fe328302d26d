"""Tells from pixels alone what a tiny-world clip shows. No learning: geometry and nearest colours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .world import ATTRIBUTES, BACKGROUNDS, COLORS, FIRST_BOUNCE, SHAPES, SPEEDS, Scene

# A pixel belongs to a shape when it differs from the background by more than this (Euclidean, RGB 0..255).
_FOREGROUND = 60.0
# Smaller specks are not counted as shapes (pixels).
_SMALLEST = 25
# Fill of the bounding box: triangle 1/2, circle pi/4, square 1; the limits lie half-way.
_FILL_LIMITS = (0.64, 0.89)


@dataclass(frozen=True)
class Reading:
    """What the reader saw. Attributes are None when no shape is visible. ``count`` is the number of shapes."""

    shape: str | None
    color: str | None
    direction: str | None
    speed: str | None
    background: str
    count: int

    def agreement(self, scene: Scene) -> dict[str, bool]:
        """For each attribute, and for ``count`` (one shape), whether clip and scene agree."""
        agree = {name: getattr(self, name) == getattr(scene, name) for name in ATTRIBUTES}
        return {**agree, "count": self.count == 1}


def read_clip(clip: np.ndarray) -> Reading:
    """Read a uint8 clip (F, H, W, 3) of at least two frames."""
    if clip.ndim != 4 or clip.shape[-1] != 3 or clip.shape[0] < 2:
        raise ValueError(
            f"A clip of shape {clip.shape} was given, expected (frames >= 2, height, width, 3). "
            "The reader follows a shape over time; pass a whole clip."
        )
    pixels = clip.astype(np.float32)
    background, masks = foreground(clip)
    name = _nearest(background, BACKGROUNDS)
    if (masks.sum(axis=(1, 2)) < _SMALLEST).any():
        return Reading(None, None, None, None, name, 0)
    count = int(np.median([_count_components(m) for m in masks[:: max(1, len(masks) // 5)]]))
    track = np.stack([_centroid(m) for m in masks])
    return Reading(_shape(masks), _color(pixels, masks), _direction(track), _speed(track), name, count)


def foreground(clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Background colour (3,), the median of the corners, and masks (F, H, W) of the pixels that differ from it."""
    pixels = clip.astype(np.float32)
    corners = np.concatenate([pixels[:, :4, :4], pixels[:, :4, -4:], pixels[:, -4:, :4], pixels[:, -4:, -4:]], axis=1)
    background = np.median(corners.reshape(-1, 3), axis=0)
    return background, np.linalg.norm(pixels - background, axis=-1) > _FOREGROUND


def _nearest(value: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(value - np.array(palette[name]))))


def _centroid(mask: np.ndarray) -> np.ndarray:
    y, x = np.nonzero(mask)
    return np.array([x.mean(), y.mean()])


def _color(pixels: np.ndarray, masks: np.ndarray) -> str:
    # Edge pixels are mixed with the background, so only pixels whose four neighbours are in the mask count.
    core = masks[:, 1:-1, 1:-1] & masks[:, :-2, 1:-1] & masks[:, 2:, 1:-1] & masks[:, 1:-1, :-2] & masks[:, 1:-1, 2:]
    chosen = pixels[:, 1:-1, 1:-1][core] if core.any() else pixels[masks]
    return _nearest(np.median(chosen, axis=0), COLORS)


def _direction(track: np.ndarray) -> str:
    dx, dy = track[min(FIRST_BOUNCE, len(track)) - 1] - track[0]
    if abs(dx) >= abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def _speed(track: np.ndarray) -> str:
    # Steps over four frames, so that whole-pixel edges average out; their median is blind to a bounce.
    span = min(4, len(track) - 1)
    step = float(np.median(np.abs(track[span:] - track[:-span]).max(axis=1))) / span
    return min(SPEEDS, key=lambda name: abs(SPEEDS[name] - step))


def _shape(masks: np.ndarray) -> str:
    fills = []
    for mask in masks:
        y, x = np.nonzero(mask)
        fills.append(len(x) / ((np.ptp(x) + 1) * (np.ptp(y) + 1)))
    fill = float(np.median(fills))
    triangle, square = _FILL_LIMITS
    return SHAPES[2] if fill < triangle else SHAPES[0] if fill < square else SHAPES[1]


def _count_components(mask: np.ndarray) -> int:
    """Number of 4-connected regions of at least ``_SMALLEST`` pixels."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        spread = np.maximum.reduce(
            [padded[1:-1, 1:-1], padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
        )
        spread = np.where(mask, spread, 0)
        if (spread == labels).all():
            break
        labels = spread
    _, sizes = np.unique(labels[labels > 0], return_counts=True)
    return int((sizes >= _SMALLEST).sum())
