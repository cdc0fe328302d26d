"""How well a tiny model draws what a caption asks: the analytic reader judges generated clips."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..pipeline import Pipeline
from ..plan import TilePlan
from .reader import read_clip
from .train_dit import is_held_out
from .world import ATTRIBUTES, Scene, random_scene

EVALUATION_SEED = 77_000


def held_out_scenes(count: int) -> list[Scene]:
    """Scenes whose combination of attributes was never trained on."""
    rng = np.random.default_rng(EVALUATION_SEED)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng)
        if is_held_out(scene):
            scenes.append(scene)
    return scenes


def evaluate(
    pipeline: Pipeline,
    *,
    captions: int,
    steps: int,
    guidance: float,
    sampler: str = "ddim",
    plan: TilePlan | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Generate one clip for each of ``captions`` held-out captions and compare what it shows.

    Returns the share of clips that agree for each attribute, their mean over the caption's attributes (``agreement``),
    the share that shows exactly one shape (``count``), and the set-up.
    """
    hits: dict[str, list[bool]] = {}
    for number, scene in enumerate(held_out_scenes(captions)):
        video = pipeline.generate(
            scene.caption(), steps=steps, guidance=guidance, sampler=sampler, plan=plan, seed=number
        )
        for name, same in read_clip(video.frames).agreement(scene).items():
            hits.setdefault(name, []).append(same)
        if progress:
            progress(number + 1, captions)
    shares = {name: float(np.mean(values)) for name, values in hits.items()}
    return {
        "agreement": float(np.mean([shares[name] for name in ATTRIBUTES])),
        "attributes": shares,
        "captions": captions,
        "steps": steps,
        "guidance": guidance,
        "sampler": sampler,
        "plan": "dense" if plan is None else plan.to_json(),
        "first_seed": 0,
        "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {"efficient-vdit": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
