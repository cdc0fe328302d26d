"""The paper's idea: the attention map of a video falls into frame x frame tiles, and few of them matter.

The arrow mask ``k:T-k`` keeps the diagonal tiles (a frame attends to itself) and the rows and columns of k reference
frames (they attend to every frame, every frame attends to them). Efficient-vDiT, arXiv 2502.06155, section 3 and Table
1. Beyond the paper, a window widens the diagonal: a frame also attends to its neighbours, ``k:T-k~window``. And mean frames
stand for what is left out: a frame attends to its unseen frames as to few means over time, ``k:T-k~window+means``.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace

from .limits.quote import quoted

PLACEMENTS = ("strided", "first", "last", "rotating", "chunk heads")
CHUNK = 5  # latent frames that MiniMax-H3's VAE makes of 17 pixel frames; the first of them holds one pixel frame
MAX_WINDOW = 256  # latent frames
MAX_MEANS = 16
_COUNT = r"([0-9]{1,4}|-[1-9][0-9]{0,3})"  # of a window or means; those below 0 are read to be named
PATTERN = rf"(?:full|([0-9]{{1,4}})(?::([0-9]{{1,4}}))?(?:~{_COUNT})?(?:\+{_COUNT})?)"  # groups: k, T-k, window, means
MeanFrames = dict[int, tuple[tuple[int, ...], ...]]  # by frame, the frames of each mean that it sees


@dataclass(frozen=True)
class TokenGrid:
    """Video tokens: ``t`` latent frames of ``h`` x ``w`` tokens, in that order, row-major."""

    t: int
    h: int
    w: int

    def __post_init__(self) -> None:
        if min(self.t, self.h, self.w) < 1:
            raise ValueError(
                f"The token grid is {self.t} x {self.h} x {self.w}, expected at least 1 on each axis. "
                "The latent is smaller than one patch; choose a larger size."
            )

    @property
    def tokens_per_frame(self) -> int:
        return self.h * self.w

    @property
    def tokens(self) -> int:
        return self.t * self.tokens_per_frame


@dataclass(frozen=True)
class TilePattern:
    """Which tiles a layer computes: ``k`` reference frames, or all tiles where ``k`` is None.

    ``placement`` says where the reference frames stand: ``strided`` over the clip (the paper's), the ``first`` or the
    ``last`` k, ``rotating``: strided and moved on by ``shift`` frames, around the end of the clip, or ``chunk heads``:
    spread over every fifth frame, strided where there are more than these. ``stride`` is their distance where it was
    settled by another clip, None = by this one's length. With ``window`` w a frame also
    attends to those at most w frames away. With ``means`` m the clip falls into m stretches of time, and of each of them a
    frame sees the mean of the frames that it does not attend to, keys and values at each place of the frame, as one frame
    that counts as often as it has frames. 0 and 0 are the paper's pattern.
    """

    k: int | None
    placement: str = "strided"
    shift: int = 0
    stride: int | None = None
    window: int = 0
    means: int = 0

    def __post_init__(self) -> None:
        if self.k is not None and (isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 0):
            raise ValueError(
                f"A pattern has k={quoted(self.k)} reference frames, expected a whole number from 0, or None for full attention."
            )
        if self.placement not in PLACEMENTS:
            raise ValueError(
                f"placement is {quoted(self.placement)}, expected one of {', '.join(PLACEMENTS)}. Choose one of these."
            )
        if type(self.window) is not int or not 0 <= self.window <= MAX_WINDOW:
            raise ValueError(
                f"A pattern has the window {quoted(self.window)}, expected a whole number of frames from 0 to {MAX_WINDOW}."
            )
        if type(self.means) is not int or not 0 <= self.means <= MAX_MEANS:
            raise ValueError(
                f"A pattern has {quoted(self.means)} mean frames, expected a whole number from 0 to {MAX_MEANS}."
            )

    def is_full(self, frames: int) -> bool:
        """True where nothing is left out of ``frames`` frames: one non-reference frame leaves nothing out, nor does the
        mean of one frame."""
        if self.k is None or frames - self.k <= 1:
            return True
        # The first of the others has as many behind it as its window at most, and one of each stretch: most plans end here.
        if frames - self.k > 1 + self.window + self.means:
            return False
        others = self._others(frames)
        if not self.means:
            return others[-1] - others[0] <= self.window
        stretches = [f // self._stretch(frames) for f in others]
        for low, high in self._windows(others):
            unseen = stretches[:low] + stretches[high:]
            if len(set(unseen)) < len(unseen):
                return False
        return True

    def reference_frames(self, frames: int) -> tuple[int, ...]:
        """Indices of the k reference frames, ascending. Strided: 0, s, 2s, ... with s = ceil(frames / k). All when
        full.

        That stride reproduces the sparsities of the paper's Table 1 to two decimals. Where it meets fewer than k frames
        (k above half of the frames, mostly), they are spread evenly instead, so that k is what you get.
        """
        return tuple(range(frames)) if self.is_full(frames) else self._placed(frames)

    def _placed(self, frames: int) -> tuple[int, ...]:
        """The reference frames of a pattern of fewer than ``frames``, whatever its window leaves out."""
        if not self.k:
            return ()
        if self.placement in ("first", "last"):
            start = 0 if self.placement == "first" else frames - self.k
            return tuple(range(start, start + self.k))
        heads = range(0, frames, CHUNK)
        if self.placement == "chunk heads" and self.k <= len(heads):
            return tuple(heads[i * len(heads) // self.k] for i in range(self.k))
        strided = range(0, frames, self.stride or -(-frames // self.k))
        found = strided if len(strided) == self.k else [i * frames // self.k for i in range(self.k)]
        return tuple(sorted((f + self.shift) % frames for f in found)) if self.placement == "rotating" else tuple(found)

    def _others(self, frames: int) -> list[int]:
        references = set(self._placed(frames))
        return [f for f in range(frames) if f not in references]

    def _windows(self, others: list[int]) -> list[tuple[int, int]]:
        """Of each of the frames that are no reference frames, where in their list those that it sees begin and end."""
        found, low, high = [], 0, 0
        for f in others:
            while others[low] < f - self.window:
                low += 1
            while high < len(others) and others[high] <= f + self.window:
                high += 1
            found.append((low, high))
        return found

    def neighbours(self, frames: int) -> dict[int, tuple[int, ...]]:
        """For every frame that is no reference frame, in order: itself and those in its window that are none either.

        Empty where the pattern is full.
        """
        if self.is_full(frames):
            return {}
        others = dict.fromkeys(self._others(frames))
        return {f: tuple(g for g in range(f - self.window, f + self.window + 1) if g in others) for f in others}

    def mean_frames(self, frames: int) -> MeanFrames:
        """For every frame that is no reference frame, in order: the frames of each mean that it sees, none of them empty.

        Without mean frames, and where the pattern is full, there are none.
        """
        return {} if not self.means or self.is_full(frames) else _averaged(self, frames)

    def head_groups(self, heads: int) -> dict[TilePattern, tuple[int, ...]]:
        """The ``heads`` of a call by the pattern that they follow: all alike."""
        return {self: tuple(range(heads))}

    def of_heads(self, start: int, count: int) -> TilePattern:
        """The pattern of some of a layer's heads."""
        return self

    def mean(self, values: Mapping[TilePattern, float]) -> float:
        """The mean of ``values`` by pattern over a layer's heads."""
        return values[self]

    @property
    def kinds(self) -> tuple[TilePattern, ...]:
        """The different patterns of a layer's heads."""
        return (self,)

    def placed(self, placement: str, shift: int = 0) -> TilePattern:
        """The same k, standing elsewhere. Raises ValueError for an unknown placement."""
        return replace(self, placement=placement, shift=shift)

    def scaled(self, made_for: int | None, frames: int) -> TilePattern:
        """The pattern for a clip of ``frames``, where it was made for a longer one of ``made_for``: the stride stays, and
        the length of the stretches that are averaged; of reference frames that are spread evenly, their share."""
        if self.k is None or made_for is None or frames >= made_for:
            return self
        means = -(-frames // self._stretch(made_for)) if self.means else 0
        if not self.k:
            return replace(self, means=means)
        if self.is_full(made_for):
            return replace(self, k=None)
        stride = -(-made_for // self.k)
        if len(range(0, made_for, stride)) != self.k:  # spread evenly there, at no one distance
            return replace(self, k=-(-self.k * frames // made_for), means=means)
        return replace(self, k=-(-frames // stride), stride=stride, means=means)

    def _stretch(self, frames: int) -> int:
        """Frames in a stretch of time that is averaged; the last may be shorter."""
        return -(-frames // self.means)

    def name(self, frames: int) -> str:
        """The paper's name, such as ``2:6`` for 8 frames, ``2:6~1`` with a window, ``2:6+1`` with a mean frame; ``full``
        where nothing is left out."""
        return "full" if self.is_full(frames) else f"{self.k}:{frames - (self.k or 0)}{self._suffix}"

    @property
    def short_name(self) -> str:
        """The name without the frames: ``full``, ``2``, ``2~1`` or ``2~1+1``."""
        return "full" if self.k is None else f"{self.k}{self._suffix}"

    @property
    def _suffix(self) -> str:
        return (f"~{self.window}" if self.window else "") + (f"+{self.means}" if self.means else "")

    @classmethod
    def parse(cls, text: str) -> TilePattern:
        """The pattern alone of `read_pattern`, and its errors."""
        return read_pattern(text)[0]

    def density(self, frames: int) -> float:
        """Share of the frame x frame tiles that is computed, 0 to 1; a mean frame is one."""
        if self.is_full(frames):
            return 1.0
        others = self._others(frames)
        seen = sum(high - low for low, high in self._windows(others))
        return 1.0 - (len(others) ** 2 - seen - self._mean_tiles(frames)) / frames**2

    def _mean_tiles(self, frames: int) -> int:
        """How many means `mean_frames` has for all frames together, counted without them."""
        if not self.means or self.is_full(frames):
            return 0
        others, length = self._others(frames), self._stretch(frames)
        edges = [bisect_left(others, start) for start in range(0, frames + length, length)]
        windows = self._windows(others)
        pieces = [(start, end) for start, end in itertools.pairwise(edges) if start < end]
        return sum(start < low or end > high for low, high in windows for start, end in pieces)

    def flop_density(self, grid: TokenGrid, extra: int = 0) -> float:
        """Share of the attention FLOPs that is computed, with ``extra`` text or other tokens that attend to all."""
        total = grid.tokens + extra
        return 1.0 - (1.0 - self.density(grid.t)) * (grid.tokens / total) ** 2

    def block_sparsity(self, grid: TokenGrid, block: int = 128) -> float:
        """Share of ``block`` x ``block`` token blocks with no live element: the paper's "sparsity", 0 to 1.

        Counted from block edges alone, never from an N x N mask. Mean frames come on top, by their area.
        """
        if self.is_full(grid.t):
            return 0.0
        size, count = grid.tokens_per_frame, -(-grid.tokens // block)
        references = set(self.reference_frames(grid.t))
        spans = [(i * block // size, (min((i + 1) * block, grid.tokens) - 1) // size) for i in range(count)]
        plain = [not references.intersection(range(first, last + 1)) for first, last in spans]
        plain_before = [0, *itertools.accumulate(plain)]
        live = count**2 - sum(plain) ** 2 + self._mean_tiles(grid.t) * (size / block) ** 2
        for (first, last), is_plain in zip(spans, plain, strict=True):
            if is_plain:
                low = max(first - self.window, 0) * size // block
                high = -(-min((last + 1 + self.window) * size, grid.tokens) // block)
                live += plain_before[high] - plain_before[low]
        return 1.0 - live / count**2


# A plain dict: torch.compile reads it while it traces, and would trace through a cache of functools.
_AVERAGED: dict[tuple[TilePattern, int], MeanFrames] = {}
_MOST_KEPT = 1024
_MOST_NUMBERS = 2**22  # in all that is kept: 32 MB


def _averaged(pattern: TilePattern, frames: int) -> MeanFrames:
    """By frame, the unseen frames of each stretch of time, for a pattern of fewer reference frames than ``frames``."""
    key = (pattern, frames)
    averaged = _AVERAGED.get(key)
    if averaged is None:
        numbers = sum(length**2 for _, length in list(_AVERAGED))  # at most; another thread may add to them
        if len(_AVERAGED) >= _MOST_KEPT or numbers + frames**2 > _MOST_NUMBERS:
            _AVERAGED.clear()
        others, length = pattern._others(frames), pattern._stretch(frames)
        stretches = [[g for g in others if g // length == i] for i in range(-(-frames // length))]
        unseen = {f: [tuple(g for g in s if abs(g - f) > pattern.window) for s in stretches] for f in others}
        averaged = {f: tuple(mean for mean in means if mean) for f, means in unseen.items()}
        _AVERAGED[key] = averaged
    return averaged


def read_pattern(text: str) -> tuple[TilePattern, int | None]:
    """Read ``full``, ``k:T-k`` or a bare ``k``; the latter two may end in ``~window``, ``+means`` or both. Beside the pattern
    the latent frames T, which ``k:T-k`` alone tells.

    Raises ValueError for anything else, and for a window or a number of means out of range.
    """
    match = re.fullmatch(PATTERN, text.strip().lower())
    if match is None:
        raise ValueError(
            f"The pattern {quoted(text)} cannot be read, expected 'full', 'k:T-k' such as '2:6', '2:6~1' with neighbours up "
            "to 1 frame away, or '2:6+1' with 1 mean frame. Correct the plan."
        )
    references, others, window, means = (None if part is None else int(part) for part in match.groups())
    if references is None:
        return TilePattern(None), None
    pattern = TilePattern(references, window=window or 0, means=means or 0)
    return pattern, None if others is None else references + others
