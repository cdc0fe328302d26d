"""Follows the two shapes of a crossing-world clip: where each is seen, and which circle, square or triangle fits what is
seen of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..moving.fit import fit_shape, start_of
from ..moving.scene import COLORS, SHAPES, coverage
from .ground import Parts, grown, shrunk
from .scene import BAR, IN_VIEW, SIZE

# Frames with fewer pixels of a colour do not show it. A shape of another colour than at first is one that has changed,
# where this colour has as many pixels as half a triangle.
FEW, CHANGED = 12, 30
# A shape counts as seen where at least this share of it is; the pixels of one lie this close to their middle.
SEEN, REACH = 0.4, 10
# A pixel this far from every mixture of shape and ground shows something else (Euclidean, RGB 0..255).
_FOREIGN = 30.0
_VOTERS = 5  # whole frames that say which shape a half hidden one is
_EDGES = (4.0, 4.0, 2.0, 2.0, 1.0, 1.0)  # of the fit, step by step
_HALF = 13  # half the side of the square around a shape that is fitted


@dataclass(frozen=True)
class Sighting:
    """One shape in F frames.

    color: the name in each frame, None where none shows. paint (F, 3): its colour, 0..255. whole (F,): nothing hides it
    and nothing is near. seen (F,): ``SEEN`` of it is, or more. kind (F,): index in ``SHAPES``; where it is not whole,
    that of the whole frames around. places (F, 3): centre x, y and radius in pixels, nan where it is not seen. overlap
    (F,): soft intersection over union with the shape that fits best, over the pixels that nothing hides.
    """

    color: list[str | None]
    paint: np.ndarray
    whole: np.ndarray
    seen: np.ndarray
    kind: np.ndarray
    places: np.ndarray
    overlap: np.ndarray

    def stretches(self) -> list[np.ndarray]:
        """The frames that show it, in runs: what is gone for three frames and more begins a new one."""
        frames = np.flatnonzero(self.seen)
        return [run for run in np.split(frames, np.flatnonzero(np.diff(frames) > 3) + 1) if len(run)]


def follow(pixels: np.ndarray, parts: Parts) -> tuple[Sighting, Sighting] | None:
    """The two shapes of a float32 clip (F, SIZE, SIZE, 3), or None where its first frames do not show two colours."""
    counts = parts.solid.sum(axis=(2, 3))
    first = np.median(counts[:, :IN_VIEW], axis=1)
    own = np.argsort(-first, kind="stable")[:2]
    if first[own[1]] < FEW:
        return None
    labels = _labels(counts, own)
    return _sight(pixels, parts, labels[0]), _sight(pixels, parts, labels[1])


def _labels(counts: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The colour (2, F) that each shape has in each frame, -1 where it shows none, by the colours' pixels (C, F): its own, or
    another where it has turned into that. Another belongs to the shape whose own is not seen beside it."""
    labels = np.where(counts[own] >= FEW, own[:, None], -1)
    for color in set(range(len(counts))) - set(own):
        strange = counts[color] >= CHANGED
        owner = int(np.argmin((strange & (counts[own] >= FEW)).sum(axis=1)))
        labels[owner, strange & (labels[owner] < 0)] = color
    return labels


