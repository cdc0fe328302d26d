"""The reference model's own samplers, run by diffusers' schedulers: the many-step baseline."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..limits.packages import install

_CLASSES = {"ddim": "DDIMScheduler", "euler_ancestral": "EulerAncestralDiscreteScheduler"}


@torch.no_grad()
def sample_reference(
    network: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    sampler: str,
    steps: int,
    prediction_type: str,
    *,
    generator: torch.Generator,
    callback: Callable[[int], None] | None = None,
) -> Tensor:
    """Samples with the settings of Open-Sora-Plan v1.2: linear betas, no clipping, the scheduler's default spacing.

    Args:
        network: network(z, timestep (B,) float32) -> epsilon or v.
        noise: (B, ...) unit noise.
        sampler: "ddim" or "euler_ancestral".
        steps: 2 at least; one alone would be at timestep 0, the clean end.
        generator: CPU generator of the noise that euler_ancestral adds.
        callback: called with the number of steps done.

    Returns:
        Clean latents of noise's shape.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(
            f"The sampler {sampler!r} needs the package 'diffusers', which is missing. "
            f"{install('diffusers', instead='Use the consistency sampler')}"
        ) from error
    # The class is looked up here, so that only the one in use is imported.
    settings = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": prediction_type}
    if sampler == "ddim":
        settings["clip_sample"] = False
    scheduler = getattr(diffusers, _CLASSES[sampler])(**settings)
    scheduler.set_timesteps(steps, device=noise.device)
    z = noise * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(z, t)
        out = network(scaled, t.float().expand(len(z))).to(z.dtype)
        z = scheduler.step(out, t, z, generator=generator).prev_sample
        if callback is not None:
            callback(i + 1)
    return z
