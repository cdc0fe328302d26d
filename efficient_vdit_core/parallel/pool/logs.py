"""What a rank prints goes to its log while there is room, and nowhere where there is none: a full disk must not end a
rank, or hide what it has to say."""

from __future__ import annotations

import io
import os
import sys


class _Patient(io.RawIOBase):
    """Writes to a file descriptor; what does not fit is dropped."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def fileno(self) -> int:
        return self.descriptor

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        try:
            done = 0
            while done < len(view):
                done += os.write(self.descriptor, view[done:])
        except OSError:
            pass
        return len(view)


def print_patiently() -> None:
    """Have this process's standard output and error drop what cannot be written."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        raw = io.BufferedWriter(_Patient(descriptor))
        stream = io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)
        setattr(sys, name, stream)
