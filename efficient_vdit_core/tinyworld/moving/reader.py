"""Tells from pixels alone what a tiny-world clip shows, and judges it against a caption. No learning: geometry and
nearest colours."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .fit import Fits, fit_clip
from .scene import BACKGROUNDS, COLORS, DIRECTIONS, FIRST_BOUNCE, SHAPES, SPEEDS, Scene, coverage, signed_distance

# What a clip is judged by; it is *all right* where none fails.
COLUMNS = ("shape", "color", "background", "track", "outline", "identity", "clean", "steady")

# Share of the frames that must agree, and the soft overlap with an ideal shape that an outline must have.
MOST, OVERLAP = 0.9, 0.8
# Pixels (root mean square) that the shape may be off the captioned way; slow and fast ones end 28 pixels apart.
OFF_TRACK = 2.0
# Largest share of stained pixels, relative to the shape's area.
STAINED = 0.03
# Largest deviation of the size over the clip, relative to its mean, and largest change of a colour from frame to frame, in the
# mean and in any but one.
SWELLING, FLICKER, FLASH = 0.05, 6.0, 25.0
# A stain is a hue that lies this far from the way between background and colour, or, further than some pixels from the
# outline, which may be blurred, a brightness that is this far off (RGB 0..255).
_HUE, _BRIGHTNESS, _EDGE = 25.0, 30.0, 4.0


@dataclass(frozen=True)
class Reading:
    """What the reader saw in F frames. Names are None where most frames show no shape.

    track (F, 2): centre x, y in pixels, nan where a frame shows none; radius (F,) likewise. overlap: mean over frames of
    the soft intersection over union with the ideal shape that fits best. same: share of the frames that show this shape
    in this color. lasts: share of the frames that show this background. outlined: share of the frames whose overlap reaches
    ``OVERLAP``. stain: stained pixels relative to the shape's area. swelling: deviation of the size relative to its mean.
    flicker: mean change from frame to frame, in grey levels, of the colour, background's or shape's, that changes most;
    flash: the largest change; both as `restlessness` has them.
    """

    shape: str | None
    color: str | None
    direction: str | None
    speed: str | None
    background: str
    track: np.ndarray
    radius: np.ndarray
    overlap: float = 0.0
    same: float = 0.0
    lasts: float = 0.0
    outlined: float = 0.0
    stain: float = 0.0
    swelling: float = 0.0
    flicker: float = 0.0
    flash: float = 0.0

    @property
    def seen(self) -> bool:
        """Whether the clip shows a shape; without one there is nothing that stain, swelling and flicker could be of."""
        return self.shape is not None

    def off_track(self, scene: Scene) -> float:
        """Root mean square distance in pixels from the way that the caption names, begun where the clip begins; infinite
        where that shows no shape."""
        first = np.arange(min(FIRST_BOUNCE // 2, len(self.track)))
        if not np.isfinite(self.track[first]).any():
            return float("inf")
        velocity = np.array(DIRECTIONS[scene.direction]) * SPEEDS[scene.speed]
        start = np.nanmedian(self.track[first] - first[:, None] * velocity, axis=0)
        asked = replace(scene, start=(float(start[0]), float(start[1])), radius=float(np.nanmedian(self.radius)))
        apart = np.square(self.track - asked.centers(len(self.track))).sum(axis=1)
        return float(np.sqrt(np.nanmean(apart)))

    def verdict(self, scene: Scene) -> dict[str, bool]:
        """Whether the clip passes each of ``COLUMNS`` for the scene's caption; where it starts is its own matter."""
        background = self.background == scene.background and self.lasts >= MOST
        if self.shape is None:
            return dict.fromkeys(COLUMNS, False) | {"background": background}
        return {
            "shape": self.shape == scene.shape,
            "color": self.color == scene.color,
            "background": background,
            "track": self.off_track(scene) <= OFF_TRACK,
            "outline": self.outlined >= MOST,
            "identity": self.same >= MOST,
            "clean": self.stain <= STAINED,
            "steady": self.swelling <= SWELLING and self.flicker <= FLICKER and self.flash <= FLASH,
        }


