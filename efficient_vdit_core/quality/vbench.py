"""Clips and prompts laid out for VBench's mode custom_input, which scores any clip in six dimensions.

What VBench (version 0.1.5, https://github.com/Vchitect/VBench) reads in that mode: every .mp4 and .gif that lies flat
in one folder, and a JSON object of file name to prompt, each name relative to that folder. Without the JSON it takes a
name ``<prompt>-<number>`` for the prompt; the names here are of that form too, but a prompt may hold what no file name
can.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..limits.quote import named, quoted
from ..media.read_video import iterate_video, read_video
from ..media.video import read_metadata, write_video
from ..storage.files import check_writable_file

VIDEOS, PROMPTS, CLIPS, README = "videos", "prompts.json", "clips.json", "README.md"
_READ_BY_VBENCH = (".mp4", ".gif")
_NAME_BYTES = 180  # of 255 that file systems allow; Windows counts the folders before it too
# As VBench's README lists them for custom videos. Its other dimensions need its own prompts.
DIMENSIONS = (
    "subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree", "aesthetic_quality", "imaging_quality",
)  # fmt: skip

_INSTRUCTIONS = """\
# {count} clips for VBench

- `{videos}/`: the clips, named after their prompts; the number tells clips of one prompt apart.
- `{prompts}`: the prompt of each clip, by file name.
- `{clips}`: where each clip came from and, as far as its file tells, how it was made.

## Evaluate

VBench needs an NVIDIA GPU, and fixes old versions of transformers and NumPy: give it an environment of its own, never the
one of ComfyUI or of this project.

    python3.10 -m venv vbench-env && . vbench-env/bin/activate
    # torch and torchvision first, built for CUDA 12.1 or older, as https://github.com/Vchitect/VBench describes
    pip install vbench

Then, in this folder (VBench fetches the models that judge, several GB, on the first run of each dimension):

    for dimension in {dimensions}; do
        vbench evaluate --mode=custom_input --videos_path {videos} --prompt_file {prompts} \\
            --dimension $dimension --output_path results
    done

The scores are in `results/`, one `*_eval_results.json` a dimension: the mean first, then each clip.

