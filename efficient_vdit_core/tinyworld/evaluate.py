"""How well a tiny model draws what a caption asks: the analytic reader judges generated clips."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..pipeline import Pipeline
from ..plan import TilePlan
from .figures import figures_of
from .train_dit import is_held_out
from .world import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES, SIZE, SPEEDS, Scene

EVALUATION_SEED = 77_000


def held_out_scenes(count: int) -> list[Scene]:
    """Scenes whose combination of attributes was never trained on, in a fixed random order, from the first again after
    all 72. Their captions count; that they start in the middle does not."""
    combinations = itertools.product(SHAPES, COLORS, DIRECTIONS, SPEEDS, BACKGROUNDS)
    scenes = [Scene(*names, start=(SIZE / 2, SIZE / 2), radius=12.5) for names in combinations]
    scenes = [scene for scene in scenes if is_held_out(scene)]
    order = np.random.default_rng(EVALUATION_SEED).permutation(len(scenes))
    return [scenes[order[i % len(scenes)]] for i in range(count)]


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
    """Generate one clip for each of ``captions`` held-out captions and judge it; returns `figures_of` and the set-up."""
    scenes, clips = held_out_scenes(captions), []
    for number, scene in enumerate(scenes):
        video = pipeline.generate(
            scene.caption(), steps=steps, guidance=guidance, sampler=sampler, plan=plan, seed=number
        )
        clips.append(video.frames)
        if progress:
            progress(number + 1, captions)
    return {
        **figures_of(clips, scenes),
        "captions": captions,
        "steps": steps,
        "guidance": guidance,
        "sampler": sampler,
        "plan": "dense" if plan is None else plan.to_json(),
        "first_seed": 0,
        "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {"efficient-vdit": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
