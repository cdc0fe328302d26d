"""How well a tiny model draws what a caption asks: the analytic reader judges generated clips."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..bench.machine import describe_machine
from ..generation.request import TINY_GUIDANCE
from ..pipeline import Pipeline
from ..plan import TilePlan
from .worlds import MOVING, Progress, World

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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Generate one clip for each of ``captions`` held-out captions of ``world``, from the first again where it has fewer, and
    judge it; returns their figures and the set-up. Of a clip only what was read of it is kept. ``progress`` is called after
    each, with what tells the same of the clips so far. What is not said is the model's: a distilled one's own steps, else
    DDIM's 100 with guidance 3."""
    choices = _choices(pipeline.distilled, steps, guidance, sampler)
    scenes = world.held_out_scenes(captions)
    # Without a caption a tiny model was trained on none, not on the negative prompt of the large ones.
    asked = pipeline.header.requests([scene.caption() for scene in scenes], negative="", frames=world.frames, **choices)
    requests = [replace(request, seed=number) for number, request in enumerate(asked)]
    about = {
        "world": world.name,
        "captions": captions,
        **{name: getattr(requests[0], name) for name in ("steps", "segments", "guidance", "sampler")},
        "plan": "dense" if plan is None else plan.to_json(),
        "first_seed": 0,
        **describe_machine(pipeline.device),
    }
    readings: list[Any] = []

    def so_far() -> dict[str, Any]:
        return {**world.figures(readings, scenes[: len(readings)]), **about}

    for request in requests:
        readings.append(world.read(pipeline.generate(request, plan=plan).frames))
        if progress:
            progress(so_far)
    return so_far()


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
