"""The crossing world: two shapes move over a textured ground, pass behind a bar, and cross each other in the open.

A clip is uint8 (F, H, W, 3), 93 frames of 64 x 64 by default, 24 latent frames. Positions are in pixels, x to the right
and y down. A model has to keep in mind what it does not see: what went in behind the bar has to come out of it, at its
time and height, and who is in front where the two cross is the caption's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..moving.scene import COLORS, SHAPES, bouncing, coverage, signed_distance

FRAMES, SIZE = 93, 64

# Pixels a frame along x. The slowest pass the bar once, the fastest two or three times.
SPEEDS: dict[str, float] = {"slowly": 0.6, "steadily": 1.0, "fast": 1.5}
# Every direction leads behind the bar; those that climb or fall do so by half a pixel for each along x.
DIRECTIONS: dict[str, tuple[float, float]] = {
    "right": (1, 0),
    "left": (-1, 0),
    "up and right": (1, -0.5),
    "down and right": (1, 0.5),
    "up and left": (-1, -0.5),
    "down and left": (-1, 0.5),
}
GROUNDS: dict[str, tuple[int, int, int]] = {
    "sand": (205, 182, 142),
    "water": (38, 66, 105),
    "slate": (88, 86, 94),
    "snow": (228, 232, 238),
}
# How far the brightness of a ground stays alike along y and x, in pixels, and how much it varies (standard deviation in
# grey levels).
GRAINS: dict[str, tuple[float, float]] = {
    "sand": (1.2, 1.2),
    "water": (1.6, 6.0),
    "slate": (5.0, 5.0),
    "snow": (2.5, 2.5),
}
TEXTURE = 6.0
# The bar's columns of pixels, and its colour, which no shape has.
BAR = slice(23, 41)
BAR_COLOR = (16, 14, 14)
OPEN = np.ones(SIZE, dtype=bool)  # the columns that it does not cover
OPEN[BAR] = False

RADII = {"circle": (5.5, 6.5), "square": (5.5, 6.5), "triangle": (6.4, 7.2)}
# Both are seen whole and apart for IN_VIEW frames at first, and again after the bar: MARGIN pixels from it and from one
# another. No wall is met before FIRST_BOUNCE.
IN_VIEW, MARGIN, FIRST_BOUNCE = 4, 2, 12
# Pixels, summed over the frames, in which both shapes lie, away from their edges, while three fifths of each are seen:
# enough to tell who is in front. And the most frames in which they are so near that they may overlap.
CROSSING, TOGETHER = 120, 36
_TRIES = 128

_TEMPLATES = (
    "a {0} moving {0.way} and a {1} moving {1.way} over {ground} behind a black bar, the {front} in front of the {back}",
    "over {ground}, a {0} moves {0.way} and a {1} moves {1.way}, both pass behind a black bar, "
    "the {front} passes in front of the {back}",
    "{0}, moving {0.way}, {1}, moving {1.way}, {ground}, black bar, {front} in front of {back}",
)


@dataclass(frozen=True)
class Mover:
    """One of the two shapes. ``start`` is the centre in the first frame, ``radius`` half the shape's width."""

    shape: str
    color: str
    direction: str
    speed: str
    start: tuple[float, float]
    radius: float

    def __str__(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def way(self) -> str:
        """Direction and speed, as the caption says them."""
        return f"{self.direction} {self.speed}"

    @property
    def velocity(self) -> np.ndarray:
        """Pixels a frame along x and y, until it meets a wall."""
        return np.array(DIRECTIONS[self.direction]) * SPEEDS[self.speed]

    def centers(self, frames: int = FRAMES, size: int = SIZE) -> np.ndarray:
        """Centre in each frame, (F, 2) as x, y, seen or not; it is reflected where its edge meets a wall."""
        return bouncing(self.start, self.velocity, self.radius, frames, size)


@dataclass(frozen=True)
class CrossingScene:
    """Everything that a clip shows. ``front`` is the index of the mover that is in front; ``texture`` seeds the ground."""

    movers: tuple[Mover, Mover]
    ground: str
    front: int
    texture: int

    def caption(self, template: int = 0) -> str:
        """The caption, in one of three wordings."""
        front, back = self.movers[self.front], self.movers[1 - self.front]
        return _TEMPLATES[template % len(_TEMPLATES)].format(*self.movers, ground=self.ground, front=front, back=back)


def random_scene(rng: np.random.Generator) -> CrossingScene:
    """A scene with looks drawn evenly, and motions among those under which a clip tells all that its caption says: both
    are seen whole before the bar and after it, and cross in the open rather than go side by side. Most often one is faster
    than the other."""
    colors = [str(name) for name in rng.choice(list(COLORS), size=2, replace=False)]
    shapes = [str(name) for name in rng.choice(SHAPES, size=2)]
    ground, front, texture = str(rng.choice(list(GROUNDS))), int(rng.integers(2)), int(rng.integers(2**31))
    while True:
        speeds = [str(name) for name in rng.choice(list(SPEEDS), size=2)]
        for first, second in _motions(rng, shapes, colors, speeds):
            if _crossing_pixels(*((second, first) if front == 0 else (first, second))) >= CROSSING:
                return CrossingScene((first, second), ground, front, texture)


def random_words(rng: np.random.Generator) -> CrossingScene:
    """A scene whose caption may say anything, evenly and at once, for a text encoder: nobody can draw it."""

    def of(names: Iterable[str]) -> str:
        return str(rng.choice(list(names)))

    colors = [str(name) for name in rng.choice(list(COLORS), size=2, replace=False)]
    first, second = (Mover(of(SHAPES), color, of(DIRECTIONS), of(SPEEDS), (0.0, 0.0), 0.0) for color in colors)
    return CrossingScene((first, second), of(GROUNDS), int(rng.integers(2)), 0)


def _motions(
    rng: np.random.Generator, shapes: list[str], colors: list[str], speeds: list[str]
) -> list[tuple[Mover, Mover]]:
    """Those of ``_TRIES`` random pairs that are seen before and after the bar and come near each other for a while. Each
    starts on the side that it comes from."""
    pairs = (_TRIES, 2)
    directions, speed = rng.integers(len(DIRECTIONS), size=pairs), np.array([SPEEDS[name] for name in speeds])
    low, high = np.array([RADII[shape] for shape in shapes]).T
    radius = rng.uniform(low, high, size=pairs)
    velocity = np.array(list(DIRECTIONS.values()))[directions] * speed[:, None]
    from_wall = rng.uniform(radius, BAR.start - radius - MARGIN - IN_VIEW * speed)
    fall = velocity[..., 1] * FIRST_BOUNCE
    y = rng.uniform(np.maximum(radius, radius - fall), np.minimum(SIZE - radius, SIZE - radius - fall))
    start = np.stack([np.where(velocity[..., 0] > 0, from_wall, SIZE - from_wall), y], axis=-1)

    places = bouncing(start, velocity, radius, FRAMES, SIZE)
    reach, distance = radius.sum(axis=1)[:, None], np.abs(places[:, 0] - places[:, 1]).max(axis=-1)
    near, apart = distance < reach, distance > reach + MARGIN
    from_bar = np.maximum(BAR.start - places[..., 0], places[..., 0] - BAR.stop)
    after = np.cumsum(from_bar < 0, axis=-1) > 0
    out = ((from_bar > radius[..., None] + MARGIN) & after & apart[:, None]).sum(axis=-1)
    told = apart[:, :IN_VIEW].all(axis=1) & near.any(axis=1) & (near.sum(axis=1) <= TOGETHER)
    told &= (out >= IN_VIEW).all(axis=1)
    # Cheap, before pixels are counted: some frames in the open in which a part of the one hides a part of the other.
    part = (distance < 0.8 * reach) & (distance > 0.3 * reach) & (from_bar > 0).all(axis=1)
    told &= part.sum(axis=1) >= 3

    def mover(pair: int, i: int) -> Mover:
        x, y = start[pair, i].tolist()
        direction = list(DIRECTIONS)[directions[pair, i]]
        return Mover(shapes[i], colors[i], direction, speeds[i], (x, y), float(radius[pair, i]))

    return [(mover(pair, 0), mover(pair, 1)) for pair in np.flatnonzero(told).tolist()]


def _crossing_pixels(back: Mover, front: Mover) -> int:
    """Pixels of both that the front one shows, as ``CROSSING`` counts them."""
    places = back.centers(), front.centers()
    near = np.abs(places[0] - places[1]).max(axis=1) < back.radius + front.radius
    for centers in places:  # behind the bar too little is seen
        near &= (centers[:, 0] < BAR.start) | (centers[:, 0] > BAR.stop)
    behind, before = _inner(back, places[0][near]), _inner(front, places[1][near])
    both = behind & before & OPEN
    seen = np.minimum(_share(behind & ~before & OPEN, behind), _share(before & OPEN, before))
    return int(both.sum(axis=(1, 2))[seen > 0.6].sum())


def _inner(mover: Mover, centers: np.ndarray) -> np.ndarray:
    """The pixels (F, SIZE, SIZE) of a shape that no edge mixes with others."""
    places = np.column_stack([centers, np.full(len(centers), mover.radius)]).astype(np.float32)
    return signed_distance(mover.shape, places, SIZE) < -1


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part.sum(axis=(1, 2)) / np.maximum(whole.sum(axis=(1, 2)), 1)


def is_held_out(scene: CrossingScene) -> bool:
    """One caption in eight is never to be trained on, whichever of the two it names first."""
    words = [word for mover in scene.movers for word in (str(mover), mover.way)]
    words += [scene.ground, scene.movers[scene.front].color]
    return sum(ord(letter) for word in words for letter in word) % 8 == 0


HELD_OUT_SEED = 78_000


def held_out_scenes(count: int) -> list[CrossingScene]:
    """Scenes of so many different held-out captions, the same ones each time."""
    rng, scenes = np.random.default_rng(HELD_OUT_SEED), {}
    while len(scenes) < count:
        scene = random_scene(rng)
        if is_held_out(scene):
            scenes.setdefault(scene.caption(), scene)
    return list(scenes.values())


def render(scene: CrossingScene, frames: int = FRAMES, first: int = 0) -> np.ndarray:
    """Frames ``first`` to ``first + frames`` as uint8 (F, SIZE, SIZE, 3), edges anti-aliased over one pixel."""
    layers = []
    for mover in (scene.movers[1 - scene.front], scene.movers[scene.front]):
        centers = mover.centers(first + frames)[first:]
        places = np.column_stack([centers, np.full(frames, mover.radius)]).astype(np.float32)
        layers.append((coverage(mover.shape, places, SIZE), np.array(COLORS[mover.color])))
    return compose(textured(scene.ground, scene.texture), layers)


def compose(ground: np.ndarray, layers: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """A uint8 clip (F, H, W, 3) of a ground (H, W, 3) or (F, H, W, 3), layers from the back to the front, each the share
    of the pixels that it covers (F, H, W) with its colour (3,) or (F, 3), and the bar before all."""
    shape = (*layers[0][0].shape, 3)
    picture = np.broadcast_to(np.round(np.clip(ground, 0, 255)).astype(np.uint8), shape).copy()
    for covered, color in layers:
        at = np.nonzero(covered > 0)  # a shape covers a thirtieth of the picture
        paint, below = np.broadcast_to(color, (shape[0], 3))[at[0]], picture[at].astype(np.float32)
        picture[at] = np.round(below + covered[at][:, None] * (paint - below))
    picture[:, :, BAR] = BAR_COLOR
    return picture


def textured(ground: str, seed: int) -> np.ndarray:
    """A ground (SIZE, SIZE, 3), float32: its colour, brighter and darker by smooth noise."""
    noise = np.fft.fft2(np.random.default_rng(seed).standard_normal((SIZE, SIZE)))
    frequency = np.fft.fftfreq(SIZE)
    along_y, along_x = (np.exp(-2 * (np.pi * grain * frequency) ** 2) for grain in GRAINS[ground])
    smooth = np.fft.ifft2(noise * along_y[:, None] * along_x).real
    brightness = TEXTURE * (smooth - smooth.mean()) / smooth.std()
    return (np.array(GROUNDS[ground]) + brightness[..., None]).astype(np.float32)
