"""Clips of one coloured shape that moves over a plain background and bounces off the walls.

A clip is uint8 (F, H, W, 3), 29 frames of 64 x 64. Positions are in pixels, x to the right and y down;
speeds in pixels a frame.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

FRAMES, SIZE = 29, 64

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 30),
    "green": (30, 165, 60),
    "blue": (50, 90, 250),
    "yellow": (245, 230, 40),
    "purple": (185, 50, 215),
    "cyan": (50, 220, 225),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (12, 12, 12),
    "white": (245, 245, 245),
    "gray": (120, 120, 120),
    "navy": (16, 20, 80),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
SPEEDS: dict[str, float] = {"slowly": 0.5, "fast": 1.5}
ATTRIBUTES = ("shape", "color", "direction", "speed", "background")

# The start is placed so that no wall is met before this frame: the caption's direction is the one first seen.
FIRST_BOUNCE = 12

_TEMPLATES = (
    "a {color} {shape} moving {direction} {speed} on a {background} background",
    "a {color} {shape} moves {direction} {speed} on a {background} background",
    "{color} {shape}, moving {speed} {direction}, {background} background",
)


@dataclass(frozen=True)
class Scene:
    """Everything that a clip shows. ``start`` is the centre in the first frame, ``radius`` half the shape's width."""

    shape: str
    color: str
    direction: str
    speed: str
    background: str
    start: tuple[float, float]
    radius: float

    def caption(self, template: int = 0) -> str:
        """The caption, in one of three wordings."""
        words = {name: getattr(self, name) for name in ATTRIBUTES}
        return _TEMPLATES[template % len(_TEMPLATES)].format(**words)

    def centers(self, frames: int = FRAMES) -> np.ndarray:
        """Centre of the shape in each frame, (F, 2) as x, y; it is reflected where its edge meets a wall."""
        velocity = np.array(DIRECTIONS[self.direction]) * SPEEDS[self.speed]
        return bouncing(self.start, velocity, self.radius, frames, SIZE)


def bouncing(start: Any, velocity: np.ndarray, radius: Any, frames: int, size: int) -> np.ndarray:
    """Centres (..., F, 2) as x, y from ``start`` (..., 2) on at ``velocity`` (..., 2), reflected where the edge, ``radius``
    (...) away, meets a wall."""
    radius = np.asarray(radius)[..., None, None]
    span = size - radius - radius
    free = np.asarray(start)[..., None, :] + np.arange(frames)[:, None] * velocity[..., None, :] - radius
    return radius + span - np.abs(free % (2 * span) - span)


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene with every attribute drawn evenly."""
    radius = float(rng.uniform(11, 14))
    low, high = radius, SIZE - radius
    direction, speed = str(rng.choice(list(DIRECTIONS))), str(rng.choice(list(SPEEDS)))
    travel = np.array(DIRECTIONS[direction]) * SPEEDS[speed] * FIRST_BOUNCE
    lows = np.maximum(low, low - travel)
    highs = np.minimum(high, high - travel)
    x, y = rng.uniform(lows, highs)
    return Scene(
        shape=str(rng.choice(SHAPES)),
        color=str(rng.choice(list(COLORS))),
        direction=direction,
        speed=speed,
        background=str(rng.choice(list(BACKGROUNDS))),
        start=(float(x), float(y)),
        radius=radius,
    )


def is_held_out(scene: Scene) -> bool:
    """One combination of attributes in eight is never trained on; the evaluation draws its captions from these."""
    return sum(ord(c) for name in ATTRIBUTES for c in getattr(scene, name)) % 8 == 0


HELD_OUT_SEED = 77_000


def held_out_scenes(count: int) -> list[Scene]:
    """Scenes whose combination of attributes was never trained on, in a fixed random order, from the first again after
    all 72. Their captions count; that they start in the middle does not."""
    combinations = itertools.product(SHAPES, COLORS, DIRECTIONS, SPEEDS, BACKGROUNDS)
    scenes = [Scene(*names, start=(SIZE / 2, SIZE / 2), radius=12.5) for names in combinations]
    scenes = [scene for scene in scenes if is_held_out(scene)]
    order = np.random.default_rng(HELD_OUT_SEED).permutation(len(scenes))
    return [scenes[order[i % len(scenes)]] for i in range(count)]


def render(scene: Scene, frames: int = FRAMES, first: int = 0) -> np.ndarray:
    """Frames ``first`` to ``first + frames`` as uint8 (F, H, W, 3), edges anti-aliased over one pixel."""
    centers = scene.centers(first + frames)[first:]
    places = np.column_stack([centers, np.full(len(centers), scene.radius)])
    drawn = coverage(scene.shape, places)[..., None]
    color, background = np.array(COLORS[scene.color]), np.array(BACKGROUNDS[scene.background])
    return np.round(background + drawn * (color - background)).astype(np.uint8)


def coverage(shape: str, places: np.ndarray, size: int = SIZE, edge: float = 1.0) -> np.ndarray:
    """How much of each pixel (F, size, size) the shape covers, 0 to 1, at places (F, 3): centre x, y and radius. Edges
    are ``edge`` pixels wide."""
    return np.clip(0.5 - signed_distance(shape, places, size) / edge, 0.0, 1.0)


def signed_distance(shape: str, places: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Distance of each pixel (F, size, size) from the shape's outline, negative within, at places (F, 3)."""
    y, x = np.mgrid[0:size, 0:size].astype(places.dtype) + 0.5
    center_x, center_y, radius = (places[:, i, None, None] for i in range(3))
    dx, dy = x - center_x, y - center_y
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - 0.9 * radius
    # An upward triangle as wide and as high as the circle: base at +radius, apex at -radius.
    slope = np.sqrt(5.0)
    return np.maximum((2 * np.abs(dx) - dy - radius) / slope, dy - radius)
