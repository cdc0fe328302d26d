"""The candidate patterns of a search, as a user writes them."""

from __future__ import annotations

import re

from ..limits.quote import quoted
from ..tiles import PATTERN, TilePattern

MAX_CANDIDATES = 16


def parse_candidates(text: str) -> tuple[TilePattern, ...]:
    """Read ``1,2,2~1,1+1``, numbers of reference frames with or without a window and mean frames, ascending.

    Raises ValueError for anything else, or over 16 of them.
    """
    parts = [part.strip() for part in text.split(",")]
    if any(part == "full" or ":" in part or not re.fullmatch(PATTERN, part) for part in parts):
        raise ValueError(
            f"The candidates {quoted(text)} cannot be read, expected numbers of reference frames such as '1,2,4', '1~1,2~1' with "
            "neighbours up to 1 frame away, or '0+1,1~1+1' with 1 mean frame."
        )
    try:
        found = {TilePattern.parse(part) for part in parts}
    except ValueError as error:
        raise ValueError(f"The candidates {quoted(text)} cannot be used: {error}") from None
    if len(found) > MAX_CANDIDATES:
        raise ValueError(
            f"{len(found)} candidates were given, expected at most {MAX_CANDIDATES}: each is computed in every layer."
        )
    return tuple(sorted(found, key=lambda pattern: (pattern.means, pattern.window, pattern.k)))


def sparse_candidates(candidates: tuple[TilePattern, ...], frames: int) -> tuple[TilePattern, ...]:
    """Those that leave something out of ``frames`` latent frames. Raises ValueError where none does."""
    sparse = tuple(pattern for pattern in candidates if not pattern.is_full(frames))
    if not sparse:
        raise ValueError(
            f"The video has {frames} latent frames, so the candidates {', '.join(p.short_name for p in candidates)} all mean full "
            "attention. Use more frames or fewer reference frames."
        )
    return sparse
