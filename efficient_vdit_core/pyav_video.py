"""mp4 written and streams read by PyAV, the FFmpeg that every ComfyUI brings; used where imageio-ffmpeg is missing."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

CRF = 10  # what imageio-ffmpeg makes of the quality 8


def write_mp4(path: Path, frames: np.ndarray, fps: float, comment: str) -> None:
    """H.264 4:2:0 of frames (F, H, W, 3) uint8. Raises OSError where FFmpeg cannot finish."""
    import av

    _, height, width, _ = frames.shape
    rate = Fraction(fps).limit_denominator(100_000)
    try:
        with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            container.metadata["comment"] = comment
            stream = container.add_stream("libx264", rate=rate, options={"crf": str(CRF)})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    except av.FFmpegError as error:
        raise OSError(f"FFmpeg could not finish the video ({error}); is the disk full?") from error


def read_frames(path: Path) -> list[np.ndarray]:
    """All frames (H, W, 3) uint8 at the container's constant rate: one that lasts longer is repeated.

    Raises ValueError where one is damaged or missing.
    """
    import av

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it has no pictures")
        stream = container.streams.video[0]
        stream.codec_context.options = {"err_detect": "explode"}
        expected, rate = stream.frames, stream.base_rate or stream.average_rate or Fraction(1)
        decoded = [(frame.time or 0.0, _pixels(frame)) for frame in container.decode(stream)]
    if len(decoded) < expected:
        raise ValueError(f"{len(decoded)} of its {expected} frames can be decoded")
    return list(_at_constant_rate(decoded, float(rate)))


def _pixels(frame: Any) -> np.ndarray:
    if frame.is_corrupt:
        raise ValueError(f"its frame at {frame.time} s is damaged")
    return frame.to_ndarray(format="rgb24")


def _at_constant_rate(decoded: list[tuple[float, np.ndarray]], rate: float) -> Iterator[np.ndarray]:
    """``decoded``: (seconds, pixels) in the order of showing."""
    for i, (start, pixels) in enumerate(decoded):
        end = decoded[i + 1][0] if i + 1 < len(decoded) else start + 1 / rate
        for _ in range(max(1, round((end - start) * rate))):
            yield pixels
