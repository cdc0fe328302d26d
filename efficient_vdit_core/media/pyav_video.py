"""mp4 written and streams read by PyAV, the FFmpeg that every ComfyUI brings; used where imageio-ffmpeg is missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .pyav_log import no_complaints
from .shown import HDR, is_square, square_size, upright, warn_of_hdr

# All that FFmpeg is asked to read: videos, photos, and sound, which is then said to have no pictures. Whatever a file's name,
# FFmpeg would also follow lists of other files, such as ffconcat's, which may name one another without end.
FORMATS = (
    "mov,matroska,avi,mpeg,mpegts,asf,flv,ogg,mxf,gxf,dv,nut,ivf,obu,mjpeg,mpegvideo,m4v,h264,hevc,yuv4mpegpipe,rm,swf,wtv,"
    "jpeg_pipe,png_pipe,bmp_pipe,tiff_pipe,webp_pipe,wav,mp3,flac,aac"
)
UNEVEN = 0.1  # share by which a constant rate may be another than the mean one
CRF = 10  # what imageio-ffmpeg makes of the quality 8
BT709, TV_RANGE = 1, 1  # FFmpeg's numbers of HD's colours and of values from 16 to 235
_TRANSFERS = dict(zip((16, 18), HDR, strict=True))  # by FFmpeg's numbers


def write_mp4(path: Path, frames: np.ndarray, fps: float, comment: str) -> None:
    """H.264 4:2:0 of frames (F, H, W, 3) uint8. Raises OSError where FFmpeg cannot finish."""
    import av

    _, height, width, _ = frames.shape
    rate = Fraction(fps).limit_denominator(100_000)
    try:
        with av.open(f"file:{path}", "w", format="mp4", options={"movflags": "+faststart"}) as container:
            container.metadata["comment"] = comment
            stream = container.add_stream("libx264", rate=rate, options={"crf": str(CRF)})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            codec = stream.codec_context
            codec.colorspace = codec.color_primaries = codec.color_trc = BT709  # or players guess by the height
            codec.color_range = TV_RANGE
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                picture = picture.reformat(format="yuv420p", dst_colorspace="itu709")
                picture.colorspace, picture.color_range = BT709, TV_RANGE
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
    except av.FFmpegError as error:
        raise OSError(f"FFmpeg could not finish the video ({error}); is the disk full?") from error


def times_shown(start: float, end: float, fps: float) -> int:
    """How often a frame that lasts from ``start`` to ``end`` in seconds comes at ``fps``, as ffmpeg's filter of that name rounds."""
    return math.floor(end * fps + 0.5) - math.floor(start * fps + 0.5)


def is_steady(mean: float, constant: float) -> bool:
    """Whether frames that come ``mean`` times a second, 0 where that is not told, are hardly repeated at a ``constant`` rate."""
    return 0 < mean and abs(constant - mean) <= UNEVEN * mean


def frame_rates(mean: float, constant: float) -> tuple[float, float]:
    """Both rates of the frames, where the constant one may count fields, two in a frame, as MPEG's does."""
    return mean, constant / 2 if is_steady(2 * mean, constant) else constant


def read_rates(path: Path) -> tuple[float, float]:
    """Mean and constant frames a second as the container tells them; 0 where it does not."""
    import av

    with av.open(f"file:{path}", options={"format_whitelist": FORMATS}) as container:
        return _rates(container.streams.video[0])


def _rates(stream: Any) -> tuple[float, float]:
    return frame_rates(float(stream.average_rate or 0), float(stream.base_rate or 0))


