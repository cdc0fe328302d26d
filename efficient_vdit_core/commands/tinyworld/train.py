"""evdit tinyworld train: the tiny models, or further ones from them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import INTERRUPTED, say
from ..arguments import count, quantity, seed_number
from ..bench.device import device_named
from .world import add_world

PARTS = ("text_encoder", "vae", "transformer")


def add(commands: Any) -> None:
    train = commands.add_parser("train", help="train the tiny models; run it again to go on where it stopped")
    train.add_argument(
        "--run", dest="run_folder", type=Path, default=Path("runs/tiny"), help="the run's state, default: %(default)s"
    )
    train.add_argument(
        "--out", type=Path, default=Path("runs/tiny/model"), help="folder for the model, default: %(default)s"
    )
    train.add_argument(
        "--parts",
        nargs="+",
        default=PARTS,
        choices=(*PARTS, "decoder"),
        help="decoder: that of the VAE in --out, further, so that transformers of its latents stay; default: the other three",
    )
    _add_lengths(train)
    _add_start(train)
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
    train.add_argument(
        "--short-first",
        action="store_true",
        help="the transformer learns the first quarter of clips for half of its steps, then half clips, then whole ones: for long clips",
    )
    add_world(train)
    train.add_argument("--device", default="cpu", help="cpu or cuda, default: %(default)s")
    train.add_argument(
        "--tensorboard", action="store_true", help="write the loss for TensorBoard into the run's folder"
    )


def _add_lengths(train: argparse.ArgumentParser) -> None:
    """How long each part is trained, and of what."""
    for part, steps in (("decoder", 9000), ("vae", 9000), ("dit", 8000)):
        train.add_argument(f"--{part}-steps", type=count(1, 10_000_000), default=steps, help="default: %(default)s")
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


def _add_start(train: argparse.ArgumentParser) -> None:
    """What is gone on from, and what it is given more of."""
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


def run(args: argparse.Namespace) -> int:
    from ...tinyworld.train.recipe import TinyRecipe
    from ...tinyworld.worlds import WORLDS

    recipe = TinyRecipe(
        args.run_folder, args.out, world=WORLDS[args.world], parts=tuple(args.parts), vae_steps=args.vae_steps,
        decoder_steps=args.decoder_steps, dit_steps=args.dit_steps, clips=args.clips, batch=args.batch, seed=args.seed,
        start=args.start, start_vae=args.start_vae, latent_channels=args.latent_channels, res_blocks=args.res_blocks,
        vae_rate=args.vae_rate, bf16=args.bf16, prediction=args.prediction, short_first=args.short_first,
        device=str(device_named(args.device)), tensorboard=args.tensorboard,
    )  # fmt: skip
    try:
        recipe.train()
    except KeyboardInterrupt:
        say(f"interrupted; the same command goes on from {args.run_folder}")
        return INTERRUPTED
    return 0
