"""Takes a crossing-world clip apart, pixel by pixel: what is ground, what is bar, and which colour all else has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..moving.scene import COLORS
from .scene import BAR, OPEN

# A pixel differs from the ground where it is further from it than this (Euclidean, RGB 0..255): half of the least contrast
# between a colour and a ground of the world.
CONTRAST = 50.0
PALETTE = np.array(list(COLORS.values()), dtype=np.float32)


@dataclass(frozen=True)
class Parts:
    """What the pixels of a clip (F, H, W, 3) are.

    ground (H, W, 3): the median over time. shift (F, 3): how far all of the ground is off it in a frame. unrest (F,): mean
    difference from ground and shift, in grey levels. differs (F, H, W, 3): each pixel less its ground. labels (F, H, W):
    the index of the nearest of ``COLORS`` where a pixel is no ground and no bar, -1 elsewhere. solid (C, F, H, W): the
    pixels of each colour but for lines of one or two pixels, where an edge mixes two colours into a third.
    """

    ground: np.ndarray
    shift: np.ndarray
    unrest: np.ndarray
    differs: np.ndarray
    labels: np.ndarray
    solid: np.ndarray


def take_apart(pixels: np.ndarray) -> Parts:
    """The parts of a float32 clip (F, SIZE, SIZE, 3)."""
    level = np.median(pixels[:, :, OPEN].reshape(len(pixels), -1, 3)[:, ::3], axis=1)
    usual = np.median(level, axis=0)
    shift = level - usual
    ground = usual + _texture(pixels - level[:, None, None])
    differs = pixels - ground - shift[:, None, None]
    there = np.square(differs).sum(axis=-1) > CONTRAST**2
    there[:, :, BAR] = False
    labels = np.full(there.shape, -1, dtype=np.int8)
    labels[there] = np.square(pixels[there][:, None] - PALETTE).sum(axis=-1).argmin(axis=1)
    solid = np.stack([opened(labels == i) for i in range(len(PALETTE))])
    plain = ~there & OPEN
    unrest = (np.abs(differs).mean(axis=-1) * plain).sum(axis=(1, 2)) / np.maximum(plain.sum(axis=(1, 2)), 1)
    return Parts(ground, shift, unrest, differs, labels, solid)


def _texture(pixels: np.ndarray) -> np.ndarray:
    """Each pixel's median over the frames, of pixels less the level of their frame; where a shape stays for half of the
    clip, over those that show the ground."""
    texture = np.median(pixels[::2], axis=0)
    hidden = (np.square(texture).sum(axis=-1) > CONTRAST**2) & OPEN
    values = pixels[:, hidden]
    shown = np.square(values).sum(axis=-1) <= CONTRAST**2
    for column, at in enumerate(np.argwhere(hidden)):
        if shown[:, column].any():
            texture[tuple(at)] = np.median(values[shown[:, column], column], axis=0)
    return texture


def grown(mask: np.ndarray) -> np.ndarray:
    """Masks (F, H, W) and all that touches them, corners too."""
    tall = mask.copy()
    tall[:, 1:] |= mask[:, :-1]
    tall[:, :-1] |= mask[:, 1:]
    wide = tall.copy()
    wide[..., 1:] |= tall[..., :-1]
    wide[..., :-1] |= tall[..., 1:]
    return wide


def shrunk(mask: np.ndarray) -> np.ndarray:
    """Masks (F, H, W) less their outermost pixels; the picture's border takes none."""
    return ~grown(~mask)


def opened(mask: np.ndarray) -> np.ndarray:
    """Masks (F, H, W) without what is thinner than three pixels."""
    return grown(shrunk(mask)) & mask if mask.any() else mask
