"""evdit convert: upstream weights into safetensors."""

from __future__ import annotations

import argparse

from . import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command's options."""
    parser.add_argument("part", choices=("vae", "text-encoder"), help="what the file holds")
    parser.add_argument("source", metavar="IN", help="checkpoint.ckpt of the VAE, or the folder of mT5")
    parser.add_argument("target", metavar="OUT", help="the .safetensors file to write")


def run(args: argparse.Namespace) -> int:
    """Converts one file."""
    from ..models.opensora_plan import convert

    convert_part = convert.convert_vae if args.part == "vae" else convert.convert_text_encoder
    convert_part(args.source, args.target)
    say(f"wrote {args.target}")
    return 0
