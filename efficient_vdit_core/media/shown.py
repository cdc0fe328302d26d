"""How a file says that its pictures are to be shown: with square pixels, upright, and in which light."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import cache

import numpy as np

from ..limits.quote import quoted

# Share by which pixels may be wider than high: 854x480 is 16:9 by that, and a column less would only blur it.
OBLONG = 0.01
SLANTED = 0.02  # what a display matrix may have beside a right angle: about a degree
HDR = ("smpte2084", "arib-std-b67")  # what ffmpeg calls PQ and HLG
# What `square_size` says, as a filter of ffmpeg.
SQUARE = "scale=round(iw*max(sar\\,1)):round(ih*max(1/sar\\,1)),setsar=1"

log = logging.getLogger(__name__)


def is_square(aspect: float) -> bool:
    """Whether pixels ``aspect`` times as wide as high, 0 where that is not told, may be shown as they are."""
    return aspect <= 0 or abs(aspect - 1) <= OBLONG


def square_size(width: int, height: int, aspect: float) -> tuple[int, int]:
    """The size of a picture once its pixels, ``aspect`` times as wide as high, are square. It only grows: what is turned
    by a right angle afterwards is as large as what was turned before."""
    if is_square(aspect):
        return width, height
    return math.floor(width * max(aspect, 1) + 0.5), math.floor(height * max(1 / aspect, 1) + 0.5)


def upright(pixels: np.ndarray, matrix: Sequence[float]) -> np.ndarray:
    """Pixels (H, W, 3) turned and mirrored as FFmpeg's display matrix of 9 numbers says, of which phones store one beside
    what they film lying. Raises ValueError where it slants them."""
    a, b, _, c, d, *_ = matrix  # a pixel at (x, y) is shown at (ax + cy, bx + dy)
    if max(abs(a), abs(d)) < min(abs(b), abs(c)):
        pixels, (a, b, c, d) = pixels.transpose(1, 0, 2), (c, d, a, b)
    if max(abs(b), abs(c)) > SLANTED * min(abs(a), abs(d)):
        raise ValueError("its pictures are to be turned by an angle that is no right one")
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


@cache  # once for each file: a training reads them many times
def warn_of_hdr(path: str, transfer: str) -> None:
    """Says by name that a file's light is that of ``transfer``, one of `HDR`: its pixels are taken as they are."""
    log.warning(
        "%s is HDR footage (%s), and is read as if it were SDR: its colours come out pale. Convert it to SDR first.",
        quoted(path, 120),
        transfer,
    )
