"""One step of a run computed twice, dense and sparse: which step that is, and how long each took."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field


@dataclass
class StepMeasure:
    """The measured step of a run, safe to fill from several threads.

    It is the first behind another sparse step, so that what a first forward loads and compiles is in neither time. The
    only sparse step of a run is measured itself.

    Attributes:
        refused: why no step of this run is computed twice, "" = nothing speaks against it.
        first: the run's first sparse step, None before it. Steps are numbers of the schedule, 0 = first.
        step: the one that is measured, None before it.
        forwards: of the model in that step; each is computed dense and sparse.
        dense, sparse: seconds of these forwards.
    """

    refused: str = ""
    first: int | None = None
    step: int | None = None
    forwards: int = 0
    dense: float = 0.0
    sparse: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def wants(self, step: int, *, last: bool) -> bool:
        """Whether a sparse forward of ``step`` is to be computed twice; ``last``: no sparse step follows this one."""
        with self.lock:
            if self.refused:
                return False
            if self.first is None:
                self.first = step
            if self.step is None and (last or step != self.first):
                self.step = step
            return self.step == step

    @property
    def cold(self) -> bool:
        """Whether no sparse forward of this run was computed before the one that is to be measured."""
        return self.step == self.first and not self.forwards

    def add(self, dense: float, sparse: float) -> None:
        """The seconds of one forward, each way."""
        with self.lock:
            self.forwards += 1
            self.dense += dense
            self.sparse += sparse

    def reset(self) -> None:
        with self.lock:
            self.refused, self.first, self.step = "", None, None
            self.forwards, self.dense, self.sparse = 0, 0.0, 0.0
