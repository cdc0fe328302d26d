"""What FFmpeg complains of inside PyAV, which keeps it to itself: of a hole in a file it says nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_listeners = 0
_before: tuple[int | None, bool] = (None, True)


@contextmanager
def no_complaints() -> Iterator[None]:
    """Raises ValueError where FFmpeg complained in this thread, as ``ffmpeg -xerror`` ends then.

    Held for one call into PyAV, not between two frames: who listens in a thread is a stack there, and readers take turns.
    """
    from av import logging

    _listen(1)
    try:
        with logging.Capture() as said:
            yield
    finally:
        _listen(-1)
    for level, _, text in said:
        if level <= logging.ERROR:  # the smaller, the worse
            raise ValueError(f"ffmpeg: {text.strip().rstrip('.')}")


def _listen(change: int) -> None:
    """PyAV has one log for the whole process: the first who listens turns it on, the last sets it back."""
    global _listeners, _before
    from av import logging

    with _lock:
        if not _listeners:
            _before = logging.get_level(), logging.get_skip_repeated()
            logging.set_level(max(_before[0] or 0, logging.ERROR))
            logging.set_skip_repeated(False)  # or a file that is read again would be whole
        _listeners += change
        if not _listeners:
            logging.set_level(_before[0])
            logging.set_skip_repeated(_before[1])
