"""Tells a training that diverges from one whose loss only rises for a while."""

from __future__ import annotations

from dataclasses import dataclass, field

SETTLING = 100  # steps from which a run's own scale is learnt
FACTOR = 10.0  # times its best, and above where it began: no training that works was seen to do that
PATIENCE = 100  # steps that it may stay there
SMOOTHING = 0.95


@dataclass
class _Course:
    """One value's way: ``began`` is its mean while it settled, ``best`` the lowest of its smoothed self since."""

    seen: int = 0
    began: float = 0.0
    smooth: float = 0.0
    best: float = float("inf")
    above: int = 0

    def add(self, value: float) -> None:
        self.seen += 1
        if self.seen <= SETTLING:
            self.began += (value - self.began) / self.seen
            self.smooth = self.began
            return
        self.smooth = SMOOTHING * self.smooth + (1 - SMOOTHING) * value
        self.best = min(self.best, self.smooth)
        limit = max(self.began, FACTOR * self.best)
        # Of a rise that has passed the smoothed value tells for long: it is counted no further, and forgotten at last.
        self.above = self.above + (value > limit) if self.smooth > limit else 0

    @property
    def rise(self) -> float:
        """How many times its best it is."""
        return self.smooth / max(self.best, 1e-30)


@dataclass
class DivergenceWatch:
    """Follows a run's loss, a step at a time, and its parts, to name the one that rose. A resumed run settles anew.

    The loss alone decides: a part may rise for good, as the information in a VAE's latents does.
    """

    loss: _Course = field(default_factory=_Course)
    parts: dict[str, _Course] = field(default_factory=dict)

    def add(self, loss: float, parts: dict[str, float]) -> None:
        """What they were in one step; a part may be missing in some."""
        self.loss.add(loss)
        for name, value in parts.items():
            self.parts.setdefault(name, _Course()).add(value)

    @property
    def rising(self) -> bool:
        """Whether the loss stands where only a diverging run's does, for how long ever: not a state to keep."""
        return self.loss.above > 0

    def diverged(self) -> str:
        """From what to what the loss rose, and the part that rose most; "" where it has not."""
        if self.loss.above < PATIENCE:
            return ""
        said = f"loss rose from {self.loss.best:.3g} to {self.loss.smooth:.3g}"
        if not self.parts:
            return said
        name, part = max(self.parts.items(), key=lambda item: item[1].rise)
        return f"{said} ({name}: from {part.best:.3g} to {part.smooth:.3g})"
