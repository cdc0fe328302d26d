"""evdit eval: lay clips and their prompts out for VBench's mode custom_input, with instructions in the folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..limits.documents import parse_json, read_text
from ..limits.quote import quoted
from . import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command vbench-layout."""
    commands = parser.add_subparsers(dest="eval_command", required=True, metavar="COMMAND")
    layout = commands.add_parser(
        "vbench-layout", help="a folder of clips and prompts that VBench reads, with instructions"
    )
    layout.add_argument(
        "clips", nargs="+", metavar="CLIP", help="a .mp4, .gif, or .webp of `evdit generate`, which tells its prompt"
    )
    layout.add_argument(
        "--out", required=True, metavar="FOLDER", help="a new folder, one for each method that is compared"
    )
    layout.add_argument(
        "--prompts", metavar="FILE", help='prompts of clips made elsewhere: JSON, {"clip.mp4": "its prompt", ...}'
    )


def run(args: argparse.Namespace) -> int:
    """Writes the folder and says how to go on."""
    from ..quality.vbench import README, write_vbench_layout

    prompts = _read_prompts(args.prompts, [Path(clip).name for clip in args.clips]) if args.prompts else None
    out = write_vbench_layout(args.clips, args.out, prompts)
    say(
        f"wrote {out}: {len(args.clips)} clip{'s' * (len(args.clips) != 1)}; {out / README} says how VBench scores them"
    )
    return 0


def _read_prompts(file: str, clips: list[str]) -> dict[str, str]:
    name = quoted(file)
    prompts: Any = parse_json(read_text(file, f"--prompts {name}"), f"--prompts {name}", advice="Correct the file.")
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise ValueError(f'--prompts {name} must hold one JSON object of texts, {{"clip.mp4": "its prompt", ...}}.')
    unknown = sorted(set(prompts) - set(clips))
    if unknown:
        raise ValueError(
            f"--prompts {name} names {quoted(unknown[0])}, which is not among the clips; use file names without folders."
        )
    return prompts
