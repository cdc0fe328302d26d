"""Runs a script once for each gloo rank on this CPU; must be imported before ComfyUI, which rank processes alone load."""

import json
import os
import subprocess
import sys
import tempfile
from datetime import timedelta


def start_ranks(script: str, numbers: tuple[int, ...]) -> dict[str, dict]:
    """What rank 0 found on each number of ranks; every rank is the script again."""
    found = {}
    for ranks in numbers:
        with tempfile.TemporaryDirectory() as folder:
            about = {**os.environ, "EVDIT_RANKS": str(ranks), "EVDIT_STORE": f"{folder}/store", "OMP_NUM_THREADS": "1"}
            started = [
                subprocess.Popen(
                    [sys.executable, script],
                    env={**about, "EVDIT_RANK": str(rank)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for rank in range(ranks)
            ]
            printed = [process.communicate() for process in started]
            for process, (_, error) in zip(started, printed, strict=True):
                assert process.returncode == 0, error[-4000:]
        found[str(ranks)] = json.loads(printed[0][0].strip().splitlines()[-1])
    return found


def is_rank() -> bool:
    return "EVDIT_RANK" in os.environ


def join_ranks() -> None:
    import torch.distributed as dist

    ranks = int(os.environ["EVDIT_RANKS"])
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(os.environ["EVDIT_STORE"], ranks),
        rank=int(os.environ["EVDIT_RANK"]),
        world_size=ranks,
        timeout=timedelta(seconds=100),  # a rank that fails alone leaves the others waiting
    )
