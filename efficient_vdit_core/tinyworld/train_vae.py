"""Trains the tiny causal VAE: on stills first, then on pieces of clips, then on whole ones, as it is used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..models.opensora_plan.config import VAEConfig
from ..models.opensora_plan.vae import CausalVAE
from ..training import TrainingRun
from .figures import figures_of
from .world import FRAMES, random_scene, render

TINY_VAE = VAEConfig(hidden_size=16, hidden_size_mult=(1, 2, 4, 4), num_res_blocks=1, norm_num_groups=1)

# (share of the steps, frames, batch). Stills teach colour and shape cheaply; frames are always whole, because GroupNorm
# averages over the picture and a shape fills far more of a crop. It averages over time too, so a VAE that never saw a
# whole clip grows worse along it.
PHASES = ((0.17, 1, 12), (0.33, 9, 3), (0.5, FRAMES, 2))
# A shape covers a tenth of the picture, so an even mean would spend the loss on flat background.
SHAPE_WEIGHT = 5.0
# Of the errors of slopes across and down the picture (blurred edges), of what changes from frame to frame (flicker), and
# of hue (fringes, stains), beside the error itself.
EDGE_WEIGHT, MOTION_WEIGHT, HUE_WEIGHT = 1.0, 0.5, 1.0
# Standard deviation of what is added to a latent, relative to the latents' own: drawn for each clip from 0 to this.
# Decoding then rounds a sampler's small errors to the nearest picture of the world.
MAX_NOISE = 0.2
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


def train_vae(
    folder: Path, *, steps: int = 9000, seed: int = 0, bf16: bool = False, tensorboard: bool = False
) -> CausalVAE:
    """Train (or resume) in ``folder`` and return the VAE with averaged weights. ``bf16``: see `recipe.train`."""
    torch.manual_seed(seed)
    vae = CausalVAE(TINY_VAE)
    flatten_kernels(vae)
    run = TrainingRun(
        vae,
        make_optimizers(list(vae.parameters()), 1.0),
        folder=folder,
        steps=steps,
        seed=seed,
        ema_decay=0.998,
        tensorboard=tensorboard,
    )

    def loss_of(generator: torch.Generator) -> Tensor:
        x = to_model_range(random_clips(numpy_rng(generator), *_phase(run.step / steps)))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            mean, logvar = (m.float() for m in vae.moments(x))
            out = vae.decode(_off(mean, logvar, generator)).float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3, 4)).mean()
        return picture_error(out, x) + KL_WEIGHT * kl

    def evaluate(ema: dict[str, Tensor]) -> str:
        return describe_readback(vae_of(TINY_VAE, ema), clips=12)

    return vae_of(TINY_VAE, run.train(loss_of, evaluate=evaluate))


def _off(mean: Tensor, logvar: Tensor, generator: torch.Generator) -> Tensor:
    """A latent drawn from its Gaussian, and moved further by up to ``MAX_NOISE``."""
    share = MAX_NOISE * torch.rand(len(mean), 1, 1, 1, 1, generator=generator)
    spread = (0.5 * logvar).exp() + share * mean.detach().std()
    return mean + spread * torch.randn(mean.shape, generator=generator)


def picture_error(out: Tensor, x: Tensor) -> Tensor:
    """Error of clips (B, 3, F, H, W): of pixels, hue, slopes and, where there are several frames, of motion."""
    error = out - x
    slopes = error.diff(dim=3).abs().mean() + error.diff(dim=4).abs().mean()
    motion = error.diff(dim=2).abs().mean() if error.shape[2] > 1 else 0.0
    hue = error - error.mean(dim=1, keepdim=True)
    weight = _shape_weight(x)
    pixels = (weight * (error.abs() + error.square() + HUE_WEIGHT * hue.abs())).mean()
    return pixels + EDGE_WEIGHT * slopes + MOTION_WEIGHT * motion


def _shape_weight(x: Tensor) -> Tensor:
    """Weights (B, 1, F, H, W) of mean 1: the shape counts ``SHAPE_WEIGHT`` times the background."""
    shape = ((x - x[..., :1, :1]).abs().amax(dim=1, keepdim=True) > 0.1).float()
    weight = 1 + (SHAPE_WEIGHT - 1) * shape
    return weight / weight.mean()


class _Kernel(nn.Module):
    """A convolution's kernel kept as a matrix (out, in x taps), which is what Muon accepts."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.shape)

    def right_inverse(self, kernel: Tensor) -> Tensor:
        return kernel.flatten(1)


def flatten_kernels(vae: CausalVAE) -> None:
    """Keep the kernels of all convolutions as matrices, in place."""
    for module in _convolutions(vae):
        parametrize.register_parametrization(module, "weight", _Kernel(module.weight.shape))


def vae_of(config: VAEConfig, state: dict[str, Tensor]) -> CausalVAE:
    """A VAE of weights with flat kernels, its own kernels as they were, ready for inference."""
    vae = CausalVAE(config)
    flatten_kernels(vae)
    vae.load_state_dict(state)
    for module in _convolutions(vae):
        parametrize.remove_parametrizations(module, "weight")
    return vae.eval()


def _convolutions(vae: CausalVAE) -> list[nn.Conv2d | nn.Conv3d]:
    return [m for m in vae.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]


def make_optimizers(trained: list[nn.Parameter], rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the kernels, AdamW for the rest: a still reaches in 200 steps what AdamW alone needs 400 for. ``rate`` is
    relative to that of a new VAE."""
    kernels = [p for p in trained if p.ndim == 2 and min(p.shape) >= 8]
    chosen = {id(p) for p in kernels}
    rest = [p for p in trained if id(p) not in chosen]
    return [
        torch.optim.Muon(kernels, lr=4e-3 * rate, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=2e-3 * rate, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def _phase(progress: float) -> tuple[int, int]:
    """(batch, frames) at ``progress``, 0 to 1, through the run."""
    for share, frames, batch in PHASES:
        if progress < share:
            return batch, frames
        progress -= share
    return batch, frames


def random_clips(rng: np.random.Generator, count: int, frames: int) -> np.ndarray:
    """Pieces (count, frames, H, W, 3) that start anywhere in a clip."""
    starts = rng.integers(0, FRAMES - frames + 1, size=count)
    return np.stack([render(random_scene(rng), first=int(start), frames=frames) for start in starts])


@torch.no_grad()
def describe_readback(vae: CausalVAE, clips: int) -> str:
    """How well ``clips`` whole clips that were never trained on come back: PSNR (dB) in all and in the first and last
    eighth of the frames, overlap with the ideal shape, and the share that is all right."""
    rng = np.random.default_rng(10_000)
    scenes = [random_scene(rng) for _ in range(clips)]
    true = [to_model_range(render(scene)[None]) for scene in scenes]
    again = [vae.decode(vae.encode(x)).clamp(-1, 1) for x in true]
    error = torch.cat([(a - b).square().mean(dim=(1, 3, 4)) for a, b in zip(again, true, strict=True)]).mean(dim=0)
    eighth = FRAMES // 8
    whole, first, last = (float(10 * torch.log10(4 / e.mean())) for e in (error, error[:eighth], error[-eighth:]))
    found = figures_of([to_pixels(x)[0] for x in again], scenes)
    return (
        f"PSNR {whole:.1f} dB (first frames {first:.1f}, last {last:.1f}), overlap {found['overlap']:.3f}, "
        f"all right {found['all_right']:.2f}"
    )
