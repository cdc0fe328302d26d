"""Whether what the model is built from lies on this machine too: a pool that spans machines reads files by the same
paths."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path


def check_paths(paths: Mapping[str, int | None]) -> None:
    """``paths``: each with its size in bytes, None for a folder. Raises ValueError naming this machine and what it
    lacks."""
    here = platform.node() or "this machine"
    missing = [path for path in paths if not Path(path).exists()]
    if missing:
        raise ValueError(
            f"{here} has no {', '.join(missing)}, expected the same paths on every machine of the pool. Copy or mount it there."
        )
    for path, size in paths.items():
        found = Path(path).stat().st_size
        if size is not None and found != size:
            raise ValueError(
                f"{path} has {found} bytes on {here}, expected {size} as where ComfyUI runs. Copy the same file there."
            )
