"""Open-Sora-Plan's noise schedule in ComfyUI's terms."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_sampling import EPS, V_PREDICTION, ModelSamplingDiscrete
from torch import Tensor

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
        level = sigma.to(log_sigmas.device).float().log().clamp(log_sigmas[0], log_sigmas[-1])
        high = torch.searchsorted(log_sigmas, level.contiguous()).clamp(1, len(log_sigmas) - 1)
        low = high - 1
        share = (level - log_sigmas[low]) / (log_sigmas[high] - log_sigmas[low])
        return (low + share).to(sigma.device)


class EpsilonSampling(FractionalTimesteps, EPS):
    """For models that predict the noise."""


class VelocitySampling(FractionalTimesteps, V_PREDICTION):
    """For models that predict v = alpha * noise - sigma * x0."""
