"""What tells the code of this pack from that of another copy, of the same version too: one that was updated since."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from ... import __version__
from .imports import PACK


def sources_number(folder: Path, files: Iterable[Path]) -> str:
    """Eight digits of what these files in ``folder`` say and are called, whatever ends their lines."""
    digest = hashlib.sha256()
    for file in sorted(files):
        source = file.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{file.relative_to(folder).as_posix()} {len(source)}\n".encode() + source)
    return digest.hexdigest()[:8]


def code_version(pack: Path = PACK) -> str:
    """The version, and a number of what the sources of engine and nodes say."""
    folders = [pack / "efficient_vdit_core", *([pack / "nodes"] if (pack / "pyproject.toml").is_file() else [])]
    number = sources_number(pack, (file for folder in folders for file in folder.rglob("*.py")))
    return f"{__version__} (code {number})"


# Of what this process has imported: the files may be others by the time that somebody asks.
CODE_VERSION = code_version()
