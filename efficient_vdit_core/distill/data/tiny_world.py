"""The tiny world as a source of clips, encoded by the VAE of the model that learns from them. Nothing else of a distillation
knows that world."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from ...generation.request import SPACE
from ...limits.memory import check_memory
from ...models.opensora_plan.vae import CausalVAE
from ...tinyworld.train.latents import cache_clips
from ...tinyworld.worlds import MOVING
from ..config import DistillConfig
from ..families.model import FamilyModel
from ..families.opensora_plan import OpenSoraPlanModel
from .clips import ClipSet


def check_tinyworld(config: DistillConfig, model: FamilyModel) -> None:
    data = config.data
    shape = model.latent_shape(model.size(data.frames, data.height, data.width))
    _check_size(shape)
    check_memory(4 * math.prod(shape) * data.clips, f"data.clips = {data.clips}", "Lower it; 4096 clips are enough.")
    _vae(model)


def tinyworld_clips(config: DistillConfig, model: FamilyModel, cache: Path, device: torch.device) -> ClipSet:
    cached = cache_clips(_vae(model), config.data.clips, cache, seed=config.data.seed)
    return ClipSet(cached.latents, [tuple(s.caption(i) for i in range(3)) for s in cached.scenes])


def _check_size(latents: tuple[int, ...]) -> None:
    _, frames, height, width = latents
    if frames != MOVING.latent_frames:
        raise ValueError(
            f"data.source tinyworld has clips of {MOVING.latent_frames} latent frames, and the run is of {frames}. Set data.frames to "
            f"{MOVING.frames}, or choose videos or teacher for a model of another world."
        )
    if {height, width} != {MOVING.size // SPACE}:
        raise ValueError(
            f"data.source tinyworld has clips of {MOVING.size} x {MOVING.size} pixels, and the run is of {SPACE * width} x "
            f"{SPACE * height}. Leave out data.height and data.width."
        )


def _vae(model: FamilyModel) -> CausalVAE:
    if not isinstance(model, OpenSoraPlanModel):
        raise ValueError(
            "data.source tinyworld is made for the tiny model of family opensora_plan. Choose videos or teacher."
        )
    return model.vae()
