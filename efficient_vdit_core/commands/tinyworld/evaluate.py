"""evdit tinyworld eval: what clips that a model generates show of their captions, judged from pixels."""

from __future__ import annotations

import argparse
from typing import Any

from ..arguments import count, quantity
from ..generate import load_plan
from .figures import add_json, figures_file
from .world import add_world


def add(commands: Any) -> None:
    judge = commands.add_parser(
        "eval", help="share of generated clips that are all right by their captions, judged from pixels"
    )
    judge.add_argument("--model", default="tiny", help="tiny or a folder, default: %(default)s")
    judge.add_argument("--transformer", metavar="PATH", help="other weights for it, such as evdit distill's")
    judge.add_argument(
        "--lora", action="append", default=[], metavar="FILE", help="of evdit distill for the model; may be repeated"
    )
    judge.add_argument(
        "--captions",
        type=count(1, 100_000),
        default=200,
        help="clips, one for each held-out caption; the moving world has 72 of these and begins again behind them, "
        "default: %(default)s",
    )
    judge.add_argument("--steps", type=count(1, 1000), help="default: what the model was distilled for, else 100")
    judge.add_argument(
        "--guidance", type=quantity(0, 1000), help="default: 1 where the model was distilled with it, else 3"
    )
    judge.add_argument(
        "--sampler",
        choices=("ddim", "euler_ancestral", "consistency"),
        help="default: consistency where the model was distilled, else ddim",
    )
    judge.add_argument("--plan", help="k:T-k for a uniform plan, or a plan file; dense without it")
    add_world(judge)
    judge.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add_json(judge)


def run(args: argparse.Namespace) -> int:
    from ...pipeline import Pipeline
    from ...tinyworld.evaluate import evaluate
    from ...tinyworld.worlds import WORLDS

    with figures_file(args.json, args.captions) as out:
        world = WORLDS[args.world]
        plan = load_plan(args.plan, world.latent_frames)
        pipeline = Pipeline.from_model(args.model, transformer=args.transformer, loras=args.lora, device=args.device)
        figures = evaluate(pipeline, captions=args.captions, steps=args.steps, guidance=args.guidance, sampler=args.sampler, plan=plan,
                           world=world, progress=out.judged)  # fmt: skip
        out.finish(figures)
    return 0
