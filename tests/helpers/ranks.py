"""Processes that work together, one for each rank of a test.

They are forked from one process that has imported the libraries, which would take each of them seconds. pytest's own process
has threads by then, so it cannot be forked.
"""

import gc
import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar
from unittest import mock

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
# What of these is not installed is passed over.
IMPORTED = ["torch.distributed.fsdp", "accelerate", "diffusers.models.transformers", "diffusers.loaders.peft",
            "efficient_vdit_core.distill.runs.recipe", "efficient_vdit_core.parallel.sharding.blocks"]  # fmt: skip


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
    work: Callable[..., Any],
    arguments: Sequence[tuple],
    timeout: float,
    exits: Mapping[int, int] = MappingProxyType({}),
    context: BaseContext | None = None,
) -> list[Any]:
    """Call ``work`` (of a module that can be imported) with each of ``arguments`` in a process of its own on the CPU, all at
    once; what they return, through JSON, in order. None outlives the call. ``exits``: with what a rank is to end, where
    not with 0; it returns None. ``context``: of multiprocessing, in place of a server that has imported the libraries.

    Raises RankCrashed where a rank crashed, else AssertionError where one failed or took longer than ``timeout`` seconds.
    """
    context = context or _context()
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(rank) for rank in range(len(arguments))]
        started: list[BaseProcess] = []
        end = time.monotonic() + timeout
        try:
            for given, place in zip(arguments, places, strict=True):
                process = context.Process(target=_rank, args=(work, given, place))
                process.start()
                started.append(process)
            for process in started:
                process.join(max(0.0, end - time.monotonic()))
        finally:
            for process in started:
                process.kill()
                process.join()
        found = [process.exitcode for process in started]
        if any(code != exits.get(rank, 0) for rank, code in enumerate(found)):
            said = [
                f"rank {rank}, exit {found[rank]}:\n{_said(place).read_text()[-3000:]}"
                for rank, place in enumerate(places)
            ]
            raise (RankCrashed if {-signal.SIGABRT, -signal.SIGSEGV} & set(found) else AssertionError)("\n".join(said))
        return [json.loads(_answer(place).read_text()) if _answer(place).exists() else None for place in places]


def run_group(
    work: Callable[[int, int], Any],
    ranks: int,
    timeout: float,
    context: BaseContext | None = None,
    patience: timedelta | None = None,
) -> list[Any]:
    """`run_together` of ``work(rank, ranks)`` in a gloo group, whose ranks wait ``patience`` for one another, default
    PyTorch's."""
    with tempfile.TemporaryDirectory() as folder:
        given = [(work, folder, rank, ranks, patience) for rank in range(ranks)]
        return run_together(_in_group, given, timeout, context=context)


def _in_group(work: Callable[[int, int], Any], folder: str, rank: int, ranks: int, patience: timedelta | None) -> Any:
    import torch.distributed as dist

    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=patience)
    found = work(rank, ranks)
    dist.barrier()
    dist.destroy_process_group()
    return found


def _context() -> BaseContext:
    """Its server runs until pytest ends; the ranks get the environment that it was started with."""
    own = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with mock.patch.dict(os.environ, own):
        multiprocessing.forkserver.ensure_running()
    return context


def _rank(work: Callable[..., Any], given: tuple, place: Path) -> None:
    with _said(place).open("w") as said:
        os.dup2(said.fileno(), sys.stdout.fileno())
        os.dup2(said.fileno(), sys.stderr.fileno())
    gc.freeze()  # or each collection of garbage goes through all that the libraries have made
    _answer(place).write_text(json.dumps(work(*given)))


def _said(place: Path) -> Path:
    return place.with_suffix(".log")


def _answer(place: Path) -> Path:
    return place.with_suffix(".json")
