"""Gloo ranks on this CPU for the scripts here, forked once ComfyUI is loaded; must be imported before it."""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a process whose torch has started threads cannot be forked

sys.path.append(str(Path(__file__).parents[2] / "helpers"))
from ranks import run_together  # noqa: E402

TIMEOUT = 900.0  # a minute of work; the rest is patience with a busy machine


def on_ranks(work: Callable[[int], Any], ranks: int) -> Any:
    """What ``work(ranks)`` returns on rank 0 of a group of them, through JSON."""
    with tempfile.TemporaryDirectory() as folder:
        given = [(work, folder, rank, ranks) for rank in range(ranks)]
        return run_together(_in_group, given, TIMEOUT, context=multiprocessing.get_context("fork"))[0]


def _in_group(work: Callable[[int], Any], folder: str, rank: int, ranks: int) -> Any:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", ranks),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=100),  # a rank that fails alone leaves the others waiting
    )
    found = work(ranks)
    dist.barrier()
    dist.destroy_process_group()
    return found
