"""What a distillation learns from: clean latents with captions, encoded once and kept in the run's folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...limits.documents import parse_json, read_text
from ...limits.quote import named, quoted
from ...models.opensora_plan.weights import is_finite
from ...storage.weight_files import read_state_dict, save_safetensors

CLIP, WAY = "latents", "way"  # in a file of the cache: the clip, and the states before it, from noise on
MAX_LIST = 2**28  # bytes of a file of captions
MAX_STEM = 200  # bytes of a video's name in that of its latents, which may have 255
FPS = 24  # of every model that makes sound
VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".webm", ".mov", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv", ".ogv", ".3gp",
    ".gif", ".webp", ".apng",
)  # fmt: skip

# Captions and the samples' numbers to the states kept of their ways, the clips last: latents (B, states, C, T, h, w).
Generate = Callable[[list[str], list[int]], Tensor]

log = logging.getLogger("efficient_vdit")


class LatentFiles(Sequence[Tensor]):
    """Latents (C, T, h, w) that stay on the disk, one file each."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Tensor:
        file = self.files[index]
        try:
            return self.taken_from(read_state_dict(file)[0])
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{named(file.name)} in the cache is damaged or half written. Delete it; the same command makes it anew."
            ) from error

    def taken_from(self, tensors: dict[str, Tensor]) -> Tensor:
        return tensors[CLIP]


