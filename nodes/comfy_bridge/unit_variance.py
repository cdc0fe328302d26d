"""Latents at unit variance for models whose noise schedule scales none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import comfy.model_sampling
from torch import Tensor

SCALES_NONE: Any = getattr(comfy.model_sampling, "V_PREDICTION_DDPM", ())  # since ComfyUI knows CogVideoX


class _UnitVariance:
    """A guider that takes latents as a sampler has them and asks ``guider`` about them at unit variance."""

    def __init__(self, guider: Any) -> None:
        self.guider = guider

    def __getattr__(self, name: str) -> Any:
        return getattr(self.guider, name)

    def __call__(self, x: Tensor, sigma: Tensor, **options: Any) -> Tensor:
        return self.guider(x / (1 + sigma.view(-1, *(1,) * (x.ndim - 1)) ** 2).sqrt(), sigma, **options)


def at_unit_variance(model: Any) -> Callable[..., Tensor]:
    """A sampler's ``model`` (x, sigma, **options) that hands CogVideoX, which scales no latents itself, what its network was
    trained on, as VOIDSampler does; any other model as it is."""
    if not isinstance(model.inner_model.inner_model.model_sampling, SCALES_NONE):
        return model
    scaled = copy.copy(model)  # scaled within it: what a mask keeps is put in before, in the sampler's terms
    scaled.inner_model = _UnitVariance(model.inner_model)
    return scaled