def read_clip(clip: np.ndarray) -> Reading:
    """Read a uint8 clip (F, H, W, 3) of at least two frames."""
    if clip.ndim != 4 or clip.shape[-1] != 3 or clip.shape[0] < 2:
        raise ValueError(
            f"A clip of shape {clip.shape} was given, expected (frames >= 2, height, width, 3). "
            "The reader follows a shape over time; pass a whole clip."
        )
    fits = fit_clip(clip)
    backgrounds = [_nearest(value, BACKGROUNDS) for value in fits.background]
    background = _most(backgrounds)
    lasts = backgrounds.count(background) / len(clip)
    if fits.seen.sum() * 2 <= len(clip):
        nowhere = np.full((len(clip), 2), np.nan)
        return Reading(None, None, None, None, background, nowhere, nowhere[:, 0], lasts=lasts)
    best = fits.overlap.argmax(axis=1)
    shapes, colors = [SHAPES[i] for i in best], [_nearest(value, COLORS) for value in fits.color]
    seen = [pair for pair, there in zip(zip(shapes, colors, strict=True), fits.seen, strict=True) if there]
    shape, color = _most([s for s, _ in seen]), _most([c for _, c in seen])
    places = np.where(fits.seen[:, None], fits.places[np.arange(len(clip)), best], np.nan)
    track = places[:, :2]
    overlap = fits.overlap.max(axis=1)
    changes = [restlessness(np.diff(color, axis=0)) for color in (fits.background, fits.color[fits.seen])]
    return Reading(
        shape, color, _direction(track), _speed(track), background, track, places[:, 2],
        overlap=float(overlap.mean()),
        same=sum(pair == (shape, color) for pair in seen) / len(clip),
        lasts=lasts,
        outlined=float((overlap >= OVERLAP).mean()),
        stain=_stain(clip, fits, best),
        swelling=_swelling(fits, best),
        flicker=float(max(change.mean() for change in changes)),
        flash=float(max(change.max() for change in changes)),
    )  # fmt: skip


def restlessness(steps: np.ndarray) -> np.ndarray:
    """How much a colour changes from frame to frame, of its differences (n, 3), but for the largest: what turns into another
    changes once, which is for other columns to judge, and what flashes twice, out and back."""
    changes = np.abs(steps).mean(axis=1)
    return np.sort(changes)[:-1] if len(changes) > 1 else np.zeros(1)


def _nearest(value: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(value - np.array(palette[name]))))


def _most(names: list[str]) -> str:
    return max(sorted(set(names)), key=names.count)


def _direction(track: np.ndarray) -> str:
    steps = np.diff(track[:FIRST_BOUNCE], axis=0)
    dx, dy = np.nansum(steps, axis=0)
    if abs(dx) >= abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def _speed(track: np.ndarray) -> str:
    # The median step is blind to a bounce.
    steps = np.abs(np.diff(track, axis=0)).max(axis=1)
    step = float(np.median(steps[np.isfinite(steps)])) if np.isfinite(steps).any() else 0.0
    return min(SPEEDS, key=lambda name: abs(SPEEDS[name] - step))


def _swelling(fits: Fits, best: np.ndarray) -> float:
    """Deviation of the size, among the frames that show the clip's most common shape, relative to its mean."""
    common = np.bincount(best[fits.seen]).argmax()
    radius = fits.places[fits.seen & (best == common), common, 2]
    return float(radius.std() / radius.mean())


def _stain(clip: np.ndarray, fits: Fits, best: np.ndarray) -> float:
    """Pixels that neither shape nor background explains, relative to the shape's area: the mean over frames."""
    shares = []
    for i in np.flatnonzero(fits.seen):
        shape, place = SHAPES[best[i]], fits.places[i, best[i]][None]
        way = fits.color[i] - fits.background[i]
        drawn = coverage(shape, place, clip.shape[1])[0]
        error = clip[i].astype(np.float32) - (fits.background[i] + drawn[..., None] * way)
        along = error @ way / max(float(np.linalg.norm(way)), 1.0)
        across = np.sqrt(np.maximum(np.square(error).sum(axis=-1) - np.square(along), 0.0))
        far = np.abs(signed_distance(shape, place, clip.shape[1])[0]) > _EDGE
        shares.append(((across > _HUE) | (far & (np.abs(along) > _BRIGHTNESS))).sum() / max(drawn.sum(), 1.0))
    return float(np.mean(shares))
