"""What tells the contents of a cache from those of another model: settings of its parts, and names, sizes and samples of their
files. Reading them whole would take minutes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from .model import FamilyModel

WINDOWS, WINDOW = 16, 4096  # looked at of each file, and bytes of each: training changes all of a model's weights
MAX_WHOLE = 2**18  # bytes of a file that is read whole, as a config.json is


def text_stamp(model: FamilyModel) -> str:
    """Of what encodes captions."""
    return _stamp(model.family, *model.text_size, model.parts["text encoder"])


def video_stamp(model: FamilyModel) -> str:
    """Of what encodes videos, and their sound where the model has it, which is scaled by its noise schedules."""
    scales = [model.schedules] if model.sound_rate else []
    return _stamp(model.family, *scales, *(path for name, path in model.parts.items() if "VAE" in name))


def teacher_stamp(model: FamilyModel) -> str:
    """Of what draws samples for captions: the transformer, the LoRAs that it wears, and the text encoder."""
    return _stamp(model.family, text_stamp(model), model.transformer_file, *map(Path, model.loras))


def weights_stamp(files: Iterable[Path]) -> str:
    """Of weights in files or folders, in this order; "" of none."""
    found = list(files)
    return _stamp(*found) if found else ""


def _stamp(*parts: object) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(_file_stamps(part) if isinstance(part, Path) else repr(part).encode())
        found.update(b"\0")
    return found.hexdigest()[:16]


def _file_stamps(path: Path) -> bytes:
    """Of a file, whatever its name, or of all in a folder; nothing where nothing is there."""
    if path.is_file():
        return _contents(path)
    files = [(f.relative_to(path), f) for f in sorted(path.rglob("*")) if f.is_file()]
    # Hidden ones are a download's own notes.
    kept = [(name, f) for name, f in files if not any(part.startswith(".") for part in name.parts)]
    return b"".join(name.as_posix().encode() + _contents(f) for name, f in kept)


def _contents(file: Path) -> bytes:
    size = file.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        if size <= MAX_WHOLE:
            found.update(opened.read())
        else:
            for number in range(WINDOWS):
                opened.seek((size - WINDOW) * number // (WINDOWS - 1))
                found.update(opened.read(WINDOW))
    return found.digest()
