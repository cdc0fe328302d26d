"""Trains the tiny causal VAE: on stills first, then on pieces of clips, then on whole ones, as it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...models.opensora_plan.config import VAEConfig
from ...models.opensora_plan.vae import CausalVAE
from ...training import TrainingRun
from ...training.muon import is_for_muon, muon_and_adamw
from ..worlds import MOVING, Progress, World
from .phases import phase_at

TINY_VAE = VAEConfig(hidden_size=16, hidden_size_mult=(1, 2, 4, 4), num_res_blocks=1, norm_num_groups=1)

# (share of the steps, frames, batch), 0 frames being a whole clip. Stills teach colour and shape cheaply; frames are always
# whole, because GroupNorm averages over the picture and a shape fills far more of a crop. It averages over time too, so a
# VAE that never saw a whole clip grows worse along it.
PHASES = ((0.15, 1, 12), (0.25, 9, 3), (0.3, 29, 2), (0.3, 0, 2))
# A shape covers a tenth of the picture, so an even mean would spend the loss on flat background. Its edges are where most of
# the error is: of the squared error of a trained VAE 85 % lay in the twentieth of the pixels that are next to one.
SHAPE_WEIGHT, AT_EDGE = 5.0, 15.0
# Of the errors of slopes across and down the picture (blurred edges), of what changes from frame to frame (flicker), and
# of hue (fringes, stains), beside the error itself.
EDGE_WEIGHT, MOTION_WEIGHT, HUE_WEIGHT = 1.0, 0.5, 1.0
# Standard deviation of what is added to a latent, relative to its channel's own: drawn for each clip from 0 to this.
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


def channels_last(x: Tensor) -> Tensor:
    """``x``, pictures, clips or kernels, with the channels of a pixel side by side: on a CPU a whole clip there and back
    takes three quarters of the time."""
    return x.contiguous(memory_format=torch.channels_last_3d if x.ndim == 5 else torch.channels_last)


def train_vae(
    folder: Path,
    vae: CausalVAE,
    *,
    world: World = MOVING,
    steps: int = 9000,
    seed: int = 0,
    bf16: bool = False,
    device: str = "cpu",
    tensorboard: bool = False,
    rate: float = 1.0,
) -> CausalVAE:
    """Train ``vae`` (or resume) in ``folder`` on clips of ``world``; returns it with averaged weights, on the CPU. ``bf16``:
    see `TinyRecipe`. ``rate`` is relative to what suits a new VAE."""
    torch.manual_seed(seed)
    flatten_kernels(vae)
    vae.to(device)
    run = make_run(vae, rate, folder=folder, steps=steps, seed=seed, tensorboard=tensorboard)

    def loss_of(generator: torch.Generator) -> Tensor:
        clips = random_clips(world, numpy_rng(generator), *_phase(run.step / steps, world.frames))
        x = channels_last(to_model_range(clips).to(device))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            mean, logvar = (m.float() for m in vae.moments(x))
            out = vae.decode(_off(mean, logvar, generator)).float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3, 4)).mean()
        return picture_error(out, x, world.shapes(x)) + KL_WEIGHT * kl

    def evaluate(ema: dict[str, Tensor]) -> str:
        return describe_readback(vae_of(vae.config, ema).to(device), world, clips=12)

    return vae_of(vae.config, run.train(loss_of, evaluate=evaluate))


def _off(mean: Tensor, logvar: Tensor, generator: torch.Generator) -> Tensor:
    """A latent drawn from its Gaussian, and moved further by up to ``MAX_NOISE``."""
    share = MAX_NOISE * torch.rand(len(mean), 1, 1, 1, 1, generator=generator).to(mean.device)
    spread = (0.5 * logvar).exp() + share * mean.detach().std(dim=(0, 2, 3, 4), keepdim=True)
    return mean + spread * torch.randn(mean.shape, generator=generator).to(mean.device)


def picture_error(out: Tensor, x: Tensor, shapes: Tensor) -> Tensor:
    """Error of clips (B, 3, F, H, W): of pixels, hue, slopes and, where there are several frames, of motion. ``shapes`` (B,
    1, F, H, W): where x shows them."""
    error = out - x
    slopes = error.diff(dim=3).abs().mean() + error.diff(dim=4).abs().mean()
    motion = error.diff(dim=2).abs().mean() if error.shape[2] > 1 else 0.0
    hue = error - error.mean(dim=1, keepdim=True)
    weight = _shape_weight(shapes)
    pixels = (weight * (error.abs() + error.square() + HUE_WEIGHT * hue.abs())).mean()
    return pixels + EDGE_WEIGHT * slopes + MOTION_WEIGHT * motion


def _shape_weight(shapes: Tensor) -> Tensor:
    """Weights (B, 1, F, H, W) of mean 1: a shape counts ``SHAPE_WEIGHT`` times the ground, and ``AT_EDGE`` more at its edge."""
    inside = shapes.float()
    frames = inside.flatten(1, 2)
    edge = F.max_pool2d(frames, 3, 1, 1) + F.max_pool2d(-frames, 3, 1, 1)  # 1 beside what is otherwise
    weight = 1 + (SHAPE_WEIGHT - 1) * inside + AT_EDGE * edge.view(shapes.shape)
    return weight / weight.mean()


class _Kernel(nn.Module):
    """A convolution's kernel kept as a matrix (out, in x taps), which is what Muon accepts."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, matrix: Tensor) -> Tensor:
        return channels_last(matrix.view(self.shape))

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
    vae.load_state_dict({name: value.cpu() for name, value in state.items()})
    for module in _convolutions(vae):
        parametrize.remove_parametrizations(module, "weight")
        module.weight.data = module.weight.data.contiguous()
    return vae.eval()


