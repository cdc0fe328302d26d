"""Physical state of tiny-world clips, read from pixels, and what it says about a set of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .reader import foreground
from .world import FIRST_BOUNCE

SMALLEST = 9  # pixels; below it no shape is seen
STATE = ("x", "y", "velocity x", "velocity y", "size", "red", "green", "blue")


@dataclass(frozen=True)
class ClipPhysics:
    """state: (8,) as ``STATE``: start in pixels, pixels a frame, square root of the area, 0..255; None where no shape
    is seen.

    motion: mean speed of the shape's centre in pixels a frame. flicker: mean change of background pixels from frame to
    frame, 0..255.
    """

    state: np.ndarray | None
    motion: float
    flicker: float


def read_physics(clip: np.ndarray) -> ClipPhysics:
    """Read a uint8 clip (F, H, W, 3)."""
    _, masks = foreground(clip)
    state, motion = read_state(clip, masks)
    change = np.abs(np.diff(clip.astype(np.float32), axis=0)).mean(axis=-1)
    wide = _grown(masks)
    still = ~(wide[1:] | wide[:-1])
    return ClipPhysics(state, motion, float(change[still].mean()) if still.any() else float(change.mean()))


def read_state(clip: np.ndarray, masks: np.ndarray | None = None) -> tuple[np.ndarray | None, float]:
    """State and motion of a clip, as in `ClipPhysics`; ``masks`` (F, H, W) of its shape, where they are known."""
    masks = foreground(clip)[1] if masks is None else masks
    areas = masks.sum(axis=(1, 2))
    if (areas < SMALLEST).any():
        return None, 0.0
    rows, columns = masks.sum(axis=2), masks.sum(axis=1)
    x, y = columns @ np.arange(clip.shape[2]) / areas, rows @ np.arange(clip.shape[1]) / areas
    track = np.stack([x, y], axis=1)
    steps = np.diff(track, axis=0)
    color = np.median(clip[masks], axis=0)
    state = np.array([*track[0], *steps[: FIRST_BOUNCE - 1].mean(axis=0), np.sqrt(np.median(areas)), *color])
    return state, float(np.linalg.norm(steps, axis=1).mean())


def frechet_distance(states: np.ndarray, real: np.ndarray) -> float:
    """Frechet distance of two sets of states (n, d) as Gaussians, each dimension in units of the real deviation."""
    scale = real.std(axis=0) + 1e-6
    a, b = states / scale, real / scale
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = _root(covariance_b)
    cross = _root(root @ covariance_a @ root)
    gap = float(np.square(a.mean(axis=0) - b.mean(axis=0)).sum())
    return gap + float(np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.trace(cross))


def _root(matrix: np.ndarray) -> np.ndarray:
    """The square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def start_spread(states: list[np.ndarray | None], groups: list[int]) -> float:
    """Diversity: deviation of the start position, which no caption names, among clips of one caption; pixels, mean over
    captions."""
    spreads = []
    for group in sorted(set(groups)):
        found = [s[:2] for s, g in zip(states, groups, strict=True) if g == group and s is not None]
        if len(found) > 1:
            spreads.append(float(np.sqrt(np.var(np.stack(found), axis=0, ddof=1).sum())))
    return float(np.mean(spreads)) if spreads else 0.0


def _grown(masks: np.ndarray, by: int = 3) -> np.ndarray:
    """Masks (F, H, W) widened by ``by`` pixels, so that blurred edges do not count as background."""
    out = masks.copy()
    for axis in (1, 2):
        for shift in range(1, by + 1):
            out |= np.roll(masks, shift, axis) | np.roll(masks, -shift, axis)
        masks = out.copy()
    return out
