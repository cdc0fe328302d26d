"""Open-Sora-Plan's noise schedule in ComfyUI's terms."""

from __future__ import annotations

from typing import Any

from comfy.model_sampling import EPS, V_PREDICTION, ModelSamplingDiscrete
from torch import Tensor

from ....efficient_vdit_core.sampling.schedule import fractional_level

# ComfyUI's name "sqrt_linear" stands for betas that are linear themselves (diffusers' "linear").
SAMPLING_SETTINGS: dict[str, Any] = {
    "beta_schedule": "sqrt_linear",
    "linear_start": 1e-4,
    "linear_end": 0.02,
    "timesteps": 1000,
}


class FractionalTimesteps(ModelSamplingDiscrete):
    """The stock schedule, but noise levels between two trained ones get a fractional timestep.

    The stock class rounds to the nearest trained level; Open-Sora-Plan's own samplers feed fractions.
    """

    def timestep(self, sigma: Tensor) -> Tensor:
        """sigma of any shape -> timesteps 0..999 of that shape, the inverse of `sigma`."""
        log_sigmas: Tensor = self.log_sigmas  # pyright: ignore[reportAssignmentType]
        return fractional_level(log_sigmas, sigma.to(log_sigmas.device).float().log()).to(sigma.device)


class EpsilonSampling(FractionalTimesteps, EPS):
    """For models that predict the noise."""


class VelocitySampling(FractionalTimesteps, V_PREDICTION):
    """For models that predict v = alpha * noise - sigma * x0."""
