"""evdit convert: upstream weights into safetensors, a LoRA into the weights it is for, results into ComfyUI's names, a
plan into ComfyUI's own choice of attention."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..limits.numbers import number
from ..limits.quote import quoted
from . import say
from .arguments import refuse_unheard

_SETTINGS = ("tau", "below", "int8")  # of an attention config
_PARTS_OF = {name: ("lora",) for name in ("lora", "expert", "strength")} | {name: ("attention",) for name in _SETTINGS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command's options."""
    parser.add_argument(
        "part", choices=("vae", "text-encoder", "lora", "comfyui", "attention"), help="what the file holds"
    )
    parser.add_argument(
        "source",
        metavar="IN",
        help="checkpoint.ckpt of the VAE, the folder of mT5, the folder of the model that --lora is merged into, or for comfyui "
        "whole weights of Wan or CogVideoX that were distilled; for attention a plan of MiniMax-H3",
    )
    parser.add_argument("target", metavar="OUT", help="the .safetensors file to write, none of those that are read")
    parser.add_argument("--lora", metavar="FILE", help="with lora: a published LoRA for Wan, CogVideoX or MiniMax-H3")
    parser.add_argument("--expert", choices=("high", "low"), help="with lora: which of Wan 2.2's two networks")
    parser.add_argument("--strength", type=float, help="of the LoRA, -10 to 10, default: 1.0")
    attention = parser.add_argument_group(
        "with attention: a LoRA that tells ComfyUI itself which layers attend sparsely"
    )
    attention.add_argument("--tau", type=float, help="of its sparse method, default: 1.0")
    attention.add_argument(
        "--below", type=float, metavar="SHARE",
        help="layers that compute a smaller share of their tiles under the plan are sparse, default: all that are not full",
    )  # fmt: skip
    attention.add_argument("--int8", action="store_true", default=None, help="the other layers attend in INT8")


def run(args: argparse.Namespace) -> int:
    """Converts one file."""
    refuse_unheard(args, _PARTS_OF, args.part, "convert")
    from ..models.opensora_plan import convert

    target = convert.check_target(args.target)
    for source in filter(None, (args.source, args.lora)):
        _check_apart(Path(source), target)
    if args.part == "lora":
        return _merge(args)
    if args.part == "comfyui":
        return _rename(args)
    if args.part == "attention":
        return _attention(args)
    convert_part = convert.convert_vae if args.part == "vae" else convert.convert_text_encoder
    convert_part(args.source, args.target)
    say(f"wrote {args.target}")
    return 0


def _check_apart(source: Path, target: Path) -> None:
    """Raises ValueError where the target is the source, a shard of it, or there already in the folder that is read: what was
    made from it would take its place."""
    from ..storage.weight_files import files_of

    read = files_of(source) if source.is_file() else {source}
    # A link is written through: what it leads to counts as well as the place where it lies.
    written = Path(os.path.realpath(target)), Path(os.path.realpath(target.parent)) / target.name
    if target.exists() and any(w.is_relative_to(os.path.realpath(r)) for w in written for r in read):
        raise ValueError(
            f"The target {quoted(str(target), 120)} is among the files of {quoted(str(source), 120)}, which are read, and would be "
            "written over. Choose another name."
        )


def _rename(args: argparse.Namespace) -> int:
    from ..distill.lora.comfy_names import convert_weights

    say(f"renamed {convert_weights(args.source, args.target)} tensors")
    say(f"wrote {args.target}")
    return 0


def _attention(args: argparse.Namespace) -> int:
    from ..distill.lora.attention_config import write_attention_config
    from ..plan import TilePlan

    plan = TilePlan.load(args.source)
    given = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    sparse, layers = write_attention_config(plan, args.target, **given)
    say(f"{sparse} of {layers} layers attend sparsely")
    say(f"wrote {args.target}")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from ..distill.families.published_lora import merge_published

    if not args.lora:
        raise ValueError("Of what is to be merged --lora is missing. Name the LoRA's .safetensors file.")
    strength = number(1.0 if args.strength is None else args.strength, "--strength", -10, 10)
    say(f"reading {args.source}")
    say(f"changed {merge_published(args.source, args.lora, args.target, strength, args.expert or '')} tensors")
    say(f"wrote {args.target}")
    return 0
