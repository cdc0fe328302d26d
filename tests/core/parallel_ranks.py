"""Gloo ranks on this CPU for the tests: `run_ranks` starts them, and `compute` is what each of them runs."""

import importlib.util
import tempfile
from pathlib import Path

from ranks import run_together

HERE = Path(__file__).parent
TIMEOUT = 400.0  # a few seconds of work; the rest is patience with a busy machine


def run_ranks(case: str, ranks: int, cases: str = "parallel_cases") -> list[dict]:
    """Call the function ``case`` of ``cases``, a neighbour of this file, on each of ``ranks`` ranks; their results in
    order."""
    with tempfile.TemporaryDirectory() as folder:
        return run_together(compute, [(cases, case, rank, ranks, folder) for rank in range(ranks)], TIMEOUT)


def neighbour(name: str):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compute(cases: str, case: str, rank: int, ranks: int, folder: str) -> dict:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks)
    with torch.no_grad():
        result = getattr(neighbour(cases), case)(rank, ranks)
    dist.barrier()
    dist.destroy_process_group()
    return result
