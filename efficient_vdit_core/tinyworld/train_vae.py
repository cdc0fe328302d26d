"""Trains the tiny causal VAE: on crops and stills first, on whole frames in the end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.opensora_plan.config import VAEConfig
from ..models.opensora_plan.vae import CausalVAE
from .reader import read_clip
from .run import TrainingRun
from .world import FRAMES, random_scene, render

TINY_VAE = VAEConfig(hidden_size=8, hidden_size_mult=(1, 2, 4, 8), num_res_blocks=1, norm_num_groups=2)

# (share of the steps, crop in pixels, frames, batch). Small crops and stills teach colour and shape cheaply; whole frames
# must follow, because GroupNorm averages over the picture and a shape fills far more of a crop.
PHASES = ((0.25, 32, 1, 16), (0.25, 32, 9, 4), (0.25, 64, 1, 8), (0.25, 64, 9, 2))
KL_WEIGHT = 1e-6


def numpy_rng(generator: torch.Generator) -> np.random.Generator:
    """A numpy generator seeded from a torch one, so that one saved state covers both."""
    return np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))


def to_model_range(clips: np.ndarray) -> Tensor:
    """uint8 (B, F, H, W, 3) to float (B, 3, F, H, W) in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def to_pixels(video: Tensor) -> np.ndarray:
    """Float (B, 3, F, H, W) about [-1, 1] to uint8 (B, F, H, W, 3)."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()


def train_vae(folder: Path, *, steps: int = 9000, seed: int = 0, tensorboard: bool = False) -> CausalVAE:
    """Train (or resume) in ``folder`` and return the VAE with averaged weights."""
    torch.manual_seed(seed)
    vae = CausalVAE(TINY_VAE)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    run = TrainingRun(vae, [optimizer], folder=folder, steps=steps, seed=seed, ema_decay=0.998, tensorboard=tensorboard)

    def loss_of(generator: torch.Generator) -> Tensor:
        x = to_model_range(_crops(numpy_rng(generator), *_phase(run.step / steps)))
        mean, logvar = vae.moments(x)
        noise = torch.randn(mean.shape, generator=generator)
        out = vae.decode(mean + noise * (0.5 * logvar).exp())
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3, 4)).mean()
        return F.l1_loss(out, x) + F.mse_loss(out, x) + KL_WEIGHT * kl

    def evaluate(ema: dict[str, Tensor]) -> str:
        judge = CausalVAE(TINY_VAE).eval()
        judge.load_state_dict(ema)
        return describe_readback(judge, clips=24)

    vae.load_state_dict(run.train(loss_of, evaluate=evaluate))
    return vae.eval()


def _phase(progress: float) -> tuple[int, int, int]:
    """(batch, frames, crop) at ``progress``, 0 to 1, through the run."""
    for share, crop, frames, batch in PHASES:
        if progress < share:
            return batch, frames, crop
        progress -= share
    return batch, frames, crop


def _crops(rng: np.random.Generator, count: int, frames: int, crop: int) -> np.ndarray:
    """Crops (count, frames, crop, crop, 3) around random points of the shape's track, so that few show bare background."""
    crops = []
    for _ in range(count):
        scene = random_scene(rng)
        start = int(rng.integers(0, FRAMES - frames + 1))
        clip = render(scene, first=start, frames=frames)
        center = scene.centers()[start + frames // 2] + rng.uniform(-14, 14, size=2)
        x, y = np.clip(np.round(center - crop / 2), 0, clip.shape[1] - crop).astype(int)
        crops.append(clip[:, y : y + crop, x : x + crop])
    return np.stack(crops)


@torch.no_grad()
def describe_readback(vae: CausalVAE, clips: int) -> str:
    """PSNR (dB) and the share of attributes read back correctly from held-out whole clips."""
    rng = np.random.default_rng(10_000)
    agree: dict[str, list[bool]] = {}
    errors = []
    for _ in range(clips):
        scene = random_scene(rng)
        x = to_model_range(render(scene)[None])
        out = vae.decode(vae.encode(x))
        errors.append(float(F.mse_loss(out.clamp(-1, 1), x)))
        for name, same in read_clip(to_pixels(out)[0]).agreement(scene).items():
            agree.setdefault(name, []).append(same)
    psnr = 10 * np.log10(4.0 / np.mean(errors))
    return f"PSNR {psnr:.1f} dB, " + ", ".join(f"{k} {np.mean(v):.2f}" for k, v in agree.items())
