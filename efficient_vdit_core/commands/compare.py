"""evdit compare: how near two clips of the same seed are to each other, such as sparse attention and dense.

mp4 adds the losses of H.264 to what is measured; webp as `evdit generate` writes it is lossless.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..limits.quote import quoted
from ..media.registry import check_reads_videos
from ..storage.files import check_writable_file, write_bytes, write_text
from ..storage.json_text import json_text
from . import say

if TYPE_CHECKING:
    from torch import Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command's options."""
    parser.add_argument("a", metavar="A", help="the clip to compare with: dense (.mp4, .gif, .webp, or another video)")
    parser.add_argument("b", metavar="B", help="the clip that is compared: sparse, of the same size, length and seed")
    parser.add_argument("--json", metavar="FILE", help="write the metrics, also those of each frame")
    parser.add_argument(
        "--picture", metavar="FILE", help="write frames, their difference and a curve of the PSNR (.png)"
    )
    parser.add_argument("--no-lpips", action="store_true", help="leave LPIPS out even where its package is installed")


def run(args: argparse.Namespace) -> int:
    """Compares and prints."""
    check_reads_videos("Use ComfyUI's node Compare Videos, or a clone.")
    _check_target("--json", args.json, ".json")
    _check_target("--picture", args.picture, ".png")
    from ..quality import compare_clips, comparison_picture, metrics_table
    from ..quality.picture import shown_frames

    _warn_of_other_settings(args.a, args.b)
    a, b = _File(args.a), _File(args.b)
    comparison = compare_clips(a, b, lpips=not args.no_lpips)
    say(f"a: {args.a}\nb: {args.b}")
    say(metrics_table(comparison))
    if args.json:
        values = {"a": args.a, "b": args.b, **comparison.to_dict()}
        write_text(args.json, json_text(values, indent=2))
        say(f"wrote {args.json}")
    if args.picture:
        names = Path(args.a).stem, Path(args.b).stem
        shown = shown_frames(comparison.frames)
        picture = comparison_picture(
            a.chosen(shown), b.chosen(shown), comparison, names=names if names[0] != names[1] else ("a", "b")
        )
        _write_png(args.picture, (picture * 255).round().byte().numpy())
        say(f"wrote {args.picture}")
    return 0


class _File:
    """A clip whose frames are read from its file each time they are asked for; memory is that of a few frames."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Tensor]:
        import torch

        from ..media.read_video import iterate_video

        return (torch.from_numpy(frame.copy()) for frame in iterate_video(self.path))

    def chosen(self, numbers: Collection[int]) -> dict[int, Tensor]:
        """Some frames by their number."""
        return {i: frame for i, frame in enumerate(self) if i in numbers}


def _write_png(path: str, pixels: Any) -> None:
    import io

    from PIL import Image

    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "png")
    write_bytes(path, png.getvalue())


def _check_target(option: str, path: str | None, suffix: str) -> None:
    """ValueError before the work where the file cannot be written."""
    if path is None:
        return
    if Path(path).suffix.lower() != suffix:
        raise ValueError(f"{option} is {quoted(path, 120)}, expected a name that ends in {suffix}.")
    check_writable_file(path)


def _warn_of_other_settings(a: str, b: str) -> None:
    """Paired metrics of clips with another seed or prompt compare two videos, not two methods."""
    import logging

    first, second = _metadata(a), _metadata(b)
    for name in ("seed", "prompt", "model"):
        if name in first and name in second and first[name] != second[name]:
            logging.getLogger(__name__).warning(
                "The clips were made with %s %s and %s, so the numbers compare two videos and not two methods.",
                name,
                quoted(first[name]),
                quoted(second[name]),
            )


def _metadata(path: str) -> dict[str, Any]:
    from ..media.video import read_metadata

    try:
        return read_metadata(path)
    except ValueError:
        return {}  # a clip of another program says nothing about its making
