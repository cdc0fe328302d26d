"""Latents at unit variance for models whose noise schedule scales none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_sampling
from torch import Tensor


def at_unit_variance(model: Any) -> Callable[..., Tensor]:
    """A sampler's ``model`` (x, sigma, **options) that hands CogVideoX, which scales no latents itself, what its network was
    trained on, as VOIDSampler does; any other model as it is."""
    scales_none = getattr(comfy.model_sampling, "V_PREDICTION_DDPM", ())  # since ComfyUI knows CogVideoX
    if not isinstance(model.inner_model.inner_model.model_sampling, scales_none):
        return model

    def scaled(x: Tensor, sigma: Tensor, **options: Any) -> Tensor:
        return model(x / (1 + sigma.view(-1, *(1,) * (x.ndim - 1)) ** 2).sqrt(), sigma, **options)

    return scaled
