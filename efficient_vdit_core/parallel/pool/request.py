"""A request on its way to a pool, and how long its answer may take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from .messages import Tick, ticks

# The number of what the pool asks of itself: to offload, behind all that a ComfyUI which has left had asked for.
POOLS_OWN = 0


@dataclass
class Request:
    """``seconds``: how long its answer may take, once those before it are answered. ``setting``: the node's input that
    says so. ``ours``: whether a pool that takes longer hangs over the work of this ComfyUI, and is ended."""

    number: int
    seconds: float
    setting: str = ""
    ours: bool = True
    end: float = math.inf

    def tick(self, poll: Callable[[], None] | None) -> Tick:
        """As ``ticks``; the time begins with the first call, and goes on where ``poll`` has broken the wait off."""
        if self.end == math.inf:
            self.end = time.monotonic() + self.seconds
        return ticks(self.end - time.monotonic(), poll)
