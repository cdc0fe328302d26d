"""evdit distill: stage 1 (consistency: few steps) or stage 3 (knowledge: few tiles) of Efficient-vDiT, or score
distillation, which sharpens a few-step model and needs no clips.

Run it again to go on where it stopped. SIGTERM and Ctrl-C save first. For several GPUs or machines, start it with
`accelerate launch --multi_gpu -m efficient_vdit_core distill ...`; where weights, gradients and optimiser do not
fit into each GPU, share them out with `--use_fsdp --fsdp_version 2` in place of `--multi_gpu`. Where one clip's activations do not
fit, training.sequence_parallel shares out its frames.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..limits.quote import named, quoted
from . import INTERRUPTED, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command's options."""
    add = parser.add_argument
    add(
        "method",
        choices=("consistency", "knowledge", "score"),
        help="consistency: fewer steps; knowledge: restore what a tile plan cost; score: consistency with distribution matching",
    )
    add("--config", type=Path, metavar="FILE", help="settings in TOML: [model], [data], [objective], [training]")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides",
        help="one setting, over the file's; VALUE as in TOML, quotes may be left out; may be repeated")  # fmt: skip
    add("--out", type=Path, required=True, metavar="FOLDER", help="the run's folder: state, cache and result")


def run(args: argparse.Namespace) -> int:
    """Reads the settings, trains, exports."""
    from ..distill.config import DistillConfig, read_toml
    from ..distill.runs.trainer import distill

    values = read_toml(args.config) if args.config else {}
    if values.setdefault("method", args.method) != args.method:
        raise ValueError(
            f"{named(args.config.name)} is for method {quoted(values['method'])}, but {args.method!r} was asked for."
        )
    for text in args.overrides:
        override(values, text)
    try:
        result = distill(DistillConfig.from_dict(values), args.out)
    except KeyboardInterrupt:
        say(f"interrupted; the same command goes on from {args.out}")
        return INTERRUPTED
    say(f"wrote {result}")
    return 0


def override(values: dict[str, Any], text: str) -> None:
    """Puts ``section.key=value`` into settings."""
    key, equals, value = text.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and name):
        raise ValueError(f"--set {quoted(text)} cannot be read, expected SECTION.KEY=VALUE such as training.steps=500.")
    table = values.setdefault(section, {})
    if not isinstance(table, dict):
        raise ValueError(
            f"--set {quoted(text)} names {quoted(section)}, which is {quoted(table)} and no section of settings. Correct its name."
        )
    table[name] = _value(value.strip())


def _value(text: str) -> Any:
    """A TOML value; what is none is taken as a string."""
    from ..limits.documents import parse_toml

    try:
        return parse_toml(f"value = {text}\n", "The value")["value"]
    except (ValueError, KeyError):
        return text
