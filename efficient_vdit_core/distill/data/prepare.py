"""The data of a run: clips and text states, made once and kept in the run's cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...limits.memory import check_memory
from ...limits.packages import install, missing
from ..config import DistillConfig, learns_on_ways, needs_no_clips
from ..families.fingerprints import teacher_stamp, text_stamp, video_stamp
from ..families.model import FamilyModel
from ..families.open_model import open_model
from ..families.texts import TextBank
from ..objectives.rollout import guided, trajectory
from .clips import FPS, ClipSet, Generate, encode_videos, read_captions, teacher_clips, video_captions, without_clips
from .noise import numbered_noise
from .tiny_world import check_tinyworld, tinyworld_clips


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


@dataclass(frozen=True)
class ClipSource:
    """What a name in ``data.source`` stands for.

    Attributes:
        check: raises ValueError, before any work, where its data are not there or do not suit the model.
        clips: builds them, or reads them back from the cache.
    """

    check: Callable[[DistillConfig, FamilyModel], None]
    clips: Callable[[DistillConfig, FamilyModel, Path, torch.device], ClipSet]


def check_data(config: DistillConfig, model: FamilyModel) -> None:
    """Raises ValueError, before any work, where the data that ``config.data`` names are not there or do not suit the
    model."""
    data = config.data
    size = model.size(data.frames, data.height, data.width)
    latent = 4 * math.prod(model.latent_shape(size))
    # The clips of a batch, or their ways, noise and what is predicted; the network's own activations come on top.
    states = 8 + (config.objective.segments if learns_on_ways(config) else 0)
    check_memory(
        states * latent * config.training.batch, f"A batch of {config.training.batch}", "Lower training.batch."
    )
    SOURCES[data.source].check(config, model)


def prepare_data(config: DistillConfig, model: FamilyModel, cache: Path, device: torch.device) -> PreparedData:
    """Build or read back what ``config.data`` names."""
    data, cache = config.data, cache_folder(config, cache)
    _text_file(model, cache)  # what would end the run behind the clips, whose encoding may take hours
    clips = SOURCES[data.source].clips(config, model, cache, device).worded(data.prompt)
    texts = [*clips.texts(), data.negative, *map(data.prompt, config.training.samples)]
    bank = _text_bank(texts, model, cache, device)
    return PreparedData(clips, bank, data.negative, device)


def cache_folder(config: DistillConfig, own: Path) -> Path:
    """Where a run's data are kept: the folder that is asked for, or its ``own``."""
    cache = Path(config.data.cache) if config.data.cache else own
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def _text_bank(texts: Iterable[str], model: FamilyModel, cache: Path, device: torch.device) -> TextBank:
    encoder = partial(model.text_encoder, device)
    return TextBank.build(texts, encoder, _text_file(model, cache), model.text_padding)


def _text_file(model: FamilyModel, cache: Path) -> Path:
    """The model's own file of text states in the cache, which other models may share. Raises ValueError where there is none
    yet, and a package is missing that encodes them."""
    rows = f"-{model.text_padding}" if model.text_padding else ""  # earlier versions padded Wan's to fewer
    file = cache / f"texts-{text_stamp(model)}{rows}.safetensors"
    lacking = missing(model.encoder_packages)
    if lacking and not file.is_file():
        raise ValueError(
            f"{', '.join(lacking)} is missing, without which this model's text encoder cannot be loaded. {install(*lacking)}"
        )
    return file


def _check_videos(config: DistillConfig, model: FamilyModel) -> None:
    data = config.data
    video_captions(Path(data.folder))
    rate = model.sound_rate  # of a VAE that may be missing
    if rate and data.fps not in (0, FPS):
        raise ValueError(
            f"data.fps is {data.fps:g}, but the model's pictures come at {FPS} a second, or its sound would not keep pace. Set it "
            f"to {FPS}, or to 0 for videos that have it."
        )


def _from_videos(config: DistillConfig, model: FamilyModel, cache: Path, device: torch.device) -> ClipSet:
    data = config.data
    size = model.size(data.frames, data.height, data.width)
    encoder = partial(model.video_encoder, device)
    return encode_videos(Path(data.folder), cache, size, encoder, model.sound_rate, video_stamp(model), data.fps)


def _check_teacher(config: DistillConfig, model: FamilyModel) -> None:
    read_captions(config.data.captions)


def _check_captions(config: DistillConfig, model: FamilyModel) -> None:
    read_captions(config.data.captions)
    if not needs_no_clips(config):
        raise ValueError(
            f'data.source is "captions", which has no clips, but {config.method} distillation learns from clips. Choose '
            'teacher, which samples them first, or method score, or consistency with states = "student".'
        )


def _from_captions(config: DistillConfig, model: FamilyModel, cache: Path, device: torch.device) -> ClipSet:
    data = config.data
    shape = model.latent_shape(model.size(data.frames, data.height, data.width))
    return without_clips(read_captions(data.captions), shape)


def encode_captions(config: DistillConfig, model: FamilyModel, cache: Path, device: torch.device) -> TextBank:
    """What the teacher's samples are drawn for: text states that are encoded once."""
    data = config.data
    return _text_bank([*map(data.prompt, read_captions(data.captions)), data.negative], model, cache, device)


def sample_teacher(
    config: DistillConfig, model: FamilyModel, cache: Path, device: torch.device, share: tuple[int, int] = (0, 1)
) -> ClipSet:
    """The teacher's own samples: a recipe's later stages learn from those of its first teacher. ``share``: the place of this
    process, and how many there are, among all that draw what is missing at once."""
    data = config.data
    model = open_model(config.sampled_by) if config.sampled_by else model
    captions, bank = read_captions(data.captions), encode_captions(config, model, cache, device)
    shape = model.latent_shape(model.size(data.frames, data.height, data.width))
    source = PreparedData(ClipSet([], []), bank, data.negative, device)

    def load_teacher() -> Generate:
        teacher = model.load().eval().requires_grad_(False).to(device)

        def generate(texts: list[str], numbers: list[int]) -> Tensor:
            condition, negative = bank.batch([data.prompt(t) for t in texts], device), source.negative(len(texts))
            network = guided(lambda z, t, c: model.predict(teacher, z, t, c), condition, negative, data.guidance)
            start = torch.stack([numbered_noise(shape, "teacher", n, data.seed) for n in numbers])
            down = trajectory(
                network,
                model.path,
                model.prediction,
                start.to(device),
                segments=data.teacher_steps,
                order=data.teacher_order,
            )
            every = data.teacher_steps // max(1, data.ways)
            kept = [z.cpu() for step, (_, z) in enumerate(down, start=1) if step % every == 0]
            return torch.stack([start, *kept] if data.ways else kept, dim=1)

        return generate

    asked = [data.seed, data.guidance, data.negative, data.teacher_steps, shape, data.template]
    padding = [model.text_padding] if model.text_padding else []
    ways = [{"ways": data.ways}] if data.ways else []
    order = [{"order": data.teacher_order}] if data.teacher_order != 1 else []
    settings = [*asked, teacher_stamp(model), *padding, *model.schedules, *ways, *order]
    return teacher_clips(captions, data.clips, cache, settings, load_teacher, config.training.batch, share)


SOURCES = {
    "tinyworld": ClipSource(check_tinyworld, tinyworld_clips),
    "videos": ClipSource(_check_videos, _from_videos),
    "teacher": ClipSource(_check_teacher, sample_teacher),
    "captions": ClipSource(_check_captions, _from_captions),
}
