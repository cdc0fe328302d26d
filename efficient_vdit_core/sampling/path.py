"""Signal and noise along a model's diffusion time, and the clean data that its output stands for.

z_t = a_t x + s_t e with clean data x and unit noise e. Timesteps run from ``start`` (noise) to ``clean`` (data) as in
the table of `schedule`; equal pieces of them are equal pieces of diffusion time. Coefficients are float64: targets of
consistency distillation take differences of nearly equal ones.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from .schedule import DISCRETE_CLEAN, DiscreteSchedule, shifted_time

EPSILON, V, FLOW = "epsilon", "v_prediction", "flow"
PREDICTIONS = (EPSILON, V, FLOW)


class NoisePath(Protocol):
    """``kind`` and ``describe`` go into a checkpoint's metadata."""

    kind: str
    start: float
    clean: float

    def coefficients(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """a and s (N,) float64 on the CPU of timesteps (N,)."""
        ...

    def network_time(self, timestep: Tensor) -> Tensor:
        """The number (N,) float32 that the network is given for timesteps (N,)."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON-able settings."""
        ...


class VPPath:
    """A variance-preserving model with a table of trained levels: a^2 + s^2 = 1.

    ``log_sigmas`` (levels,) ascending, of s / a; the last may be infinite (zero terminal SNR). Fractions of a timestep
    are log-linear between levels.
    """

    kind = "vp"

    def __init__(self, log_sigmas: Tensor | None = None) -> None:
        self.log_sigmas = (DiscreteSchedule().log_sigmas if log_sigmas is None else log_sigmas).double().cpu()
        self.start, self.clean = float(len(self.log_sigmas) - 1), DISCRETE_CLEAN

    @classmethod
    def from_alphas_bar(cls, alphas_bar: Tensor) -> VPPath:
        """From a table (levels,) of a^2, as diffusers' ``alphas_cumprod``."""
        alphas_bar = alphas_bar.double()
        return cls(0.5 * ((1.0 - alphas_bar).log() - alphas_bar.log()))

    def coefficients(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        t = timestep.double().cpu()
        inside = t.clamp(0, self.start)
        low, high, share = self.log_sigmas[inside.floor().long()], self.log_sigmas[inside.ceil().long()], inside.frac()
        # An infinite last level times a share of 0 would be no number.
        log_sigma = torch.where(share > 0, low + share * (high - low), low)
        a, s = torch.sigmoid(-2 * log_sigma).sqrt(), torch.sigmoid(2 * log_sigma).sqrt()
        at_data = t <= self.clean
        return a.masked_fill(at_data, 1.0), s.masked_fill(at_data, 0.0)

    def network_time(self, timestep: Tensor) -> Tensor:
        return timestep.float()

    def describe(self) -> dict[str, Any]:
        first, last = (float(self.log_sigmas[i].exp()) for i in (0, -1))
        return {
            "kind": self.kind,
            "levels": len(self.log_sigmas),
            "sigma_min": first,
            "sigma_max": last if math.isfinite(last) else None,
        }


class FlowPath:
    """Rectified flow: a = 1 - s with s the `shifted_time` of u, the share of unshifted time."""

    kind = "flow"

    def __init__(self, shift: float = 1.0, multiplier: float = 1000.0) -> None:
        if not shift > 0:
            raise ValueError(
                f"The shift of a flow schedule is {shift}, expected a number above 0; 1 leaves time as it is."
            )
        self.shift, self.start, self.clean = shift, multiplier, 0.0

    def coefficients(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        u = timestep.double().cpu() / self.start
        s = shifted_time(u, self.shift)
        return 1.0 - s, s

    def network_time(self, timestep: Tensor) -> Tensor:
        return (self.coefficients(timestep)[1] * self.start).float()

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "shift": self.shift, "multiplier": self.start}


def predict_x0(prediction: str, z: Tensor, out: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """The clean data that a network's raw output stands for; a and s broadcast to z.

    ``epsilon`` divides by a and so loses precision near pure noise; ``v_prediction`` and ``flow`` divide by nothing.
    """
    if prediction == EPSILON:
        return (z - s * out) / a
    return a * z - s * out if prediction == V else z - s * out


def ddim_step(z: Tensor, x: Tensor, a: Tensor, s: Tensor, a_to: Tensor, s_to: Tensor) -> Tensor:
    """DDIM from (a, s) to (a_to, s_to) with the clean prediction x; for a flow this is the Euler step."""
    return a_to * x + s_to / s * (z - a * x)


def half_a_step_on(x: Tensor, before: Tensor | None) -> Tensor:
    """The clean prediction in the middle of a step, from that at its beginning and ``before``, at the beginning of the step
    before, which was as long in diffusion time; without one, x.

    `ddim_step` with it is of second order and asks nobody again, as DPM-Solver++ (2M) is (Lu et al. 2022, arXiv 2211.01095). That
    takes the middle in log-SNR, which has none in a step to clean data; this is the middle in time. Next to clean data, where the
    noise is no smooth function of time, it gains least.
    """
    return x if before is None else x + (x - before) / 2


def clean_between(z: Tensor, z_to: Tensor, a: Tensor, s: Tensor, a_to: Tensor, s_to: Tensor) -> Tensor:
    """The clean prediction with which `ddim_step` leads from z at (a, s) to z_to at (a_to, s_to)."""
    kept = s_to / s
    return (z_to - kept * z) / (a_to - kept * a)
