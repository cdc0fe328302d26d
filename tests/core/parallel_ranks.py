"""Gloo ranks on this CPU for the tests: `run_ranks` starts them, and `compute` is what each of them runs."""

import importlib.util
from functools import partial
from pathlib import Path

from ranks import run_group

HERE = Path(__file__).parent
TIMEOUT = 400.0  # a few seconds of work; the rest is patience with a busy machine


def run_ranks(case: str, ranks: int, cases: str = "parallel_cases") -> list[dict]:
    """Call the function ``case`` of ``cases``, a neighbour of this file, on each of ``ranks`` ranks; their results in
    order."""
    return run_group(partial(compute, cases, case), ranks, TIMEOUT)


def neighbour(name: str):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compute(cases: str, case: str, rank: int, ranks: int) -> dict:
    import torch

    torch.set_num_threads(1)
    with torch.no_grad():
        return getattr(neighbour(cases), case)(rank, ranks)
