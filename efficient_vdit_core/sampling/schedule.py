"""Noise schedules and the segment edges shared by the consistency sampler and its training.

Noise levels are VE sigmas: x = x0 + sigma * noise, so sigma = sqrt((1 - abar) / abar) for a variance-preserving
model. Diffusion time u runs from 1 (pure noise) to 0 (clean data); a model counts it in its own timesteps:

    model                  u = 1    u = 0
    discrete VP (1000)       999       -1     index into the table of trained levels; -1 is one level below the first
    rectified flow          1000        0     or 1 and 0 where the model's time is not multiplied
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor

from ..limits.quote import quoted

DISCRETE_START, DISCRETE_CLEAN = 999.0, -1.0
MAX_EDGES = 10_000

T = TypeVar("T", float, Tensor)


class DiscreteSchedule:
    """The 1000 noise levels that Open-Sora-Plan v1.2 was trained at, with linear betas."""

    def __init__(self) -> None:
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        alphas_bar = torch.cumprod(1.0 - betas, dim=0)
        self.sigmas = ((1.0 - alphas_bar) / alphas_bar).sqrt()  # (1000,) float64, ascending
        self.log_sigmas = self.sigmas.log()

    @property
    def sigma_max(self) -> float:
        return float(self.sigmas[-1])

    def sigma(self, timestep: Tensor | float) -> Tensor:
        """VE sigma of a timestep in 0..999, fractions allowed, log-linear between levels, clamped outside.

        Returns a float32 tensor of the timestep's shape, on its device.
        """
        t = torch.as_tensor(timestep)
        log_sigmas = self._table(t.device)
        t = t.to(log_sigmas).clamp(0, len(log_sigmas) - 1)
        low, high = t.floor().long(), t.ceil().long()
        return torch.lerp(log_sigmas[low], log_sigmas[high], t.frac()).exp().float()

    def timestep(self, sigma: Tensor | float) -> Tensor:
        """The fractional timestep of a sigma: the inverse of `sigma`, clamped to 0..999.

        Returns a float32 tensor of sigma's shape, on its device.
        """
        s = torch.as_tensor(sigma)
        log_sigmas = self._table(s.device)
        return fractional_level(log_sigmas, s.to(log_sigmas).log()).float()

    def _table(self, device: torch.device) -> Tensor:
        """log_sigmas on a device, in float64 where it has that."""
        return self.log_sigmas.to(device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)


def fractional_level(log_sigmas: Tensor, log_sigma: Tensor) -> Tensor:
    """Where values of any shape lie in an ascending table (N,), 0 to N - 1, linear between its entries, clamped outside."""
    log_sigma = log_sigma.clamp(log_sigmas[0], log_sigmas[-1]).contiguous()
    high = torch.searchsorted(log_sigmas, log_sigma).clamp(1, len(log_sigmas) - 1)
    low = high - 1
    return low + (log_sigma - log_sigmas[low]) / (log_sigmas[high] - log_sigmas[low])


def shifted_time(u: T, shift: float) -> T:
    """A flow's noise level, 0 to 1, at the share u of unshifted time (a number, or a tensor of any shape); shift 1 is u itself."""
    return shift * u / (1.0 + (shift - 1.0) * u)


def segment_edges(
    segments: int, steps: int | None = None, *, start: float = DISCRETE_START, clean: float = DISCRETE_CLEAN
) -> Tensor:
    """The timesteps at which a multi-step consistency model is evaluated, and where it ends.

    Diffusion time is cut into `segments` equal pieces (Multistep Consistency Models, Heek et al. 2024, section 3.1).
    Each piece is walked in steps // segments equal sub-steps; where that does not divide, the pieces nearest to the
    clean data get one sub-step more, as they are the hardest to learn. Training and sampling must both take their
    edges from here: edges rounded in two places differ, and a sampler then starts a jump in the wrong segment.

    Args:
        segments: number of segments, >= 1.
        steps: evaluations in all, >= segments; None means one for each segment.
        start, clean: the model's timesteps of pure noise and of clean data (see the table above).

    Returns:
        (steps + 1,) float64, descending from `start` to `clean`.

    Raises:
        ValueError: counts out of range, or more steps than the model has trained noise levels.
    """
    steps = segments if steps is None else steps
    if segments < 1:
        raise ValueError(f"segments must be at least 1, got {quoted(segments)}; 1 is a plain consistency model.")
    if steps < segments:
        raise ValueError(
            f"steps must be at least segments, got {quoted(steps)} steps for {quoted(segments)} segments: each segment takes at "
            "least one evaluation; raise steps or lower segments."
        )
    if steps > MAX_EDGES:
        raise ValueError(f"steps must be at most {MAX_EDGES}, got {quoted(steps)}; use fewer.")
    if not start > clean:
        raise ValueError(f"The noisy end must lie above the clean end, got start={start} and clean={clean}.")
    base, extra = divmod(steps, segments)
    edges: list[Fraction] = []
    for piece in range(segments):  # piece 0 is the noisiest
        parts = base + (piece >= segments - extra)
        edges += [Fraction(segments - piece, segments) - Fraction(n, parts * segments) for n in range(parts)]
    low, span = Fraction(clean), Fraction(start) - Fraction(clean)
    if low + span * edges[-1] < 0:
        raise ValueError(
            f"{steps} steps in {segments} segments do not fit into {int(start - clean)} trained noise levels; "
            "use fewer steps."
        )
    return torch.tensor([float(low + span * u) for u in [*edges, Fraction(0)]], dtype=torch.float64)


def consistency_sigmas(
    sigma_of_t: Callable[[Tensor], Tensor],
    segments: int,
    steps: int | None = None,
    *,
    start: float = DISCRETE_START,
    clean: float = DISCRETE_CLEAN,
) -> Tensor:
    """The sigmas of `segment_edges`, for any model whose schedule is given as a function.

    Args:
        sigma_of_t: maps a float32 tensor of timesteps (N,) to their sigmas (N,). `DiscreteSchedule().sigma` for
            Open-Sora-Plan; ComfyUI's `model_sampling.sigma` for any model, with start=multiplier and clean=0 for flow.
        segments, steps, start, clean: see `segment_edges`.

    Returns:
        (steps + 1,) float32 on the CPU, strictly descending; the last is exactly 0.

    Raises:
        ValueError: as `segment_edges`, or a schedule that is not strictly ascending in time.
    """
    timesteps = segment_edges(segments, steps, start=start, clean=clean)
    sigmas = torch.as_tensor(sigma_of_t(timesteps[:-1].float())).detach().float().cpu().flatten()
    sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    if len(sigmas) != len(timesteps) or not bool((sigmas[1:] < sigmas[:-1]).all()):
        raise ValueError(
            f"The model's schedule gives {quoted(sigmas.tolist())} at the segment edges, which does not descend strictly; "
            "use fewer steps or check the model's sampling settings."
        )
    return sigmas
