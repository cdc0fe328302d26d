"""Processes that work together, one for each rank of a test."""

import os
import signal
import subprocess
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

T = TypeVar("T")
ROOT = Path(__file__).parents[2]


class RankCrashed(AssertionError):
    """A rank died of SIGABRT or SIGSEGV."""


def through_crashes(make: Callable[[], T]) -> T:
    """What ``make`` makes.

    Once in some hundred times a rank ends with "malloc(): unaligned tcache chunk detected" in a thread of gloo (PyTorch
    2.13). Python code cannot do that, and GPUs do not use gloo; so a crash, and only that, is told and tried again,
    twice.
    """
    for _ in range(2):
        try:
            return make()
        except RankCrashed as crash:
            warnings.warn(f"Tried again, because PyTorch crashed in a rank: {crash}", stacklevel=2)
    return make()


def run_together(
    commands: list[list[str]], timeout: float, exits: Mapping[int, int] = MappingProxyType({})
) -> list[str]:
    """Run one command for each rank on the CPU, all at once; what they print, in order. None outlives the call. ``exits``:
    with what a rank is to end, where not with 0.

    Raises RankCrashed where a rank crashed, else AssertionError where one failed.
    """
    own = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
    }
    environment = {**os.environ, **own}
    started = [
        subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for c in commands
    ]
    try:
        ended = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    found = [process.returncode for process in started]
    if any(code != exits.get(rank, 0) for rank, code in enumerate(found)):
        said = "\n".join(f"rank {rank}, exit {found[rank]}:\n{err[-3000:]}" for rank, (_, err) in enumerate(ended))
        raise (RankCrashed if {-signal.SIGABRT, -signal.SIGSEGV} & set(found) else AssertionError)(said)
    return [out for out, _ in ended]
