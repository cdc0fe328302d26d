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
        every: a cached residual is renewed every so many steps, of which none is measured; 0 = none is kept.
        renewals, renewing: forwards that renewed it, behind the first of the run, and the seconds of all.
    """

    refused: str = ""
    first: int | None = None
    step: int | None = None
    forwards: int = 0
    dense: float = 0.0
    sparse: float = 0.0
    every: int = 0
    renewals: int = 0
    renewing: float = 0.0
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

    @property
    def warm(self) -> bool:
        """Whether a sparse forward that renews no residual was computed before."""
        return self.first is not None

    def add(self, dense: float, sparse: float, every: int = 0) -> None:
        """The seconds of one forward, each way; ``every``: as above."""
        with self.lock:
            self.forwards += 1
            self.dense += dense
            self.sparse += sparse
            self.every = every

    def add_renewal(self, seconds: float) -> None:
        """Those of a forward that computed dense attention as well, to renew the residual."""
        with self.lock:
            self.renewals += 1
            self.renewing += seconds

    @property
    def renewing_step(self) -> float:
        """Seconds of a step that renews the residual, 0 = none was timed."""
        return self.forwards * self.renewing / self.renewals if self.renewals else 0.0

    @property
    def mean_step(self) -> float:
        """Seconds of a sparse step, in the mean over those that renew a residual and those between; 0 = not known."""
        if not self.every:
            return self.sparse
        between = (self.every - 1) * self.sparse
        return (between + self.renewing_step) / self.every if self.renewals else 0.0

    def reset(self) -> None:
        with self.lock:
            self.refused, self.first, self.step = "", None, None
            self.forwards, self.dense, self.sparse = 0, 0.0, 0.0
            self.every, self.renewals, self.renewing = 0, 0, 0.0
