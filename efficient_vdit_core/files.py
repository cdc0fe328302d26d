"""Writes files so that nothing is lost: refused early where it cannot work, and whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def check_writable_file(path: str | Path) -> Path:
    """Raises ValueError if no file can be written at `path`; called before the long work, so touches nothing."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"Cannot write {str(path)!r}: it is a folder; name a file in it.")
    if not path.parent.is_dir():
        raise ValueError(f"Cannot write {str(path)!r}: the folder {str(path.parent)!r} does not exist; create it first.")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"Cannot write {str(path)!r}: no permission in {str(path.parent)!r}; choose another folder.")
    return path


@contextmanager
def written_whole(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file to write; it takes the place of ``path`` at the end, once it is on the disk.

    Where writing fails (a full disk, Ctrl-C) a file of that name stays as it was, and nothing else is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` as UTF-8; a file of that name is replaced only once the new one is whole."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes `data`; a file of that name is replaced only once the new one is whole."""
    with written_whole(path) as file:
        file.write(data)