To compare two methods, lay out each in a folder of its own, from the same prompts and seeds. VBench is meant for clips below
5 seconds; for longer ones its authors give VBench-Long, which reads the same folder. Other dimensions are defined for VBench's
own prompts and five clips of each: the mode custom_input refuses most of them, and its scores are not those of the leaderboard.
"""


def write_vbench_layout(clips: Sequence[str | Path], out: str | Path, prompts: Mapping[str, str] | None = None) -> Path:
    """Writes the folder ``out``: all of it or, on any error or Ctrl-C, nothing.

    Args:
        clips: .mp4 and .gif are copied; a .webp of this program becomes an mp4, as VBench does not read it.
        out: a folder that does not exist yet, or is empty.
        prompts: file name to prompt; a clip that it does not name tells its own prompt, as ``evdit generate`` wrote it.

    Returns:
        ``out``.

    Raises:
        ValueError: a clip is missing, damaged, named twice, of a kind that does not fit, or without a prompt; ``prompts``
            names two of them; ``out`` holds files.
    """
    out, paths = _check_out(out), [Path(clip) for clip in clips]
    if not paths:
        raise ValueError("There are no clips to lay out; name at least one .mp4, .gif or .webp file.")
    for path, count in Counter(path.resolve() for path in paths).items():
        if count > 1:
            raise ValueError(
                f"The clip {quoted(str(path), 120)} is named {count} times; it would count as often. Name it once."
            )
    _check_names(paths, prompts or {})
    found = [_describe(path, prompts or {}) for path in paths]
    # In an empty folder that is there: it may be the one that a shell stands in, and the one above need not be the user's.
    part = Path(tempfile.mkdtemp(prefix=".evdit-", dir=out if out.is_dir() else out.parent))
    try:
        _fill(part, paths, found)
        if out.is_dir():
            _move_contents(part, out)
        else:
            part.chmod(0o755)  # mkdtemp makes folders private
            part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _move_contents(source: Path, target: Path) -> None:
    """All of it or, on any error or Ctrl-C, nothing."""
    names = [made.name for made in source.iterdir()]
    try:
        for name in names:
            (source / name).rename(target / name)
    except BaseException:
        for name in names:
            with suppress(FileNotFoundError):
                (target / name).rename(source / name)
        raise


def clip_names(prompts: Sequence[str]) -> list[str]:
    """``<prompt>-<number>`` for each, without ending: what a file name cannot hold is "_", and none is there twice."""
    names, used = [], Counter[str]()
    for prompt in prompts:
        plain = re.sub(r'[<>:"/\\|?*\x00-\x1f]+', "_", " ".join(prompt.split()))
        stem = plain.encode(errors="replace")[:_NAME_BYTES].decode(errors="ignore").strip(" .") or "clip"
        names.append(f"{stem}-{used[stem.casefold()]}")  # many file systems do not tell A from a
        used[stem.casefold()] += 1
    return names


def _check_out(out: str | Path) -> Path:
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(
            f"Cannot lay clips out in {quoted(str(out), 120)}: it exists and is no empty folder. Name a new one."
        )
    check_writable_file(out / README if out.is_dir() else out)
    return out


def _check_names(paths: Sequence[Path], prompts: Mapping[str, str]) -> None:
    for name, count in Counter(path.name for path in paths).items():
        if count > 1 and name in prompts:
            raise ValueError(
                f"{count} clips are called {quoted(name, 120)}, and --prompts has one prompt of that name, which would be given to all "
                "of them. Rename them, or leave the name out where they tell their own prompts."
            )


def _describe(path: Path, prompts: Mapping[str, str]) -> dict[str, Any]:
    """{source, prompt, metadata} of a clip that is whole, its source as it was named; ValueError says what is wrong with it."""
    suffix = path.suffix.lower()
    if suffix not in (*_READ_BY_VBENCH, ".webp"):
        raise ValueError(
            f"{quoted(str(path), 120)} ends in {quoted(suffix)}, but VBench reads .mp4 and .gif only. Convert it first."
        )
    if not sum(1 for _ in iterate_video(path)) > 1:
        raise ValueError(f"{quoted(str(path), 120)} holds a single frame, but VBench judges motion. Leave it out.")
    try:
        metadata = read_metadata(path)
    except ValueError:
        metadata = {}  # a clip of another program
    prompt = prompts.get(path.name, metadata.get("prompt"))
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(
            f"{quoted(str(path), 120)} does not tell its prompt, as a clip of `evdit generate` would. "
            f'Name it in a JSON file of the form {{"{named(path.name)}": "its prompt"}} and give that as --prompts.'
        )
    if suffix == ".webp" and not isinstance(metadata.get("fps"), int | float):
        raise ValueError(
            f"{quoted(str(path), 120)} does not tell its frames per second, so it cannot become an mp4. Convert it first."
        )
    return {"source": str(path), "prompt": prompt, "metadata": metadata}


def _fill(folder: Path, paths: Sequence[Path], found: Sequence[Mapping[str, Any]]) -> None:
    (folder / VIDEOS).mkdir()
    prompts, clips = {}, {}
    for path, clip, stem in zip(paths, found, clip_names([clip["prompt"] for clip in found]), strict=True):
        copied = path.suffix.lower() in _READ_BY_VBENCH
        name = stem + (path.suffix.lower() if copied else ".mp4")
        if copied:
            shutil.copyfile(path, folder / VIDEOS / name)
        else:
            write_video(
                folder / VIDEOS / name, read_video(path), fps=clip["metadata"]["fps"], metadata=clip["metadata"]
            )
        prompts[name], clips[name] = clip["prompt"], clip
    for name, value in ((PROMPTS, prompts), (CLIPS, clips)):
        # ASCII: VBench opens the file in whatever encoding its machine prefers.
        (folder / name).write_text(json.dumps(value, indent=1) + "\n", encoding="ascii")
    text = _INSTRUCTIONS.format(
        count=len(clips), videos=VIDEOS, prompts=PROMPTS, clips=CLIPS, dimensions=" ".join(DIMENSIONS)
    )
    (folder / README).write_text(text, encoding="utf-8")
