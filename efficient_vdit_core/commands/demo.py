"""evdit demo: a short clip from the built-in model, with sparse attention and the few-step sampler on."""

from __future__ import annotations

import argparse
import time

from . import say
from .generate import make_video, write

PROMPT = "a red circle moving right fast on a white background"
PLAN = "2:6"
SETTINGS = {"sampler": "consistency", "steps": 20, "segments": 20, "gamma": 0.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command's options."""
    parser.add_argument("--prompt", default=PROMPT, help="default: %(default)s")
    parser.add_argument("--out", default="evdit-demo.mp4", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Makes the clip, writes it, and tells what the analytic reader sees in it."""
    from ..video import check_writable

    start = time.perf_counter()
    out = check_writable(args.out)

    from ..pipeline import Pipeline
    from ..tinyworld.reader import read_clip

    say(f"prompt: {args.prompt}")
    say(f"sparse attention {PLAN} (2 of 8 latent frames are reference frames), {SETTINGS['steps']} steps")
    pipeline = Pipeline.from_model("tiny")
    video = make_video(pipeline, args.prompt, {**SETTINGS, "seed": args.seed}, plan_text=PLAN)
    write(video, out, zoom=4, start=start)
    seen = read_clip(video.frames)
    if seen.shape is None:
        say("seen in its pixels: no shape")
    else:
        say(f"seen in its pixels: a {seen.color} {seen.shape} moving {seen.direction} {seen.speed} on {seen.background}")
    return 0