def _chosen(solid: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The solid pixels (F, H, W) of the colour that the shape has in each frame."""
    return solid[np.maximum(label, 0), np.arange(len(label))] & (label >= 0)[:, None, None]


def _middle(mask: np.ndarray) -> np.ndarray:
    """Median x, y (F, 2) of the pixels of masks (F, H, W), whole numbers; a stain elsewhere does not move it much."""
    middles = []
    for axis in (1, 2):
        along = mask.sum(axis=axis).cumsum(axis=1)
        middles.append((2 * along >= along[:, -1:]).argmax(axis=1))
    return np.stack(middles, axis=1)


def _near_middle(mask: np.ndarray) -> np.ndarray:
    x, y = _middle(mask).T[..., None]
    line = np.arange(SIZE)
    return mask & (np.abs(line - y) <= REACH)[:, :, None] & (np.abs(line - x) <= REACH)[:, None]


def _sight(pixels: np.ndarray, parts: Parts, label: np.ndarray) -> Sighting:
    mask = _near_middle(_chosen(parts.solid, label))
    size = mask.sum(axis=(1, 2))
    shown, paint = size >= FEW, _paint(pixels, mask)
    cut = _Cut(parts, paint, _middle(mask))
    whole = shown & ~_touched(mask[cut.at], cut.foreign | cut.bar)
    if whole.any():  # less than half of it, with nothing before it, is a stain
        whole &= 2 * size > np.quantile(size[whole], 0.8)
    kind, fits = np.zeros(len(pixels), dtype=int), np.zeros((len(pixels), 5), dtype=np.float32)
    if whole.any():
        at = np.flatnonzero(whole)
        found = np.stack([cut.fit(at, shape) for shape in SHAPES])
        kind[at] = best = found[..., 3].argmax(axis=0)
        fits[at] = found[best, np.arange(len(at))]
        kind, radius = np.where(whole, kind, _vote(kind, at)), float(np.median(fits[at, 2]))
        for i, shape in enumerate(SHAPES):
            at = np.flatnonzero(shown & ~whole & (kind == i))
            if len(at):
                fits[at] = cut.fit(at, shape, radius)
    places, overlap, share = fits[:, :3], fits[:, 3], fits[:, 4]
    seen = share >= SEEN
    places[~seen] = np.nan
    color = [list(COLORS)[i] if there else None for i, there in zip(label, shown, strict=True)]
    return Sighting(color, paint, whole & seen, seen, kind, places, overlap * seen)


def _vote(kind: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """For each of F frames the most common shape of the ``_VOTERS`` frames nearest to it that show it whole."""
    nearest = np.argsort(np.abs(np.arange(len(kind))[:, None] - whole), axis=1, kind="stable")[:, :_VOTERS]
    return (kind[whole[nearest]][..., None] == np.arange(len(SHAPES))).sum(axis=1).argmax(axis=1)


def _touched(mask: np.ndarray, foreign: np.ndarray) -> np.ndarray:
    """Whether the bar or another thing is within two pixels of masks (F, n, n): it may hide a part then. What is within
    the shape does not count, which is a stain."""
    wide = grown(grown(mask))
    return (wide & ~shrunk(shrunk(wide)) & foreign).sum(axis=(1, 2)) > 1


def _paint(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The colour (F, 3) in each frame, 0 where the mask is empty."""
    core = shrunk(mask)  # edge pixels are mixed with the ground
    paint = np.zeros((len(pixels), 3), dtype=np.float32)
    for i in np.flatnonzero(mask.any(axis=(1, 2))):
        paint[i] = np.median(pixels[i][core[i] if core[i].sum() >= 4 else mask[i]], axis=0)
    return paint


class _Cut:
    """Squares around the middles (F, 2) of a shape, which may reach beyond the picture.

    soft (F, n, n): how far each pixel lies on the way from its ground, 0, to the shape's colour, 1. foreign: whether it
    lies far from that way, so that something else covers it. inside: whether it is in the picture and not the bar's.
    """

    def __init__(self, parts: Parts, paint: np.ndarray, middle: np.ndarray) -> None:
        self.middle, corner = middle, middle - _HALF
        x, y = (corner[:, i, None] + np.arange(2 * _HALF) for i in range(2))
        self.corner = corner.astype(np.float32)
        # The bar's own edge may be blurred.
        self.bar = np.broadcast_to(((x >= BAR.start - 1) & (x <= BAR.stop))[:, None], (len(x), 2 * _HALF, 2 * _HALF))
        self.inside = ((y >= 0) & (y < SIZE))[:, :, None] & ((x >= 0) & (x < SIZE))[:, None] & ~self.bar
        frames, rows, columns = np.arange(len(x))[:, None, None], y[:, :, None], x[:, None]
        self.at = frames, np.clip(rows, 0, SIZE - 1), np.clip(columns, 0, SIZE - 1)

        way = paint[:, None, None] - parts.ground[self.at[1:]] - parts.shift[:, None, None]
        differs = parts.differs[self.at]
        share = (differs * way).sum(axis=-1) / np.maximum(np.square(way).sum(axis=-1), 1.0)
        self.soft = np.clip(share, 0.0, 1.0)
        self.foreign = np.square(differs - share[..., None] * way).sum(axis=-1) > _FOREIGN**2
        # An edge between two colours is near neither.
        self.weight = (self.inside & ~grown(self.foreign)).astype(np.float32)

    def fit(self, at: np.ndarray, shape: str, radius: float | None = None) -> np.ndarray:
        """The best fit (n, 5) to the frames ``at``: x, y, radius, overlap with what is seen, and share of it that is.
        ``radius`` is given where a part is hidden."""
        soft, weight, corner = self.soft[at], self.weight[at], self.corner[at]
        if radius is None:
            start = start_of(soft * weight, shape)
        else:
            start = np.column_stack([self.middle[at] - corner, np.full(len(at), radius)]).astype(np.float32)
        found = fit_shape(soft, shape, start, weight=weight, radius=radius, corner=corner, size=SIZE, edges=_EDGES)
        drawn = coverage(shape, found, soft.shape[-1])
        both, either = (
            np.where(weight > 0, part(drawn, soft), 0).sum(axis=(1, 2)) for part in (np.minimum, np.maximum)
        )
        clear = np.minimum(drawn, soft) * (self.inside[at] & ~self.foreign[at])
        share = clear.sum(axis=(1, 2)) / np.maximum(drawn.sum(axis=(1, 2)), 1)
        return np.column_stack([found[:, :2] + corner, found[:, 2], both / np.maximum(either, 1), share])
