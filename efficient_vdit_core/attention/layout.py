"""Where the video tokens stand in the sequence that a layer attends over."""

from __future__ import annotations

from dataclasses import dataclass

from ..tiles import TokenGrid


@dataclass(frozen=True)
class TokenLayout:
    """``prefix`` tokens, then the video grid frame by frame, then ``suffix`` tokens.

    Prefix and suffix tokens (text, extra frames) attend to everything and are attended to by everything.
    """

    grid: TokenGrid
    prefix: int = 0
    suffix: int = 0

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid.tokens + self.suffix
