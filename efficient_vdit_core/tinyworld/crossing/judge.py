"""Judges clips of the crossing world against their captions, from pixels alone: geometry and nearest colours, no
learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..moving.figures import counts, means_of_seen, shares
from ..moving.reader import FLASH, FLICKER, MOST, OFF_TRACK, STAINED, SWELLING, restlessness
from ..moving.scene import SHAPES, bouncing, coverage, signed_distance
from .ground import Parts, opened, take_apart
from .scene import BAR, BAR_COLOR, GROUNDS, OPEN, SIZE, CrossingScene, Mover
from .track import Sighting, follow

# What a clip is judged by; it is *all right* where none fails. track: each of the two is where the caption and its own
# start lead, in every stretch that shows it, before the bar and after it. identity: what comes out is what went in. both:
# neither is gone where nothing hides it. order: who is in front where they cross.
COLUMNS: tuple[str, ...] = (
    "shape", "color", "ground", "bar", "track", "outline", "identity", "both", "order", "clean", "steady",
)  # fmt: skip

# The soft overlap with an ideal shape that an outline must have: these shapes are half as wide as those of `reader`.
OVERLAP = 0.7
# Mean grey levels that the ground may be off from itself, pixel by pixel, in most frames.
UNREST = 5.0
# Frames of a stretch that show a shape whole, enough to say what it is, and those that show it at all, enough to say
# where: of glimpses between the bar and the other shape, both at once before it, the place is not so sure.
WHOLE, LONG = 3, 6
# Frames that a shape may be gone; frames that it may come out later than it went in, which is for the track to judge.
GONE, LATE = 4, 12
# Pixels in which both lie, summed over frames, that tell who is in front; the share of them that must agree.
CROSSED, AGREED = 12, 0.8
# A stain is off by this much (Euclidean, RGB 0..255), further than this outside or inside of edges, which may be blurred.
_OFF, _OUTSIDE, _INSIDE = 60.0, 2.5, 1.5


@dataclass(frozen=True)
class CrossingReading:
    """What the judge saw in F frames.

    sightings: the two shapes, None where the first frames do not show two colours. grounds: the nearest ground in each
    frame. unrest (F,): mean difference of the ground from itself, in grey levels. bar: share of the frames in which
    nothing shows through the bar. fronts: pixels in which both lie that show the first and the second of the sightings.
    stain: stained pixels relative to those of a shape. shift (F, 3): how far the whole ground is off in a frame.
    """

    sightings: tuple[Sighting, Sighting] | None
    grounds: list[str]
    unrest: np.ndarray
    bar: float
    fronts: tuple[int, int]
    stain: float
    shift: np.ndarray

    def verdict(self, scene: CrossingScene) -> dict[str, bool]:
        """Whether the clip passes each of ``COLUMNS`` for the scene's caption; where it starts is its own matter. Which
        sighting is which of the caption's shapes is told by colour, and where that fails by all else."""
        if self.sightings is None:
            return self._ground(scene)
        ways = []
        for order in ((0, 1), (1, 0)):
            looks = [first_look(self.sightings[i]) for i in order]
            colors = [look is not None and look[1] == m.color for look, m in zip(looks, scene.movers, strict=True)]
            verdict = self._ground(scene) | self._shapes(scene, order)
            ways.append((sum(colors), sum(verdict.values()), verdict))
        return max(ways, key=lambda way: way[:2])[2]

    def _ground(self, scene: CrossingScene) -> dict[str, bool]:
        """The columns of ground and bar, the others not passed."""
        named = np.mean([name == scene.ground for name in self.grounds])
        verdict = dict.fromkeys(COLUMNS, False)
        verdict["ground"] = bool(named >= MOST and np.mean(self.unrest <= UNREST) >= MOST)
        verdict["bar"] = self.bar >= MOST
        return verdict

    def _shapes(self, scene: CrossingScene, order: tuple[int, int]) -> dict[str, bool]:
        """The other columns, ``order`` being the sightings of the caption's first and second shape."""
        assert self.sightings is not None
        seen, fronts = [self.sightings[i] for i in order], [self.fronts[i] for i in order]
        pairs = list(zip(seen, scene.movers, strict=True))
        looks = [first_look(sighting) for sighting in seen]
        crossed = sum(fronts)
        return {
            "shape": all(look and look[0] == mover.shape for look, (_, mover) in zip(looks, pairs, strict=True)),
            "color": all(look and look[1] == mover.color for look, (_, mover) in zip(looks, pairs, strict=True)),
            "track": all(off_track(sighting, mover) <= OFF_TRACK for sighting, mover in pairs),
            "outline": all(s.seen.any() and np.mean(s.overlap[s.seen] >= OVERLAP) >= MOST for s in seen),
            "identity": all(stays_itself(sighting) for sighting in seen),
            "both": all(gone(seen[i], seen[1 - i]) <= GONE for i in range(2)),
            "order": crossed >= CROSSED and fronts[scene.front] >= AGREED * crossed,
            "clean": self.stain <= STAINED,
            "steady": self.swelling <= SWELLING and self.flicker <= FLICKER and self.flash <= FLASH,
        }

    @property
    def seen(self) -> bool:
        """Whether the clip shows two shapes, and one of them whole; else there is nothing that stain, swelling and flicker
        could be of."""
        return any(sighting.whole.any() for sighting in self.sightings or ())

    @property
    def swelling(self) -> float:
        """Deviation of a shape's size relative to its mean, the larger of the two, over frames that show it whole."""
        worst = 0.0
        for sighting in self.sightings or ():
            if sighting.whole.any():
                common = np.bincount(sighting.kind[sighting.whole]).argmax()
                radius = sighting.places[sighting.whole & (sighting.kind == common), 2]
                worst = max(worst, float(radius.std() / radius.mean()))
        return worst

    @property
    def flicker(self) -> float:
        """Mean change from frame to frame, in grey levels, of the colour, ground's or shape's, that changes most."""
        return float(max(change.mean() for change in self._changes()))

    @property
    def flash(self) -> float:
        """The largest of these changes."""
        return float(max(change.max() for change in self._changes()))

    def _changes(self) -> list[np.ndarray]:
        """As `restlessness` has them, of the ground and of each shape where two frames show it whole."""
        changes = [restlessness(np.diff(self.shift, axis=0))]
        for sighting in self.sightings or ():
            follows = sighting.whole[1:] & sighting.whole[:-1]
            changes.append(restlessness(np.diff(sighting.paint, axis=0)[follows]))
        return changes


