"""A diffusion network seen as a predictor of clean data in VE coordinates, as samplers want it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .schedule import DiscreteSchedule

PREDICTION_TYPES = ("epsilon", "v_prediction")


class Denoiser:
    """Wraps a variance-preserving network: denoiser(x, sigma) -> x0.

    With x = x0 + sigma * noise and c = sqrt(1 + sigma^2) the network sees z = x / c, and

        epsilon        x0 = x - sigma * out
        v_prediction   x0 = x / c^2 - out * sigma / c

    Args:
        network: network(z, timestep (B,) float32, **kwargs) -> prediction of z's shape.
        schedule: gives the fractional timestep of a sigma.
        prediction_type: "epsilon" or "v_prediction".
    """

    def __init__(
        self, network: Callable[..., Tensor], schedule: DiscreteSchedule, prediction_type: str = "epsilon"
    ) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}; "
                "correct it in the model's config.json."
            )
        self.network = network
        self.schedule = schedule
        self.prediction_type = prediction_type

    def __call__(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """x (B, ...) at noise level sigma (B,) -> x0 (B, ...) in x's dtype."""
        s = sigma.view(-1, *[1] * (x.ndim - 1))
        scale = (1.0 + s**2).sqrt()
        out = self.network(x / scale, self.schedule.timestep(sigma), **kwargs).to(x.dtype)
        if self.prediction_type == "epsilon":
            return x - s * out
        return x / scale**2 - out * (s / scale)
