"""Reads the frames of a clip: all of them, or an error. A damaged file never passes for a shorter or a greyer clip.

Sizes are read before pixels, and frames come one by one: a file of a few hundred bytes can stand for terabytes.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..limits.memory import check_memory
from ..limits.quote import quoted, reason
from .ffmpeg import (
    ended_when_stuck,
    input_arguments,
    run_ffmpeg,
    start_ffmpeg,
    stream_lines,
    told_rates,
    told_streams,
    words_in,
)
from .pyav_video import is_steady, read_frames, read_rates, times_shown
from .shown import HDR, SQUARE, is_square, square_size, warn_of_hdr
from .video import ANIMATIONS, MAX_FPS, MIN_FPS, PACKAGES, frame_milliseconds, has_ffmpeg, install, read_metadata

MAX_PIXELS = 2**25  # of a frame: 8K
MAX_FRAMES = 10_000  # of a clip
_MOST_COUNTED = 10**6  # to say how many there are; a few bytes may stand for far more
MAX_CLIP = 2**32  # pixels of all frames: 2,000 of 1080p
_UNTIMED = 100  # milliseconds
_ANIMATION_SUFFIXES = (".gif", ".webp", ".png", ".apng")
_SIZE = re.compile(r"Video: [^\n]*?, (\d{1,6})x(\d{1,6})\b")
_ASPECT = re.compile(r"\bSAR (\d+):(\d+)")
_TRANSFER = re.compile("|".join(HDR))
_COUNT = re.compile(r"(?:^|[\r\n])frame=\s*(\d+)")

Check = Callable[[int, int, int], None]  # told width, height and number of frames, raises TooLarge


class TooLarge(ValueError):
    """A clip beyond the bounds above; its message says which."""


def read_video(path: str | Path) -> np.ndarray:
    """All frames at once, uint8 (F, H, W, 3); see `iterate_video`. ValueError also where they are more than is free."""
    frames: list[np.ndarray] = []
    for frame in iterate_video(path):
        frames.append(frame)
        if len(frames) % 16 == 0:  # they are copied into one array at the end
            size = 2 * len(frames) * frame.nbytes
            check_memory(size, f"{quoted(str(path), 120)} with its frames so far", "Cut it, or make it smaller.")
    return np.stack(frames)


def iterate_video(path: str | Path, fps: float = 0.0, first: int = 0) -> Iterator[np.ndarray]:
    """The frames one by one, uint8 (H, W, 3), RGB: animations (gif, webp, apng) with Pillow, everything else with
    ffmpeg or PyAV.

    A rate that varies becomes ``fps``, by the frames' own times, or without it the constant one of the container: frames that
    last longer are repeated. ``first``: how many are wanted, and no more are given; 0 is all. A stream of which some are wanted
    may be of any length; of an animation all frames are looked at, for how long they last.

    Raises ValueError where the file is missing, damaged, no video, or larger than the bounds above.
    """
    path = Path(path)
    name = quoted(str(path), 120)
    if not path.is_file():
        raise ValueError(f"There is no file {name}; check the path.")
    count, size = 0, None
    try:
        for frame in islice(_frames(path, fps, first), first or None):
            if size is not None and frame.shape != size:
                raise ValueError("its frames differ in size")
            count, size = count + 1, frame.shape
            _check_size(frame.shape[1], frame.shape[0], count)
            yield frame
    except ImportError as error:
        raise ValueError(
            f"Reading {path.suffix} needs the package {PACKAGES.get(error.name or '', error.name)!r}, which is missing. "
            f"{install(error.name)}"
        ) from error
    except TooLarge as error:
        raise ValueError(f"{name} cannot be read: {error} Cut it, or make it smaller.") from None
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # Pillow alone names a broken file in a dozen ways, IndexError among them
        said = reason(error) if isinstance(error, OSError | ValueError) else "its pictures are cut short"
        raise ValueError(
            f"{name} cannot be read as a video ({said}). It is damaged, half written or of another kind; make it again."
        ) from error
    if not count:
        raise ValueError(f"{name} holds no frames. It is damaged, half written or of another kind; make it again.")


def check_steady(path: Path) -> None:
    """Raises ValueError where the constant rate of the container is not that of the frames: what a browser records counts
    thousandths of a second, and each frame would come dozens of times. An animation says how long each lasts."""
    if path.suffix.lower() in _ANIMATION_SUFFIXES:
        return
    mean, constant = told_rates(told_streams(path)) if has_ffmpeg() else read_rates(path)
    if not is_steady(mean, constant):
        raise ValueError("its frame rate is not told, or varies. Set data.fps to the model's, or convert it")


def _frames(path: Path, fps: float, first: int) -> Iterator[np.ndarray]:
    """Where some ``first`` frames are wanted, only so many are held against the bounds."""

    def check(width: int, height: int, frames: int) -> None:
        _check_size(width, height, min(frames, first or frames))

    if path.suffix.lower() in _ANIMATION_SUFFIXES:
        return _animation(path, fps, check)
    return _stream(path, fps, check, first) if has_ffmpeg() else read_frames(path, check, fps)


def _check_size(width: int, height: int, frames: int) -> None:
    if width * height > MAX_PIXELS:
        raise TooLarge(f"its frames are {width}x{height}, at most {MAX_PIXELS:,} pixels are read.")
    if frames > MAX_FRAMES:
        raise TooLarge(f"it has {frames:,} frames at its constant rate, at most {MAX_FRAMES:,} are read.")
    if frames * width * height > MAX_CLIP:
        raise TooLarge(f"it has {frames:,} frames of {width}x{height}, at most {MAX_CLIP:,} pixels are read in all.")


def _animation(path: Path, fps: float, check: Check) -> Iterator[np.ndarray]:
    """Writers of animations join equal frames into one that lasts longer; here each is as long as the file's own rate
    says, or the shortest, or as it takes at ``fps``."""
    from PIL import Image, ImageSequence

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound here is lower
        try:
            image: Any = Image.open(path, formats=ANIMATIONS)
        except Image.DecompressionBombError:
            raise TooLarge(f"its frames have more than {MAX_PIXELS:,} pixels.") from None
    with image:
        _check_size(image.width, image.height, getattr(image, "n_frames", 1))
        durations = [_duration(frame) for frame in ImageSequence.Iterator(image)]
        own_unit, own_count = _own_words(path)
        unit = own_unit or min(durations)
        repeats = [max(1, round(duration / unit)) for duration in durations]
        if len(repeats) == 1:
            repeats = [own_count or repeats[0]]
        if fps:
            ends = [unit / 1000 * end for end in accumulate(repeats, initial=0)]
            repeats = [times_shown(*times, fps) for times in pairwise(ends)]
        check(image.width, image.height, sum(repeats))
        for frame, repeat in zip(ImageSequence.Iterator(image), repeats, strict=True):
            pixels = np.asarray(frame.convert("RGB"))
            for _ in range(repeat):
                yield pixels


def _duration(frame: Any) -> int:
    """In milliseconds, at least 1; a webp tells it once the frame is decoded. One of no time lasts as long as browsers show it,
    or each of its neighbours would count as a hundred frames."""
    frame.load()
    return max(1, int(frame.info.get("duration") or _UNTIMED))


def _own_words(path: Path) -> tuple[int, int]:
    """Milliseconds of a frame and number of frames where `write_video` wrote the file, else 0: nothing else tells how
    many equal frames a clip has that stands still."""
    try:
        metadata = read_metadata(path)
    except ValueError:
        return 0, 0
    fps, count = _within(metadata.get("fps"), MIN_FPS, MAX_FPS), _within(metadata.get("frames"), 1, MAX_FRAMES)
    return frame_milliseconds(path.suffix.lower(), fps) if fps else 0, int(count)


def _within(value: Any, low: float, high: float) -> float:
    """A number that stands in a file, or 0 where it is none or out of range."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    return float(value) if usable else 0.0