def read_crossing(clip: np.ndarray) -> CrossingReading:
    """Read a uint8 clip (F, 64, 64, 3) of at least five frames."""
    if clip.ndim != 4 or clip.shape[1:] != (SIZE, SIZE, 3) or len(clip) < 5:
        raise ValueError(
            f"A clip of shape {clip.shape} was given, expected (frames >= 5, {SIZE}, {SIZE}, 3). "
            "The judge knows where this world's bar stands; pass a whole clip of it."
        )
    pixels = clip.astype(np.float32)
    parts = take_apart(pixels)
    usual = np.median(parts.ground[:, OPEN].reshape(-1, 3), axis=0)
    sightings = follow(pixels, parts)
    distances = [_distances(sighting) for sighting in sightings or ()]
    return CrossingReading(
        sightings,
        [min(GROUNDS, key=lambda name: float(np.linalg.norm(value - GROUNDS[name]))) for value in usual + parts.shift],
        parts.unrest,
        _bar_share(pixels),
        _fronts(pixels, sightings, distances) if sightings else (0, 0),
        _stain(pixels, parts, sightings, distances) if sightings else 0.0,
        parts.shift,
    )


def first_look(sighting: Sighting) -> tuple[str, str | None] | None:
    """Shape and colour before anything hides it for the first time."""
    stretches = sighting.stretches()
    frames = [i for i in stretches[0] if sighting.whole[i]] if stretches else []
    looks = [(SHAPES[sighting.kind[i]], sighting.color[i]) for i in frames]
    return max(looks, key=looks.count) if looks else None


