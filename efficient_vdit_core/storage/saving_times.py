"""When something that takes long is saved on its way, so that a killed process loses minutes and saving takes little of the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHARE = 0.05  # of the time that may go into saving


class SavingTimes:
    """Every ``seconds``, and more seldom where a save takes more than `SHARE` of them. ``clock``: seconds."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock = seconds, clock
        self.pause, self.saved = seconds, clock()

    def due(self) -> bool:
        return self.clock() >= self.saved + self.pause

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around each save, also one that was not due."""
        begun = self.clock()
        yield
        self.saved = self.clock()
        self.pause = max(self.seconds, (self.saved - begun) / SHARE)
