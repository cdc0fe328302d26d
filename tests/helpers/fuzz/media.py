"""Clips: cut, bruised, of impossible sizes and durations, with comments of others."""

import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from efficient_vdit_core.media.read_video import iterate_video
from efficient_vdit_core.media.video import read_metadata, write_video

from . import odd
from .command import Call, evdit

Random = random.Random


@cache
def clips() -> dict[str, bytes]:
    """Whole small clips of each format, moving and still."""
    found, noise = {}, np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".mp4", ".gif", ".webp"):
            for name, frames in (("moving", noise), ("still", noise[[0, 0, 0]])):
                path = write_video(Path(folder) / f"{name}{suffix}", frames, fps=8, metadata={"prompt": "x"})
                found[path.name] = path.read_bytes()
    return found


def media(rng: Random, folder: Path) -> Call:
    """Clips: cut, bruised, of impossible sizes and durations, with comments of others."""
    name = rng.choice(list(clips()))
    file, data = folder / name, clips()[name]
    way = rng.random()
    if way < 0.5:
        data = odd.bruise(rng, data)
    elif way < 0.7:
        file, data = folder / "a.gif", gif(rng)
    elif way < 0.85:
        file, data = folder / f"a{rng.choice(['.webp', '.gif'])}", b""
        animation(rng, file)
    else:
        file = folder / f"a{rng.choice(['.mp4', '.gif', '.webp', '.mkv', '.png', '.txt', ''])}"
    if data:
        file.write_bytes(data)
    other = folder / f"other{Path(name).suffix}"
    other.write_bytes(clips()[name])
    read = lambda: sum(1 for _ in iterate_video(file))  # noqa: E731
    layout = evdit("eval", "vbench-layout", str(file), "--out", str(folder / "out"))
    compare = evdit("compare", str(file), str(other), "--no-lpips")
    return rng.choice([read, lambda: read_metadata(file), layout, compare])


def gif(rng: Random) -> bytes:
    """A screen of any size, a comment of any kind, and one small picture."""
    sides = b"".join(rng.choice([1, 48, 6000, 15_000, 65_535]).to_bytes(2, "little") for _ in range(2))
    comment = rng.choice(
        [b"[" * 100_000, b"{}", b'{"fps": 0, "frames": 1e400}', b"\xff\xfe", b'{"fps": 24, "frames": 9999}', b""]
    )
    blocks = b"".join(bytes([len(comment[i : i + 255])]) + comment[i : i + 255] for i in range(0, len(comment), 255))
    picture = b"\x2c" + bytes(8) + b"\0\2\2\x4c\1\0"
    return (
        b"GIF89a"
        + sides
        + b"\x80\0\0"
        + bytes(6)
        + b"\x21\xfe"
        + blocks
        + b"\0"
        + picture * rng.choice([0, 1, 50])
        + b"\x3b"
    )


def animation(rng: Random, file: Path) -> None:
    """Whole, but with durations and tags of any kind."""
    from PIL import Image

    images = [Image.new("RGB", (16, 16), (i * 50 % 256, 0, 0)) for i in range(3)]
    longest = 2**24 - 1 if file.suffix == ".webp" else 655_350
    durations = [rng.choice([1, 10, 40, 1000, longest]) for _ in images]
    tags = rng.choice([b"garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b'{"prompt": "' + b"x" * 100_000, b""])
    more: dict[str, Any] = {"exif": tags} if file.suffix == ".webp" else {"comment": tags}
    images[0].save(file, save_all=True, append_images=images[1:], duration=durations, **more)
