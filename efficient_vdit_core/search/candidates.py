"""The candidate patterns of a search, as a user writes them."""

from __future__ import annotations

import re

from ..limits.quote import quoted
from ..tiles import TilePattern

MAX_CANDIDATES = 16


def parse_candidates(text: str) -> tuple[int, ...]:
    """Read ``1,2,4`` as numbers of reference frames, ascending. Raises ValueError for anything else, or over 16 of
    them."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,4}", part) for part in parts):
        raise ValueError(
            f"The candidates {quoted(text)} cannot be read, expected numbers of reference frames such as '1,2,4'."
        )
    counts = sorted({int(part) for part in parts})
    if len(counts) > MAX_CANDIDATES:
        raise ValueError(
            f"{len(counts)} candidates were given, expected at most {MAX_CANDIDATES}: each is computed in every layer."
        )
    return tuple(counts)


def sparse_candidates(candidates: tuple[int, ...], frames: int) -> tuple[int, ...]:
    """Those that leave something out of ``frames`` latent frames. Raises ValueError where none does."""
    sparse = tuple(k for k in candidates if not TilePattern(k).is_full(frames))
    if not sparse:
        raise ValueError(
            f"The video has {frames} latent frames, so the candidates {', '.join(map(str, candidates))} all mean full "
            "attention. Use more frames or fewer reference frames."
        )
    return sparse
