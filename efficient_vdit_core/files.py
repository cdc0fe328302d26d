"""Writes files so that nothing is lost: refused early where it cannot work, and whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_writable_file(path: str | Path) -> Path:
    """Raises ValueError if no file can be written at `path`; called before the long work, so touches nothing."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"Cannot write {str(path)!r}: it is a folder; name a file in it.")
    if not path.parent.is_dir():
        raise ValueError(
            f"Cannot write {str(path)!r}: the folder {str(path.parent)!r} does not exist; create it first."
        )
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"Cannot write {str(path)!r}: no permission in {str(path.parent)!r}; choose another folder.")
    return path


@contextmanager
def whole_file(path: str | Path, ending: str = ".tmp") -> Iterator[Path]:
    """A hidden file beside ``path`` to write; it takes the place of ``path`` at the end, once it is on the disk.

    ``ending`` is for writers that choose the format by it.
    Where writing fails (a full disk, Ctrl-C) a file of that name stays as it was, and nothing else is left behind.
    """
    path = Path(path)
    part = path.with_name(f".evdit-{uuid.uuid4().hex[:12]}{ending}")
    try:
        part.touch(exist_ok=False)
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # some writers, such as safetensors', make their own file, which nobody else may read
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` as UTF-8; a file of that name is replaced only once the new one is whole."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes `data`; a file of that name is replaced only once the new one is whole."""
    with whole_file(path) as part:
        part.write_bytes(data)
