"""Reads the sound of a clip, as long as its pictures last."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from .limits.quote import quoted
from .read_video import ffmpeg, said
from .video import has_ffmpeg, install

CHANNELS = 2
_RATE = re.compile(r"Video: [^\n]*?, (\d+(?:\.\d+)?) fps\b")


def read_sound(path: str | Path, seconds: float, rate: int, fps: float) -> np.ndarray | None:
    """float32 (2, seconds * rate) of a file's first ``seconds``, in stereo and with silence behind its end; None where it
    has no sound.

    Raises ValueError where the sound cannot be read, or where the pictures come at another rate than ``fps``, so that the
    two would part.
    """
    name = quoted(str(path), 120)
    if not has_ffmpeg():
        raise ValueError(
            f"Reading sound needs the package 'imageio-ffmpeg', which is missing. {install('imageio_ffmpeg')}"
        )
    source = ["-nostdin", "-i", f"file:{path}"]
    about = _told(["-hide_banner", *source])
    found = _RATE.search(about)
    if found and abs(float(found[1]) - fps) > 0.01 * fps:
        raise ValueError(
            f"{name} has {found[1]} frames a second, expected {fps:g} as the model knows them. Convert it."
        )
    if "Audio:" not in about:
        return None
    wanted = ["-map", "0:a:0", "-t", str(seconds), "-ac", str(CHANNELS), "-ar", str(rate), "-f", "f32le", "-"]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as complaints:
        with ffmpeg(["-v", "error", "-xerror", *source, *wanted], out, complaints) as process:
            status = process.wait()
        if status or said(complaints):
            raise ValueError(f"{name} holds sound that cannot be read. It is damaged, or half written; make it again.")
        out.seek(0)
        samples = np.frombuffer(out.read(), np.float32).reshape(-1, CHANNELS).T
    length = round(seconds * rate)
    return np.pad(samples[:, :length], ((0, 0), (0, max(0, length - samples.shape[1]))))


def _told(arguments: list[str]) -> str:
    """What ffmpeg says of a file when it is asked for nothing else."""
    with tempfile.TemporaryFile() as answer:
        with ffmpeg(arguments, subprocess.DEVNULL, answer) as process:
            process.wait()
        return said(answer)
