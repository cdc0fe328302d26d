"""The VAE's last phase: its decoder alone, on whole clips, from latents that are a little off, as a sampler's are.

The encoder stays, and with it every latent that a transformer was trained on.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..models.opensora_plan.vae import CausalVAE
from ..training import TrainingRun
from .train_vae import (
    describe_readback,
    flatten_kernels,
    numpy_rng,
    plain_vae,
    random_clips,
    shape_weighted_error,
    split_optimizers,
    to_model_range,
)
from .world import FRAMES

# Standard deviation of what is added to a latent, relative to the latents' own: drawn for each clip from 0 to this.
# Decoding rounds the sampler's errors to the nearest picture of the world, so that edges and colours stay clean.
MAX_NOISE = 0.25
EDGE_WEIGHT, MOTION_WEIGHT = 1.0, 0.5


def train_decoder(
    folder: Path, vae: CausalVAE, *, steps: int = 1500, batch: int = 1, seed: int = 0, tensorboard: bool = False
) -> CausalVAE:
    """Train (or resume) in ``folder`` from ``vae`` on, and return the VAE with the decoder's averaged weights."""
    torch.manual_seed(seed)
    flatten_kernels(vae)
    vae.requires_grad_(False)
    for module in (vae.decoder, vae.post_quant_conv):
        module.requires_grad_(True)
    optimizers = split_optimizers([p for p in vae.parameters() if p.requires_grad], muon=1e-3, adam=5e-4)
    run = TrainingRun(
        vae, optimizers, folder=folder, steps=steps, seed=seed, ema_decay=0.99, warmup=30, tensorboard=tensorboard
    )

    def loss_of(generator: torch.Generator) -> Tensor:
        x = to_model_range(random_clips(numpy_rng(generator), batch, FRAMES))
        with torch.no_grad():
            z = vae.encode(x)
        share = MAX_NOISE * torch.rand(batch, 1, 1, 1, 1, generator=generator)
        noise = torch.randn(z.shape, generator=generator)
        return decoder_error(vae.decode(z + share * z.std() * noise), x)

    def evaluate(ema: dict[str, Tensor]) -> str:
        return describe_readback(plain_vae({**vae.state_dict(), **ema}), clips=12)

    return plain_vae({**vae.state_dict(), **run.train(loss_of, evaluate=evaluate, save_every=100, evaluate_every=250)})


def decoder_error(out: Tensor, x: Tensor) -> Tensor:
    """The error of clips (B, 3, F, H, W), and of their slopes across and along time: blurred edges, and what flickers."""
    across, down, motion = ((out - x).diff(dim=dim).abs().mean() for dim in (4, 3, 2))
    return shape_weighted_error(out, x) + EDGE_WEIGHT * (across + down) + MOTION_WEIGHT * motion
