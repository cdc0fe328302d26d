"""What tells the data of a run from others under the same name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..config import DataConfig
from .clips import read_captions, video_captions


def data_stamp(data: DataConfig) -> str:
    """Of the captions, or of the videos' names, sizes and captions, wherever they lie; "" where a source has neither, and where
    they are gone, which is refused only where they are needed."""
    try:
        if data.source == "videos":
            folder = Path(data.folder)
            found = [[v.relative_to(folder).as_posix(), v.stat().st_size, t] for v, t in video_captions(folder).items()]
            return _told(sorted(found), "videos")
        return texts_stamp(read_captions(data.captions)) if data.source in ("teacher", "captions") else ""
    except (ValueError, OSError):
        return ""


def texts_stamp(texts: list[str]) -> str:
    """Of texts in their order."""
    return _told(texts, "captions")


def _told(found: list[Any], what: str) -> str:
    """Their number is for who reads that they have changed."""
    return f"{len(found)} {what} ({hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]})"
