"""Sample videos during training: the same noise and captions every time, at the steps that the student is made for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...models.distilled import DistillMetadata
from ..config import DistillConfig
from ..data.noise import numbered_noise
from ..families.model import FamilyModel, read_plan, sparse_options
from ..objectives.rollout import guided, roll_down

if TYPE_CHECKING:
    from ..data.prepare import PreparedData


@torch.no_grad()
def write_samples(
    config: DistillConfig,
    model: FamilyModel,
    module: nn.Module,
    data: PreparedData,
    about: DistillMetadata,
    folder: Path,
    *,
    write: bool = True,
) -> str:
    """Write one gif for each of ``training.samples`` (or the first four captions) and say where: at the speed of ``data.fps`` or the
    model's, and with guidance where the student is one that is to be sampled so.

    A process that only helps to compute them, since it holds a part of the weights, does not ``write``.
    """
    from ...media.video import write_video

    texts = [config.data.prompt(t) for t in config.training.samples] or [c[0] for c in data.clips.captions[:4]]
    shape = tuple(data.clips.latents[0].shape)
    options = sparse_options(model, read_plan(config.objective.plan)) if about.plan is not None else None
    decode = model.video_decoder(data.device) if write else None
    guidance = config.data.guidance if _is_guided(config, model, about) else 1.0
    negative = data.negative(1) if guidance != 1 else None
    if write:
        folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        noise = numbered_noise((1, *shape), "samples", number).to(data.device)
        condition = data.bank.batch([text], data.device)
        network = guided(
            lambda z, t, c: model.predict(module, z, t, c, options(z) if options else None),
            condition,
            negative,
            guidance,
        )
        z = roll_down(network, model.path, model.prediction, noise, segments=about.segments, steps=about.steps)
        if decode is None:
            continue
        write_video(
            folder / f"{number:02d}.gif",
            decode(z[0]),
            fps=config.data.fps or model.fps,
            metadata={"prompt": text, "seed": number, "steps": about.steps},
        )
    return f"samples in {folder}"


def _is_guided(config: DistillConfig, model: FamilyModel, about: DistillMetadata) -> bool:
    """Whether the student keeps its teacher's need of guidance, and learns what guidance is measured against."""
    learnt = config.method == "knowledge" and config.data.negative_share > 0
    return learnt and model.guided and about.guidance is None
