"""The VAE's decoder alone, trained further on whole clips from latents that are off as a sampler's are. The encoder stays,
and with it every latent that a transformer was trained on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...models.opensora_plan.vae import CausalVAE
from ..worlds import MOVING, World
from .vae import (
    channels_last,
    describe_readback,
    flatten_kernels,
    make_run,
    numpy_rng,
    picture_error,
    random_clips,
    to_model_range,
    vae_of,
)

# Of what is added to a latent, relative to the latents' own deviation: drawn for each clip from 0 to this.
MAX_NOISE = 0.3


def train_decoder(
    folder: Path,
    vae: CausalVAE,
    *,
    world: World = MOVING,
    steps: int = 9000,
    seed: int = 0,
    bf16: bool = False,
    device: str = "cpu",
    tensorboard: bool = False,
) -> CausalVAE:
    """Train (or resume) in ``folder`` from ``vae`` on; returns the VAE with its decoder's averaged weights, on the CPU.
    ``bf16``: see `TinyRecipe`."""
    torch.manual_seed(seed)
    flatten_kernels(vae)
    vae.to(device)
    vae.requires_grad_(False)
    for part in (vae.decoder, vae.post_quant_conv):
        part.requires_grad_(True)
    run = make_run(vae, 0.5, folder=folder, steps=steps, seed=seed, tensorboard=tensorboard)

    def loss_of(generator: torch.Generator) -> Tensor:
        x = channels_last(to_model_range(random_clips(world, numpy_rng(generator), 1, world.frames)).to(device))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                z = vae.encode(x).float()
            off = MAX_NOISE * torch.rand((), generator=generator) * torch.randn(z.shape, generator=generator)
            out = vae.decode(z + z.std() * off.to(device)).float()
        return picture_error(out, x, world.shapes(x))

    def whole(ema: dict[str, Tensor]) -> CausalVAE:
        return vae_of(vae.config, {**vae.state_dict(), **ema})

    def evaluate(ema: dict[str, Tensor]) -> str:
        return describe_readback(whole(ema).to(device), world, clips=12)

    return whole(run.train(loss_of, evaluate=evaluate, save_every=250, evaluate_every=2000))
