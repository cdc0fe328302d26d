"""What a run made sparse, what it left dense, and why."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..layout import TokenLayout
from .clock import AttentionClock
from .cost import StepCost
from .measure import StepMeasure
from .reason_names import ADVICE, NOT_OVER_THE_VIDEO

log = logging.getLogger("efficient_vdit")


@dataclass(frozen=True)
class RunCounts:
    """What a report had counted at one moment.

    ``dense``: reasons and their calls, most common first; ``computed`` likewise by what computed them. The rest as in
    ``AttentionReport``.
    """

    sparse: int
    density_sum: float
    dense: tuple[tuple[str, int], ...]
    computed: tuple[tuple[str, int], ...]
    trials: dict[str, str]
    unasked: str

    @property
    def dense_over_video(self) -> list[tuple[str, int]]:
        """Of the self-attention over the video."""
        return [(reason, count) for reason, count in self.dense if reason not in NOT_OVER_THE_VIDEO]

    @property
    def other(self) -> list[tuple[str, int]]:
        """Of attention that no plan could make sparse."""
        return [(reason, count) for reason, count in self.dense if reason in NOT_OVER_THE_VIDEO]

    @property
    def calls(self) -> int:
        """Of the self-attention over the video, sparse and dense."""
        return self.sparse + sum(count for _, count in self.dense_over_video)

    @property
    def density(self) -> float:
        """The share of dense attention's FLOPs that were computed over the video, dense calls included; 0 to 1."""
        return (self.density_sum + self.calls - self.sparse) / self.calls if self.sparse else 1.0

    @property
    def why_dense(self) -> str:
        """Why no call became sparse, in a line; "" where one did, or no call was seen."""
        if self.sparse or self.unasked:
            return "" if self.sparse else self.unasked
        return ", ".join(f"{count} {reason}" for reason, count in self.dense_over_video or self.dense)


@dataclass
class AttentionReport:
    """Counts of a run, safe to fill from several threads."""

    sparse: int = 0
    density_sum: float = 0.0
    dense: Counter[str] = field(default_factory=Counter)
    computed: Counter[str] = field(default_factory=Counter)  # calls over the video by what computed them
    trials: dict[str, str] = field(default_factory=dict)  # by pattern: the backends' times where auto measured them
    warned: set[str] = field(default_factory=set)
    noted: set[str] = field(default_factory=set)
    unasked: str = ""  # why the last run, at its end, had made no call of the self-attention over the video
    layout: TokenLayout | None = None  # of the last forward; None before the first, or where it is not known
    cost: StepCost | None = None  # of the last forward, where the model's matrices are known
    seconds: float = 0.0  # that the last sampling took, 0 before its end
    clock: AttentionClock = field(default_factory=AttentionClock)
    measure: StepMeasure | None = None  # where a step of each run is computed dense as well
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add_sparse(self, density: float, computed: str) -> None:
        """A call under a pattern; ``computed`` names the backend, or the dense function of its pieces."""
        with self.lock:
            self.sparse += 1
            self.density_sum += density
            self.computed[computed] += 1

    def add_dense(self, reason: str, computed: str = "") -> None:
        """A dense call; ``computed`` names the function of one over the video."""
        with self.lock:
            self.dense[reason] += 1
            if computed:
                self.computed[computed] += 1

    def snapshot(self) -> RunCounts:
        """All counts of one moment."""
        with self.lock:
            dense, computed = tuple(self.dense.most_common()), tuple(self.computed.most_common())
            return RunCounts(self.sparse, self.density_sum, dense, computed, dict(self.trials), self.unasked)

    def counts(self) -> dict[str, Any]:
        """What was counted so far, as JSON: for the report of another process."""
        with self.lock:
            dense, computed = dict(self.dense), dict(self.computed)
            return {"sparse": self.sparse, "density_sum": self.density_sum, "dense": dense, "computed": computed}

    def add_counts(self, counts: Mapping[str, Any]) -> None:
        """Calls that another report has counted, as of its ``counts``."""
        with self.lock:
            self.sparse += counts["sparse"]
            self.density_sum += counts["density_sum"]
            self.dense.update(counts["dense"])
            self.computed.update(counts["computed"])

    def add_trial(self, pattern: str, times: str) -> None:
        """What a trial of the backends found for calls under ``pattern``."""
        with self.lock:
            self.trials[pattern] = times

    def warn(self, about: str, text: str) -> None:
        """Log ``text``, once a run for each ``about``."""
        self._log_once(logging.WARNING, self.warned, about, text)

    def note(self, about: str, text: str) -> None:
        """The same for what is good to know and asks nothing of the user."""
        self._log_once(logging.INFO, self.noted, about, text)

    def _log_once(self, level: int, said: set[str], about: str, text: str) -> None:
        with self.lock:
            if about in said:
                return
            said.add(about)
        log.log(level, "Efficient-vDiT: %s", text)

    def reset(self) -> None:
        with self.lock:
            self.sparse, self.density_sum, self.seconds, self.unasked = 0, 0.0, 0.0, ""
            self.layout = self.cost = None
            self.dense.clear()
            self.computed.clear()
            self.trials.clear()
            self.warned.clear()
            self.noted.clear()
        self.clock.reset()
        if self.measure is not None:
            self.measure.reset()

    def advice(self) -> list[str]:
        """What can be done about calls that stayed dense: a text for each reason that has one."""
        with self.lock:
            return [f"{reason}: {ADVICE[reason]}." for reason, _ in self.dense.most_common() if reason in ADVICE]

    def summary(self) -> str:
        """One line: how many calls became sparse, at what mean density, and why the others stayed dense."""
        with self.lock:
            kept = f" at mean density {self.density_sum / self.sparse:.2f}" if self.sparse else ""
            why = ", ".join(f"{count} {reason}" for reason, count in self.dense.most_common())
            return f"{self.sparse} attention calls sparse{kept}; dense: {why or 'none'}"
