"""Runs a script once for each gloo rank on this CPU; must be imported before ComfyUI, which rank processes alone load."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path


def start_ranks(script: str, numbers: tuple[int, ...]) -> dict[str, dict]:
    """What rank 0 tells on each number of ranks. Every rank is the script again, which goes through ``each_number``: ComfyUI
    is loaded once a rank, not once for each number."""
    with tempfile.TemporaryDirectory() as folder:
        about = {**os.environ, "OMP_NUM_THREADS": "1", "EVDIT_STORE": folder}
        about["EVDIT_RANKS"] = ",".join(map(str, sorted(numbers, reverse=True)))
        # Into files: a rank that waits for its full pipe to be read would have the others wait for it.
        files = [(Path(folder) / f"{rank}.out", Path(folder) / f"{rank}.err") for rank in range(max(numbers))]
        started = []
        for rank, (out, error) in enumerate(files):
            with out.open("w") as told_to, error.open("w") as complains_to:
                own = {**about, "EVDIT_RANK": str(rank)}
                started.append(subprocess.Popen([sys.executable, script], env=own, stdout=told_to, stderr=complains_to))
        for process, (_, error) in zip(started, files, strict=True):
            assert process.wait() == 0, error.read_text()[-4000:]
        lines = files[0][0].read_text().strip().splitlines()
    told = [json.loads(line) for line in lines[-len(numbers) :]]
    return dict(zip(map(str, sorted(numbers, reverse=True)), told, strict=True))


def is_rank() -> bool:
    return "EVDIT_RANK" in os.environ


def each_number() -> Iterator[int]:
    """The numbers of ranks that this one works with, in a group of them; the most first, so that none waits for fewer. What
    it found it prints as a line of JSON each time."""
    import torch.distributed as dist

    rank = int(os.environ["EVDIT_RANK"])
    for ranks in map(int, os.environ["EVDIT_RANKS"].split(",")):
        if rank < ranks:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(f"{os.environ['EVDIT_STORE']}/of-{ranks}", ranks),
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=100),  # a rank that fails alone leaves the others waiting
            )
            yield ranks
            sys.stdout.flush()
            dist.barrier()
            dist.destroy_process_group()
