"""Reads the frames of a clip."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .video import INSTALL_ENGINE

_STILLS = (".gif", ".webp", ".png", ".apng")


def read_video(path: str | Path) -> np.ndarray:
    """All frames, uint8 (F, H, W, 3), RGB: animations (gif, webp, apng) with Pillow, everything else with ffmpeg.

    Raises ValueError where the file is missing or is no video.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r}; check the path.")
    try:
        frames = _read_animation(path) if path.suffix.lower() in _STILLS else _read_stream(path)
    except ImportError as error:
        raise ValueError(f"Reading {path.suffix} needs the package {error.name!r}, which is missing. {INSTALL_ENGINE}") from error
    except (OSError, ValueError, RuntimeError, SyntaxError) as error:  # Pillow and ffmpeg name a broken file in many ways
        raise ValueError(f"{str(path)!r} cannot be read as a video; it is damaged or of another kind.") from error
    if not frames:
        raise ValueError(f"{str(path)!r} holds no frames; it is damaged or of another kind.")
    return np.stack(frames)


def _read_animation(path: Path) -> list[np.ndarray]:
    """Writers of animations join equal frames into one that lasts longer; here each is as long as the shortest."""
    from PIL import Image, ImageSequence

    with Image.open(path) as image:
        shown = [(np.asarray(frame.convert("RGB")), frame.info.get("duration") or 1) for frame in ImageSequence.Iterator(image)]
    shortest = min((duration for _, duration in shown), default=1)
    return [frame for frame, duration in shown for _ in range(round(duration / shortest))]


def _read_stream(path: Path) -> list[np.ndarray]:
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path), pix_fmt="rgb24")
    try:
        width, height = next(reader)["size"]  # pyright: ignore[reportArgumentType, reportCallIssue]
        return [np.frombuffer(data, np.uint8).reshape(height, width, 3) for data in reader]
    finally:
        reader.close()
