"""When a training will end and what it will cost, told once it has found its pace."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import datetime, timedelta

FIRST = 3  # steps that compile, allocate and choose, and are no measure
SECONDS = 120.0  # of steps that are one
# torchrun, which `accelerate launch` starts, kills the processes that are not gone so many seconds after SIGTERM or Ctrl-C.
GRACE, SECONDS_OF_GRACE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30
LONG = 20.0  # seconds a step that leave too few of these to save


class Pace:
    """Watches a run of ``steps`` steps in ``processes``, of which ``done`` were made before. ``clock``: seconds."""

    def __init__(self, steps: int, done: int, processes: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self.left, self.processes, self.clock = steps - done, processes, clock
        self.counted, self.start, self.told = 0, 0.0, False

    def after_step(self) -> str:
        """A line to say, once, after two minutes at full pace; else nothing."""
        now = self.clock()
        self.counted += 1
        if self.counted == FIRST:
            self.start = now
        passed, steps = now - self.start, self.counted - FIRST
        if self.told or steps < 1 or passed < SECONDS:
            return ""
        self.told = True
        left = timedelta(seconds=passed / steps * (self.left - self.counted))
        hours = passed / steps * self.left / 3600
        gpus = f" on each of {self.processes}, {hours * self.processes:,.1f} together" if self.processes > 1 else ""
        return (
            f"{passed / steps:,.2f} s a step: it will end about {datetime.now() + left:%a %d %b %H:%M}, after {hours:,.1f} hours{gpus}, "
            f"sample videos not counted{self._grace(passed / steps)}"
        )

    def _grace(self, seconds: float) -> str:
        """What to do where steps of so many ``seconds`` would be killed before they are saved."""
        if self.processes == 1 or seconds <= LONG or GRACE in os.environ:
            return ""
        return (
            f". SIGTERM and Ctrl-C leave {SECONDS_OF_GRACE} s to end such a step and save: set {GRACE} to more before the "
            "launch, or what came after the last checkpoint is lost"
        )
