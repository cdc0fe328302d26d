"""The weights that ship with the package."""

from __future__ import annotations

from pathlib import Path

TINY_PARTS = ("transformer", "vae", "text_encoder")


def tiny_path(part: str) -> Path:
    """Folder of a part of the built-in tiny model. Raises ValueError for an unknown part."""
    if part not in TINY_PARTS:
        raise ValueError(f"The tiny model has no part {part!r}, expected one of {', '.join(TINY_PARTS)}.")
    return Path(__file__).parent / "tiny" / part
