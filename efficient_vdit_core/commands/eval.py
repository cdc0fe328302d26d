"""evdit eval: lay clips and their prompts out for VBench's mode custom_input, with instructions in the folder."""

from __future__ import annotations

import argparse
from glob import glob
from pathlib import Path
from typing import Any

from ..limits.documents import parse_json, read_text
from ..limits.quote import quoted
from ..media.registry import check_reads_videos
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
    check_reads_videos()
    from ..quality.vbench import README, write_vbench_layout

    clips = [clip for word in args.clips for clip in _matching(word)]
    prompts = _read_prompts(args.prompts, [Path(clip).name for clip in clips]) if args.prompts else None
    out = write_vbench_layout(clips, args.out, prompts)
    say(f"wrote {out}: {len(clips)} clip{'s' * (len(clips) != 1)}; {out / README} says how VBench scores them")
    return 0


def _matching(word: str) -> list[str]:
    """The files that a word of the command line means: Windows' shells pass a * on as it is."""
    if Path(word).exists():
        return [word]
    return sorted(glob(word)) or [word]


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
