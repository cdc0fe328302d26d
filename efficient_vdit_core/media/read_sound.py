"""Reads the sound of a clip, as long as its pictures last."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from ..limits.quote import quoted
from .ffmpeg import ended_when_stuck, input_arguments, start_ffmpeg, told_rates, told_streams, words_in
from .pyav_video import is_steady
from .video import has_ffmpeg, install

CHANNELS = 2


def read_sound(path: str | Path, seconds: float, rate: int, fps: float) -> np.ndarray | None:
    """float32 (2, seconds * rate) of a file's first ``seconds``, in stereo and with silence behind its end; None where it
    has no sound.

    Raises ValueError where the sound cannot be read, or where the pictures come at another rate than ``fps``, or at none that
    is told and constant, so that the two would part; 0 takes any.
    """
    name = quoted(str(path), 120)
    if not has_ffmpeg():
        raise ValueError(
            f"Reading sound needs the package 'imageio-ffmpeg', which is missing. {install('imageio_ffmpeg')}"
        )
    streams = told_streams(path)
    mean, constant = told_rates(streams)
    if fps and not (is_steady(mean, constant) and abs(mean - fps) <= 0.01 * fps):
        found = f"{mean:g} frames a second" if is_steady(mean, constant) else "a frame rate that is not told, or varies"
        raise ValueError(
            f"{name} has {found}, expected {fps:g} as the model knows them. Set data.fps = {fps:g}, or convert it."
        )
    if ": Audio: " not in streams:
        return None
    # Silence stands for what the file has no sound of, before its begin as well: `iterate_video` repeats a first picture that
    # comes later than the file begins.
    filled = "aresample=async=1:first_pts=0"
    wanted = ["-map", "0:a:0", "-af", filled, "-t", str(seconds), "-ac", str(CHANNELS), "-ar", str(rate), "-f", "f32le"]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as complaints:
        strict = ["-v", "error", "-xerror", *input_arguments(path), *wanted, "-"]
        with (
            start_ffmpeg(strict, out, complaints) as process,
            ended_when_stuck(process, lambda: os.fstat(out.fileno()).st_size),
        ):
            status = process.wait()
        if status or words_in(complaints):
            raise ValueError(f"{name} holds sound that cannot be read. It is damaged, or half written; make it again.")
        out.seek(0)
        samples = np.frombuffer(out.read(), np.float32).reshape(-1, CHANNELS).T
    length = round(seconds * rate)
    return np.pad(samples[:, :length], ((0, 0), (0, max(0, length - samples.shape[1]))))
