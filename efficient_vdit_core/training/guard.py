"""Ends a training whose numbers went wrong, with what became of its state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .divergence import DivergenceWatch
from .processes import Processes

OTHERS = "loss of another process rose"


class NotANumber(ValueError):
    """Raised by all processes at the same place, before the weights are touched."""


class Guard:
    """Of a run of ``steps`` steps. ``processes``: those that train, which all end together.

    lost: whether the weights are no numbers any more; rising: whether the state may be a diverging run's. Neither is to be
    saved over an earlier one.
    """

    def __init__(self, checkpoint: Path, processes: Processes, steps: int) -> None:
        self.checkpoint, self.processes = checkpoint, processes
        self.watch, self.rising = DivergenceWatch(steps), False

    def state(self) -> Tensor:
        """What the watches of all processes know, each of losses of its own, for `restore`. Called by all of them."""
        return self.processes.gather(torch.tensor(self.watch.state(), dtype=torch.float64))

    def restore(self, state: Tensor | None) -> None:
        """Go on judging by ``state``. Where a checkpoint has none, as those of earlier versions, or has it of another number
        of processes, the watch settles anew."""
        if state is None or state.numel() != self.processes.count * self.watch.NUMBERS:
            return
        self.watch.restore(self.processes.local(state).tolist())
        self.rising = self.processes.any(self.watch.rising)

    def numbers(self, values: dict[str, float], step: int) -> None:
        """Raises NotANumber where one of them is none, in any process: what is saved next is the last good state."""
        wrong = {name: value for name, value in values.items() if not math.isfinite(value)}
        if not self.processes.any(bool(wrong)):
            return
        first = next(iter(wrong), "loss")
        parts = ", ".join(name for name in wrong if name != first)
        raise NotANumber(
            f"The {first} became {wrong.get(first, 'infinite or nan in another process')} at step {step}"
            + (f" ({parts})" if parts else "")
            + f". {self.checkpoint} keeps the last good state; resume from it with a lower learning rate."
        )

    def weights(self, trained: Iterable[Tensor], step: int) -> None:
        """Raises ValueError where a weight is no number: there is no way back then, and the last checkpoint stays."""
        total = sum(torch.linalg.vector_norm(value, 1, dtype=torch.float32) for value in trained)
        if self.processes.any(not math.isfinite(float(total))):
            raise ValueError(
                f"The weights became infinite or nan at step {step}, so nothing is exported. "
                f"{self._kept('an earlier state')} with a lower learning rate."
            )

    def divergence(self, step: int) -> None:
        """Raises ValueError where the loss that ``watch`` follows rose and stays up."""
        self.rising = self.processes.any(self.watch.rising)
        found = self.watch.diverged()
        if not self.rising or not self.processes.any(bool(found)):  # what has diverged is rising: one question a step
            return
        raise ValueError(
            f"The training diverges: the {found or OTHERS} and stayed there for {self.watch.patience} steps, to step {step}. "
            f"{self._kept('the state before it')} with a lower learning rate."
        )

    def end(self, step: int) -> None:
        """Raises ValueError where the run ends while its loss is up: what it would export may be a diverging run's."""
        if not self.rising:  # as `divergence` found, of all processes
            return
        raise ValueError(
            f"The training may be diverging where it ends: the {self.watch.rise() or OTHERS} by step {step}, so nothing is exported. "
            f"{self._kept('the state before it')} with a lower learning rate."
        )

    def _kept(self, what: str) -> str:
        return f"{self.checkpoint} keeps {what}; resume" if self.checkpoint.exists() else "Start again"