def _convolutions(vae: CausalVAE) -> list[nn.Conv2d | nn.Conv3d]:
    return [m for m in vae.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]


def make_run(vae: CausalVAE, rate: float, *, folder: Path, steps: int, seed: int, tensorboard: bool) -> TrainingRun:
    """A run of those weights that have gradients, by Muon for the kernels and AdamW for the rest: a still reaches in 200
    steps what AdamW alone needs 400 for. ``rate`` is relative to that of a new VAE."""
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizers = muon_and_adamw(
        filter(is_for_muon, trained), trained, rates=(4e-3 * rate, 2e-3 * rate), decays=(0.0, 0.0)
    )
    return TrainingRun(vae, optimizers, folder=folder, steps=steps, seed=seed, ema_decay=0.998, tensorboard=tensorboard)


def _phase(progress: float, whole: int) -> tuple[int, int]:
    """(batch, frames) at ``progress``, 0 to 1, through the run; ``whole``: the frames of a whole clip."""
    frames, batch = phase_at(PHASES, progress)
    return batch, frames or whole


def random_clips(world: World, rng: np.random.Generator, count: int, frames: int) -> np.ndarray:
    """Pieces (count, frames, H, W, 3) that start anywhere in a clip."""
    starts = rng.integers(0, world.frames - frames + 1, size=count)
    scenes = [world.trained_on(world.random_scene, rng) for _ in starts]
    return np.stack([world.render(s, first=int(start), frames=frames) for s, start in zip(scenes, starts, strict=True)])


@torch.no_grad()
def read_back(vae: CausalVAE, world: World, clips: int, progress: Progress | None = None) -> dict[str, Any]:
    """How well ``clips`` whole clips come back that are encoded and decoded: ``psnr`` (dB) in all, ``psnr_first`` and
    ``psnr_last`` in the first and last eighth of the frames, and the world's own figures of them. ``progress`` is called after
    each, with what tells the same of the clips so far."""
    rng = np.random.default_rng(10_000)
    scenes = [world.random_scene(rng) for _ in range(clips)]
    device, errors, readings = next(vae.parameters()).device, [], []

    def so_far() -> dict[str, Any]:
        error, eighth = torch.cat(errors).mean(dim=0), world.frames // 8
        parts = {"psnr": error, "psnr_first": error[:eighth], "psnr_last": error[-eighth:]}
        found = {name: float(10 * torch.log10(4 / e.mean())) for name, e in parts.items()}
        return found | world.figures(readings, scenes[: len(readings)])

    for scene in scenes:
        true = to_model_range(world.render(scene)[None]).to(device)
        made = vae.decode(vae.encode(true)).clamp(-1, 1)
        reading = world.read(to_pixels(made.cpu())[0])
        errors.append((made - true).square().mean(dim=(1, 3, 4)).cpu())
        readings.append(reading)
        if progress:
            progress(so_far)
    return so_far()


def describe_readback(vae: CausalVAE, world: World, clips: int) -> str:
    """`read_back` in a line."""
    found = read_back(vae, world, clips)
    return (
        f"PSNR {found['psnr']:.1f} dB (first frames {found['psnr_first']:.1f}, last {found['psnr_last']:.1f}), "
        f"outlines {found['columns']['outline']:.2f}, all right {found['all_right']:.2f}"
    )
