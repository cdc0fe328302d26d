"""What the registry's build of the pack, which starts no process, lacks of this folder."""

from __future__ import annotations

from importlib.util import find_spec


def check_reads_videos(advice: str = "Use a clone.") -> None:
    """Raises ValueError in that build, with what to do instead."""
    if find_spec(f"{__package__}.read_video") is None:
        raise ValueError(f"The registry's build of the pack reads no videos. {advice}")
