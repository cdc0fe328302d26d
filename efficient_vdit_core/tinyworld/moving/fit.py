"""Finds the shape in each frame of a tiny-world clip: which circle, square and triangle overlap it most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .scene import SHAPES, coverage

# A pixel differs from the background where it is further from it than this (Euclidean, RGB 0..255): half of the least
# contrast between a colour and a background of the world.
CONTRAST = 60.0
# Frames with fewer pixels that differ show no shape.
SMALLEST = 25
# Width in pixels of the edge that is fitted, step by step: a wide one finds the place, a narrow one settles it.
_EDGES = (8.0, 8.0, 4.0, 4.0, 2.0, 2.0, 1.0, 1.0)
_NUDGE = 0.1  # pixels, for derivatives
_STIFF = 1e3  # how much a known radius weighs, against some tens of pixels along an outline


@dataclass(frozen=True)
class Fits:
    """The best fits to each of F frames.

    background, color (F, 3): 0..255. seen (F,): whether there is a shape at all. places (F, S, 3): centre x, y and radius
    in pixels, for each of ``SHAPES``. overlap (F, S): soft intersection over union with the frame's mask, 0 to 1.
    """

    background: np.ndarray
    color: np.ndarray
    seen: np.ndarray
    places: np.ndarray
    overlap: np.ndarray


def fit_clip(clip: np.ndarray) -> Fits:
    """Fit every shape to every frame of a uint8 clip (F, H, W, 3)."""
    pixels = clip.astype(np.float32)
    background = np.median(_border(pixels), axis=1)
    color, seen = _colors(pixels, background)
    mask = _soft_mask(pixels, background, color) * seen[:, None, None]
    places = np.stack([fit_shape(mask, shape, start_of(mask, shape)) for shape in SHAPES], axis=1)
    drawn = np.stack([coverage(shape, places[:, i], mask.shape[-1]) for i, shape in enumerate(SHAPES)], axis=1)
    both, either = np.minimum(drawn, mask[:, None]), np.maximum(drawn, mask[:, None])
    overlap = both.sum(axis=(2, 3)) / np.maximum(either.sum(axis=(2, 3)), 1e-6)
    return Fits(background, color, seen, places, overlap * seen[:, None])


def _border(pixels: np.ndarray) -> np.ndarray:
    """The outermost pixels (F, n, 3): a shape that touches a wall covers a tenth of them."""
    sides = pixels[:, 0], pixels[:, -1], pixels[:, 1:-1, 0], pixels[:, 1:-1, -1]
    return np.concatenate(sides, axis=1)


def _colors(pixels: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shape's colour in each frame (F, 3), and whether there is one (F,)."""
    differs = np.linalg.norm(pixels - background[:, None, None], axis=-1) > CONTRAST
    seen = differs.sum(axis=(1, 2)) >= SMALLEST
    core = differs.copy()  # edge pixels are mixed with the background
    for axis in (1, 2):
        core &= np.roll(differs, 1, axis) & np.roll(differs, -1, axis)
    colors = np.zeros_like(background)
    for i in np.flatnonzero(seen):
        colors[i] = np.median(pixels[i][core[i] if core[i].any() else differs[i]], axis=0)
    return colors, seen


def _soft_mask(pixels: np.ndarray, background: np.ndarray, color: np.ndarray) -> np.ndarray:
    """How far each pixel (F, H, W) lies on the way from the background, 0, to the shape's colour, 1."""
    way = (color - background)[:, None, None]
    along = ((pixels - background[:, None, None]) * way).sum(axis=-1)
    return np.clip(along / np.maximum(np.square(way).sum(axis=-1), 1.0), 0.0, 1.0)


def fit_shape(
    mask: np.ndarray,
    shape: str,
    start: np.ndarray,
    *,
    weight: np.ndarray | None = None,
    radius: float | None = None,
    corner: np.ndarray | None = None,
    size: int | None = None,
    edges: Sequence[float] = _EDGES,
) -> np.ndarray:
    """Places (F, 3) of the shape that differ least from square masks (F, n, n), by Gauss-Newton from ``start``.

    weight (F, n, n): 0 where a pixel says nothing, as where something else hides the shape. radius: what to hold it to,
    where too little is seen to find it. corner (F, 2): x, y of the masks' first pixel in pictures of ``size`` pixels, for
    masks that are cut out of them; places are within the masks. edges: the widths, step by step.
    """
    side = mask.shape[-1]
    corner = np.zeros((len(mask), 2), dtype=np.float32) if corner is None else corner
    places = start
    for edge in edges:
        drawn = coverage(shape, places, side, edge)
        slopes = [
            (coverage(shape, places + _NUDGE * axis, side, edge) - drawn) / _NUDGE
            for axis in np.eye(3, dtype=np.float32)
        ]
        jacobian = np.stack([s.reshape(len(mask), -1) for s in slopes], axis=2)
        missing = (mask - drawn).reshape(len(mask), -1, 1)
        weighted = jacobian if weight is None else jacobian * weight.reshape(len(mask), -1, 1)
        normal = weighted.transpose(0, 2, 1) @ jacobian + 1e-3 * np.eye(3, dtype=np.float32)
        pull = weighted.transpose(0, 2, 1) @ missing
        if radius is not None:
            normal[:, 2, 2] += _STIFF
            pull[:, 2, 0] += _STIFF * (radius - places[:, 2])
        step = np.linalg.solve(normal, pull)[..., 0]
        places = _inside(places + np.clip(step, -4.0, 4.0), shape, corner, size or side)
    return places


def _inside(places: np.ndarray, shape: str, corner: np.ndarray, size: int) -> np.ndarray:
    """Places whose shape lies within the picture, as the world's do: what lies beyond it cannot be fitted."""
    radius = np.clip(places[:, 2], 1.0, size / 2)
    extent = radius * (0.9 if shape == "square" else 1.0)
    center = np.clip(places[:, :2] + corner, extent[:, None], size - extent[:, None]) - corner
    return np.column_stack([center, radius])


# Areas of the shapes of radius 1, and how far the centre of gravity lies below the centre.
_AREAS = {"circle": np.pi, "square": 1.8**2, "triangle": 2.0}
_LOWER = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3}


def start_of(mask: np.ndarray, shape: str) -> np.ndarray:
    """Places (F, 3) by the area and the centre of gravity of masks (F, H, W)."""
    y, x = np.mgrid[0 : mask.shape[1], 0 : mask.shape[2]].astype(np.float32) + 0.5
    area = np.maximum(mask.sum(axis=(1, 2)), 1.0)
    radius = np.sqrt(area / _AREAS[shape])
    centre_x, centre_y = ((mask * axis).sum(axis=(1, 2)) / area for axis in (x, y))
    return np.stack([centre_x, centre_y - _LOWER[shape] * radius, radius], axis=1)
