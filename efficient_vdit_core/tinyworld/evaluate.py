"""How well a tiny model draws what a caption asks: the analytic reader judges generated clips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..bench.machine import describe_machine
from ..generation.request import TINY_GUIDANCE
from ..pipeline import Pipeline
from ..plan import TilePlan
from .worlds import MOVING, World

if TYPE_CHECKING:
    from ..models.distilled import DistillMetadata


def evaluate(
    pipeline: Pipeline,
    *,
    captions: int,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    plan: TilePlan | None = None,
    world: World = MOVING,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Generate one clip for each of ``captions`` held-out captions of ``world`` and judge it; returns its figures and the
    set-up. What is not said is the model's: a distilled one's own steps, else DDIM's 100 with guidance 3."""
    choices = _choices(pipeline.distilled, steps, guidance, sampler)
    scenes = world.held_out_scenes(captions)
    # Without a caption a tiny model was trained on none, not on the negative prompt of the large ones.
    asked = pipeline.header.requests([scene.caption() for scene in scenes], negative="", frames=world.frames, **choices)
    requests = [replace(request, seed=number) for number, request in enumerate(asked)]
    clips = []
    for number, request in enumerate(requests):
        video = pipeline.generate(request, plan=plan)
        clips.append(video.frames)
        if progress:
            progress(number + 1, captions)
    return {
        **world.figures(clips, scenes),
        "world": world.name,
        "captions": captions,
        **{name: getattr(requests[0], name) for name in ("steps", "segments", "guidance", "sampler")},
        "plan": "dense" if plan is None else plan.to_json(),
        "first_seed": 0,
        **describe_machine(pipeline.device),
    }


def _choices(
    distilled: DistillMetadata | None, steps: int | None, guidance: float | None, sampler: str | None
) -> dict[str, Any]:
    """A few-step student is asked where it was trained, at the edges of its segments: of fewer, where it has fewer steps."""
    if distilled is None:
        return {
            "steps": steps or 100,
            "guidance": TINY_GUIDANCE if guidance is None else guidance,
            "sampler": sampler or "ddim",
        }
    own = sampler in (None, "consistency")
    segments = min(steps or distilled.steps, distilled.segments) if own else None
    return {"steps": steps, "guidance": guidance, "sampler": sampler, "segments": segments}
