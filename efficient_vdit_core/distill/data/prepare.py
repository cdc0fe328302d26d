"""The data of a run: clips and text states, made once and kept in the run's cache."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...limits.memory import check_memory
from ...models.opensora_plan.vae import CausalVAE
from ..config import DistillConfig
from ..families.fingerprints import teacher_stamp, text_stamp, video_stamp
from ..families.model import FamilyModel
from ..families.open_model import open_model
from ..families.texts import TextBank
from ..objectives.rollout import guided, roll_down
from .clips import FPS, ClipSet, Generate, encode_videos, read_captions, teacher_clips, video_captions, without_clips
from .noise import numbered_noise


@dataclass
class PreparedData:
    """``negative_text``: what guidance is measured against."""

    clips: ClipSet
    bank: TextBank
    negative_text: str
    device: torch.device

    def negative(self, batch: int) -> Any:
        """The unconditional half's text states and mask, repeated."""
        context, mask = self.bank.batch([self.negative_text], self.device)
        return context.expand(batch, -1, -1), mask.expand(batch, -1)


def check_data(config: DistillConfig, model: FamilyModel) -> None:
    """Raises ValueError, before any work, where the data that ``config.data`` names are not there or do not suit the
    model."""
    data = config.data
    size = model.size(data.frames, data.height, data.width)
    latent = 4 * math.prod(model.latent_shape(size))
    # The clips of a batch, their noise and what is predicted; the network's own activations come on top.
    check_memory(8 * latent * config.training.batch, f"A batch of {config.training.batch}", "Lower training.batch.")
    if data.source == "tinyworld":
        _check_tinyworld(model.latent_shape(size))
        check_memory(latent * data.clips, f"data.clips = {data.clips}", "Lower it; 4096 clips are enough.")
    if data.source == "videos":
        video_captions(Path(data.folder))
        rate = model.sound_rate  # of a VAE that may be missing
        if rate and data.fps not in (0, FPS):
            raise ValueError(
                f"data.fps is {data.fps:g}, but the model's pictures come at {FPS} a second, or its sound would not keep pace. Set it "
                f"to {FPS}, or to 0 for videos that have it."
            )
    elif data.source in ("teacher", "captions"):
        read_captions(data.captions)
    else:
        _tiny_vae(model)
    if data.source == "captions" and config.method != "score":
        raise ValueError(
            f'data.source is "captions", which has no clips, but {config.method} distillation learns from clips. Choose '
            "teacher, which samples them first, or method score."
        )


def prepare_data(config: DistillConfig, model: FamilyModel, cache: Path, device: torch.device) -> PreparedData:
    """Build or read back what ``config.data`` names."""
    data = config.data
    cache = Path(data.cache) if data.cache else cache
    cache.mkdir(parents=True, exist_ok=True)
    if data.source == "tinyworld":
        clips = _tinyworld(config, model, cache)
    elif data.source == "videos":
        size = model.size(data.frames, data.height, data.width)
        encoder = partial(model.video_encoder, device)
        clips = encode_videos(Path(data.folder), cache, size, encoder, model.sound_rate, video_stamp(model), data.fps)
    elif data.source == "captions":
        shape = model.latent_shape(model.size(data.frames, data.height, data.width))
        clips = without_clips(read_captions(data.captions), shape)
    else:
        clips = _from_teacher(config, open_model(config.sampled_by) if config.sampled_by else model, cache, device)
    clips = clips.worded(data.prompt)
    texts = [*clips.texts(), data.negative, *map(data.prompt, config.training.samples)]
    bank = _text_bank(texts, model, cache, device)
    return PreparedData(clips, bank, data.negative, device)


def _text_bank(texts: Iterable[str], model: FamilyModel, cache: Path, device: torch.device) -> TextBank:
    """From the model's own file in the cache, which other models may share."""
    rows = f"-{model.text_padding}" if model.text_padding else ""  # earlier versions padded Wan's to fewer
    file = cache / f"texts-{text_stamp(model)}{rows}.safetensors"
    return TextBank.build(texts, partial(model.text_encoder, device), file, model.text_padding)


def _tinyworld(config: DistillConfig, model: FamilyModel, cache: Path) -> ClipSet:
    from ...tinyworld.train.latents import cache_clips

    cached = cache_clips(_tiny_vae(model), config.data.clips, cache, seed=config.data.seed)
    return ClipSet(cached.latents, [tuple(s.caption(i) for i in range(3)) for s in cached.scenes])


def _check_tinyworld(latents: Sequence[int]) -> None:
    from ...tinyworld.worlds import MOVING

    if latents[1] != MOVING.latent_frames:
        raise ValueError(
            f"data.source tinyworld has clips of {MOVING.latent_frames} latent frames, and the run is of {latents[1]}. Set data.frames to "
            f"{MOVING.frames}, or choose videos or teacher for a model of another world."
        )


def _tiny_vae(model: FamilyModel) -> CausalVAE:
    from ..families.opensora_plan import OpenSoraPlanModel

    if not isinstance(model, OpenSoraPlanModel):
        raise ValueError(
            "data.source tinyworld is made for the tiny model of family opensora_plan. Choose videos or teacher."
        )
    return model.vae()


def _from_teacher(config: DistillConfig, model: FamilyModel, cache: Path, device: torch.device) -> ClipSet:
    """Samples of ``model``: a recipe's later stages learn from those of its first teacher."""
    data = config.data
    captions = read_captions(data.captions)
    bank = _text_bank([*map(data.prompt, captions), data.negative], model, cache, device)
    shape = model.latent_shape(model.size(data.frames, data.height, data.width))
    source = PreparedData(ClipSet([], []), bank, data.negative, device)

    def load_teacher() -> Generate:
        teacher = model.load().eval().requires_grad_(False).to(device)

        def generate(texts: list[str], numbers: list[int]) -> Tensor:
            condition, negative = bank.batch([data.prompt(t) for t in texts], device), source.negative(len(texts))
            network = guided(lambda z, t, c: model.predict(teacher, z, t, c), condition, negative, data.guidance)
            start = torch.stack([numbered_noise(shape, "teacher", n, data.seed) for n in numbers]).to(device)
            return roll_down(network, model.path, model.prediction, start, segments=data.teacher_steps).cpu()

        return generate

    asked = [data.seed, data.guidance, data.negative, data.teacher_steps, shape, data.template]
    padding = [model.text_padding] if model.text_padding else []
    settings = [*asked, teacher_stamp(model), *padding, *model.schedules]
    return teacher_clips(captions, data.clips, cache, settings, load_teacher, at_once=config.training.batch)