def read_frames(path: Path, check: Callable[[int, int, int], None], fps: float = 0.0) -> Iterator[np.ndarray]:
    """The frames (H, W, 3) uint8 one by one, at ``fps`` or the container's constant rate: one that lasts longer is repeated.

    ``check`` is told width, height and number of frames before any is decoded, and refuses by raising. Raises ValueError
    where one is damaged or missing.
    """
    import av

    with no_complaints():
        opened = av.open(f"file:{path}", options={"format_whitelist": FORMATS})
    with opened as container:
        if not container.streams.video:
            raise ValueError("it has no pictures")
        stream = container.streams.video[0]
        codec = stream.codec_context
        codec.options = {"err_detect": "explode"}
        codec.thread_count = 1  # of another thread no complaint is heard, and it would wait for Python's lock
        rate = next(filter(None, reversed(_rates(stream))), 1.0)  # the constant one, where it is told
        aspect = float(stream.sample_aspect_ratio or 1)
        check(*square_size(codec.width, codec.height, aspect), stream.frames)
        if codec.color_trc in _TRANSFERS:
            warn_of_hdr(str(path), _TRANSFERS[codec.color_trc])
        begin = (container.start_time or 0) / av.time_base
        held, start, end = None, 0.0, 0.0
        for frame, time in _decoded(container, stream):
            if time is None and fps:
                raise ValueError("it does not tell when its frames are shown")
            pixels, now = _pixels(frame, aspect), 0.0 if time is None else time - begin
            if held is not None:  # how long it lasts, the next one tells
                yield from [held] * (times_shown(start, now, fps) if fps else max(1, round((now - start) * rate)))
            held, start = pixels, min(0.0, now) if held is None else now  # a first one that comes late is shown before
            lasts = getattr(frame, "duration", 0)  # from PyAV 15 on
            end = now + (float(lasts * frame.time_base) if lasts and time is not None else 1 / rate)
        if held is not None:
            yield from [held] * (times_shown(start, end, fps) if fps else max(1, round((end - start) * rate)))


def _decoded(container: Any, stream: Any) -> Iterator[tuple[Any, float | None]]:
    """All frames that are to be shown, and when each is, in seconds, where that is told. A clip that was cut without coding it
    anew still holds the frames before its begin, on which others build, and counts them."""
    if container.format.name == "avi":
        yield from _decoded_by_place(container, stream)
        return
    count = hidden = 0
    for packet, frames in _packets(container, stream):
        hidden += packet.is_discard
        count += len(frames)
        yield from ((frame, frame.time) for frame in frames)
    if count < stream.frames - hidden:
        raise ValueError(f"{count} of its {stream.frames - hidden} frames can be decoded")


def _decoded_by_place(container: Any, stream: Any) -> Iterator[tuple[Any, float]]:
    """The same of an AVI, which knows no times: each picture lasts until the place of the next that is not empty. Those that
    others build on are stored before them, so times that are made of a packet's place do not rise."""
    places: list[int] = []
    count = 0
    for packet, frames in _packets(container, stream):
        places += [packet.dts] if packet.size else []
        for frame in frames:
            yield frame, float(places[min(count, len(places) - 1)] * stream.time_base)
            count += 1
    longest = max((later - place for place, later in pairwise(places)), default=1)
    if not places or places[-1] + longest < stream.frames:
        raise ValueError(f"its pictures end at the place {places[-1] + 1 if places else 0} of {stream.frames}")
    if count < len(places):
        raise ValueError(f"{count} of its {len(places)} frames can be decoded")


def _packets(container: Any, stream: Any) -> Iterator[tuple[Any, list[Any]]]:
    """What the file holds of the stream, piece by piece, and the frames that each completes."""
    packets = container.demux(stream)
    while True:
        with no_complaints():
            packet = next(packets, None)
            frames = [] if packet is None else packet.decode()
        if packet is None:
            return
        yield packet, frames


def _pixels(frame: Any, aspect: float) -> np.ndarray:
    if frame.is_corrupt:
        raise ValueError(f"its frame at {frame.time} s is damaged")
    width, height = square_size(frame.width, frame.height, aspect)
    # Before its version 17, PyAV takes a frame for BT.601 unless told what it says itself, and that something else is wanted.
    way = {"src_colorspace": frame.colorspace, "dst_colorspace": "itu601", "src_color_range": frame.color_range}
    if not is_square(aspect):
        way["interpolation"] = "BICUBIC"  # as ffmpeg does
    pixels = frame.to_ndarray(format="rgb24", width=width, height=height, **way)
    return np.ascontiguousarray(upright(pixels, _display_matrix(frame)))


def _display_matrix(frame: Any) -> Sequence[float]:
    """Of 9 numbers, as FFmpeg's, whatever their unit."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV tells of none where it does not know one of a frame's side data, such as a photo's EXIF
        angle = math.radians(frame.rotation)
        a, b = math.cos(angle), math.sin(angle)
        return a, -b, 0, b, a, 0, 0, 0, 1
    return (1, 0, 0, 0, 1, 0, 0, 0, 1) if matrix is None else np.frombuffer(matrix, np.int32).tolist()
