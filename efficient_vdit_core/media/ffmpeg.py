"""imageio-ffmpeg's program: started, listened to, and ended where it stands still."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .pyav_video import FORMATS, frame_rates

PATIENCE = 300  # seconds without a picture or a word of ffmpeg's
_STREAM = re.compile(r"^ *Stream #\d+:\d+.*", re.M)
_RATES = re.compile(r"Video: [^\n]*?(?:, ([\d.]+k?) fps)?, ([\d.]+k?) tbr\b")


def stream_lines(about: str) -> str:
    """The lines on streams in what ffmpeg tells. Beside them stand comments, with prompts that may speak of "Video:" too; it
    indents what follows a line's end in one by a colon."""
    return "\n".join(_STREAM.findall(about))


def told_streams(path: str | Path) -> str:
    """What ffmpeg tells of a file's streams, a line each."""
    return stream_lines(run_ffmpeg(["-hide_banner", *input_arguments(path)]))


def input_arguments(path: str | Path) -> list[str]:
    """The arguments that have ffmpeg read a file, and nothing that it may name."""
    return ["-nostdin", "-format_whitelist", FORMATS, "-i", f"file:{path}"]


def told_rates(about: str) -> tuple[float, float]:
    """Mean and constant frames a second in what ffmpeg tells of a file; 0 where it does not."""
    found = _RATES.search(about)
    texts = found.groups("0") if found else ("0", "0")
    return frame_rates(*(float(text.replace("k", "e3")) for text in texts))


def run_ffmpeg(arguments: list[str]) -> str:
    """What ffmpeg says of its work, whether it succeeds or not. Raises ValueError where it says nothing any more, which it does
    twice a second."""
    with tempfile.TemporaryFile() as answer:
        words = answer.fileno()
        with (
            start_ffmpeg(arguments, subprocess.DEVNULL, answer) as process,
            ended_when_stuck(process, lambda: os.fstat(words).st_size),
        ):
            process.wait()
        return words_in(answer)


@contextmanager
def ended_when_stuck(process: subprocess.Popen[bytes], progress: Callable[[], object]) -> Iterator[None]:
    """Ends a process whose ``progress`` is the same for ``PATIENCE`` seconds, as on a share that is gone; ValueError then. The
    seconds are counted one by one: what stops both, such as Ctrl-Z, takes none."""
    left, ended = threading.Event(), threading.Event()

    def watch() -> None:
        last, still = progress(), 0
        while still < PATIENCE:
            if left.wait(1.0):
                return
            now = progress()
            last, still = now, still + 1 if now == last else 0
        ended.set()
        process.kill()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        left.set()
        watcher.join()
    if ended.is_set():
        raise ValueError(f"ffmpeg did nothing for {PATIENCE} seconds")


def start_ffmpeg(arguments: list[str], out: Any, errors: Any) -> subprocess.Popen[bytes]:
    """imageio-ffmpeg's program at work, its output in ``out`` and its words in ``errors``."""
    import imageio_ffmpeg

    return subprocess.Popen([imageio_ffmpeg.get_ffmpeg_exe(), *arguments], stdout=out, stderr=errors)


def words_in(file: Any) -> str:
    """The words in a file that a program has written to."""
    file.seek(0)
    return file.read(2**20).decode(errors="replace").strip()
