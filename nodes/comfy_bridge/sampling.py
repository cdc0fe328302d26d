"""ComfyUI's SIGMAS and SAMPLER made from the engine's few-step sampling."""

from __future__ import annotations

from typing import Any

import torch
from comfy.k_diffusion.sampling import trange
from comfy.model_sampling import CONST, EPS, ModelSamplingDiscrete, ModelSamplingDiscreteFlow, ModelSamplingFlux
from comfy.samplers import KSAMPLER
from torch import Tensor

from ...efficient_vdit_core.sampling import consistency_sigmas, sample_consistency


def model_consistency_sigmas(model: Any, segments: int, steps: int) -> Tensor:
    """The (steps + 1,) noise levels of a MODEL at equal segments of its diffusion time, in its own units."""
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, ModelSamplingDiscrete):
        start, clean = float(sampling.timestep(sampling.sigma_max)), -1.0
    elif isinstance(sampling, ModelSamplingDiscreteFlow):
        start, clean = float(sampling.multiplier), 0.0
    elif isinstance(sampling, ModelSamplingFlux):
        start, clean = 1.0, 0.0
    else:
        raise ValueError(
            f"The model's noise schedule is {_kinds(sampling)}, expected a discrete or a flow schedule: segments of equal "
            "diffusion time are not defined for others. Use a BasicScheduler node for this model."
        )
    return consistency_sigmas(sampling.sigma, segments, steps, start=start, clean=clean)


def consistency_sampler(gamma: float, noise_seed: int) -> KSAMPLER:
    """A SAMPLER that re-noises by the rule of the model it is used with."""
    return KSAMPLER(_sample, extra_options={"gamma": gamma, "noise_seed": noise_seed})


def _sample(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: bool | None = None,
    *,
    gamma: float,
    noise_seed: int,
) -> Tensor:
    sampling = model.inner_model.inner_model.model_sampling
    if gamma and not isinstance(sampling, (EPS, CONST)):
        raise ValueError(
            f"The model's noise schedule is {_kinds(sampling)}, expected an epsilon, v or flow model: fresh noise cannot be "
            "added to others. Set gamma to 0."
        )

    def renoise(sigma: Tensor, noise: Tensor, x0: Tensor) -> Tensor:
        return sampling.noise_scaling(sigma, noise, x0)

    with torch.no_grad():
        return sample_consistency(
            model, x, sigmas, extra_args, callback, disable, gamma=gamma, noise_seed=noise_seed, renoise=renoise, trange=trange
        )


def _kinds(sampling: Any) -> str:
    # ComfyUI builds a class "ModelSampling" from a schedule and a prediction; their names say more.
    return " + ".join(base.__name__ for base in type(sampling).__bases__)
