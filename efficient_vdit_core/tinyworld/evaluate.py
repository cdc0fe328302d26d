"""How well a tiny model draws what a caption asks: the analytic reader judges generated clips."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch

from .. import __version__
from ..pipeline import Pipeline
from ..plan import TilePlan
from .worlds import MOVING, World


def evaluate(
    pipeline: Pipeline,
    *,
    captions: int,
    steps: int,
    guidance: float,
    sampler: str = "ddim",
    plan: TilePlan | None = None,
    world: World = MOVING,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Generate one clip for each of ``captions`` held-out captions of ``world`` and judge it; returns its figures and the
    set-up."""
    scenes, clips = world.held_out_scenes(captions), []
    for number, scene in enumerate(scenes):
        video = pipeline.generate(
            scene.caption(),
            frames=world.frames,
            steps=steps,
            guidance=guidance,
            sampler=sampler,
            plan=plan,
            seed=number,
        )
        clips.append(video.frames)
        if progress:
            progress(number + 1, captions)
    return {
        **world.figures(clips, scenes),
        "world": world.name,
        "captions": captions,
        "steps": steps,
        "guidance": guidance,
        "sampler": sampler,
        "plan": "dense" if plan is None else plan.to_json(),
        "first_seed": 0,
        "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {"efficient-vdit": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
