"""Locks that a process holds on a file for as long as it lives, however it ends; another one, also on a machine that shares the
folder, sees that it is there."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TRIES = 20
_BUSY = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)  # the last is Windows' word for it


def take_lock(path: Path, mode: int = 0o600) -> int | None:
    """A descriptor that holds the lock of the file, made with ``mode`` where it is missing, until it is closed; None where
    another process holds it. Raises OSError, also where the file system knows no locks."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, mode)
    held = False
    try:
        for _ in range(_TRIES):  # who only asks whether it is held holds it for a moment
            if held := _try_lock(descriptor):
                return descriptor
            time.sleep(0.05)
    finally:
        if not held:
            os.close(descriptor)
    return None


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of the file; also where the file system knows none."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _try_lock(descriptor)
    except OSError:
        return True
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Holds the lock of the file while the block runs; False where another process does. A file system without locks keeps
    nobody out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, alone = None, True
    try:
        descriptor = take_lock(path, 0o666)
        alone = descriptor is not None
    except OSError as error:
        if error.filename is not None:  # the file itself could not be opened
            raise
    try:
        yield alone
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        raise
    return True