def _stream(path: Path, fps: float, check: Check, first: int) -> Iterator[np.ndarray]:
    """ffmpeg hands over PPM pictures, whose headers tell their size; any complaint of its decoder ends the reading."""
    pictures = ["-max_pixels", str(MAX_PIXELS), *input_arguments(path), "-map", "0:v:0"]
    wanted = ["-frames:v", str(first)] if first else []
    counted = wanted or ["-frames:v", str(_MOST_COUNTED)]
    about = run_ffmpeg(["-hide_banner", *pictures, *counted, "-c", "copy", "-f", "null", "-"])
    if stream_lines(about) and not _pictures(about):
        raise ValueError("it has no pictures")
    check(*_probed(about))
    if found := _TRANSFER.search(_pictures(about)):
        warn_of_hdr(str(path), found[0])
    filters = [f"fps={fps}"] * bool(fps) + [SQUARE] * (not is_square(_aspect(about)))
    changed = ["-vf", ",".join(filters)] if filters else []
    ppm = ["-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"]
    strict = ["-v", "error", "-xerror", *pictures, *changed, *wanted, *ppm]
    with tempfile.TemporaryFile() as complaints, start_ffmpeg(strict, subprocess.PIPE, complaints) as process:
        assert process.stdout is not None
        try:
            yield from _in_time(process, _ppm_pictures(process.stdout))
        except BaseException:
            process.kill()
            raise
        status = process.wait()
        text = words_in(complaints)
    if status or text:
        # Without "[h264 @ 0x5575c0]".
        lines = re.sub(r"^\[.*?\] ", "", text).splitlines()[:1] or [f"exit status {status}"]
        raise ValueError(f"ffmpeg: {lines[0].rstrip('.')}")


def _probed(about: str) -> tuple[int, int, int]:
    """Width, height and packets of the video as ffmpeg's words on a copy tell them, without decoding; 0 where they do not."""
    size, counts = _SIZE.match(_pictures(about)), _COUNT.findall(about)
    width, height = square_size(int(size[1]), int(size[2]), _aspect(about)) if size else (0, 0)
    return width, height, int(counts[-1]) if counts else 0


def _aspect(about: str) -> float:
    """How many times as wide as high pixels are; 0 where ffmpeg does not tell. The container's word comes behind the codec's."""
    found = _ASPECT.findall(_pictures(about))
    return int(found[-1][0]) / max(1, int(found[-1][1])) if found else 0.0


def _pictures(about: str) -> str:
    """From "Video:" on, what ffmpeg tells of the first stream of pictures; nothing where there is none."""
    found = re.search(r"Video: .*", stream_lines(about))
    return found[0] if found else ""


def _in_time(process: subprocess.Popen[bytes], pictures: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The pictures of a process that is ended where the next does not come; that one is not fetched yet is not its fault."""
    awaited, count = True, 0
    with ended_when_stuck(process, lambda: count if awaited else object()):
        for picture in pictures:
            awaited, count = False, count + 1
            yield picture
            awaited = True


def _ppm_pictures(stream: IO[bytes]) -> Iterator[np.ndarray]:
    """Each (H, W, 3) uint8; ends before a picture that is not whole, as ffmpeg's own message then says why."""
    while stream.readline() == b"P6\n":
        width, height = map(int, stream.readline().split())
        _check_size(width, height, 1)
        stream.readline()  # 255, the value of white
        data = stream.read(width * height * 3)
        if len(data) < width * height * 3:
            return
        yield np.frombuffer(data, np.uint8).reshape(height, width, 3)
