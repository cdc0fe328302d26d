"""Writes a clip as mp4, gif or webp with its metadata inside, and reads that metadata back.

Frames are uint8 (F, H, W, 3), RGB. The metadata is JSON: in mp4 the comment tag, in gif the comment block, in webp the
EXIF image description.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ..limits.documents import MAX_BYTES, parse_json
from ..limits.packages import PACKAGES, install
from ..limits.quote import quoted
from ..storage.files import check_writable_file, whole_file
from .pyav_video import write_mp4

if TYPE_CHECKING:
    from torch import Tensor

MAX_METADATA = 100_000  # bytes
LARGEST_SIDE = {".mp4": 16_384, ".gif": 65_535, ".webp": 16_383}  # pixels, of x264 and of the formats
ANIMATIONS = (
    "GIF",
    "WEBP",
    "PNG",
)  # all that Pillow is asked to read: of others it starts programs, such as Ghostscript
MIN_FPS, MAX_FPS = 0.01, 1000.0
_EXIF_DESCRIPTION = 0x010E
# Where a file does not tell its colours, players take what is high for HD's, BT.709, and ffmpeg everything for BT.601.
# An old ffmpeg hears of them by its options, a new one by its frames.
_TAGS = ("colorspace", "color_primaries", "color_trc")
_COLOURS = [
    "-vf",
    "scale=out_color_matrix=bt709:out_range=tv,format=yuv420p,setparams=color_primaries=bt709:color_trc=bt709",
    *(word for tag in _TAGS for word in (f"-{tag}", "bt709")),
]
_MOST_ATOMS = 10_000  # beside one another; a film has some dozens


def has_ffmpeg() -> bool:
    """Whether imageio-ffmpeg is here and finds a program; else PyAV writes and reads mp4, if it is here."""
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return False
    return True


def check_writable(path: str | Path) -> Path:
    """Raises ValueError if no video can be written at `path`; called before the long work, so touches nothing."""
    path = Path(path)
    if path.suffix.lower() not in LARGEST_SIDE:
        raise ValueError(
            f"Cannot write {quoted(str(path), 120)}: the ending must be one of {', '.join(LARGEST_SIDE)}, as it picks the format."
        )
    check_writable_file(path)
    _check_writer_installed(path.suffix.lower())
    return path


def check_size(path: str | Path, height: int, width: int) -> None:
    """Raises ValueError where the format that ``path`` asks for has no room for frames of this size."""
    suffix = Path(path).suffix.lower()
    if max(height, width) > LARGEST_SIDE[suffix]:
        raise ValueError(
            f"{suffix[1:]} holds frames of up to {LARGEST_SIDE[suffix]} pixels on a side, got {width}x{height}. Make them smaller, "
            f"or write a {max(LARGEST_SIDE, key=lambda name: LARGEST_SIDE[name])}."
        )
    if suffix == ".mp4" and (height % 2 or width % 2):
        raise ValueError(f"mp4 needs even sizes, got {width}x{height}; write a gif or webp instead.")


def check_metadata(metadata: Mapping[str, Any], room: int = 0) -> str:
    """``metadata`` as text for a clip. Raises ValueError where they and ``room`` further bytes are more than fits."""
    text = json.dumps(metadata)  # ASCII only, so that every container takes it
    # Beyond what an argument of ffmpeg may have, unless each letter is its own bytes.
    if len(text) + room > MAX_METADATA:
        text = json.dumps(metadata, ensure_ascii=False)
        if (size := len(text.encode()) + room) > MAX_METADATA:
            raise ValueError(
                f"The metadata have {size} bytes, at most {MAX_METADATA} fit into a clip. Shorten the prompt, or write the plan as "
                "a line: it carries no history then."
            )
    return text


def frame_milliseconds(suffix: str, fps: float) -> int:
    """How long a frame of an animation lasts: a gif counts in 1/100 s."""
    return max(10, round(100 / fps) * 10) if suffix == ".gif" else round(1000 / fps)


def to_frames(pixels: Tensor) -> np.ndarray:
    """What a VAE decoded, (3, F, H, W) with -1 black and 1 white, as frames. Raises ValueError where it is not finite:
    as frames that would be black."""
    if not bool(pixels.isfinite().all()):
        raise ValueError(
            f"The VAE's pictures are not finite in {str(pixels.dtype).removeprefix('torch.')}: its weights or the latents are "
            "damaged, or the precision is too low. Use float32; if it stays so, download the VAE again."
        )
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()


def write_video(
    path: str | Path, frames: np.ndarray, *, fps: float = 24.0, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Writes all of `frames` (F, H, W, 3) uint8 or, on any error or Ctrl-C, nothing.

    Args:
        path: the ending picks the format. mp4 is H.264 4:2:0 in the colours of BT.709, so height and width must be even; gif
            and webp are written as loops. A gif counts time in 1/100 s, so its rate is rounded (24 fps become 25).
        fps: frames per second, 0.01 to 1000; a gif holds at most 100.
        metadata: anything that JSON can hold; ``fps`` and ``frames`` are added where it says nothing of it.

    Returns:
        The path. An existing file is replaced in one move.
    """
    path = check_writable(path)
    frames = np.ascontiguousarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise ValueError(f"Frames must be uint8 (F, H, W, 3), got {frames.dtype} {frames.shape}.")
    if not MIN_FPS <= fps <= MAX_FPS:
        raise ValueError(f"fps must lie in {MIN_FPS:g}..{MAX_FPS:g}, got {fps}: no container times frames beyond that.")
    # A webp of equal frames is a still picture, and a gif one long frame: this alone tells how many they were.
    about = {"fps": fps if isinstance(fps, int) else float(fps), "frames": len(frames), **(metadata or {})}
    text = check_metadata(about)
    check_size(path, frames.shape[1], frames.shape[2])
    suffix = path.suffix.lower()
    with whole_file(path, suffix) as part:
        if suffix == ".mp4":
            (_write_mp4 if has_ffmpeg() else write_mp4)(part, frames, fps, text)
        else:
            _write_animation(part, frames, fps, text)
    return path


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that `write_video` put into a file; ValueError if there is none."""
    path = Path(path)
    nothing = f"{quoted(str(path), 120)} holds no metadata of this program"
    try:
        text = _mp4_comment(path) if path.suffix.lower() == ".mp4" else _image_comment(path)
    except Exception as error:  # Pillow names a broken file in a dozen ways
        raise ValueError(f"{nothing} (it is of another program, or damaged).") from error
    metadata = parse_json(text, f"{nothing}: its comment", advice="It is of another program, or damaged.")
    if not isinstance(metadata, dict):
        raise ValueError(f"{nothing} (its comment is {quoted(text)}).")
    return metadata


def _check_writer_installed(suffix: str) -> None:
    try:
        if suffix != ".mp4":
            import PIL.Image  # noqa: F401 # pyright: ignore[reportUnusedImport]

            return
        if not has_ffmpeg():
            import av  # noqa: F401 # pyright: ignore[reportUnusedImport, reportMissingImports]
    except ImportError as error:
        instead = "Write a .gif or .webp instead" if suffix == ".mp4" else ""
        raise ValueError(
            f"Writing {suffix} needs the package {PACKAGES.get(error.name or '', error.name)!r}, which is missing. "
            f"{install(error.name, instead=instead)}"
        ) from error


def _write_mp4(path: Path, frames: np.ndarray, fps: float, text: str) -> None:
    import imageio_ffmpeg

    count, height, width, _ = frames.shape
    writer = imageio_ffmpeg.write_frames(
        f"file:{path}",  # what stands before a colon in a path would be taken for a protocol
        (width, height),
        codec="libx264",
        quality=8,
        macro_block_size=1,
        fps=fps,  # pyright: ignore[reportArgumentType] # fractions are fine: it goes to ffmpeg as text
        ffmpeg_log_level="error",
        output_params=[*_COLOURS, "-metadata", f"comment={text}", "-movflags", "+faststart"],
    )
    writer.send(None)
    try:
        for frame in frames:
            writer.send(frame)
    finally:
        writer.close()
    try:
        _mp4_comment(path)  # ffmpeg writes it last, and nobody hears of it when that fails
    except LookupError:
        raise OSError("ffmpeg could not finish the video; is the disk full?") from None


def _write_animation(path: Path, frames: np.ndarray, fps: float, text: str) -> None:
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    options: dict[str, Any] = {"save_all": True, "append_images": images[1:], "loop": 0}
    if path.suffix == ".gif":
        options |= {"duration": frame_milliseconds(path.suffix, fps), "comment": text.encode()}
    else:
        exif = Image.Exif()
        exif[_EXIF_DESCRIPTION] = text.encode()  # of a text Pillow would keep what is ASCII
        options |= {"duration": frame_milliseconds(path.suffix, fps), "lossless": True, "exif": exif}
    images[0].save(path, **options)


def _image_comment(path: Path) -> str:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes, though nothing is decompressed here, and of damaged tags
        with Image.open(path, formats=ANIMATIONS) as image:
            if path.suffix.lower() == ".gif":
                return image.info["comment"].decode()
            return str(image.getexif()[_EXIF_DESCRIPTION]).encode("latin-1").decode()  # Pillow reads bytes as that


def _mp4_comment(path: Path) -> str:
    """Walks moov/udta/meta/ilst/(c)cmt/data; a `data` atom starts with a type and a locale of 4 bytes each."""
    with path.open("rb") as file:
        start, end = 0, path.stat().st_size
        for name in (b"moov", b"udta", b"meta", b"ilst", b"\xa9cmt", b"data"):
            start, end = _find_atom(file, start, end, name)
            start += 4 if name == b"meta" else 0  # version and flags come before its children
        file.seek(start + 8)
        return file.read(min(end - start - 8, MAX_BYTES + 1)).decode()


def _find_atom(file: IO[bytes], start: int, end: int, name: bytes) -> tuple[int, int]:
    """Where the content of the atom `name` begins and ends, among the atoms in the bytes from start to end."""
    for _ in range(_MOST_ATOMS):
        if start + 8 > end:
            break
        file.seek(start)
        head = file.read(16)
        size, header = int.from_bytes(head[:4], "big"), 8
        if size == 1:
            size, header = int.from_bytes(head[8:], "big"), 16
        if size < header:
            break
        if head[4:8] == name:
            return start + header, min(start + size, end)
        start += size
    raise LookupError(f"no {name.decode('latin-1')} atom")
