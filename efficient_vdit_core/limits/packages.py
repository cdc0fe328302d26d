"""What to type for a package that is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.util import find_spec

PACKAGES = {"PIL": "pillow", "imageio_ffmpeg": "imageio-ffmpeg"}  # module -> its name on PyPI, where they differ


def install(*modules: str | None, instead: str = "") -> str:
    """For modules, or packages as pip calls them (with a version, too): for this Python, since a bare pip may be another's.
    ``instead``: what may be done in its place, as the begin of a sentence."""
    words = [sys.executable, "-m", "pip", "install", *(PACKAGES.get(name or "", str(name)) for name in modules)]
    return f"{f'{instead}, or install it' if instead else 'Install it'}: {' '.join(map(_word, words))}"


def missing(modules: Iterable[str]) -> list[str]:
    """Those of the modules that are not here; none is imported."""
    return [name for name in modules if find_spec(name) is None]


def _word(text: str) -> str:
    """In the quotes that every shell takes off, cmd.exe too."""
    return f'"{text}"' if set(text) & set(" <>&()") else text
