"""evdit tinyworld: train the tiny models, judge them, draw true clips of the world."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..commands.arguments import count, quantity, seed_number
from ..commands.command_line import command_line


def add_arguments(subparsers: Any) -> None:
    """Add the commands train, eval, read-back, render, crossing-render and crossing-bounds."""
    for add in (_add_train, _add_eval, _add_read_back, _add_render, _add_crossing_render, _add_crossing_bounds):
        add(subparsers)


def _add_train(subparsers: Any) -> None:
    train = subparsers.add_parser("train", help="train the tiny models; run it again to go on where it stopped")
    train.add_argument(
        "--run", dest="run_folder", type=Path, default=Path("runs/tiny"), help="the run's state, default: %(default)s"
    )
    train.add_argument(
        "--out", type=Path, default=Path("runs/tiny/model"), help="folder for the model, default: %(default)s"
    )
    parts = ("text_encoder", "vae", "transformer")
    train.add_argument(
        "--parts",
        nargs="+",
        default=parts,
        choices=(*parts, "decoder"),
        help="decoder: that of the VAE in --out, further, so that transformers of its latents stay; default: the other three",
    )
    train.add_argument("--decoder-steps", type=count(1, 10_000_000), default=9000, help="default: %(default)s")
    train.add_argument("--vae-steps", type=count(1, 10_000_000), default=9000, help="default: %(default)s")
    train.add_argument("--dit-steps", type=count(1, 10_000_000), default=8000, help="default: %(default)s")
    train.add_argument(
        "--clips",
        type=count(1, 1_000_000),
        default=6144,
        help="clips that the transformer learns from, default: %(default)s",
    )
    train.add_argument(
        "--batch", type=count(1, 65_536), default=32, help="clips in a step of the transformer, default: %(default)s"
    )
    train.add_argument("--seed", type=seed_number, default=0, help="default: %(default)s")
    train.add_argument(
        "--start", type=Path, metavar="FOLDER", help="a transformer of the world to go on from, in place of a new one"
    )
    train.add_argument(
        "--start-vae",
        type=Path,
        metavar="FOLDER",
        help="a VAE to go on from, of another world say, in place of a new one",
    )
    for flag, highest, what in (
        ("--latent-channels", 64, "latent channels"),
        ("--res-blocks", 8, "residual blocks a stage"),
    ):
        train.add_argument(
            flag,
            type=count(1, highest),
            metavar="N",
            help=f"{what} of the VAE; one to go on from is given more; default: as it has",
        )
    train.add_argument(
        "--vae-rate",
        type=quantity(0.001, 10),
        default=1.0,
        metavar="X",
        help="the VAE's learning rate, relative to what suits a new one; less for one to go on from, default: %(default)s",
    )
    train.add_argument(
        "--bf16",
        action="store_true",
        help="VAE and transformer compute in bfloat16: faster where the CPU has AVX-512 BF16 or AMX",
    )
    train.add_argument(
        "--prediction",
        choices=("v_prediction", "epsilon"),
        default="v_prediction",
        help="what the transformer learns to say; epsilon as the paper's model, default: %(default)s",
    )
    _add_world(train)
    train.add_argument("--device", default="cpu", help="cpu or cuda, default: %(default)s")
    train.add_argument(
        "--tensorboard", action="store_true", help="write the loss for TensorBoard into the run's folder"
    )
    train.set_defaults(run=_train)


def _add_eval(subparsers: Any) -> None:
    judge = subparsers.add_parser(
        "eval", help="share of generated clips that are all right by their captions, judged from pixels"
    )
    judge.add_argument("--model", default="tiny", help="tiny or a folder, default: %(default)s")
    judge.add_argument("--transformer", metavar="PATH", help="other weights for it, such as evdit distill's")
    judge.add_argument(
        "--lora", action="append", default=[], metavar="FILE", help="of evdit distill for the model; may be repeated"
    )
    judge.add_argument(
        "--captions", type=count(1, 100_000), default=200, help="held-out captions, default: %(default)s"
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
    _add_world(judge)
    judge.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    judge.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    judge.set_defaults(run=_evaluate)


def _add_read_back(subparsers: Any) -> None:
    back = subparsers.add_parser(
        "read-back",
        help="how well true clips come back that are encoded and decoded: the most that a transformer can reach",
    )
    back.add_argument("--vae", type=Path, metavar="PATH", help="its folder or file; default: the built-in one")
    back.add_argument("--clips", type=count(1, 100_000), default=40, help="default: %(default)s")
    _add_world(back)
    back.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    back.set_defaults(run=_read_back)


def _add_render(subparsers: Any) -> None:
    draw = subparsers.add_parser("render", help="draw a true clip of the world with its caption")
    draw.add_argument("--seed", type=seed_number, default=0, help="default: %(default)s")
    draw.add_argument("--out", default="tinyworld.gif", metavar="FILE", help="default: %(default)s")
    draw.set_defaults(run=_render)


def _add_crossing_render(subparsers: Any) -> None:
    cross = subparsers.add_parser(
        "crossing-render", help="draw true clips of the crossing world, two shapes that pass a bar and each other"
    )
    cross.add_argument("--clips", type=count(1, 1_000_000), default=8, help="default: %(default)s")
    cross.add_argument("--seed", type=seed_number, default=0, help="default: %(default)s")
    cross.add_argument(
        "--out",
        type=Path,
        default=Path("crossing"),
        metavar="FOLDER",
        help="for the clips, each with its caption in a .txt file beside it; default: %(default)s",
    )
    cross.set_defaults(run=_render_crossing)


def _add_crossing_bounds(subparsers: Any) -> None:
    bounds = subparsers.add_parser(
        "crossing-bounds", help="what the judge of the crossing world says of true clips, blurred ones and those of other captions"
    )  # fmt: skip
    bounds.add_argument("--clips", type=count(2, 100_000), default=100, help="default: %(default)s")
    bounds.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    bounds.set_defaults(run=_bound_crossing)


def _add_world(command: argparse.ArgumentParser) -> None:
    """The names of ``worlds.WORLDS``, which takes torch to import."""
    command.add_argument(
        "--world",
        choices=("moving", "crossing"),
        default="moving",
        help="moving: one shape over a plain ground; crossing: two behind a bar, default: %(default)s",
    )


def _train(args: argparse.Namespace) -> int:
    from ..commands import INTERRUPTED, say
    from ..commands.bench.device import device_named
    from .train.recipe import TinyRecipe
    from .worlds import WORLDS

    recipe = TinyRecipe(
        args.run_folder, args.out, world=WORLDS[args.world], parts=tuple(args.parts), vae_steps=args.vae_steps,
        decoder_steps=args.decoder_steps, dit_steps=args.dit_steps, clips=args.clips, batch=args.batch, seed=args.seed,
        start=args.start, start_vae=args.start_vae, latent_channels=args.latent_channels, res_blocks=args.res_blocks,
        vae_rate=args.vae_rate, bf16=args.bf16, prediction=args.prediction,
        device=str(device_named(args.device)), tensorboard=args.tensorboard,
    )  # fmt: skip
    try:
        recipe.train()
    except KeyboardInterrupt:
        say(f"interrupted; the same command goes on from {args.run_folder}")
        return INTERRUPTED
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..commands.generate import load_plan
    from ..pipeline import Pipeline
    from .evaluate import evaluate
    from .worlds import WORLDS

    _check_file(args.json)
    world = WORLDS[args.world]
    plan = load_plan(args.plan, world.latent_frames)
    pipeline = Pipeline.from_model(args.model, transformer=args.transformer, loras=args.lora, device=args.device)
    with tqdm(total=args.captions, desc="captions") as bar:

        def progress(done: int, _: int) -> None:
            bar.update(done - bar.n)

        figures = evaluate(pipeline, captions=args.captions, steps=args.steps, guidance=args.guidance, sampler=args.sampler, plan=plan,
                           world=world, progress=progress)  # fmt: skip
    _tell(figures, args.json)
    return 0


def _check_file(file: Path | None) -> None:
    """Raises before the work where the figures could not be written."""
    from ..storage.files import check_writable_file

    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        check_writable_file(file)


def _tell(figures: dict[str, Any], file: Path | None) -> None:
    """The figures and the command that gave them, for a person and in ``file``."""
    from ..commands import say
    from ..storage.files import write_text

    text = json.dumps({"command": command_line(), **figures}, indent=2)
    if file:
        write_text(file, text + "\n")
    say(text)


def _render(args: argparse.Namespace) -> int:
    import numpy as np

    from ..commands import say
    from ..media.video import check_writable, write_video
    from .moving.scene import random_scene, render

    scene = random_scene(np.random.default_rng(args.seed))
    write_video(
        check_writable(args.out), render(scene), fps=24, metadata={"prompt": scene.caption(), "seed": args.seed}
    )
    say(f"{args.out}: {scene.caption()}")
    return 0


def _render_crossing(args: argparse.Namespace) -> int:
    import numpy as np

    from ..commands import say
    from ..media.video import check_writable, write_video
    from ..storage.files import write_text
    from .crossing.scene import random_scene, render

    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    for number in range(args.clips):
        scene = random_scene(rng)
        file, caption = args.out / f"{number:05d}.mp4", scene.caption(number)
        write_video(check_writable(file), render(scene), fps=24, metadata={"prompt": caption, "seed": args.seed})
        write_text(file.with_suffix(".txt"), caption + "\n")
        say(f"{file}: {caption}")
    return 0


def _read_back(args: argparse.Namespace) -> int:
    import torch

    from ..assets import tiny_path
    from ..bench.machine import describe_machine
    from ..models.opensora_plan.checkpoint import load_vae
    from .train.vae import read_back
    from .worlds import WORLDS

    _check_file(args.json)
    vae = load_vae(args.vae or tiny_path("vae", "tiny"), dtype=torch.float32)
    machine = describe_machine(torch.device("cpu"))
    _tell({"machine": machine, "world": args.world, **read_back(vae, WORLDS[args.world], args.clips)}, args.json)
    return 0


def _bound_crossing(args: argparse.Namespace) -> int:
    from .crossing.bounds import bounds

    _check_file(args.json)
    _tell(bounds(args.clips), args.json)
    return 0
