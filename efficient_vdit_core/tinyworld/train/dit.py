"""Trains the tiny Open-Sora-Plan transformer on cached latents of the tiny world.

By v-prediction rather than the reference checkpoint's epsilon: at high noise the network then says what the clip will
show, instead of copying its input, and a tiny model learns shape and motion in a fraction of the steps. ``epsilon`` trains
one as the reference is; its errors count as they would in v.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...limits.quote import quoted
from ...models.opensora_plan.checkpoint import read_transformer_config
from ...models.opensora_plan.config import DiTConfig
from ...models.opensora_plan.text import TextEncoder
from ...models.opensora_plan.transformer import OpenSoraT2V
from ...training import TrainingRun
from ...training.muon import is_for_muon, muon_and_adamw
from ..worlds import MOVING, World
from .latents import CachedClips
from .phases import phase_at
from .text import WIDTH
from .vae import numpy_rng

TINY_DIT = DiTConfig(
    num_layers=6, num_attention_heads=4, attention_head_dim=36, caption_channels=WIDTH, sample_size=(8, 8), sample_size_t=8,
    interpolation_scale_t=1.0, interpolation_scale_h=1.0, interpolation_scale_w=1.0, prediction_type="v_prediction",
)  # fmt: skip
NULL_TEXT_SHARE = 0.1
LEAST_SIGNAL = 0.05  # below it noise tells so little of a clip that its errors weigh no more
# (share of the steps, part of a clip's latent frames, from its begin) where short ones come first. How things move is learnt from
# a quarter of a clip as well, and a step then takes a quarter of the time.
SHORT_FIRST = ((0.5, 0.25), (0.3, 0.5), (0.2, 1.0))
# What a transformer to go on from may have otherwise.
_MAY_DIFFER = ("in_channels", "out_channels", "sample_size", "sample_size_t", "prediction_type")
_OF_LATENTS = ("pos_embed.proj.weight", "proj_out.weight", "proj_out.bias")


def train_dit(
    folder: Path,
    clips: CachedClips,
    text: TextEncoder,
    *,
    world: World = MOVING,
    steps: int = 8000,
    batch: int = 32,
    seed: int = 0,
    tensorboard: bool = False,
    start: OpenSoraT2V | None = None,
    prediction: str = "v_prediction",
    bf16: bool = False,
    short_first: bool = False,
    device: str = "cpu",
    evaluate: Callable[[dict[str, Tensor]], str] | None = None,
) -> OpenSoraT2V:
    """Train (or resume) in ``folder``; returns the transformer with averaged weights, on the CPU.

    ``start``: one that knows the world already, by the latents of another VAE or under another ``prediction``, say; it is
    trained further, but for what reads and writes latents of another number of channels, which begins anew.
    ``prediction``: one of ``PREDICTION_TYPES``, what the network says of a noisy clip. ``bf16``, ``short_first``: see
    `TinyRecipe`.
    """
    torch.manual_seed(seed)
    channels = clips.latents.shape[1]
    config = replace(
        TINY_DIT,
        prediction_type=prediction,
        sample_size_t=world.latent_frames,
        in_channels=channels,
        out_channels=channels,
    )
    model = OpenSoraT2V(config)
    _initialise(model)
    if start is not None:
        _take_over(model, start)
    model.to(device)
    run = TrainingRun(
        model, _optimizers(model), folder=folder, steps=steps, seed=seed, ema_decay=0.998, tensorboard=tensorboard
    )
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float()

    def loss_of(generator: torch.Generator) -> Tensor:
        rng = numpy_rng(generator)
        chosen = rng.integers(len(clips.scenes), size=batch)
        frames = frames_at(run.step / steps, world.latent_frames) if short_first else world.latent_frames
        x0 = clips.latents[torch.from_numpy(chosen), :, :frames]
        words = [
            clips.scenes[i].caption(int(rng.integers(3))) if rng.random() > NULL_TEXT_SHARE else "" for i in chosen
        ]
        context, mask = (x.to(device) for x in text.encode(words))
        # Stratified timesteps: every batch sees the whole range, which halves the noise of the loss.
        t = ((torch.rand(1, generator=generator) + torch.arange(batch) / batch) % 1 * 1000).long()
        a, s = alpha_bar[t].sqrt().view(-1, 1, 1, 1, 1), (1 - alpha_bar[t]).sqrt().view(-1, 1, 1, 1, 1)
        noise = torch.randn(x0.shape, generator=generator)
        noisy, wanted = a * x0 + s * noise, noise if prediction == "epsilon" else a * noise - s * x0
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            said = model(noisy.to(device), t.float().to(device), context, mask).float()
        return weighted_loss(said, wanted.to(device), weights_of(prediction, a.flatten()).to(device))

    model.load_state_dict(run.train(loss_of, evaluate=evaluate, save_every=250, evaluate_every=1000))
    return model.cpu().eval()


def weights_of(prediction: str, a: Tensor) -> Tensor:
    """What the squared errors of clips at the signal shares ``a`` (B,) count, (B,).

    Those of epsilon count as the same clips' would in v, 1 / a^2: in x0 that is SNR + 1. With 1 a network learns at high noise to
    copy its input, and next to nothing of the clip. Source: Salimans and Ho 2022, arXiv 2202.00512, section 4.
    """
    return 1 / a.square().clamp(min=LEAST_SIGNAL**2) if prediction == "epsilon" else torch.ones_like(a)


def weighted_loss(said: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """The mean over clips of their mean squared errors times ``weights`` (B,)."""
    return ((said - wanted).square().flatten(1).mean(1) * weights).mean()


def frames_at(progress: float, whole: int) -> int:
    """How many of a clip's ``whole`` latent frames are learnt at ``progress``, 0 to 1, through a run with short ones first."""
    (part,) = phase_at(SHORT_FIRST, progress)
    return max(1, round(part * whole))


def _initialise(model: OpenSoraT2V) -> None:
    """Start without influence of the text and with a zero output, as PixArt does."""
    zeroed = ("proj_out.", "attn2.to_out.0.")
    for name, parameter in model.named_parameters():
        if any(part in name for part in zeroed):
            nn.init.zeros_(parameter)


def check_start(path: Path) -> None:
    """Raises ValueError where the transformer in a file or folder is not one that `train_dit` can go on from."""
    config = read_transformer_config(path)
    if replace(config, **{name: getattr(TINY_DIT, name) for name in _MAY_DIFFER}) != TINY_DIT:
        raise ValueError(
            f"{quoted(str(path), 120)} holds a transformer of another shape than the tiny one: {config.num_layers} blocks of "
            f"{config.num_attention_heads} x {config.attention_head_dim}, expected {TINY_DIT.num_layers} of "
            f"{TINY_DIT.num_attention_heads} x {TINY_DIT.attention_head_dim} for texts of {TINY_DIT.caption_channels}. Correct --start."
        )


def _take_over(model: OpenSoraT2V, start: OpenSoraT2V) -> None:
    """Copy the weights of ``start``, but for those of latents that have another number of channels."""
    weights = start.state_dict()
    if start.config.in_channels != model.config.in_channels:
        weights = {**weights, **{name: model.state_dict()[name] for name in _OF_LATENTS}}
    model.load_state_dict(weights)


def _optimizers(model: OpenSoraT2V) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest: twice the progress a step of AdamW alone at this size."""
    matrices = filter(is_for_muon, model.transformer_blocks.parameters())
    return muon_and_adamw(matrices, model.parameters(), rates=(1e-3, 1e-3), decays=(0.01, 0.0))
