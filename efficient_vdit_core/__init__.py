"""The engine of the Efficient-vDiT node pack: plain PyTorch, independent of ComfyUI."""

from __future__ import annotations

import re
from pathlib import Path


def _version() -> str:
    """The version in pyproject.toml, its only place; where only the wheel is installed, in the wheel's metadata."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    text = project.read_text(encoding="utf-8") if project.is_file() else ""
    found = re.search(r'^name = "efficient-vdit"\nversion = "([^"]+)"', text, re.M)
    if found:
        return found[1]
    from importlib.metadata import version

    return version("efficient-vdit")


__version__ = _version()
