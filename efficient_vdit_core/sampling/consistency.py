"""The multi-step consistency sampler, in k-diffusion's calling convention.

One step goes from sigma to the next sigma s' with the prediction x0 and the direction d = (x - x0) / sigma:

    gamma = 0   x' = x + d * (s' - sigma)                 the deterministic jump of Multistep Consistency Models
                                                          (DDIM, k-diffusion's `euler`)
    gamma = 1   x' = renoise(s', noise, x0)               fresh noise at every step, as LCM
    between     jump to (1 - gamma) * s', then add fresh noise up to s' (TCD, Zheng et al. 2024), in VE sigmas:
                x' = x0 + (1 - gamma) * s' * d + sqrt(1 - (1 - gamma)^2) * s' * noise

The last line mixes predicted and fresh noise at unit variance: (1 - gamma) * d + sqrt(1 - (1 - gamma)^2) * noise. Flow
models mix the same two noises, so there (1 - gamma) multiplies the noise-to-signal ratio sigma' / (1 - sigma').
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Renoise = Callable[[Tensor, Tensor, Tensor], Tensor]


def ve_renoise(sigma: Tensor, noise: Tensor, x0: Tensor) -> Tensor:
    """x0 at noise level sigma in VE coordinates: the rule of epsilon and v models."""
    return x0 + sigma * noise


def fresh_noise(x: Tensor, noise_seed: int, level: float) -> Tensor:
    """Unit noise shaped as x that is added up to a noise level, drawn in float32 on the CPU: the same on every device and
    dtype, and whichever part of the steps is run.

    A stream that each run began anew would give a second expert's steps the first one's noise once more, which their latent
    holds already; one of the bare seed, the starting noise, whose seed is often the same.
    """
    digest = hashlib.sha256(f"{noise_seed} {level:.5g}".encode()).digest()  # in digits that rounding leaves alone
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:4], "big"))
    return torch.randn(x.shape, generator=generator, dtype=torch.float32).to(device=x.device, dtype=x.dtype)


def _step(
    x: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor, gamma: float, renoise: Renoise, noise: Tensor | None
) -> Tensor:
    """One step of the table above; `noise` is None when it is not needed."""
    jump = x + (x - x0) / sigma * (sigma_next - sigma)
    if gamma == 0.0:
        return jump
    if noise is None:  # sigma_next is 0: nothing is left to add
        return x0
    fresh = renoise(sigma_next, noise, x0)
    if gamma == 1.0:
        return fresh
    keep, add = 1.0 - gamma, math.sqrt(gamma * (2.0 - gamma))
    signal = renoise(sigma_next, torch.zeros_like(x0), x0)
    return signal + keep * (jump - signal) + add * (fresh - signal)


@torch.no_grad()
def sample_consistency(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    gamma: float = 0.0,
    noise_seed: int = 0,
    renoise: Renoise | None = None,
    trange: Callable[..., Iterable[int]] | None = None,
) -> Tensor:
    """Samples with len(sigmas) - 1 evaluations of the model.

    Args:
        model: model(x, sigma (B,), **extra_args) -> x0 of x's shape.
        x: (B, ...) noise already scaled to sigmas[0].
        sigmas: (N + 1,) descending; the last is 0 for a whole run, as from `consistency_sigmas`.
        callback: called after each evaluation with {"x", "i", "sigma", "sigma_hat", "denoised"}.
        disable: hides the progress bar that `trange` draws.
        gamma: 0..1, the share of fresh noise (see the table above).
        noise_seed: seed of the fresh noise, which is one for each level; unused at gamma 0.
        renoise: (sigma, noise, x0) -> noised x0, the model's own rule; VE if None. Must be linear in noise.
        trange: trange(n, disable=...) -> the steps, for a progress bar.

    Returns:
        x at the last sigma, of x's shape.

    Raises:
        ValueError: gamma outside 0..1, or fewer than two sigmas.
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must lie in 0..1, got {gamma}: 0 jumps deterministically, 1 re-noises fully.")
    if len(sigmas) < 2:
        raise ValueError(f"The sampler needs at least two sigmas, got {len(sigmas)}; ask for one step or more.")
    extra_args = extra_args or {}
    renoise = renoise or ve_renoise
    levels = sigmas.tolist()  # read once: each read of a sigma waits for the device
    steps = len(sigmas) - 1
    batch = x.new_ones([x.shape[0]])
    for i in trange(steps, disable=disable) if trange else range(steps):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        x0 = model(x, sigma * batch, **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": x0})
        noise = fresh_noise(x, noise_seed, levels[i + 1]) if gamma and levels[i + 1] else None
        x = _step(x, x0, sigma, sigma_next, gamma, renoise, noise)
    return x
