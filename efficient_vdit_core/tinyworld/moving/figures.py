"""Figures of many clips, each read against its caption: shares that pass, and how far those shares can be trusted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .reader import COLUMNS, Reading, read_clip
from .scene import Scene

DRAWS, DRAWS_SEED = 2000, 0


# Of the clips that were judged so far; and what is called with that after each of them.
SoFar = Callable[[], dict[str, Any]]
Progress = Callable[[SoFar], None]


def figures_of(clips: Iterable[np.ndarray], scenes: Sequence[Scene]) -> dict[str, Any]:
    """`figures_of_readings` of ``clips`` (F, H, W, 3)."""
    return figures_of_readings([read_clip(clip) for clip in clips], scenes)


def figures_of_readings(readings: Sequence[Reading], scenes: Sequence[Scene]) -> dict[str, Any]:
    """What clips show of the captions of ``scenes``, by what was read of each.

    all_right: share of clips that pass every column, with a 95 % interval over captions; right: a 1 for each that does and a
    0 for each other, in their order. columns: the share that passes each of ``COLUMNS``. overlap: the mean, as in `Reading`, 0
    for a clip without a shape; stain, swelling, flicker: means of the clips that show a shape; off_track: its median in
    pixels, of the same. motion: mean speed of the centre in pixels a frame. diversity: deviation of the start, which no
    caption names, among clips of one caption, in pixels. These six are None where no clip tells them. clips: their number;
    seen: the share of them that show a shape; distinct_captions.
    """
    verdicts = [reading.verdict(scene) for reading, scene in zip(readings, scenes, strict=True)]
    captions = [scene.caption() for scene in scenes]
    off_track = _finite([reading.off_track(scene) for reading, scene in zip(readings, scenes, strict=True)])
    motions = _finite([_motion(reading) for reading in readings])
    return {
        **shares(verdicts, captions, COLUMNS),
        "overlap": float(np.mean([reading.overlap for reading in readings])),
        **means_of_seen(readings, ("stain", "swelling", "flicker")),
        "off_track": float(np.median(off_track)) if len(off_track) else None,
        "motion": float(np.mean(motions)) if len(motions) else None,
        "diversity": start_spread(readings, captions),
        **counts(readings, captions),
    }


def shares(verdicts: Sequence[Mapping[str, bool]], captions: Sequence[str], columns: Sequence[str]) -> dict[str, Any]:
    """The shares of clips that pass all ``columns``, with the 95 % interval over captions and which they are, and each of them."""
    right = np.array([all(verdict.values()) for verdict in verdicts], dtype=float)
    return {
        "all_right": float(right.mean()),
        "all_right_interval": interval(right, captions),
        "right": "".join("01"[int(passed)] for passed in right),
        "columns": {name: float(np.mean([verdict[name] for verdict in verdicts])) for name in columns},
    }


def means_of_seen(readings: Sequence[Any], names: Sequence[str]) -> dict[str, float | None]:
    """The mean of each of ``names`` over the readings with ``seen``, None where there are none: where nothing is seen, nothing
    is stained or flickers."""
    seen = [reading for reading in readings if reading.seen]
    return {name: float(np.mean([getattr(r, name) for r in seen])) if seen else None for name in names}


def counts(readings: Sequence[Any], captions: Sequence[str]) -> dict[str, Any]:
    """How many clips were judged, the share with ``seen``, and of how many different captions they are."""
    return {
        "clips": len(readings),
        "seen": float(np.mean([reading.seen for reading in readings])),
        "distinct_captions": len(set(captions)),
    }


def interval(values: np.ndarray, groups: Sequence[str]) -> tuple[float, float] | None:
    """Bounds between which the mean of ``values`` lies 95 of 100 times, by drawing whole ``groups`` anew: clips of one
    caption are alike, and other captions are what a reader of the table wants to know about. None where there are fewer than
    two groups, which tell nothing of others."""
    names, number = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        return None
    sums, counts = np.bincount(number, values), np.bincount(number)
    drawn = np.random.default_rng(DRAWS_SEED).integers(len(names), size=(DRAWS, len(names)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def start_spread(readings: Sequence[Reading], captions: Sequence[str]) -> float | None:
    """Deviation of the first frame's centre among the clips of each caption, pixels, mean over captions. None where no caption
    has two clips whose first frame shows a shape."""
    spreads = []
    for caption in sorted(set(captions)):
        starts = [r.track[0] for r, c in zip(readings, captions, strict=True) if c == caption]
        found = [start for start in starts if np.isfinite(start).all()]
        if len(found) > 1:
            spreads.append(float(np.sqrt(np.var(np.stack(found), axis=0, ddof=1).sum())))
    return float(np.mean(spreads)) if spreads else None


def _motion(reading: Reading) -> float:
    steps = _finite(np.linalg.norm(np.diff(reading.track, axis=0), axis=1))
    return float(np.mean(steps)) if len(steps) else float("nan")


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    return np.asarray([value for value in values if np.isfinite(value)])