class WayFiles(LatentFiles):
    """The teacher's ways from noise to such latents, (parts + 1, C, T, h, w), of files that keep as many parts or a multiple."""

    def __init__(self, files: list[Path], parts: int) -> None:
        super().__init__(files)
        self.parts = parts

    def taken_from(self, tensors: dict[str, Tensor]) -> Tensor:
        kept = tensors[WAY]
        return torch.cat([kept[:: len(kept) // self.parts], tensors[CLIP][None]])


@dataclass
class ClipSet:
    """Latents (each (C, T, h, w) float32, of one size) and for each the captions that say the same, any of which may be
    drawn. Or the teacher's ways to these, see `on_ways`."""

    latents: Sequence[Tensor] | Tensor
    captions: list[tuple[str, ...]]

    def texts(self) -> list[str]:
        return sorted({text for texts in self.captions for text in texts})

    def worded(self, prompt: Callable[[str], str]) -> ClipSet:
        """The same clips with each caption as ``prompt`` words it."""
        return ClipSet(self.latents, [tuple(map(prompt, texts)) for texts in self.captions])

    def on_ways(self, parts: int) -> ClipSet:
        """The same with the ways that lead to the clips in so many parts, of samples that the teacher made with ``data.ways``."""
        assert isinstance(self.latents, LatentFiles)
        return ClipSet(WayFiles(self.latents.files, parts), self.captions)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """(B, C, T, h, w) latents and their captions, drawn with replacement."""
        chosen = torch.randint(len(self.captions), (size,), generator=generator).tolist()
        words = torch.randint(2**30, (size,), generator=generator).tolist()
        texts = [self.captions[i][w % len(self.captions[i])] for i, w in zip(chosen, words, strict=True)]
        return torch.stack([self.latents[i].float() for i in chosen]), texts


def video_captions(folder: Path) -> dict[Path, str]:
    """The videos of a folder and its subfolders, linked ones too and hidden ones not, with their captions: ``name.txt`` beside
    each, or a ``metadata.jsonl`` of file_name and text. What is listed and not used is told of.

    Raises ValueError where there are no videos, or where some have no caption; it names them.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {quoted(str(folder), 120)} with videos. Check data.folder.")
    # ._NAME is what a Mac notes of a file, on disks that are not its own.
    files = [f for f in _files_below(folder) if not f.name.startswith("._")]
    named_so = (f for f in files if f.suffix.lower() in VIDEO_SUFFIXES)
    videos = sorted(f for f in named_so if not _is_preview(f) and not _is_sample(f))
    if not videos:
        raise ValueError(
            f"The folder {quoted(folder.name)} holds no videos, expected files ending in {', '.join(VIDEO_SUFFIXES)}."
        )
    if others := _captioned_others(files):
        log.warning(
            "%d files with a caption beside them are not used, such as %s: by their names they are no videos.",
            len(others), named(others[0].name),
        )  # fmt: skip
    listed = _listed(folder / "metadata.jsonl")
    names = {v: v.relative_to(folder).as_posix() for v in videos}
    if unused := sorted(listed.keys() - names.values()):
        log.warning(
            "%d of %d files that metadata.jsonl lists are not used, such as %s: they are not in the folder, in a hidden one in it, or of "
            "another kind than %s.",
            len(unused), len(listed), named(unused[0]), ", ".join(VIDEO_SUFFIXES),
        )  # fmt: skip
    found = {v: listed.get(name) or _beside(v) for v, name in names.items()}
    missing = [v.name for v, text in found.items() if not text]
    if missing:
        shown = ", ".join(map(named, missing[:3])) + ", ..." * (len(missing) > 3)
        raise ValueError(
            f"{len(missing)} of {len(videos)} videos have no caption ({shown}). "
            "Put a .txt file with the caption beside each, or list them in metadata.jsonl."
        )
    return {v: text for v, text in found.items() if text}


def _files_below(folder: Path) -> Iterator[Path]:
    """The files of a folder and all below it, but for hidden folders, as that of a trash. Links to folders are followed, after
    the folders that lie here, and each folder is entered once, whatever leads to it."""
    waiting, entered = [folder], set[str]()
    while waiting:
        for place, inner, names in os.walk(waiting.pop(0)):
            if (real := os.path.realpath(place)) in entered:
                inner.clear()
                continue
            entered.add(real)
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            # os.walk leaves these out.
            waiting += [link for name in inner if (link := Path(place, name)).is_symlink()]
            yield from (Path(place, name) for name in names)


def encode_videos(
    folder: Path,
    cache: Path,
    size: tuple[int, int, int],
    encoder: Callable[[], Callable[..., Tensor]],
    sound_rate: int = 0,
    stamp: str = "",
    fps: float = 0.0,
) -> ClipSet:
    """Latents of a folder's videos, cut to ``size`` (frames, height, width); a video that cannot be read, or is
    too short, is named, skipped and counted. With a ``sound_rate`` the encoder is given the sound beside the frames, None where there is
    none. ``stamp``: of the encoder, so that another's latents are not taken. ``fps``: what videos are brought to; 0 takes
    their own frames."""
    from tqdm import tqdm

    captions = video_captions(folder)
    encode: Callable[..., Tensor] | None = None
    files, texts, broken = [], [], []
    for video, text in tqdm(captions.items(), desc="latents", mininterval=5):
        try:
            target = cache / _cached_as(video, size, stamp, fps)
            frames = None if target.is_file() else read_frames(video, size, fps)
            sounds = () if frames is None else read_sounds(video, size, sound_rate, fps)
        except ValueError as error:
            log.warning("%s is left out: %s", named(video.name), error)
            broken.append(named(video.name))
            continue
        if frames is not None:
            encode = encode or encoder()
            save_safetensors(target, {CLIP: _finite(encode(frames, *sounds), video.name)}, {"video": video.name})
        files.append(target)
        texts.append((text,))
    if broken:
        log.warning("%d of %d videos were left out, each for the reason above.", len(broken), len(captions))
    if not files:
        raise ValueError(
            f"None of the {len(captions)} videos in {quoted(folder.name)} can be used. See the warnings above."
        )
    return ClipSet(LatentFiles(files), texts)


def _cached_as(video: Path, size: tuple[int, int, int], stamp: str, fps: float) -> str:
    """The name of the file with a video's latents. Raises ValueError where the video is gone, such as behind a link."""
    try:
        changed = video.stat().st_mtime_ns
    except OSError as error:
        raise ValueError(error.strerror) from error
    made = f"{video.resolve()} {changed} {size} {stamp}" + (f" {fps}" if fps else "")
    stem = video.stem.encode()[:MAX_STEM].decode(errors="ignore")
    return f"{stem}-{hashlib.sha256(made.encode()).hexdigest()[:16]}.safetensors"


def read_frames(video: Path, size: tuple[int, int, int], fps: float = 0.0) -> np.ndarray:
    """The first frames of a video as uint8 (F, H, W, 3), at ``fps`` or the file's own constant rate, scaled to cover height and
    width and cropped in the middle."""
    from PIL import Image

    from ...media.read_video import check_steady, iterate_video

    frames, height, width = size
    found = [_cover(Image.fromarray(frame), height, width) for frame in iterate_video(video, fps, frames)]
    if not fps:
        check_steady(video)
    if len(found) < frames:
        raise ValueError(
            f"it has {len(found)} frames{f' at {fps:g} a second' if fps else ''}, expected at least {frames}"
        )
    return np.stack(found)


def read_sounds(video: Path, size: tuple[int, int, int], rate: int, fps: float = 0.0) -> tuple[np.ndarray | None, ...]:
    """The sound of the frames that `read_frames` gives, for a model that takes it at ``rate``; nothing for one that does
    not."""
    from ...media.read_sound import read_sound

    return (read_sound(video, size[0] / FPS, rate, 0 if fps else FPS),) if rate else ()


def teacher_clips(
    captions: list[str],
    count: int,
    cache: Path,
    settings: Sequence[Any],
    teacher: Callable[[], Generate],
    at_once: int = 16,
    share: tuple[int, int] = (0, 1),
) -> ClipSet:
    """Latents that the teacher itself draws for the captions: no data needed. Goes on where it stopped.

    ``settings``: JSON-able, what sets these samples apart from others in the cache. ``teacher()`` is asked for where
    some are missing. ``share``: which of so many processes this one is, each of which draws numbers of its own.
    """
    from tqdm import tqdm

    texts = [captions[i % len(captions)] for i in range(count)]
    stamps = [hashlib.sha256(json.dumps([text, *settings]).encode()).hexdigest()[:12] for text in texts]
    files = [cache / f"sample-{i:06d}-{stamp}.safetensors" for i, stamp in enumerate(stamps)]
    place, processes = share
    missing = [i for i, file in enumerate(files) if i % processes == place and not file.is_file()]
    generate = teacher() if missing else None
    for start in tqdm(range(0, len(missing), at_once), desc="teacher's samples", mininterval=5, disable=not missing):
        numbers = missing[start : start + at_once]
        assert generate is not None
        for number, states in zip(numbers, generate([texts[i] for i in numbers], numbers), strict=True):
            *way, clip = _finite(states, f"The teacher's sample {number}")
            save_safetensors(files[number], {CLIP: clip, **({WAY: torch.stack(way)} if way else {})})
    return ClipSet(LatentFiles(files), [(text,) for text in texts])


def without_clips(captions: list[str], shape: tuple[int, ...]) -> ClipSet:
    """Captions alone: each clip is zeros of ``shape`` (C, T, h, w), which take no memory."""
    return ClipSet(torch.zeros(()).expand(len(captions), *shape), [(text,) for text in captions])


def read_captions(path: str | Path) -> list[str]:
    """One caption a line; empty lines are skipped. Raises ValueError where there are none."""
    if not Path(path).is_file():
        raise ValueError(f"There is no file of captions {quoted(str(path), 120)}, one a line. Check data.captions.")
    text = read_text(path, f"The file of captions {named(Path(path).name)}", limit=MAX_LIST)
    found = [line.strip() for line in _lines(text) if line.strip()]
    if not found:
        raise ValueError(f"{named(Path(path).name)} holds no captions, expected one a line.")
    return found


def _finite(latents: Tensor, name: str) -> Tensor:
    """Nothing is learnt from NaN, and the cache would keep it."""
    if not is_finite(latents):
        raise ValueError(
            f"{named(name)} holds NaN or infinite latents: the weights that made it are damaged, or the precision is too "
            "low. Set model.dtype to float32, or download them again."
        )
    return latents


def _is_sample(file: Path) -> bool:
    """Whether it is what a training in this folder shows of its progress (`runs.samples`)."""
    return file.parent.parent.name == "samples" and (file.parents[2] / "config.toml").is_file()


def _is_preview(file: Path) -> bool:
    """Whether a .webp stands still, or lies beside a video of its name."""
    from PIL import Image

    from ...media.video import ANIMATIONS

    if file.suffix.lower() != ".webp":
        return False
    if any(file.with_suffix(suffix).is_file() for suffix in VIDEO_SUFFIXES if suffix != ".webp"):
        return True
    try:
        with Image.open(file, formats=ANIMATIONS) as image:
            return not getattr(image, "is_animated", False)
    except Exception:  # a damaged one is named when it is read
        return False


def _lines(text: str) -> list[str]:
    """As editors and JSON Lines count them. Python's own splitlines would also cut at marks that may stand within a caption."""
    return re.split(r"\r\n|\r|\n", text)


def _listed(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    found = {}
    for number, line in enumerate(_lines(read_text(file, file.name, limit=MAX_LIST)), start=1):
        if not line.strip():
            continue
        what = f"{file.name} line {number}"
        entry = parse_json(line, what, advice="Correct it.")
        if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in ("file_name", "text")):
            raise ValueError(f"{what} is {quoted(entry)}, expected an object with file_name and text. Correct it.")
        found[entry["file_name"]] = entry["text"].strip()
    return found


def _captioned_others(files: list[Path]) -> list[Path]:
    """Files with a caption of their own beside them whose names do not end as a video's."""
    videos = {f.with_suffix("") for f in files if f.suffix.lower() in VIDEO_SUFFIXES}
    captions = {f.with_suffix("") for f in files if f.suffix == ".txt"} - videos
    return sorted(f for f in files if f.suffix != ".txt" and f.with_suffix("") in captions)


def _beside(video: Path) -> str:
    file = video.with_suffix(".txt")
    return read_text(file, f"The caption {named(file.name)}").strip() if file.is_file() else ""


def _cover(image: Any, height: int, width: int) -> np.ndarray:
    scale = max(height / image.height, width / image.width)
    resized = image.resize((max(width, round(image.width * scale)), max(height, round(image.height * scale))), 1)
    left, top = (resized.width - width) // 2, (resized.height - height) // 2
    return np.asarray(resized.crop((left, top, left + width, top + height)).convert("RGB"), dtype=np.uint8)
