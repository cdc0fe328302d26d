"""Gloo ranks on this CPU for the scripts here, forked once ComfyUI is loaded; must be imported before it."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a process whose torch has started threads cannot be forked

sys.path.append(str(Path(__file__).parents[2] / "helpers"))
from ranks import run_group  # noqa: E402

TIMEOUT = 900.0  # a minute of work; the rest is patience with a busy machine


def on_ranks(work: Callable[[int], Any], ranks: int) -> Any:
    """What ``work(ranks)`` returns on rank 0 of a group of them, through JSON."""
    fork = multiprocessing.get_context("fork")
    patience = timedelta(seconds=100)  # a rank that fails alone leaves the others waiting
    return run_group(lambda rank, ranks: work(ranks), ranks, TIMEOUT, fork, patience)[0]
