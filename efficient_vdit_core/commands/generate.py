"""evdit generate: one video for a prompt."""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..generation.request import GUIDANCE, GUIDANCE_29X480P, SAMPLERS, TINY_GUIDANCE
from ..limits.numbers import MAX_TORCH_SEED
from ..limits.quote import quoted
from . import say

if TYPE_CHECKING:
    from ..generation.request import VideoRequest
    from ..pipeline import Pipeline, Video
    from ..plan import TilePlan

MAX_ZOOM = 16
OTHER_METADATA = 4096  # bytes at most of what a clip says of itself beside the request and the plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command's options."""
    add = parser.add_argument
    add(
        "--model",
        default="tiny",
        help="built in: tiny, tiny-8-steps, tiny-8-steps-sparse, tiny-4-steps, tiny-epsilon; or a folder (transformer, vae, "
        "text_encoder)",
    )
    add("--text-encoder", metavar="PATH", help="file or folder of the mT5 encoder, if it lies elsewhere")
    add(
        "--transformer",
        metavar="PATH",
        help="other weights for it, such as evdit distill's, which set steps and guidance",
    )
    add("--lora", action="append", default=[], metavar="FILE",
        help="of evdit distill for the model, sets steps and guidance; may be repeated, in the order of training")  # fmt: skip
    add("--prompt", required=True, help="what the video shows")
    add(
        "--negative",
        help="what it must not show, which takes guidance above 1 (default: the reference model's text; empty for tiny)",
    )
    add("--template", choices=("a", "b", "c"), help="put the prompt into one of the reference model's templates")
    add("--frames", type=int, help="number of frames, 4k+1 (default: as the model was trained)")
    add("--height", type=int, help="pixels, a multiple of 16 (default: as the model was trained)")
    add("--width", type=int, help="pixels, a multiple of 16 (default: as the model was trained)")
    add("--steps", type=int, help="evaluations of the model, 1..1000 (default: 100 for ddim, euler_ancestral, which take 2 at least; "
        "for consistency what the weights were distilled for, else 20)")  # fmt: skip
    add(
        "--guidance",
        type=float,
        help="classifier-free guidance, 1 is off (default: 1 where it was distilled into the weights, else "
        f"{TINY_GUIDANCE:g} for tiny, {GUIDANCE_29X480P:g} for 29x480p, {GUIDANCE:g} for others)",
    )
    add("--sampler", choices=SAMPLERS, default="consistency", help="default: %(default)s")
    add("--segments", type=int, help="consistency: segments of diffusion time, 1..steps (default: what the weights were "
        "distilled for, else steps)")  # fmt: skip
    add("--gamma", type=float, help="consistency: share of fresh noise, 0 deterministic .. 1 as LCM (default: 0)")
    add(
        "--plan",
        metavar="K:T-K|FILE",
        help="sparse attention: a pattern, 1:7 is 1 reference frame of 8, full is dense; or a plan file (default: what the weights "
        "were distilled for, else dense)",
    )
    add("--residual-every", type=int, default=0, metavar="N", help="every N steps compute the dense attention too and add the "
        "difference in between, for 15 steps and more; 0 = never (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, help=f"0 to {MAX_TORCH_SEED:,} (default: 0)")
    add("--out", required=True, metavar="FILE", help="the ending picks the format: .mp4, .gif, .webp")
    add("--zoom", type=int, default=1, help="enlarge the written video 1..16 times, pixel by pixel (default: 1)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="default: auto")


CHOICES = ("negative", "frames", "height", "width", "steps", "guidance", "sampler", "segments", "gamma", "seed")


def run(args: argparse.Namespace) -> int:
    """Makes and writes the video. Whatever can be refused is refused before the weights are read."""
    from ..generation.model_header import ModelHeader
    from ..generation.request import VideoRequest
    from ..media.video import check_metadata, check_writable

    start = time.perf_counter()
    out = check_writable(args.out)
    if not 1 <= args.zoom <= MAX_ZOOM:
        raise ValueError(f"--zoom must lie in 1..{MAX_ZOOM}, got {quoted(args.zoom)}.")
    choices = {name: getattr(args, name) for name in CHOICES if getattr(args, name) is not None}
    request = VideoRequest(args.prompt, **choices).check()
    if args.frames and args.height and args.width:
        _check_room(request, out, args.zoom)
    load_plan(args.plan, frames=None)
    header = ModelHeader.read(args.model, text_encoder=args.text_encoder, transformer=args.transformer, loras=args.lora)
    request = header.request(args.prompt, **choices)
    plan = load_plan(args.plan, frames=request.latent_size[0]) or header.tuned_plan
    if plan:
        header.check_plan(plan)
    if args.residual_every:
        _check_residual(args.residual_every, request, plan, header.config.num_layers)
    _check_room(request, out, args.zoom)
    check_metadata({**asdict(request), "plan": plan and json.loads(plan.to_json())}, room=OTHER_METADATA)

    say(f"loading {args.model}")
    from ..pipeline import Pipeline

    pipeline = Pipeline.from_model(
        args.model, text_encoder=args.text_encoder, transformer=args.transformer, loras=args.lora, device=args.device,
        dtype=args.dtype,
    )  # fmt: skip
    write(make_video(pipeline, request, plan, args.template, args.residual_every), out, args.zoom, start)
    return 0


def _check_room(request: VideoRequest, out: Path, zoom: int) -> None:
    """Raises ValueError where the enlarged frames have no room in memory or in the file's format."""
    from ..limits.memory import check_memory
    from ..media.video import check_size

    size = 3 * zoom**2 * request.frames * request.height * request.width
    check_memory(size, f"{request.describe()}, enlarged {zoom} times,", "Lower --zoom.")
    check_size(out, zoom * request.height, zoom * request.width)


def _check_residual(every: int, request: VideoRequest, plan: TilePlan | None, layers: int) -> None:
    """Raises ValueError where the cached residual would do nothing."""
    from ..attention.hook.residual import ResidualCache, why_no_residual

    flag = f"--residual-every {quoted(every)} does not fit"
    try:
        ResidualCache(every)
    except ValueError as error:
        raise ValueError(f"{flag}. {error}") from None
    if plan is None or all(plan.pattern(i, layers).is_full(request.latent_size[0]) for i in range(layers)):
        raise ValueError(f"{flag}: no layer leaves anything out. Give a --plan that does, or leave it out.")
    if why := why_no_residual(every, request.steps or 0):
        raise ValueError(f"{flag}: {why}.")


def make_video(
    pipeline: Pipeline,
    request: VideoRequest,
    plan: TilePlan | None,
    template: str | None = None,
    residual_every: int = 0,
) -> Video:
    """Samples behind a progress bar, and says what else takes time."""
    from tqdm import tqdm

    steps = request.steps or 0
    room = pipeline.residual_room(request, plan, residual_every) if plan is not None and residual_every else None
    if room is not None:
        say(f"the cached residual takes {room}")
    say("encoding the prompt")
    with tqdm(total=steps, desc="sampling", unit="step", delay=0.1) as bar:

        def progress(done: int, _: int) -> None:
            bar.update(done - bar.n)
            if done == steps:
                bar.close()
                say(f"decoding {request.frames} frames")

        return pipeline.generate(
            request, plan=plan, template=template, progress=progress, residual_every=residual_every
        )


def write(video: Video, out: Path, zoom: int, start: float) -> None:
    """Writes the file and tells what it holds, how sparse the attention was and how long all took."""
    from ..media.video import write_video

    say(f"writing {out}")
    frames = video.frames.repeat(zoom, axis=1).repeat(zoom, axis=2)
    write_video(out, frames, fps=video.metadata["fps"], metadata={**video.metadata, "zoom": zoom})
    count, height, width, _ = frames.shape
    say(
        f"wrote {out}: {count} frames of {width}x{height} at {video.metadata['fps']} fps, {out.stat().st_size / 1024:.0f} KiB"
    )
    say(f"attention: {video.metadata['attention']}")
    say(f"took {time.perf_counter() - start:.1f} s, {video.metadata['steps']} steps of {video.metadata['sampler']}")


def load_plan(text: str | None, frames: int | None) -> TilePlan | None:
    """A plan from "k:T-k", "k:T-k~window+means", "full" or a file; None stays None.

    Args:
        frames: latent frames of the video, which k:T-k must name; None skips that check.
    """
    if text is None:
        return None
    from ..plan import TilePlan
    from ..tiles import TilePattern

    if not re.fullmatch(r"[0-9]{1,4}:[0-9]{1,4}(~[0-9]{1,4})?(\+[0-9]{1,4})?|full", text):
        if not Path(text).is_file():
            raise ValueError(
                f"--plan {quoted(text, 120)} is neither a pattern such as 1:7 nor a plan file; check the path."
            )
        return TilePlan.load(text)
    pattern = TilePattern.parse(text)
    if ":" in text and frames is not None:
        k, others = map(int, re.split(r"[~+]", text)[0].split(":"))
        if k + others != frames:
            fitting = replace(pattern, k=min(k, frames)).name(frames)
            raise ValueError(
                f"--plan {quoted(text)} is a pattern for {k + others} latent frames, but this video has {frames}; "
                f"use {fitting}."
            )
    return TilePlan(uniform_pattern=pattern)
