"""Reads the frames of a clip: all of them, or an error. A damaged file never passes for a shorter or a greyer clip."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from .pyav_video import read_frames
from .video import PACKAGES, has_ffmpeg, install

_ANIMATIONS = (".gif", ".webp", ".png", ".apng")


def read_video(path: str | Path) -> np.ndarray:
    """All frames, uint8 (F, H, W, 3), RGB: animations (gif, webp, apng) with Pillow, everything else with ffmpeg or PyAV.

    A rate that varies becomes the constant one of the container, frames that last longer are repeated.

    Raises ValueError where the file is missing, damaged, or no video.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r}; check the path.")
    try:
        if path.suffix.lower() in _ANIMATIONS:
            frames = _read_animation(path)
        else:
            frames = _read_stream(path) if has_ffmpeg() else read_frames(path)
    except ImportError as error:
        raise ValueError(
            f"Reading {path.suffix} needs the package {PACKAGES.get(error.name or '', error.name)!r}, which is missing. "
            f"{install(error.name)}"
        ) from error
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # Pillow alone names a broken file in a dozen ways, IndexError among them
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{str(path)!r} cannot be read as a video ({reason[0] if reason else type(error).__name__}). "
            "It is damaged, half written or of another kind; make it again."
        ) from error
    if not frames:
        raise ValueError(
            f"{str(path)!r} holds no frames. It is damaged, half written or of another kind; make it again."
        )
    return np.stack(frames)


def _read_animation(path: Path) -> list[np.ndarray]:
    """Writers of animations join equal frames into one that lasts longer; here each is as long as the shortest."""
    from PIL import Image, ImageSequence

    with Image.open(path) as image:
        shown = [
            (np.asarray(frame.convert("RGB")), frame.info.get("duration") or 1)
            for frame in ImageSequence.Iterator(image)
        ]
    shortest = min((duration for _, duration in shown), default=1)
    return [frame for frame, duration in shown for _ in range(round(duration / shortest))]


def _read_stream(path: Path) -> list[np.ndarray]:
    """ffmpeg hands over PPM pictures, whose headers tell their size; any complaint of its decoder ends the reading."""
    import imageio_ffmpeg

    source = ["-nostdin", "-v", "error", "-xerror", "-i", f"file:{path}", "-map", "0:v:0"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *source, "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"]
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints) as ffmpeg,
    ):
        assert ffmpeg.stdout is not None
        try:
            frames = list(_ppm_pictures(ffmpeg.stdout))
        except BaseException:
            ffmpeg.kill()
            raise
        status = ffmpeg.wait()
        complaints.seek(0)
        text = complaints.read().decode(errors="replace").strip()
    if status or text:
        first = re.sub(r"^\[.*?\] ", "", text).splitlines()[:1] or [
            f"exit status {status}"
        ]  # without "[h264 @ 0x5575c0]"
        raise ValueError(f"ffmpeg: {first[0].rstrip('.')}")
    return frames


def _ppm_pictures(stream: IO[bytes]) -> Iterator[np.ndarray]:
    """Each (H, W, 3) uint8; ends before a picture that is not whole, as ffmpeg's own message then says why."""
    while stream.readline() == b"P6\n":
        width, height = map(int, stream.readline().split())
        stream.readline()  # 255, the value of white
        data = stream.read(width * height * 3)
        if len(data) < width * height * 3:
            return
        yield np.frombuffer(data, np.uint8).reshape(height, width, 3)
