"""Figures of many clips, each read against its caption: shares that pass, and how far those shares can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .reader import COLUMNS, Reading, read_clip
from .scene import Scene

DRAWS, DRAWS_SEED = 2000, 0


def figures_of(clips: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, Any]:
    """What ``clips`` (F, H, W, 3) show of the captions of ``scenes``.

    all_right: share of clips that pass every column, with a 95 % interval over captions. columns: the share that passes
    each of ``COLUMNS``. overlap, stain, swelling, flicker: means, as in `Reading`; off_track: its median in pixels, of
    the clips that show a shape. motion: mean speed of the centre in pixels a frame. diversity: deviation of the start,
    which no caption names, among clips of one caption, in pixels.
    """
    readings = [read_clip(clip) for clip in clips]
    verdicts = [reading.verdict(scene) for reading, scene in zip(readings, scenes, strict=True)]
    captions = [scene.caption() for scene in scenes]
    off_track = _finite([reading.off_track(scene) for reading, scene in zip(readings, scenes, strict=True)])
    motions = _finite([_motion(reading) for reading in readings])
    return {
        **shares(verdicts, captions, COLUMNS),
        **{name: float(np.mean([getattr(r, name) for r in readings])) for name in ("overlap", "stain", "swelling", "flicker")},
        "off_track": float(np.median(off_track)) if len(off_track) else None,
        "motion": float(np.mean(motions)) if len(motions) else 0.0,
        "diversity": start_spread(readings, captions),
        "clips": len(readings),
    }  # fmt: skip


def shares(verdicts: Sequence[Mapping[str, bool]], captions: Sequence[str], columns: Sequence[str]) -> dict[str, Any]:
    """The shares of clips that pass all ``columns``, with the 95 % interval over captions, and each of them."""
    right = np.array([all(verdict.values()) for verdict in verdicts], dtype=float)
    return {
        "all_right": float(right.mean()),
        "all_right_interval": interval(right, captions),
        "columns": {name: float(np.mean([verdict[name] for verdict in verdicts])) for name in columns},
    }


def interval(values: np.ndarray, groups: Sequence[str]) -> tuple[float, float]:
    """Bounds between which the mean of ``values`` lies 95 of 100 times, by drawing whole ``groups`` anew: clips of one
    caption are alike, and other captions are what a reader of the table wants to know about."""
    names, number = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(number, values), np.bincount(number)
    drawn = np.random.default_rng(DRAWS_SEED).integers(len(names), size=(DRAWS, len(names)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def start_spread(readings: Sequence[Reading], captions: Sequence[str]) -> float:
    """Deviation of the first frame's centre among the clips of each caption, pixels, mean over captions."""
    spreads = []
    for caption in sorted(set(captions)):
        starts = [r.track[0] for r, c in zip(readings, captions, strict=True) if c == caption]
        found = [start for start in starts if np.isfinite(start).all()]
        if len(found) > 1:
            spreads.append(float(np.sqrt(np.var(np.stack(found), axis=0, ddof=1).sum())))
    return float(np.mean(spreads)) if spreads else 0.0


def _motion(reading: Reading) -> float:
    steps = _finite(np.linalg.norm(np.diff(reading.track, axis=0), axis=1))
    return float(np.mean(steps)) if len(steps) else float("nan")


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    return np.asarray([value for value in values if np.isfinite(value)])