def stays_itself(sighting: Sighting) -> bool:
    """Whether shape and colour are the first ones in most frames of each stretch that shows it whole for some frames."""
    first = first_look(sighting)
    for stretch in sighting.stretches():
        same = [(SHAPES[sighting.kind[i]], sighting.color[i]) == first for i in stretch if sighting.whole[i]]
        if len(same) >= WHOLE and np.mean(same) < MOST:
            return False
    return first is not None


def off_track(sighting: Sighting, mover: Mover) -> float:
    """Root mean square distance in pixels from the way that the caption names, begun where the clip begins: over all
    frames or in the longer stretch that is furthest off; infinite where the clip does not begin with the shape."""
    stretches = sighting.stretches()
    if not stretches or stretches[0][0] > 3 or not sighting.whole.any():
        return float("inf")
    track, first = sighting.places[:, :2], stretches[0][:6]
    x, y = np.median(track[first] - first[:, None] * mover.velocity, axis=0)
    radius = float(np.median(sighting.places[sighting.whole, 2]))
    asked = replace(mover, start=(float(x), float(y)), radius=radius).centers(len(track))
    squares = np.square(track - asked).sum(axis=1)
    runs = [stretch for stretch in stretches if len(stretch) >= LONG] + [np.flatnonzero(sighting.seen)]
    return float(np.sqrt(max(squares[run].mean() for run in runs)))


def gone(sighting: Sighting, other: Sighting) -> int:
    """Frames in which it is not seen, though by its last motion nothing hides it. Where it went in behind something and
    comes out of something, some frames are its own matter: how late it is, the track tells."""
    frames = len(sighting.seen)
    if not sighting.seen.any():
        return frames
    radius, cover = float(np.nanmedian(sighting.places[:, 2])), _cover(other)
    changes = np.flatnonzero(np.diff(np.pad(~sighting.seen, 1).astype(int)))
    total = 0
    for start, stop in changes.reshape(-1, 2):
        if start == 0:
            total += stop
            continue
        last = sighting.places[start - 1, :2]
        ahead = bouncing(last, _step(sighting, start), radius, stop - start + 1, SIZE)[1:]
        missed = sum(not _is_hidden(ahead[i - start], cover[i], 2.0) for i in range(start, stop))
        covered = _is_hidden(last, cover[start - 1], radius + 3)
        if covered and stop < frames:
            covered = _is_hidden(sighting.places[stop, :2], cover[stop], radius + 3)
        total += 0 if covered and missed <= LATE else missed
    return total


def _step(sighting: Sighting, before: int) -> np.ndarray:
    """Its motion in pixels a frame, over the last frames that show it."""
    steps = np.diff(sighting.places[max(before - 7, 0) : before, :2], axis=0)
    steps = steps[np.isfinite(steps).all(axis=1)]
    return np.median(steps, axis=0) if len(steps) else np.zeros(2)


def _cover(sighting: Sighting) -> np.ndarray:
    """Places (F, 3), those between sightings by what is before and after."""
    seen, frames = np.flatnonzero(sighting.seen), np.arange(len(sighting.seen))
    if not len(seen):
        return np.full_like(sighting.places, np.inf)
    return np.stack([np.interp(frames, seen, sighting.places[seen, i]) for i in range(3)], axis=1)


def _is_hidden(place: np.ndarray, cover: np.ndarray, reach: float) -> bool:
    """Whether a centre is behind the bar or the other shape (centre x, y, radius), or within ``reach`` pixels of that."""
    behind_bar = BAR.start - reach <= place[0] <= BAR.stop + reach
    return bool(behind_bar or np.abs(place - cover[:2]).max() <= cover[2] + reach)


