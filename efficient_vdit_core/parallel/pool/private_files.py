"""Files that only this user can read: where ranks and ComfyUI find one another, and the secret they prove."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from ...storage.cache_folder import cache_folder

_MOST_BYTES = 2**16  # what is read here is a line or two


def private_folder() -> Path:
    """The user's folder for pools, which need not be there yet."""
    return cache_folder() / "workers"


def make_private_folder() -> Path:
    """That folder, made where it is not there. Raises OSError, and ValueError where others could change what lies in
    it."""
    folder = private_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    about = folder.stat()
    if hasattr(os, "getuid") and (about.st_uid != os.getuid() or about.st_mode & 0o022):
        raise ValueError(
            f"{folder} is not yours alone, expected your folder with mode 0700: others could change what the workers read there. "
            "Correct its owner and mode, or set EVDIT_CACHE_DIR to a folder of yours."
        )
    return folder


def read_private(path: Path) -> str | None:
    """The text of a file; None where there is none, or where others could have read or written it."""
    try:
        with open(path, "rb") as file:
            about = os.fstat(file.fileno())
            if hasattr(os, "getuid") and (about.st_uid != os.getuid() or about.st_mode & 0o077):
                return None
            return file.read(_MOST_BYTES).decode()
    except (OSError, ValueError):
        return None


def write_private(path: Path, text: str, *, replace: bool = True) -> None:
    """Write it whole, for this user only. Raises OSError; FileExistsError where it exists and ``replace`` is off."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = path.with_name(f".evdit-{secrets.token_hex(6)}.tmp")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
        if replace:
            os.replace(part, path)
        else:
            os.link(part, path)
    finally:
        part.unlink(missing_ok=True)
