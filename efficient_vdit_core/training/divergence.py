"""Tells a training that diverges from one whose loss only rises for a while."""

from __future__ import annotations

from dataclasses import dataclass

SETTLING = 100  # steps from which a run's own scale is learnt
FACTOR = 10.0  # times its best, and above where it began: no training that works was seen to do that
PATIENCE = 100  # steps that it may stay there
# Of a short run both take this share; fewer steps than so many tell no scale where batches are small.
SHARE, LEAST = 0.2, 10
SMOOTHING = 0.95


def steps_of_watch(most: int, steps: int) -> int:
    """``most``, or fewer in a run of so few ``steps``."""
    return max(LEAST, min(most, round(SHARE * steps)))


@dataclass
class _Course:
    """One value's way: ``began`` is its mean while it settled, ``highest`` the most that it was then, ``best`` the lowest of its
    smoothed self since."""

    settling: int
    seen: int = 0
    began: float = 0.0
    highest: float = 0.0
    smooth: float = 0.0
    best: float = float("inf")
    above: int = 0

    def add(self, value: float) -> None:
        self.seen += 1
        if self.seen <= self.settling:
            self.began += (value - self.began) / self.seen
            self.smooth, self.highest = self.began, max(self.highest, value)
            return
        self.smooth = SMOOTHING * self.smooth + (1 - SMOOTHING) * value
        self.best = min(self.best, self.smooth)
        few = self.settling < SETTLING  # whose mean says less of what a batch may have
        limit = max(self.highest if few else self.began, FACTOR * self.best)
        # Of a rise that has passed the smoothed value tells for long: it is counted no further, and forgotten at last.
        self.above = self.above + (value > limit) if self.smooth > limit else 0

    @property
    def rise(self) -> float:
        """How many times its best it is."""
        return self.smooth / max(self.best, 1e-30)


class DivergenceWatch:
    """Follows the loss of a run of ``steps`` steps, a step at a time, and its parts, to name the one that rose.

    The loss alone decides: a part may rise for good, as the information in a VAE's latents does. So of a resumed run the
    parts settle anew, but never the loss: its scale would be learnt from the very rise that ended the run before.
    """

    NUMBERS = 6  # of a ``state``

    def __init__(self, steps: int) -> None:
        self.settling, self.patience = steps_of_watch(SETTLING, steps), steps_of_watch(PATIENCE, steps)
        self.loss, self.parts = _Course(self.settling), dict[str, _Course]()

    def add(self, loss: float, parts: dict[str, float]) -> None:
        """What they were in one step; a part may be missing in some."""
        self.loss.add(loss)
        for name, value in parts.items():
            self.parts.setdefault(name, _Course(self.settling)).add(value)

    def state(self) -> list[float]:
        """What is known of the loss, for `restore`."""
        course = self.loss
        return [course.seen, course.began, course.highest, course.smooth, course.best, course.above]

    def restore(self, state: list[float]) -> None:
        seen, began, highest, smooth, best, above = state
        self.loss = _Course(self.settling, int(seen), began, highest, smooth, best, int(above))

    @property
    def rising(self) -> bool:
        """Whether the loss stands where only a diverging run's does, for how long ever: not a state to keep."""
        return self.loss.above > 0

    def diverged(self) -> str:
        """`rise` once the loss has stayed up; "" before."""
        return self.rise() if self.loss.above >= self.patience else ""

    def rise(self) -> str:
        """From what to what the loss rose, and the part that rose most; "" where it is not up."""
        if not self.rising:
            return ""
        said = f"loss rose from {self.loss.best:.3g} to {self.loss.smooth:.3g}"
        settled = {name: part for name, part in self.parts.items() if part.seen > part.settling}
        if not settled:
            return said
        name, part = max(settled.items(), key=lambda item: item[1].rise)
        return f"{said} ({name}: from {part.best:.3g} to {part.smooth:.3g})"