def _distances(sighting: Sighting) -> np.ndarray:
    """Distance of each pixel (F, SIZE, SIZE) from the shape's outline, infinite where it is not seen."""
    distances = np.full((len(sighting.seen), SIZE, SIZE), np.inf, dtype=np.float32)
    for i, shape in enumerate(SHAPES):
        at = np.flatnonzero(sighting.seen & (sighting.kind == i))
        if len(at):
            distances[at] = signed_distance(shape, sighting.places[at], SIZE)
    return distances


def _bar_share(pixels: np.ndarray) -> float:
    inner = pixels[:, :, BAR.start + 2 : BAR.stop - 2]  # its edges may be blurred
    through = np.square(inner - np.array(BAR_COLOR, dtype=np.float32)).sum(axis=-1) > _OFF**2
    return float((through.mean(axis=(1, 2)) <= STAINED).mean())


def _fronts(
    pixels: np.ndarray, sightings: tuple[Sighting, Sighting], distances: Sequence[np.ndarray]
) -> tuple[int, int]:
    """How many pixels in which both lie show the one, and the other."""
    both = (distances[0] < -1) & (distances[1] < -1) & OPEN
    frame, y, x = np.nonzero(both)
    shown = pixels[frame, y, x]
    first, second = (np.square(shown - sighting.paint[frame]).sum(axis=-1) for sighting in sightings)
    clear = np.minimum(first, second) < _OFF**2  # a stain tells nothing of who is in front
    return int((clear & (first < second)).sum()), int((clear & (second < first)).sum())


def _stain(
    pixels: np.ndarray, parts: Parts, sightings: tuple[Sighting, Sighting], distances: Sequence[np.ndarray]
) -> float:
    """Pixels that neither shapes nor ground explain, relative to a shape's area, summed over the frames that show one."""
    stained = opened((np.minimum(*distances) > _OUTSIDE) & (np.square(parts.differs).sum(axis=-1) > _OFF**2))
    shown = 0.0
    for i, sighting in enumerate(sightings):
        off = np.square(pixels - sighting.paint[:, None, None]).sum(axis=-1) > _OFF**2
        stained |= (distances[i] < -_INSIDE) & (distances[1 - i] > _OUTSIDE) & off
    column = np.arange(SIZE) + 0.5
    for i, sighting in enumerate(sightings):
        if not sighting.whole.any():
            continue
        radius = float(np.median(sighting.places[sighting.whole, 2]))
        kind = np.bincount(sighting.kind[sighting.whole]).argmax()
        place = np.array([[SIZE / 2, SIZE / 2, radius]], dtype=np.float32)
        shown += float(sighting.seen.sum() * coverage(SHAPES[kind], place, SIZE).sum()) / 2
        # Where little of it looks out from behind something, that part is not judged.
        near_bar = (column > BAR.start - radius) & (column < BAR.stop + radius)
        stained &= sighting.seen[:, None, None] | ~(near_bar | (distances[1 - i] < 2 * radius))
    stained[:, :, BAR.start - 2 : BAR.stop + 2] = False
    return float(stained.sum() / max(shown, 1.0))


def crossing_figures(readings: Sequence[CrossingReading], scenes: Sequence[CrossingScene]) -> dict[str, Any]:
    """What clips show of the captions of ``scenes``, by what was read of each: all_right, its interval, right and columns as
    `figures_of_readings` gives them; stain, swelling, flicker: means of the clips that show two shapes, None where none does;
    clips: their number; seen: the share of them that do; distinct_captions."""
    verdicts = [reading.verdict(scene) for reading, scene in zip(readings, scenes, strict=True)]
    captions = [scene.caption() for scene in scenes]
    return {
        **shares(verdicts, captions, COLUMNS),
        **means_of_seen(readings, ("stain", "swelling", "flicker")),
        **counts(readings, captions),
    }
