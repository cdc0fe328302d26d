"""The one folder outside ComfyUI's in which the pack keeps something."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Where the pack keeps what it found out about this machine: ``$EVDIT_CACHE_DIR`` or the user's cache folder."""
    if chosen := os.environ.get("EVDIT_CACHE_DIR"):
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "efficient-vdit"
