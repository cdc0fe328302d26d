"""A request on its way to a pool: how long its answer may take, and when Cancel breaks the wait for it off."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from .messages import Connection, Tick, ticks

# The number of what the pool asks of itself: to offload, behind all that a ComfyUI which has left had asked for.
POOLS_OWN = 0
# How long Cancel waits for the end of a message: 100 MB take 0.3 s within a machine, and 1 s on a network of 1 Gbit/s.
MESSAGE_SECONDS = 5.0


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


class Cancel:
    """``poll``, which may raise, as it is called while a request goes over ``connection``: what it raises amid a message
    waits for the end of that, which would be torn, and the pool lost with it; but not for an end that stands still.

    What it has raised is kept, for ComfyUI's says it once.
    """

    def __init__(self, poll: Callable[[], None] | None, connection: Connection) -> None:
        self.poll, self.connection = poll, connection
        self.raised: BaseException | None = None
        self.until = 0.0

    def __call__(self) -> None:
        """Raises what ``poll`` has raised, where it need not wait."""
        if self.raised is None and self.poll is not None:
            try:
                self.poll()
            except BaseException as cancelled:
                self.raised, self.until = cancelled, time.monotonic() + MESSAGE_SECONDS
        if self.raised is not None and not (self.connection.torn and time.monotonic() < self.until):
            raise self.raised
