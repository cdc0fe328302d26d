"""evdit demo: a short clip from the built-in model after all three stages: few steps, and sparse attention by a
searched plan."""

from __future__ import annotations

import argparse
import time

from . import say
from .arguments import seed_number
from .generate import make_video, write

PROMPT = "a yellow triangle moving right slowly on a navy background"
MODEL = "tiny-8-steps-sparse"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command's options."""
    parser.add_argument("--prompt", default=PROMPT, help="default: %(default)s")
    parser.add_argument("--out", default="evdit-demo.mp4", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--seed", type=seed_number, default=0, help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Makes the clip, writes it, and tells what the analytic reader sees in it."""
    from ..media.video import check_writable

    start = time.perf_counter()
    out = check_writable(args.out)

    say(f"prompt: {args.prompt}")
    say(f"loading {MODEL}")
    from ..pipeline import Pipeline
    from ..tinyworld.moving.reader import read_clip

    pipeline = Pipeline.from_model(MODEL)
    request, plan = pipeline.request(args.prompt, seed=args.seed), pipeline.tuned_plan
    if plan is None:
        raise ValueError(
            f"The built-in model {MODEL} does not name its plan: it is damaged. Install the package again."
        )
    say(
        f"{request.steps} steps without guidance; sparse attention {plan.to_text()} (layer : reference frames : other frames)"
    )
    video = make_video(pipeline, request, plan)
    write(video, out, zoom=4, start=start)
    seen = read_clip(video.frames)
    if seen.shape is None:
        say("seen in its pixels: no shape")
    else:
        say(
            f"seen in its pixels: a {seen.color} {seen.shape} moving {seen.direction} {seen.speed} on {seen.background}"
        )
    return 0
